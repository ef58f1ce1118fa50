"""Image files as tensors of one size and number of channels."""

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from extras.command_line import UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # what official weights were trained with


def convert(image, channels, name="image"):
    """A PIL image with 1 or 3 channels of 8 bits."""
    if image.mode[0] in "IF":                              # Pillow would cut these off at 255
        raise UsageError(f"{name} has more than 8 bits a channel; convert it to 8")
    return image.convert({1: "L", 3: "RGB"}[channels])


def open_image(path, channels):
    try:
        return convert(Image.open(path), channels, f"--data-root: {path}")
    except (UnidentifiedImageError, OSError) as error:
        raise UsageError(f"--data-root: {path} cannot be decoded as an image ({error}); mend or remove it") from error


def decode(path, size, channels):
    """An image file, its centre cropped to the shape of size and resized: C H W uint8."""
    return TF.pil_to_tensor(ImageOps.fit(open_image(path, channels), size[::-1], Image.Resampling.BICUBIC))


def fit(pixels, size, channels):
    """N C H W uint8 in another size (the centre, resized) or number of channels (grey <-> colour)."""
    if channels == 1 and pixels.shape[1] == 3:
        pixels = TF.rgb_to_grayscale(pixels)
    if tuple(pixels.shape[2:]) != size:
        scale = max(size[0] / pixels.shape[2], size[1] / pixels.shape[3])
        inner = [min(n, round(s / scale)) for n, s in zip(pixels.shape[2:], size)]
        pixels = TF.resize(TF.center_crop(pixels, inner), size, interpolation=TF.InterpolationMode.BICUBIC)
    return pixels.expand(-1, channels, -1, -1)


def image_transform(size, channels, mean, std):
    """PIL image -> C H W, as an encoder of this size and mean and std wants it: `decode`, then standardised."""
    return v2.Compose([
        v2.Lambda(lambda image: ImageOps.fit(convert(image, channels), size[::-1], Image.Resampling.BICUBIC)),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ])
