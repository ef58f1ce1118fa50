"""Segmentation masks, and `eval.py patches`."""

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOY_SIZE
from PIL import Image

import eval as evaluation
import train
from extras import segment
from mae import SIZES
from support import probes
from support.command_line import UsageError
from support.masks import classes_in, count_pixels, mask_path, read_mask


def test_pixels_of_a_patch_are_counted_by_class():
    """Against a loop over pixels; a mask of another size than the image; void pixels."""
    mask = torch.randint(0, 5, (12, 20), dtype=torch.uint8)
    found = count_pixels(mask, size=(6, 6), grid=(3, 3), classes=4, void=2)
    middle = mask[:, 4:16]                                 # the centre, as square as the image
    want = torch.zeros(9, 4, dtype=torch.long)
    for row in range(12):
        for column in range(12):
            number = int(middle[row, column])
            if number < 4 and number != 2:
                want[row // 4 * 3 + column // 4, number] += 1
    assert torch.equal(found, want) and want.sum() > 50


@pytest.mark.parametrize("void, classes", [(9, 256), (255, 255), (0, 256)])
def test_all_numbers_of_8_bits_can_be_classes(void, classes):
    mask = torch.tensor([[0, 255], [9, 9]], dtype=torch.uint8)
    assert classes_in([mask], void) == {255: 10}.get(void, 256)
    found = count_pixels(mask, (2, 2), (1, 1), classes, void)[0]
    want = {0: 1, 255: 1, 9: 2}
    del want[void]
    assert {i: n for i, n in enumerate(found.tolist()) if n} == want


def test_a_pixel_belongs_to_the_patch_of_its_middle():
    found = count_pixels(torch.zeros(5, 5, dtype=torch.uint8), (2, 2), (2, 2), 1)
    assert found.flatten().tolist() == [4, 6, 6, 9]        # the middle row goes to the lower half
    smaller = count_pixels(torch.zeros(2, 2, dtype=torch.uint8), (8, 8), (4, 4), 1)
    assert smaller.sum() == 4 and smaller.max() == 1
    narrow = count_pixels(torch.zeros(5, 5, dtype=torch.uint8), (100, 1), (4, 1), 1)
    assert narrow.sum() == 5                               # a hundredth of a column is still one


def test_classes_in_masks():
    masks = [torch.tensor([[0, 3]], dtype=torch.uint8), torch.tensor([[1, 255]]).byte()]
    assert classes_in(masks) == 4 and classes_in(masks, void=3) == 256
    assert classes_in([torch.full((2, 2), 255).byte()]) == 0


def test_iou_is_that_of_pixels():
    """Patches painted in one class each, against a loop over classes on the pixels."""
    mask = torch.randint(0, 4, (5, 8, 8), dtype=torch.uint8)
    mask[mask == 3] = 255
    painted = torch.randint(0, 3, (5, 4))
    painted[:, 0] = mask[:, 0, 0].clamp(max=2)
    counts = torch.stack([count_pixels(each, (8, 8), (2, 2), 4) for each in mask])
    pixels = painted.view(5, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)
    known, found = mask != 255, probes.iou(painted, counts)
    for label in range(3):
        hit = ((pixels == label) & (mask == label)).sum()
        either = (((pixels == label) & known) | (mask == label)).sum()
        assert found[label].item() == pytest.approx((hit / either).item())
    assert math.isnan(found[3])                            # there is none of it
    assert probes.mean_iou(painted, counts) == pytest.approx(found[:3].mean().item(), abs=1e-4)


def test_paint_finds_what_is_in_the_tokens():
    """Tokens that say the class, and tokens of noise. Test masks are not asked for."""
    classes = torch.randint(0, 3, (60, 16))
    counts = 4 * torch.nn.functional.one_hot(classes, 3)
    counts[:, 3] = 0                                       # a patch without a known pixel
    said = torch.randn(60, 16, 8)
    said[..., :3] += 5 * torch.nn.functional.one_hot(classes, 3)
    val = torch.arange(60) % 5 == 0
    good, painted = probes.paint(said, counts, val, None)
    assert good > 0.95 and painted.shape == (12, 16)
    assert probes.mean_iou(painted, counts[val]) == good
    bad, painted = probes.paint(torch.randn(60, 16, 8), counts, val, said[:7])
    assert bad < 0.5 and painted.shape == (7, 16)


# --------------------------------------------------------------------------------- the command

@pytest.fixture
def pairs(tmp_path):
    """Photographs of two colours, left and right, each with a mask: 0, 1, and some void of 9."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for folder in (split, f"{split}annot"):
            (tmp_path / "pairs" / folder).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((20, 24), np.uint8)
            mask[:, rng.integers(8, 16):] = 1
            if rng.random() < 0.5:
                mask = 1 - mask
            picture = rng.integers(0, 60, (20, 24, 3)) + 150 * mask[..., None]
            mask[:2] = 9
            Image.fromarray(picture.astype(np.uint8)).save(
                tmp_path / "pairs" / split / f"{i}.jpg", quality=95)
            Image.fromarray(mask).save(tmp_path / "pairs" / f"{split}annot" / f"{i}.png")
    return tmp_path / "pairs"


def patches(capsys, *flags):
    evaluation.main(["patches", *map(str, flags), "--device", "cpu"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def checkpoint(pairs, tmp_path, no_pictures, monkeypatch):
    """Of an untrained run on the photographs, which have no classes of their own."""
    monkeypatch.setitem(SIZES, "micro", TOY_SIZE)
    train.main(["--data", "imagefolder", "--data-root", str(pairs / "train"), "--img-size", "16",
                "--patch-size", "4", "--batch-size", "8", "--image-clusters", "4",
                "--patch-clusters", "8", "--epochs", "0", "--device", "cpu",
                "--out", str(tmp_path / "run")])
    return tmp_path / "run" / "checkpoint.pt"


def test_patches_of_pairs_of_files(pairs, checkpoint, capsys):
    flags = ["--checkpoint", checkpoint, "--data", "imagefolder", "--data-root", pairs,
             "--void", 9]
    found = patches(capsys, *flags)
    assert found["iou"].keys() == {"0", "1"} and (found["images"], found["test_images"]) == (30, 10)
    assert found["miou"] == pytest.approx(sum(found["iou"].values()) / 2, abs=1e-4)
    assert found["miou"] > 0.6 > found["miou_place"]       # dark and light: easy
    assert found["miou"] <= found["miou_majority"] < 1
    pixels = patches(capsys, *flags, "--network", "pixels")
    assert pixels["network"] == "pixels" and pixels["miou"] > 0.6
    larger = patches(capsys, *flags, "--img-size", "32x40")
    assert larger["miou"] > found["miou"] and larger["miou_majority"] > found["miou_majority"]
    for path in (pairs / "testannot").iterdir():           # validation does not look at the test
        path.unlink()
    validation = patches(capsys, *flags, "--split", "validation")
    assert validation["test_images"] == 0
    assert validation["miou"] == validation["validation"] == found["validation"]


def test_patches_of_shapes_names_its_kinds(checkpoint, capsys, monkeypatch, tmp_path):
    from support import shapes
    monkeypatch.setattr(shapes, "SCENES", {"train": (0, 30), "test": (100, 10)})
    found = patches(capsys, "--checkpoint", checkpoint, "--data", "shapes", "--data-root", tmp_path)
    assert list(found["iou"])[:3] == ["ground", "disc", "triangle"] and len(found["iou"]) == 11


def test_masks_that_are_none(tmp_path):
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "train" / "a.jpg"
    Image.new("RGB", (8, 6)).save(path)
    assert mask_path(path) == tmp_path / "trainannot" / "a.png"
    for mask, words in ((None, "has no mask"), (Image.new("RGB", (8, 6)), "of the kind RGB"),
                        (Image.new("L", (6, 8)), "make them alike"),
                        ("not an image", "cannot be decoded")):
        if isinstance(mask, str):
            mask_path(path).write_text(mask)
        elif mask is not None:
            mask.save(mask_path(path))
        with pytest.raises(UsageError, match=words):
            read_mask(path)
    painted = Image.new("P", (8, 6), 7)                    # colours to look at: the number counts
    painted.putpalette(list(range(256)) * 3)
    painted.save(mask_path(path))
    assert (read_mask(path) == 7).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I"])
def test_whole_numbers_of_any_kind_are_masks(mode, tmp_path):
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "train" / "a.jpg"
    Image.new("RGB", (3, 2)).save(path)
    want = torch.tensor([[0, 1, 1], [1, 0, 0]]) * (1 if mode == "1" else 7)
    kind = {"I;16": np.uint16, "I": np.int32, "1": bool}.get(mode, np.uint8)
    mask = Image.fromarray(want.numpy().astype(kind))
    if mode == "P":
        mask.putpalette(list(range(256)) * 3)
    mask.save(mask_path(path), "TIFF" if mode == "I" else "PNG")
    assert torch.equal(read_mask(path).long(), want)
    if mode.startswith("I"):
        Image.fromarray((1000 * want.numpy()).astype(kind)).save(
            mask_path(path), "TIFF" if mode == "I" else "PNG")
        with pytest.raises(UsageError, match="numbers from 0 to 7000; number the classes"):
            read_mask(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_levels_of_few_bits_are_the_numbers_in_the_file(bits, tmp_path):
    """Pillow gives 0, 85, 170, 255 for the numbers 0 to 3 of two bits."""
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    path, last = tmp_path / "train" / "a.jpg", 2**bits - 1
    Image.new("RGB", (8, 1)).save(path)
    numbers = [min(i, last) for i in range(8)]
    line = int("".join(f"{n:0{bits}b}" for n in numbers), 2).to_bytes(bits, "big")

    def chunk(name, content):
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))
    mask_path(path).write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" + line)) + chunk(b"IEND", b""))
    assert read_mask(path)[0].tolist() == numbers


@pytest.mark.parametrize("mode, words", [("RGB", "kind RGB"), ("RGBA", "kind RGBA"),
                                         ("LA", "kind LA"), ("F", "kind F"), ("CMYK", "kind CMYK")])
def test_colours_are_no_masks(mode, words, tmp_path):
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "train" / "a.jpg"
    Image.new("RGB", (8, 6)).save(path)
    Image.new(mode, (8, 6)).save(mask_path(path), "TIFF")
    with pytest.raises(UsageError, match=words):
        read_mask(path)
    Image.new("L", (8, 6)).save(mask_path(path), "JPEG")
    with pytest.raises(UsageError, match="JPEG file, which changes the numbers"):
        read_mask(path)


def test_two_images_do_not_share_a_mask(pairs, checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", str(checkpoint), "--data", "imagefolder", "--data-root", str(pairs),
             "--device", "cpu"]
    with Image.open(pairs / "train" / "3.jpg") as image:
        image.save(pairs / "train" / "3.png")
    for command in (lambda: evaluation.main(["patches", *flags, "--void", "9"]),
                    lambda: segment.main([*flags, "--batch-size", "8",
                                          "--out", str(tmp_path / "segment")])):
        with pytest.raises(UsageError, match="3.jpg and .*3.png share the mask .*3.png; give"):
            command()
    (pairs / "train" / "3.png").rename(pairs / "train" / "lone.png")
    (pairs / "train" / "3.jpg").unlink()
    with pytest.raises(UsageError, match="lone.png has no mask .* 1 of 30 have none: lone.png"):
        evaluation.main(["patches", *flags])
    (pairs / "train" / "lone.png").unlink()
    evaluation.main(["patches", *flags, "--void", "9"])
    assert "trainannot: left out are 1 that are the mask of no image: 3.png" in (
        capsys.readouterr().err)


def test_a_mask_is_of_the_upright_picture(tmp_path):
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    path, turned = tmp_path / "train" / "a.jpg", Image.Exif()
    turned[0x0112] = 6                                     # a quarter turn
    Image.new("RGB", (8, 6)).save(path, exif=turned)
    Image.new("L", (6, 8)).save(mask_path(path))
    assert read_mask(path).shape == (8, 6)
    Image.new("L", (8, 6)).save(mask_path(path))
    with pytest.raises(UsageError, match="make them alike"):
        read_mask(path)


@pytest.mark.parametrize("flags, words", [
    (["--void", "300"], "--void 300: pixels of masks are 0 to 255"),
    (["--void", "1"], "--void 1: beside it the masks hold no number but 0"),
    (["--token", "mean"], "--token: not used by patches"),
])
def test_flags_that_make_no_sense(checkpoint, pairs, flags, words):
    for path in pairs.glob("*annot/*"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 9, 1, mask)).save(path)
    with pytest.raises(UsageError, match=words):
        evaluation.main(["patches", "--checkpoint", str(checkpoint), "--data", "imagefolder",
                         "--data-root", str(pairs), "--device", "cpu", *flags])


def test_sets_without_masks_are_refused(checkpoint, photos, capsys):
    with pytest.raises(UsageError, match="has no mask"):
        evaluation.main(["patches", "--checkpoint", str(checkpoint), "--data", "imagefolder",
                         "--data-root", str(photos), "--device", "cpu"])
    assert not (Path(checkpoint).parent / "eval.jsonl").exists()
