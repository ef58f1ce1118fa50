from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.v2 import functional as TF

import data
from data import Batches, crop_boxes, crop_flip, recolour, views_first
from support import datasets
from support.command_line import UsageError
from support.datasets import SETS, Images, held_out, load_images, mean_std, read
from support.shapes import KINDS, scene


def toy(n=12, side=16, channels=3):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=g)
    return Images(torch.arange(n) % 3, ["a", "b", "c"], (side, side), channels, pixels)


def batches(images, **settings):
    """Batches of 4 images in grey levels of 0..1."""
    settings = {"seed": 0, "batch": 4, "patches": 16} | settings
    mean, std = [0.0] * images.channels, [1.0] * images.channels
    return Batches(images, torch.arange(len(images)), mean, std, **settings)


def first(images, **settings):
    return next(batches(images, **settings).run(0, 1))


# -------------------------------------------------------------------------------- crops and flips

@pytest.mark.parametrize("box", [(0, 0, 16, 16), (3, 2, 8, 5), (1, 0, 15, 16), (7, 7, 1, 1)])
@pytest.mark.parametrize("out", [(16, 16), (7, 24)])
def test_crop_is_torchvisions(box, out):
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    ours = crop_flip(x, torch.tensor([box]), torch.tensor([False]), out)
    theirs = TF.resized_crop(x, *box, out, interpolation=TF.InterpolationMode.BICUBIC,
                             antialias=True)
    torch.testing.assert_close(ours, theirs.clamp(0, 1), atol=1e-5, rtol=0)
    flipped = crop_flip(x, torch.tensor([box]), torch.tensor([True]), out)
    torch.testing.assert_close(flipped, TF.hflip(ours), atol=1e-12, rtol=0)
    if box[2:] == out:                         # nothing to resize: exact
        assert torch.equal(ours, TF.crop(x, *box))
        assert torch.equal(flipped, TF.hflip(TF.crop(x, *box)))


def test_each_sample_has_its_own_crop():
    x = torch.rand(1, 3, 16, 16).expand(2, -1, -1, -1)
    boxes, flip = torch.tensor([(0, 0, 8, 8), (5, 6, 9, 9)]), torch.tensor([False, True])
    both = crop_flip(x, boxes, flip, (16, 16))
    for i in (0, 1):
        alone = crop_flip(x[i:i + 1], boxes[i:i + 1], flip[i:i + 1], (16, 16))
        assert torch.equal(both[i:i + 1], alone)


def test_crop_boxes_stay_inside_and_have_the_area():
    u = torch.rand(5000, 4)
    top, left, h, w = crop_boxes(u, 40, 60, (30, 45), 0.3).T
    assert (top >= 0).all() and (top + h <= 40).all()
    assert (left >= 0).all() and (left + w <= 60).all()
    assert (top == 0).any() and (top + h == 40).any()
    area = (h * w).float() / (40 * 60)
    assert 0.27 < area.min() and area.max() <= 1
    assert abs(area.mean() - 0.63) < 0.04      # 0.65, but boxes that stick out are cut
    whole = crop_boxes(u, 16, 16, (16, 16), 1.0)
    assert (whole == torch.tensor([0, 0, 16, 16])).all()


# ---------------------------------------------------------------------------------------- colours
# Numbers of `recolour`: changed at all?, brightness, contrast, saturation, hue, made grey?
# 0.5 changes nothing.

def test_colours_are_torchvisions():
    x = torch.rand(3, 3, 8, 8) * 0.4 + 0.2     # far from 0 and 1, so that nothing is cut off
    u = torch.tensor([[0.0, 0.7, 0.5, 0.5, 0.5, 0.9],
                      [0.0, 0.5, 0.2, 0.5, 0.5, 0.9],
                      [0.0, 0.5, 0.5, 0.8, 0.5, 0.9]])
    want = [TF.adjust_brightness(x[0], 1 + 0.4 * 0.4),
            TF.adjust_contrast(x[1], 1 - 0.4 * 0.6),
            TF.adjust_saturation(x[2], 1 + 0.2 * 0.6)]
    torch.testing.assert_close(recolour(x, u), torch.stack(want), atol=2e-4, rtol=0)


