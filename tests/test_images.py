import importlib
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from data import Batches
from mae import VisionTransformer
from support import images
from support.command_line import UsageError
from support.datasets import load_images
from support.images import IMAGENET_MEAN, IMAGENET_STD, decode, fit, image_transform
from support.weights import load_encoder


def only_batch(set_of_images):
    """The images, in a random order, flipped or not, but not cropped; grey levels of 0..1."""
    n = len(set_of_images)
    batches = Batches(set_of_images, torch.arange(n), [0.0] * 3, [1.0] * 3, seed=0, batch=n,
                      patches=1, smallest=1.0)
    return next(batches.run(0, 1)).student


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photograph_stands_upright_everywhere(orientation, tmp_path):
    """Brighter from top to bottom, in a file that says how the camera was held."""
    levels = np.linspace(20, 230, 32).astype(np.uint8)
    upright = np.repeat(levels[:, None, None], 16, axis=1).repeat(3, axis=2)   # 32 x 16, colours
    # Each tag says how to turn what is stored (here: the turn that undoes it, counterclockwise).
    quarters = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(np.rot90(upright, quarters))
    Image.fromarray(stored).save(tmp_path / "photo.jpg", quality=95, exif=exif)

    resident, streamed = (load_images("imagefolder", tmp_path, "train", (32, 16), resident_gb=gb)
                          for gb in (1, 0))
    transform = image_transform((32, 16), 3, [0.0] * 3, [1.0] * 3)
    want = torch.from_numpy(upright).permute(2, 0, 1) / 255
    for seen in (only_batch(resident)[0], only_batch(streamed)[0], resident.pixels[0] / 255,
                 transform(Image.open(tmp_path / "photo.jpg"))):
        torch.testing.assert_close(seen, want, atol=6 / 255, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1"])
def test_what_is_transparent_is_white(mode, channels, tmp_path):
    """The left half is black and seen, the right half black and transparent."""
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        image.paste((0, 0, 0, 255), (0, 0, 4, 8))
        image.convert(mode).save(tmp_path / "a.png")
    else:                                                  # a number that stands for transparency
        clear = 255 if mode == "1" else 1
        image = Image.new(mode, (8, 8), clear)
        image.paste(0, (0, 0, 4, 8))
        if mode == "P":
            image.putpalette([0] * 768)                    # all are black
        image.save(tmp_path / "a.png", transparency=clear)
    with warnings.catch_warnings(record=True) as seen:
        pixels = decode(tmp_path / "a.png", (8, 8), channels)
    assert (pixels[:, :, :4] == 0).all() and (pixels[:, :, 4:] == 255).all() and not seen


def test_a_very_large_image_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    Image.new("RGB", (16, 16)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)    # Pillow refuses twice as many
    with pytest.raises(UsageError, match=r"huge\.png has more than 200 pixels; shrink or remove"):
        load_images("imagefolder", tmp_path, "train", 8)
    with pytest.raises(UsageError, match=r"huge\.png .* shrink or remove"):
        only_batch(load_images("imagefolder", tmp_path, "train", 8, resident_gb=0))


def test_a_large_image_is_no_reason_for_a_warning(tmp_path, monkeypatch):
    Image.new("RGB", (12, 12)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        importlib.reload(images)               # sets its filter: pytest undoes filters of imports
        assert images.open_image(tmp_path / "large.png", 3).size == (12, 12)
    assert not seen


def test_what_is_no_image_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"broken\.png .* mend or remove"):
        load_images("imagefolder", tmp_path, "train")
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(tmp_path / "broken.png")
    with pytest.raises(UsageError, match="8 bits"):
        load_images("imagefolder", tmp_path, "train")


def test_fit_changes_size_and_channels():
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    colour = grey.expand(-1, 3, -1, -1)
    assert torch.equal(fit(grey, (28, 28), 3), colour)
    assert fit(colour, (32, 48), 1).shape == (2, 1, 32, 48)
    wide = torch.randint(0, 256, (2, 3, 10, 30), dtype=torch.uint8)
    assert torch.equal(fit(wide, (10, 10), 3), TF.center_crop(wide, [10, 10]))
    assert fit(wide, (100, 1), 3).shape == (2, 3, 100, 1)  # a tenth of a column is still one


def test_transform_of_an_encoder_is_what_training_reads(photos, tmp_path):
    weights = VisionTransformer(img_size=16, patch_size=4, embed_dim=64, depth=1, num_heads=1)
    torch.save({"model": weights.state_dict()}, tmp_path / "official.pth")
    _, transform = load_encoder(tmp_path / "official.pth")
    kept = load_images("imagefolder", photos, "test", 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    for path, pixels in zip(kept.paths[:3], kept.pixels):
        torch.testing.assert_close(transform(Image.open(path)), (pixels / 255 - mean) / std)
    wide = image_transform((8, 16), 1, [0.0], [1.0])(Image.open(kept.paths[0]))
    again = load_images("imagefolder", photos, "test", (8, 16), 1).pixels[0]
    torch.testing.assert_close(wide, again / 255)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_broken_exif_data_say_nothing(tmp_path, suffix):
    """The picture is read as it is stored."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    for name, more in (("plain", {}), ("broken", {"exif": b"Exif\x00\x00nonsense"})):
        Image.fromarray(pixels).save(tmp_path / f"{name}.{suffix}", **more)
    plain, broken = (decode(tmp_path / f"{name}.{suffix}", (16, 20), 3)
                     for name in ("plain", "broken"))
    assert torch.equal(plain, broken)


def test_large_photographs_are_decoded_small_and_look_the_same(tmp_path):
    """No side below what is asked for; within what JPEG itself loses."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    photograph = coarse.resize((1600, 1200), Image.Resampling.BICUBIC)
    for name, form in (("a.jpg", "JPEG"), ("a.png", "PNG")):
        photograph.save(tmp_path / name, form)
    for least, size in ((100, (200, 150)), (150, (200, 150)), (151, (400, 300)),
                        (None, (1600, 1200))):
        assert images.open_image(tmp_path / "a.jpg", 3, least).size == size
    assert images.open_image(tmp_path / "a.png", 3, 100).size == (1600, 1200)
    small, whole = (decode(tmp_path / name, (48, 64), 3).int() for name in ("a.jpg", "a.png"))
    assert (small - whole).abs().float().mean() < 1.5 and (small - whole).abs().max() <= 12
