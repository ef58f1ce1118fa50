from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

import data
from PIL import Image

from data import Batches, Images, crop_boxes, crop_flip, held_out, load_images, mean_std, recolour
from extras.command_line import UsageError
from eval import accuracy, knn
from extras.shapes import KINDS, scene
from mae import VisionTransformer, load_encoder


def toy(n=12, side=16, channels=3):
    pixels = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(torch.arange(n) % 3, ["a", "b", "c"], (side, side), channels, pixels)


def batches(images, **kwargs):
    return Batches(images, torch.arange(len(images)), [0.0] * images.channels, [1.0] * images.channels,
                   **{**dict(seed=0, batch=4, patches=16), **kwargs})


@pytest.mark.parametrize("box", [(0, 0, 16, 16), (3, 2, 8, 5), (1, 0, 15, 16), (7, 7, 1, 1)])
@pytest.mark.parametrize("out", [(16, 16), (7, 24)])
def test_crop_is_torchvisions(box, out):
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    ours = crop_flip(x, torch.tensor([box]), torch.tensor([False]), out)
    theirs = TF.resized_crop(x, *box, out, interpolation=TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    flipped = crop_flip(x, torch.tensor([box]), torch.tensor([True]), out)
    torch.testing.assert_close(flipped, TF.hflip(ours), atol=1e-12, rtol=0)
    if box[2:] == out:
        assert torch.equal(ours, TF.crop(x, *box))         # nothing to resize: exact
        assert torch.equal(flipped, TF.hflip(TF.crop(x, *box)))


def test_each_sample_has_its_own_crop():
    x = torch.rand(1, 3, 16, 16).expand(2, -1, -1, -1)
    boxes = torch.tensor([(0, 0, 8, 8), (5, 6, 9, 9)])
    both = crop_flip(x, boxes, torch.tensor([False, True]), (16, 16))
    for i in range(2):
        assert torch.equal(both[i:i + 1], crop_flip(x[i:i + 1], boxes[i:i + 1], torch.tensor([i == 1]), (16, 16)))


def test_crop_boxes_stay_inside_and_have_the_area():
    u = torch.rand(5000, 4)
    top, left, h, w = crop_boxes(u, 40, 60, (30, 45), 0.3).T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 40).all() and (left + w <= 60).all()
    area = (h * w).float() / (40 * 60)
    assert 0.27 < area.min() and area.max() <= 1 and abs(area.mean() - 0.63) < 0.04      # the largest are cut a little
    assert (top == 0).any() and (top + h == 40).any()
    assert (crop_boxes(u, 16, 16, (16, 16), 1.0) == torch.tensor([0, 0, 16, 16])).all()


def test_colours_are_torchvisions():
    x = torch.rand(3, 3, 8, 8) * 0.4 + 0.2                 # far from 0 and 1, so that nothing is cut off
    u = torch.tensor([[0.0, 0.7, 0.5, 0.5, 0.5, 0.9], [0.0, 0.5, 0.2, 0.5, 0.5, 0.9], [0.0, 0.5, 0.5, 0.8, 0.5, 0.9]])
    want = [TF.adjust_brightness(x[0], 1 + 0.4 * 0.4), TF.adjust_contrast(x[1], 1 - 0.4 * 0.6), TF.adjust_saturation(x[2], 1 + 0.2 * 0.6)]
    torch.testing.assert_close(recolour(x, u), torch.stack(want), atol=2e-4, rtol=0)


def test_hue_turns_and_keeps_the_brightness():
    x, luma = torch.rand(1, 3, 8, 8) * 0.2 + 0.4, torch.tensor(data.LUMA)[:, None, None]
    turned = recolour(x, torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.95, 0.9]]))
    assert (turned - x).abs().max() > 0.01
    torch.testing.assert_close((turned * luma).sum(1), (x * luma).sum(1), atol=1e-3, rtol=0)
    back = recolour(turned, torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.05, 0.9]]))
    torch.testing.assert_close(back, x, atol=1e-3, rtol=0)
    grey = recolour(x, torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.0, 0.1]]))                   # not changed, but made grey
    torch.testing.assert_close(grey, (x * luma).sum(1, keepdim=True).expand(-1, 3, -1, -1), atol=1e-5, rtol=0)
    assert torch.equal(recolour(x, torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.0, 0.9]])), x)
    assert recolour(x[:, :1], torch.rand(1, 6)).shape == (1, 1, 8, 8)