def test_hue_turns_and_keeps_the_brightness():
    x = torch.rand(1, 3, 8, 8) * 0.2 + 0.4
    turned = recolour(x, torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.95, 0.9]]))
    assert (turned - x).abs().max() > 0.01
    torch.testing.assert_close(data.luma(turned), data.luma(x), atol=1e-3, rtol=0)
    back = recolour(turned, torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.05, 0.9]]))
    torch.testing.assert_close(back, x, atol=1e-3, rtol=0)


def test_some_images_keep_their_colours_and_some_become_grey():
    x = torch.rand(1, 3, 8, 8) * 0.2 + 0.4
    grey = recolour(x, torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.0, 0.1]]))     # else not changed
    torch.testing.assert_close(grey, data.luma(x).expand(-1, 3, -1, -1), atol=1e-5, rtol=0)
    assert torch.equal(recolour(x, torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.0, 0.9]])), x)
    assert recolour(x[:, :1], torch.rand(1, 6)).shape == (1, 1, 8, 8)
    assert recolour(x[:, :1].bfloat16(), torch.rand(1, 6)).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------- batches

def test_augmentation_differs_within_a_batch_and_repeats():
    images = toy()
    images.pixels[:] = images.pixels[:1]       # the same image everywhere
    now, again = first(images, colours=1.0), first(images, colours=1.0)
    later = next(batches(images, colours=1.0).run(1, 2))
    assert torch.equal(now.student, again.student) and torch.equal(now.noise, again.noise)
    assert not torch.equal(now.student, later.student)
    assert not torch.equal(now.noise, later.noise)
    for other in now.student[1:]:
        assert not torch.equal(now.student[0], other)
    assert not torch.equal(now.student, first(images, colours=1.0, seed=1).student)


def test_a_switch_changes_no_other_number():
    plain, coloured = first(toy()), first(toy(), colours=1.0)
    assert torch.equal(plain.noise, coloured.noise)
    assert not torch.equal(plain.student, coloured.student)


def test_an_epoch_sees_every_image_once():
    images = toy()
    grey = torch.arange(12, dtype=torch.uint8)             # image i has grey level i everywhere
    images.pixels = grey[:, None, None, None].expand(-1, 3, 16, 16)
    batch = batches(images, smallest=1.0)
    for epoch in range(2):
        views = batch.run(3 * epoch, 3 * epoch + 3)
        seen = torch.cat([v.student[:, 0, 0, 0] for v in views])
        assert (seen * 255).round().sort().values.tolist() == list(range(12))


