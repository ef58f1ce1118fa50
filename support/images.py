"""Image files as tensors of one size and number of channels."""

import errno
import math
import struct
import warnings
from contextlib import contextmanager

import torch
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from support.command_line import UsageError

# What official weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pillow warns of images over 89 megapixels and refuses twice that (`open_image` says so). Between
# the two lie cameras of today: nothing to warn of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Pillow knows these by their beginning but does not decode them, or runs another program for it.
NO_PIXELS = ("MPEG", "EPS")


def suffixes():
    """Of all images that this Pillow can decode, in small letters: {".jpg", ".png", ".gif", ...}"""
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items()
            if kind == "MPO" or kind in Image.OPEN and kind not in NO_PIXELS and not (
                isinstance(Image.OPEN[kind][0], type)
                and issubclass(Image.OPEN[kind][0], ImageFile.StubImageFile))}


def convert(image, channels, name="image"):
    """A PIL image with 1 or 3 channels of 8 bits, turned upright.

    All images of training, evaluation and `image_transform` pass through here. What is transparent
    becomes white: what is stored behind it, often black, is not meant to be seen."""
    if image.mode[0] in "IF":                  # Pillow would cut these off at 255
        raise UsageError(f"{name} has more than 8 bits a channel; convert it to 8")
    image = upright(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert({1: "L", 3: "RGB"}[channels])


def upright(image):
    """Cameras store a picture as the sensor saw it, and note in its EXIF data how they were
    held."""
    image.load()                               # what is wrong with the pixels is an error
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, KeyError, struct.error):      # of EXIF data that are broken:
        return image                                               # they say nothing


ORIENTATION = 0x0112               # the number of that entry in EXIF data


def upright_size(path):
    """(W, H) of an image file, turned upright, by its header. Raises UsageError."""
    with unreadable_in_one_line(path), Image.open(path) as image:
        try:
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        except (SyntaxError, ValueError, KeyError, struct.error):
            turned = False                                 # as in `upright`
        return image.size[::-1] if turned else image.size


def open_image(path, channels, least=None, flag="--data-root"):
    """An image file, converted. Raises UsageError, which names the flag, if it cannot be decoded.

    least: so many pixels are enough for a side. Then a large JPEG file is decoded at a half, a
    quarter or an eighth of its size, no smaller than that, in a fraction of the time."""
    with unreadable_in_one_line(path, flag), Image.open(path) as image:
        if least is not None:
            image.draft(None, (math.ceil(least), math.ceil(least)))
        return convert(image, channels, f"{flag}: {path}")


@contextmanager
def unreadable_in_one_line(path, flag="--data-root"):
    """Inside, whatever goes wrong with an image file is a UsageError."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise UsageError(f"{flag}: {path} has more than {2 * Image.MAX_IMAGE_PIXELS:,} "
                         "pixels; shrink or remove it") from error
    except (UsageError, MemoryError):
        raise
    except Exception as error:                 # decoders raise many kinds for files that are broken
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise                              # it is not the image that is at fault
        raise UsageError(f"{flag}: {path} cannot be decoded as an image ({error}); "
                         "mend or remove it") from error


def centre(image, size):
    """The centre of a PIL image, as large as the shape of `size` (H, W) allows, resized to it."""
    height, width = size
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def decode(path, size, channels, flag="--data-root"):
    """An image file, its centre cropped to the shape of size and resized: C H W uint8."""
    least = 2 * max(size)                                  # twice is Pillow's advice
    image = open_image(path, channels, least, flag)
    return TF.pil_to_tensor(centre(image, size))


def fit(pixels, size, channels):
    """n C H W uint8 in another size (the centre, resized) or number of channels (grey, colour)."""
    if channels == 1 and pixels.shape[1] == 3:
        pixels = TF.rgb_to_grayscale(pixels)
    H, W = pixels.shape[2:]
    if (H, W) != size:
        scale = max(size[0] / H, size[1] / W)
        inner = [max(1, min(H, round(size[0] / scale))), max(1, min(W, round(size[1] / scale)))]
        pixels = TF.center_crop(pixels, inner)
        pixels = TF.resize(pixels, size, interpolation=TF.InterpolationMode.BICUBIC)
    return pixels.expand(-1, channels, -1, -1)


def image_transform(size, channels, mean, std):
    """PIL image -> C H W as an encoder of this size, mean and std wants it.

    The same as `decode`, then standardised."""
    def prepare(image):
        return centre(convert(image, channels), size)

    return v2.Compose([
        prepare,
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ])