def test_augmentation_differs_within_a_batch_and_repeats():
    images = toy()
    images.pixels[:] = images.pixels[:1]                   # the same image everywhere
    first, again, later = (list(batches(images, colours=True).run(s, s + 1))[0] for s in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], later[0]) and not torch.equal(first[1], later[1])
    assert all(not torch.equal(first[0][0], other) for other in first[0][1:])
    other_seed = next(batches(images, colours=True, seed=1).run(0, 1))
    assert not torch.equal(first[0], other_seed[0])


def test_a_switch_changes_no_other_number():
    plain, coloured = (next(batches(toy(), colours=c).run(2, 3)) for c in (False, True))
    assert torch.equal(plain[1], coloured[1]) and not torch.equal(plain[0], coloured[0])


def test_an_epoch_sees_every_image_once():
    images = toy()
    images.pixels = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    b = batches(images, smallest=1.0)
    for epoch in range(2):
        seen = torch.cat([x[:, 0, 0, 0] for x, _ in b.run(3 * epoch, 3 * epoch + 3)])
        assert (seen * 255).round().sort().values.tolist() == list(range(12))


@pytest.mark.parametrize("views", [1, 2])
def test_ranks_and_micro_batches_are_parts_of_the_global_batch(views):
    whole = list(batches(toy(), views=views, colours=True).run(0, 3))
    for step in range(3):
        imgs, noise = (t.unflatten(0, (views, 4)) for t in whole[step])
        for k in range(2):
            for r in range(2):
                part = list(batches(toy(), views=views, colours=True, accumulate=2, world=2, rank=r).run(step, step + 1))[k]
                torch.testing.assert_close(part[0], imgs[:, 2 * k + r], atol=1e-6, rtol=1e-6)
                assert torch.equal(part[1], noise[:, 2 * k + r])


def test_streaming_does_not_depend_on_workers(photos):
    runs = []
    for workers in (0, 2):
        images = load_images("imagefolder", photos, "train", 16, resident_gb=0)
        assert images.pixels is None
        runs.append(list(batches(images, views=2, workers=workers).run(1, 5)))
    for (x, n), (y, m) in zip(*runs):
        assert x.shape == (8, 3, 16, 16) and torch.equal(x, y) and torch.equal(n, m)


def test_streamed_crops_are_resident_crops(tmp_path):
    """Files of exactly the image size: a worker's crop is the device's, but for rounding to whole grey levels."""
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(80, 170, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
    resident, streamed = (load_images("imagefolder", tmp_path, "train", 16, resident_gb=gb) for gb in (1, 0))
    assert resident.labels.tolist() == [-1] * 8 and len(held_out(resident, 0.5)[1]) == 0     # a plain folder has no labels
    (x, _), (y, _) = (next(batches(images).run(0, 1)) for images in (resident, streamed))
    torch.testing.assert_close(x, y, atol=0.51 / 255 * 2, rtol=0)


def test_image_folder(photos):
    train, test = (load_images("imagefolder", photos, split, 16) for split in ("train", "test"))
    assert train.pixels.shape == (72, 3, 16, 16) and train.classes == test.classes == ["blue", "green", "red"]
    assert train.labels.bincount().tolist() == [24] * 3 and test.labels.bincount().tolist() == [6] * 3
    assert load_images("imagefolder", photos, "train", (8, 24), 1).pixels.shape == (72, 1, 8, 24)
    train_ids, val_ids = held_out(train, 0.25)
    assert len(val_ids) == 18 and not set(train_ids.tolist()) & set(val_ids.tolist())
    assert train.labels[val_ids].bincount().tolist() == [6] * 3


def test_missing_data_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        load_images("imagefolder", tmp_path / "nowhere", "train")
    with pytest.raises(UsageError, match="no images"):
        load_images("imagefolder", tmp_path, "train")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match="broken.png"):
        load_images("imagefolder", tmp_path, "train")
    with pytest.raises(UsageError, match="test"):
        load_images("imagefolder", tmp_path, "test")
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(tmp_path / "broken.png")
    with pytest.raises(UsageError, match="8 bits"):
        load_images("imagefolder", tmp_path, "train")
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
    with pytest.raises(UsageError, match="by hand"):
        load_images(name, tmp_path, "train")


