"""extras/detect.py: objects, boxes, scores, and the command."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, run
from PIL import Image

pytest.importorskip("pycocotools")

import train
from extras import detect, tuning
from mae import MaskedAutoencoder, VisionTransformer
from support.command_line import UsageError

SMALL = ["--batch-size", "4", "--epochs", "2", "--eval-every", "1", "--log-every", "1", "--device",
         "cpu", "--width", "8"]


@pytest.fixture(scope="module")
def bricks(tmp_path_factory):
    """A set in the format of COCO: 12 + 6 images of 24 x 36, a red (class 7) or a blue (class 3)
    brick on dark ground. In each split the last image has no object, the first a crowd and an
    object without a pixel as well."""
    root, rng = tmp_path_factory.mktemp("bricks"), np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split, count in (("train2017", 12), ("val2017", 6)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            picture = rng.integers(0, 60, (24, 36, 3))
            key, kind = 100 - i, int(rng.choice([3, 7]))
            images.append({"id": key, "file_name": f"{i}.png", "height": 24, "width": 36})
            if i < count - 1:
                left, top = int(rng.integers(0, 24)), int(rng.integers(0, 16))
                picture[top:top + 8, left:left + 12, 0 if kind == 7 else 2] += 150
                annotations.append(annotation(key, kind, left, top, 12, 8))
            if i == 0:
                annotations.append(annotation(key, 3, 0, 0, 36, 4, iscrowd=1))
                annotations.append(annotation(key, 3, 5.1, 5.1, 0.2, 0.2))
            Image.fromarray(picture.astype(np.uint8)).save(root / split / f"{i}.png")
        for number, each in enumerate(annotations):        # from 0, as home-made files do
            each["id"] = number
        content = {"images": images, "annotations": annotations, "categories": [
            {"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def annotation(key, kind, left, top, width, height, iscrowd=0):
    right, bottom = left + width, top + height
    corners = [left, top, right, top, right, bottom, left, bottom]
    mask = [corners]
    if iscrowd:                                            # written as runs of equal pixels
        crowd = np.zeros((24, 36), np.uint8)
        crowd[top:bottom, left:right] = 1
        runs = np.flatnonzero(np.diff(crowd.T.ravel(), prepend=0, append=2)).tolist()
        mask = {"size": [24, 36], "counts": np.diff([0, *runs]).tolist()}
    return {"image_id": key, "category_id": kind, "bbox": [left, top, width, height],
            "segmentation": mask, "area": width * height, "iscrowd": iscrowd}


@pytest.fixture(scope="module")
def checkpoint(bricks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "start"
    train.main(["--data", "coco", "--data-root", str(bricks), "--img-size", "16", "--patch-size",
                "4", "--batch-size", "4", "--image-clusters", "4", "--patch-clusters", "8",
                "--epochs", "1", "--device", "cpu", "--out", str(folder)])
    return folder / "checkpoint.pt"


def flags(checkpoint, out, *more):
    return ["--checkpoint", str(checkpoint), "--out", str(out), *SMALL, *more]


def scenes_of(bricks, split="train"):
    config = tuning.Config(data="coco", data_root=str(bricks))
    return detect.Scenes(tuning.load_images("coco", bricks, split, 16), config, split)


def perfect(scenes, ids, moved=0):
    """The objects themselves as results, boxes and masks moved to the right."""
    found = []
    for index in ids.tolist():
        masks, classes = scenes.objects(index)
        of_number = {number: key for key, number in scenes.number.items()}
        wanted = detect.targets(masks, classes)
        for box, label, mask in zip(wanted["boxes"], wanted["labels"], wanted["masks"]):
            left, top, right, bottom = box.tolist()
            shifted = np.roll(mask.numpy(), moved, 1)
            found.append({"image_id": scenes.keys[index], "category_id": of_number[label.item()],
                          "score": 0.9, "segmentation": detect.encode(shifted),
                          "bbox": [left + moved, top, right - left, bottom - top]})
    return found


def test_objects_of_a_set_in_the_format_of_coco(bricks):
    scenes = scenes_of(bricks)
    assert scenes.number == {3: 1, 7: 2}
    masks, classes = scenes.objects(0)
    assert masks.shape == (2, 24, 36) and masks.dtype == torch.uint8       # not the crowd
    wanted = detect.targets(masks, classes)                # nor what has no pixel
    [left, top, right, bottom], = wanted["boxes"].tolist()
    picture = scenes.read(0)
    inside = picture[:, int(top):int(bottom), int(left):int(right)].float().mean((1, 2))
    assert (right - left, bottom - top) == (12, 8) and len(wanted["labels"]) == 1
    assert inside[0 if wanted["labels"].item() == 2 else 2] > 120
    masks, classes = scenes.objects(11)
    assert masks.shape == (0, 24, 36) and detect.targets(masks, classes)["boxes"].shape == (0, 4)


def test_objects_of_shapes():
    """Boxes of their own pixels, as the set has them."""
    images = shapes(6)
    scenes = detect.Scenes(images, tuning.Config(data="shapes"), "train")
    for index in range(6):
        masks, classes = scenes.objects(index)
        wanted = detect.targets(masks, classes)
        boxes = images.targets["boxes"][index]
        boxes = boxes[boxes[:, 4] >= 0]
        assert torch.equal(wanted["boxes"], boxes[:, :4].float())
        assert torch.equal(wanted["labels"], 1 + boxes[:, 4].long())
        union = images.targets["owners"][index] > 0
        assert torch.equal(wanted["masks"].any(0), union) and wanted["masks"].sum() == union.sum()


def shapes(n):
    from data import Images
    from support.shapes import KINDS, scene
    columns = [torch.stack([torch.as_tensor(each) for each in column])
               for column in zip(*map(scene, range(n)))]
    pixels, labels, multilabel, masks, owners, boxes = columns
    return Images(labels, list(KINDS), (64, 64), 3, pixels, targets={
        "multilabel": multilabel, "masks": masks, "owners": owners, "boxes": boxes})


def test_average_precision_by_hand(bricks):
    """Boxes of 12 x 8 moved by 2 overlap by 10 x 8 of 14 x 8, an IoU of 0.71: found at 0.5, 0.55,
    ..., 0.7, which are 5 of the 10 overlaps."""
    scenes, ids = scenes_of(bricks), torch.arange(1, 12)   # without the object that has no pixel
    perfectly = detect.average_precision(scenes, perfect(scenes, ids), ids)
    assert perfectly == {"box_ap": 1, "box_ap50": 1, "mask_ap": 1, "mask_ap50": 1}
    moved = detect.average_precision(scenes, perfect(scenes, ids, moved=2), ids)
    assert moved == {"box_ap": 0.5, "box_ap50": 1, "mask_ap": 0.5, "mask_ap50": 1}
    assert detect.average_precision(scenes, [], ids) == dict.fromkeys(perfectly, 0)
    nothing = detect.average_precision(scenes, [], torch.tensor([11]))
    assert nothing == dict.fromkeys(perfectly)             # no object: None


def test_detections_are_in_the_pixels_of_the_image(bricks):
    """What the model finds is written as results. A model that finds the truth scores 1."""
    scenes, ids = scenes_of(bricks), torch.arange(1, 12)

    class Oracle(torch.nn.Module):
        seen = 0

        def forward(self, imgs):
            found = []
            for img in imgs:
                Oracle.seen += 1
                assert torch.equal((img * 255).round().to(torch.uint8), scenes.read(Oracle.seen))
                wanted = detect.targets(*scenes.objects(Oracle.seen))
                found.append(dict(wanted, scores=torch.ones(len(wanted["labels"])),
                                  masks=wanted["masks"][:, None].float()))
            return found

    found = detect.detections(Oracle(), scenes, ids, 4, torch.device("cpu"))
    assert detect.average_precision(scenes, found, ids)["mask_ap"] == 1 and Oracle.seen == 11


def test_augmentation_moves_masks_with_the_image(bricks):
    scenes = scenes_of(bricks)
    augment = detect.jitter(tuning.Config(crop=0.3), 32, [0.2, 0.2, 0.2])
    for index in (1, 2, 3, 11):
        masks, classes = scenes.objects(index)
        for _ in range(10):
            img, moved = augment(detect.tv_tensors.Image(scenes.read(index)),
                                 detect.tv_tensors.Mask(masks))
            assert img.shape == (3, 32, 32) and moved.shape == (len(masks), 32, 32)
            if moved.any():
                bright = img.amax(0) > 130
                assert (bright == moved[0].bool()).float().mean() > 0.9
                wanted = detect.targets(moved, classes)
                [left, top, right, bottom], = wanted["boxes"].long().tolist()
                assert moved[0, top:bottom, left:right].sum() == moved.sum()


def test_pyramid_and_detector():
    encoder = MaskedAutoencoder(**dict(TOY, img_size=(32, 32)), target_dim=0).encoder
    maps = detect.Pyramid(encoder, 8)(torch.rand(2, 3, 32, 32))
    assert {name: tuple(each.shape) for name, each in maps.items()} == {
        "0": (2, 8, 32, 32), "1": (2, 8, 16, 16), "2": (2, 8, 8, 8), "3": (2, 8, 4, 4)}
    model = detect.detector(encoder, 3, 8, [0.5] * 3, [0.2] * 3)
    seen = []
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = model.eval()([torch.full((3, 40, 80), 0.7), torch.rand(3, 16, 16)])
    assert [each["masks"].shape[2:] for each in found] == [(40, 80), (16, 16)]
    [imgs] = seen
    assert imgs.shape == (2, 3, 32, 32)                    # the longer side fits; filled up with 0,
    assert torch.allclose(imgs[0, :, :16], torch.tensor(1.0)) and (imgs[0, :, 16:] == 0).all()


def test_anchors_and_regions_lie_where_the_maps_are():
    """Of 16 x 16 patches of 8: maps that are 2, 4, 8, 16 pixels apart."""
    encoder = VisionTransformer(128, 8, 3, 32, 2, 2)
    model, seen = detect.detector(encoder, 3, 8, [0.5] * 3, [0.2] * 3), []
    model.rpn.anchor_generator.register_forward_hook(lambda module, inputs, out: seen.append(out))
    model.eval()([torch.rand(3, 128, 128)])
    assert model.roi_heads.box_roi_pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
    boxes = seen[0][0]
    count = 0
    for stride in (2, 4, 8, 16):
        n = 3 * (128 // stride) ** 2
        middles, areas = (boxes[count:count + n, :2] + boxes[count:count + n, 2:]) / 2, torch.prod(
            boxes[count:count + n, 2:] - boxes[count:count + n, :2], 1)
        count += n
        assert (middles.amin(), middles.amax()) == (0, 128 - stride)
        assert (areas.sqrt() / (4 * stride) - 1).abs().max() < 0.2     # sides are rounded
    assert count == len(boxes)


@pytest.mark.parametrize("img_size, patch_size", [(56, 14), (16, 2), ((32, 32), (4, 8)), (16, 16)])
def test_patches_that_do_not_fit_are_refused(img_size, patch_size):
    encoder = MaskedAutoencoder(**dict(TOY, img_size=img_size, patch_size=patch_size),
                                target_dim=0).encoder
    with pytest.raises(UsageError, match="detection takes square patches|even number of patches"):
        detect.check_geometry(encoder)


def test_large_images_are_shrunk_with_a_filter_as_in_training(bricks):
    """Stripes of one pixel become grey, in training and in judging."""
    stripes = torch.zeros(3, 160, 240)
    stripes[:, :, ::2] = 1
    encoder = MaskedAutoencoder(**dict(TOY, img_size=(32, 32)), target_dim=0).encoder
    model, seen = detect.detector(encoder, 3, 8, [0.0] * 3, [1.0] * 3), []
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = model.eval()([stripes, torch.rand(3, 2, 200)])
    assert [tuple(each["masks"].shape[2:]) for each in found] == [(160, 240), (2, 200)]
    assert (seen[0][0, :, :21, 1:-1] - 0.5).abs().max() < 0.1
    img, _ = detect.jitter(tuning.Config(crop=1.0), 32, [0.0] * 3)(
        detect.tv_tensors.Image((stripes * 255).to(torch.uint8)),
        detect.tv_tensors.Mask(torch.zeros(0, 160, 240, dtype=torch.uint8)))
    rows = img.amax((0, 2)) > 0
    assert ((img[:, rows, 1:-1].float() / 255 - 0.5).abs() < 0.1).all()


def test_places_are_not_rounded_in_bf16(checkpoint, tmp_path, monkeypatch):
    seen, real = [], detect.MaskRCNN.forward

    def forward(model, imgs, wanted=None):
        hook = model.rpn.register_forward_hook(lambda module, inputs, out: seen.append(
            (torch.is_autocast_enabled("cpu"), out[0][0].dtype)))
        losses = real(model, imgs, wanted)
        hook.remove()
        return losses

    monkeypatch.setattr(detect.MaskRCNN, "forward", forward)
    detect.main(flags(checkpoint, tmp_path / "run", "--precision", "bf16", "--epochs", "1"))
    assert (True, torch.float32) in seen and {dtype for _, dtype in seen} == {torch.float32}


def test_categories_of_the_splits_must_be_alike(checkpoint, bricks, tmp_path):
    shutil.copytree(bricks, tmp_path / "other")
    path = tmp_path / "other/annotations/instances_val2017.json"
    path.write_text(path.read_text().replace('"red"', '"green"'))
    with pytest.raises(UsageError, match="other categories"):
        detect.main(flags(checkpoint, tmp_path / "run", "--data-root", str(tmp_path / "other")))


def test_images_held_out_may_have_no_object(checkpoint, bricks, tmp_path, capsys):
    """Then there is nothing to score: null, and the run goes on."""
    shutil.copytree(bricks, tmp_path / "empty")
    path = tmp_path / "empty/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] > 95]
    path.write_text(json.dumps(content))
    detect.main(flags(checkpoint, tmp_path / "run", "--data-root", str(tmp_path / "empty"),
                      "--val-fraction", "0.1", "--epochs", "1"))
    assert json.loads(capsys.readouterr().out)["validation"] == {}


def test_an_image_without_objects_can_be_learned():
    encoder = MaskedAutoencoder(**dict(TOY, img_size=(32, 32)), target_dim=0).encoder
    model = detect.detector(encoder, 3, 8, [0.5] * 3, [0.2] * 3)
    nothing = detect.targets(torch.zeros(0, 32, 32, dtype=torch.uint8), torch.zeros(0).long())
    losses = model([torch.rand(3, 32, 32)], [nothing])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_mask"] == 0


def test_command(checkpoint, tmp_path):
    """It learns to find the bricks, writes its files, and ends with its line."""
    out = tmp_path / "run"
    command = flags(checkpoint, out, "--epochs", "30", "--eval-every", "15", "--log-every", "60",
                    "--img-size", "32", "--val-fraction", "0", "--width", "16", "--drop-path", "0",
                    "--crop", "0.8", "--lr", "3e-3")
    result = run("extras.detect", *command, cwd=ROOT)
    found = json.loads(result.stdout)
    assert found == json.loads((out / "result.json").read_text())
    assert found["box_ap50"] > 0.4 and found["test_images"] == 6 and found["split"] == "test"
    assert (out / "detections.png").exists() and (out / "curves.png").exists()


def test_a_stopped_run_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    detect.main(flags(checkpoint, tmp_path / "whole"))
    real = tuning.draw_curves

    def stop(out):
        real(out)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "draw_curves", stop)
    with pytest.raises(KeyboardInterrupt):
        detect.main(flags(checkpoint, tmp_path / "stopped"))
    monkeypatch.setattr(tuning, "draw_curves", real)
    detect.main(flags(checkpoint, tmp_path / "stopped"))
    one, other = (torch.load(tmp_path / name / "checkpoint.pt")["tuned"]
                  for name in ("whole", "stopped"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert one == other


def test_one_file_of_annotations(checkpoint, bricks, tmp_path, capsys):
    """Without a split to test on, the images held out are judged."""
    shutil.copytree(bricks, tmp_path / "one")
    (tmp_path / "one/annotations/instances_val2017.json").unlink()
    given = ["--data", "coco", "--data-root", str(tmp_path / "one"), "--val-fraction", "0.25"]
    detect.main(flags(checkpoint, tmp_path / "run", *given))
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["images"], found["test_images"]) == ("validation", 9, 3)


def first(kind, **values):
    """A change of a file of annotations: other values in the first image, category or object."""
    return lambda content: content[kind][0].update(values)


def second_mask(**values):
    return lambda content: content["annotations"][1]["segmentation"].update(values)


@pytest.mark.parametrize("change, says", [
    (lambda content: content["annotations"][0].pop("segmentation"), "object 1 (of 0.png): the seg"),
    (first("annotations", segmentation=[]), "no list of polygons"),
    (first("annotations", segmentation=[[1, 1, 2, 2]]), "no list of"),
    (first("annotations", bbox=[1, 1, 2]), "needs bbox (four numbers)"),
    (second_mask(size=[3, 4]), "36 x 24"),
    (lambda content: content["annotations"][1]["segmentation"]["counts"].pop(), "36 x 24 pixels"),
    (lambda content: content["images"][0].pop("height"), "no height and width of the image 0.png"),
    (lambda content: content["images"][1].update(id=100), "2 images have one id, 100"),
    (lambda content: content["images"][1].update(height=25), "36 x 24 pixels, its annotations"),
    (first("annotations", category_id=9), "object 1 is of category 9,"),
    # each field has a type and a range
    (first("annotations", segmentation=[1, 1, 9, 1, 9, 9]), "no list of"),
    (first("annotations", segmentation=[[1, 1, 9, 1, 9]]), "no list of"),
    (first("annotations", segmentation=[[1, 1, 9, 1, 9, None]]), "no li"),
    (first("annotations", segmentation=[[1, 1, 9, 1, 9, "9"]]), "no lis"),
    (first("annotations", segmentation=[[1, 1, 9, 1, 9, 1e9]]), "far out"),
    (first("annotations", segmentation=None), "no list of polygons"),
    (first("annotations", segmentation=[[1, 1, 9, 1, 9, math.nan]]), "no list of polygons"),
    (second_mask(counts=[-1, 865]), "no lengths"),
    (second_mask(counts="ab~"), "no lengths"),
    (second_mask(counts="11o"), "no lengths"),
    (second_mask(counts="11"), "not of the 36"),
    (first("annotations", bbox=[1, 1, 2, -3]), "is negative"),
    (first("annotations", bbox=[1, 1, 2, "3"]), "(four numbers)"),
    (first("annotations", bbox=None), "needs bbox (four numbers)"),
    (first("annotations", area="12"), "the area is '12'"),
    (first("annotations", iscrowd=2), "iscrowd is 2"),
    (first("images", height="24"), "in whole pixels"),
    (first("images", height=-24), "in whole pixels")])
def test_bad_annotations_are_one_line(checkpoint, bricks, tmp_path, change, says):
    shutil.copytree(bricks, tmp_path / "bad")
    for path in tmp_path.glob("bad/annotations/*"):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        detect.main(flags(checkpoint, tmp_path / "run", "--data-root", str(tmp_path / "bad")))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_runs_written_as_text_are_decoded():
    for _ in range(20):
        mask = torch.rand(9, 300) < 0.3
        text = detect.encode(mask.numpy())["counts"].decode()
        runs = detect.decoded(text)
        colours = torch.arange(len(runs)) % 2
        assert torch.equal(colours.repeat_interleave(torch.tensor(runs)).bool(), mask.T.flatten())


@pytest.mark.parametrize("given, says", [
    (["--data", "imagefolder", "--data-root", "PHOTOS"], "--data imagefolder: has no boxes"),
    (["--img-size", "16x24"], "--img-size 16x24: detection takes square ones"),
    (["--img-size", "20"], "--img-size 20: must hold an even number of patches"),
    (["--batch-size", "50"], "--batch-size 50: there are"),
    (["--data-root", "nowhere"], "holds no annotations")])
def test_bad_input_is_one_line(checkpoint, photos, tmp_path, given, says):
    given = [str(photos) if each == "PHOTOS" else each for each in given]
    with pytest.raises(UsageError) as error:
        detect.main(flags(checkpoint, tmp_path / "run", *given))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_without_pycocotools(monkeypatch):
    monkeypatch.setattr(detect, "COCO", None)
    with pytest.raises(UsageError, match="pip install pycocotools"):
        detect.main([])