@pytest.mark.parametrize("views", [1, 2])
def test_ranks_and_micro_batches_are_parts_of_the_global_batch(views):
    settings = dict(views=views, colours=1.0, teacher_view="other-colours")
    whole = list(batches(toy(), **settings).run(0, 3))
    for rank in (0, 1):
        parts = batches(toy(), accumulate=2, world=2, rank=rank, **settings)
        for step in range(3):
            of_images = [t.unflatten(0, (views, 4)) for t in whole[step]]      # views n ...
            for micro, part in enumerate(parts.run(step, step + 1)):
                student, teacher, noise = (t[:, 2 * micro + rank] for t in of_images)
                torch.testing.assert_close(part.student, student, atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(part.teacher, teacher, atol=1e-6, rtol=1e-6)
                assert torch.equal(part.noise, noise)


def test_each_view_has_noise_of_its_own():
    noise = first(toy(), views=2).noise
    assert noise.shape == (8, 16) and len({tuple(row) for row in noise.tolist()}) == 8
    numbers = batches(toy(), views=2).numbers(0)["noise"]                      # n views N
    assert torch.equal(noise[4 + 1], numbers[1, 1])        # view 1 of image 1


def test_the_teacher_sees_the_students_view_if_asked_to():
    views = first(toy(), views=2, colours=1.0, teacher_view="same")
    assert views.teacher is views.student


@pytest.mark.parametrize("resident_gb", [1, 0])
def test_the_teachers_view_has_the_same_crops_and_colours_of_its_own(photos, resident_gb):
    images = load_images("imagefolder", photos, "train", 16, resident_gb=resident_gb)
    settings = dict(views=2, teacher_view="other-colours")
    plain = first(images, **settings)
    assert torch.equal(plain.student, plain.teacher)       # no colours, so no other ones
    views = first(images, colours=1.0, **settings)
    numbers = batches(images, colours=1.0, **settings).numbers(0)
    for view, name in ((views.student, "colour"), (views.teacher, "teacher_colour")):
        assert torch.equal(view, recolour(plain.student, views_first(numbers[name])))
    different = (views.student - views.teacher).abs().amax((1, 2, 3)) > 0.01
    assert different.sum() >= 6                            # of 8: 1 of 25 are changed in neither
    later = batches(images, colours=1.0, **settings).numbers(1)
    assert not torch.equal(numbers["teacher_colour"], later["teacher_colour"])


def test_the_teachers_view_changes_no_other_number():
    same, other = (next(batches(toy(), views=2, colours=1.0, teacher_view=how).run(2, 3))
                   for how in ("same", "other-colours"))
    assert torch.equal(same.student, other.student) and torch.equal(same.noise, other.noise)
    assert not torch.equal(other.student, other.teacher)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("streamed", [False, True])
def test_augmentation_runs_on_a_gpu_and_reads_nothing_back(streamed, channels):
    """A played GPU: mixing devices raises, and so does every value that the host wants to know."""
    n, views, patches = 4, 2, 16
    with FakeTensorMode(), torch.device("cuda", 0):
        pixels = torch.empty(12, channels, 20, 24, dtype=torch.uint8)
        images = Images(torch.empty(12), [], (16, 16), channels, None if streamed else pixels)
        batch = batches(images, views=views, colours=1.0,
                        teacher_view="other-colours", device=torch.device("cuda", 0))
        numbers = {
            "ids": torch.empty(n, dtype=torch.int64),
            "crop": torch.empty(n, views, 4),
            "flip": torch.empty(n, views),
            "colour": torch.empty(n, views, 6),
            "teacher_colour": torch.empty(n, views, 6),
            "noise": torch.empty(n, views, patches),
        }
        files = torch.empty(n, views, channels, 16, 16, dtype=torch.uint8)
        seen = batch.augment(numbers, files if streamed else pixels[numbers["ids"]][:, None])
        assert seen.student.shape == seen.teacher.shape == (8, channels, 16, 16)
        assert seen.noise.shape == (8, patches)
        assert {t.device for t in seen} == {torch.device("cuda", 0)}


# --------------------------------------------------------------------------- folders and streaming

def test_streaming_does_not_depend_on_workers(photos):
    images = load_images("imagefolder", photos, "train", 16, resident_gb=0)
    assert images.pixels is None
    alone, helped = (list(batches(images, views=2, workers=workers).run(1, 5))
                     for workers in (0, 2))
    for one, two in zip(alone, helped, strict=True):
        assert one.student.shape == (8, 3, 16, 16)
        assert torch.equal(one.student, two.student) and torch.equal(one.noise, two.noise)


def test_streamed_crops_are_resident_crops(tmp_path):
    """Files of exactly the image size: a worker's crop is the device's, but for rounding to whole
    grey levels."""
    for i in range(8):
        picture = np.random.default_rng(i).integers(80, 170, (16, 16, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    resident, streamed = (load_images("imagefolder", tmp_path, "train", 16, resident_gb=gb)
                          for gb in (1, 0))
    assert resident.kept == "in memory, cropped from images of 16 x 16"
    assert streamed.kept == "streamed, cropped from the files at full size"
    torch.testing.assert_close(first(resident).student, first(streamed).student,
                               atol=0.51 / 255 * 2, rtol=0)


def test_image_folder(photos):
    train, test = (load_images("imagefolder", photos, split, 16) for split in ("train", "test"))
    assert train.pixels.shape == (72, 3, 16, 16)
    assert train.classes == test.classes == ["blue", "green", "red"]
    assert train.y.bincount().tolist() == [24] * 3
    assert test.y.bincount().tolist() == [6] * 3
    wide = load_images("imagefolder", photos, "train", (8, 24), 1)
    assert wide.pixels.shape == (72, 1, 8, 24)
    train_ids, val_ids = held_out(train, 0.25)
    assert sorted([*train_ids.tolist(), *val_ids.tolist()]) == list(range(72))
    assert train.y[val_ids].bincount().tolist() == [6] * 3


def test_a_plain_folder_has_no_labels(tmp_path):
    (tmp_path / "deep").mkdir()
    for place in ("1.png", "deep/2.JPG"):
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    images = load_images("imagefolder", tmp_path, "train", 8)
    assert images.y.tolist() == [-1, -1] and images.classes == []
    train_ids, val_ids = held_out(images, 0.5)
    assert train_ids.tolist() == [0, 1] and len(val_ids) == 0


def test_missing_data_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        load_images("imagefolder", tmp_path / "nowhere", "train")
    with pytest.raises(UsageError, match="no images"):
        load_images("imagefolder", tmp_path, "train")
    with pytest.raises(UsageError, match="neither test"):
        load_images("imagefolder", tmp_path, "test")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for place in ("train/cat/1.png", "train/stray.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    with pytest.raises(UsageError, match="stray.png lies beside"):
        load_images("imagefolder", tmp_path, "train")
    (tmp_path / "train").rename(tmp_path / "val")
    with pytest.raises(UsageError, match="no folder `train`"):
        load_images("imagefolder", tmp_path, "train")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "fashion-mnist", "imagenette"])
def test_no_network_is_an_error_with_a_remedy(name, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    (tmp_path / "old" / "empty").mkdir(parents=True)
    for root in ("new", "old"):
        with pytest.raises(UsageError, match="by hand"):
            load_images(name, tmp_path / root, "train")
    assert {path.name for path in tmp_path.rglob("*")} == {"old", "empty"}       # nothing is left


# --------------------------------------------------------------------------------- arrays and sums

def test_arrays_are_resized_when_read_and_cropped_at_their_own_size():
    images = toy()
    images.size = (32, 48)
    assert read(images, torch.arange(2)).shape == (2, 3, 32, 48)
    assert first(images, patches=24).student.shape == (4, 3, 32, 48)
    assert images.kept == "in memory, cropped from images of 16 x 16"


def test_arrays_of_torchvisions_sets(monkeypatch, tmp_path):
    """As its classes hold them: colour last, grey without a channel, channels first."""
    labels, classes = [0, 1, 2, 0, 1], "abc"
    colours = np.random.randint(0, 255, (5, 32, 32, 3), np.uint8)
    grey = torch.zeros(5, 28, 28, dtype=torch.uint8)
    made = {
        "CIFAR10": dict(data=colours, targets=labels, classes=classes),
        "FashionMNIST": dict(data=grey, targets=torch.tensor(labels), classes=classes),
        "STL10": dict(data=np.zeros((5, 3, 96, 96), np.uint8), classes=classes,
                      labels=np.array([0, 1, -1, -1, -1])),
    }
    asked = {}
    for name, attributes in made.items():
        def make(root, *, name=name, attributes=attributes, **which):
            asked[name] = which
            return SimpleNamespace(**attributes)
        monkeypatch.setattr(datasets.datasets, name, make)
    cifar, fashion, stl = (load_images(name, tmp_path, "train")
                           for name in ("cifar10", "fashion-mnist", "stl10"))
    for name, images in (("cifar10", cifar), ("fashion-mnist", fashion), ("stl10", stl)):
        side = SETS[name].size
        assert images.pixels.shape == (5, SETS[name].channels, side, side)
        assert images.size == (side, side) and side % SETS[name].patch == 0
    assert torch.equal(cifar.pixels[2, :, 3, 4], torch.from_numpy(colours[2, 3, 4]))
    assert cifar.y.tolist() == labels and held_out(stl, 0.5)[1].tolist() == [1]
    assert asked["STL10"]["split"] == "train+unlabeled" and asked["CIFAR10"]["train"] is True
    load_images("stl10", tmp_path, "test"), load_images("cifar10", tmp_path, "test")
    assert asked["STL10"]["split"] == "test" and asked["CIFAR10"]["train"] is False


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_std(channels):
    images = toy(n=250, channels=channels)                 # more than one chunk
    x = images.pixels.transpose(0, 1).flatten(1).double() / 255
    mean, std = mean_std(images)
    assert mean == pytest.approx(x.mean(1).tolist(), abs=1e-12)
    assert std == pytest.approx(x.std(1).tolist(), abs=1e-12)
    images.pixels[:] = 7
    assert mean_std(images) == ([7 / 255] * channels, [1e-3] * channels)   # never divide by 0


def test_mean_std_does_not_depend_on_the_number_of_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(mean_std(toy(n=250, side=32, channels=1)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


# ----------------------------------------------------------------------------------------- scenes

def test_a_scene_is_a_function_of_its_index():
    for one, two in zip(scene(3), scene(3)):
        assert np.array_equal(one, two)
    assert not np.array_equal(scene(3)[0], scene(4)[0])


def test_scenes_are_what_they_say():
    for index in range(40):
        image, label, multilabel, mask, owner, boxes = scene(index)
        assert image.shape == (3, 64, 64) and image.dtype == np.uint8
        assert mask.shape == (64, 64) and mask.max() <= len(KINDS)
        visible = set(np.flatnonzero(multilabel))
        for number, (left, top, right, bottom, kind) in enumerate(boxes, 1):
            there = np.argwhere(owner == number)                       # rows and columns
            assert (mask[owner == number] == 1 + kind).all() and (kind >= 0) == (len(there) > 0)
            if kind >= 0:
                assert (there.min(0).tolist(), (there.max(0) + 1).tolist()) == (
                    [top, left], [bottom, right])
        assert ((owner > 0) == (mask > 0)).all()
        boxes = boxes[boxes[:, 4] >= 0]
        assert label in visible
        assert set(np.unique(mask[mask > 0]) - 1) == visible == set(boxes[:, 4])
        for left, top, right, bottom, kind in boxes:
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            assert (mask[top:bottom, left:right] == 1 + kind).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_numbers_of_a_step_are_drawn_once(photos, monkeypatch, workers):
    """Also where workers cut crops by them steps ahead."""
    drawn, draw = [], data.draw
    monkeypatch.setattr(data, "draw", lambda seed, step, *args: (
        drawn.append(step), draw(seed, step, *args))[1])
    images = load_images("imagefolder", photos, "train", 16, resident_gb=0)
    assert len(list(batches(images, views=2, workers=workers).run(1, 7))) == 6
    assert drawn == [1, 2, 3, 4, 5, 6]


def test_crops_of_a_decoded_image_are_those_of_pillow(photos):
    """But for rounding: on the way Pillow keeps whole grey levels, or nearly so."""
    images = load_images("imagefolder", photos, "train", 16, resident_gb=0)
    u = torch.rand(len(images), 2, 4)
    for index, numbers in enumerate(u):
        with Image.open(images.paths[index]) as file:
            image = file.convert("RGB")
        boxes = data.crop_boxes(numbers, image.height, image.width, (16, 16), 0.2)
        crops = data.CroppedFiles(images, 0.2)[index, numbers.tolist()]
        for crop, (top, left, height, width) in zip(crops, boxes.tolist(), strict=True):
            cut = image.crop((left, top, left + width, top + height)).resize(
                (16, 16), Image.Resampling.BICUBIC)
            assert (crop.int() - TF.pil_to_tensor(cut).int()).abs().max() <= 2


def test_pixels_are_in_full_precision_also_under_autocast():
    images, settings = toy(), dict(views=2, colours=1.0)
    plain = first(images, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first(images, **settings).student, plain.student)