def test_fit_changes_size_and_channels():
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(data.fit(grey, (28, 28), 3), grey.expand(-1, 3, -1, -1))
    assert data.fit(grey.expand(-1, 3, -1, -1), (32, 48), 1).shape == (2, 1, 32, 48)


def test_arrays_are_resized_when_read_and_cropped_at_their_own_size():
    images = toy()
    images.size = (32, 48)
    assert data.read(images, torch.arange(2)).shape == (2, 3, 32, 48)
    assert next(batches(images, patches=24).run(0, 1))[0].shape == (4, 3, 32, 48)


def test_transform_of_load_encoder_is_what_eval_reads(photos, tmp_path):
    arch = dict(img_size=(8, 16), patch_size=4, in_chans=3, embed_dim=64, depth=1, num_heads=2, mlp_ratio=4.0)
    torch.save(dict(model=VisionTransformer(**arch).state_dict(), arch=arch, mean=[0.0] * 3, std=[1.0] * 3), tmp_path / "c.pt")
    _, transform = load_encoder(tmp_path / "c.pt")
    images = load_images("imagefolder", photos, "test", (8, 16))
    torch.testing.assert_close(transform(Image.open(images.paths[0])), images.pixels[0].float() / 255)


def test_raw_pixels_of_shapes_say_little():
    scenes = [scene(i) for i in range(1200)]
    x, y = torch.stack([torch.from_numpy(s[0]).flatten().float() for s in scenes]), torch.tensor([int(s[1]) for s in scenes])
    x = x - x.mean(0)
    assert accuracy(knn(x[200:], y[200:], x[:200], len(KINDS)), y[:200]) < 0.2           # chance is 0.1


def test_mean_std():
    mean, std = mean_std(toy(channels=1))
    x = toy(channels=1).pixels.double() / 255
    assert mean == pytest.approx([x.mean().item()]) and std == pytest.approx([x.std().item()])


def test_scenes_are_what_they_say():
    image, label, multilabel, mask, boxes = scene(3)
    assert all(np.array_equal(a, b) for a, b in zip(scene(3), (image, label, multilabel, mask, boxes)))
    for index in range(40):
        image, label, multilabel, mask, boxes = scene(index)
        assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and mask.max() <= len(KINDS) >= 8
        assert set(np.flatnonzero(multilabel)) == set(np.unique(mask[mask > 0]) - 1) and multilabel[label]
        assert set(boxes[boxes[:, 4] >= 0][:, 4]) == set(np.flatnonzero(multilabel))
        for left, top, right, bottom, kind in boxes[boxes[:, 4] >= 0]:
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64 and (mask[top:bottom, left:right] == 1 + kind).any()


def test_arrays_of_torchvisions_sets(monkeypatch, tmp_path):
    """What its classes hold, in the shapes they hold it: colour last, grey without a channel, channels first."""
    made = {"CIFAR10": dict(data=np.random.randint(0, 255, (5, 32, 32, 3), np.uint8), targets=[0, 1, 2, 0, 1], classes="abc"),
            "FashionMNIST": dict(data=torch.zeros(5, 28, 28, dtype=torch.uint8), targets=torch.tensor([0, 1, 2, 0, 1]), classes="abc"),
            "STL10": dict(data=np.zeros((5, 3, 96, 96), np.uint8), labels=np.array([0, 1, -1, -1, -1]), classes="abc")}
    for name, attributes in made.items():
        monkeypatch.setattr(data.datasets, name, lambda *args, attributes=attributes, **kwargs: SimpleNamespace(**attributes))
    cifar, fashion, stl = (load_images(name, tmp_path, "train") for name in ("cifar10", "fashion-mnist", "stl10"))
    assert [tuple(i.pixels.shape[1:]) for i in (cifar, fashion, stl)] == [(3, 32, 32), (1, 28, 28), (3, 96, 96)]
    assert torch.equal(cifar.pixels[2, :, 3, 4], torch.from_numpy(made["CIFAR10"]["data"][2, 3, 4]))
    assert cifar.labels.tolist() == [0, 1, 2, 0, 1] and held_out(stl, 0.5)[1].tolist() == [1]
