"""Segmentation masks: of each pixel a number, that of its class. And files that hold such masks.

Letters:  n images, N patches of an image, H W height and width.
"""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from support.command_line import UsageError, say, shortened
from support.images import unreadable_in_one_line, upright_size

# Pillow spreads grey levels of 2 and 4 bits over 0..255: what it divides by to get them back.
SPREAD = {"L;2": 85, "L;4": 17}


def seen_part(mask, size):
    """The part of a mask H W that the network sees of its image: the centre of the shape of `size`
    (H, W), as in `support.images.fit`. It is not resized."""
    H, W = mask.shape
    scale = max(size[0] / H, size[1] / W)
    inner = [max(1, min(H, round(size[0] / scale))), max(1, min(W, round(size[1] / scale)))]
    return TF.center_crop(mask, inner)


def count_pixels(mask, size, grid, classes, void=255):
    """How many pixels of each class lie in each patch: mask H W -> N classes.

    The mask may be larger or smaller than the image that the network sees, whose size (H, W) is
    `size`. A pixel belongs to the patch in which its middle lies. Pixels of the number `void`, and
    of those from `classes` on, are not counted."""
    mask = seen_part(mask.long(), size)        # 8 bits cannot be compared with a `void` beyond 255
    row, column = ((2 * torch.arange(length) + 1) * patches // (2 * length)
                   for length, patches in zip(mask.shape, grid))
    patch = row[:, None] * grid[1] + column                                                # H W
    known = (mask < classes) & (mask != void)
    cells = patch[known] * classes + mask[known]
    return cells.bincount(minlength=grid[0] * grid[1] * classes).view(-1, classes)


def classes_in(masks, void=255):
    """1 + the highest number in masks (a list of H W), not counting `void`."""
    highest = -1
    for mask in masks:
        numbers = mask.unique().long()
        highest = max([highest, *numbers[numbers != void].tolist()])
    return 1 + highest


def mask_path(path):
    """ROOT/<split>/NAME.jpg -> ROOT/<split>annot/NAME.png."""
    return path.parent.with_name(path.parent.name + "annot") / f"{path.stem}.png"


def check_pairs(images):
    """Raises UsageError where files of images and of masks are not pairs: two images share a mask,
    or an image has none. A mask without an image is said."""
    if images.paths is None or "masks" in images.targets:
        return
    image_of = {}
    for path in images.paths:
        other = image_of.setdefault(mask_path(path), path)
        if other != path:
            raise UsageError(f"--data-root: {other} and {path} share the mask {mask_path(path)}; "
                             "give each image a name and a mask of its own")
    lacking = [path for file, path in image_of.items() if not file.is_file()]
    if lacking:
        raise UsageError(f"--data-root: {lacking[0]} has no mask {mask_path(lacking[0])}; each "
                         "image needs one, DIR/train/NAME.jpg and DIR/trainannot/NAME.png, "
                         f"likewise test; {len(lacking)} of {len(images)} have none: "
                         f"{shortened([each.name for each in lacking])}")
    for folder in sorted({file.parent for file in image_of}):
        alone = sorted(each.name for each in folder.iterdir() if each not in image_of
                       and not each.name.startswith("."))
        if alone:
            say(f"{folder}: left out are {len(alone)} that are the mask of no image: "
                f"{shortened(alone)}")


def read_mask(path):
    """The mask of the image at path: H W uint8. Raises UsageError for one that is none."""
    file = mask_path(path)
    if not file.is_file():
        raise UsageError(f"--data-root: {path} has no mask {file}; each image needs one, "
                         "DIR/train/NAME.jpg and DIR/trainannot/NAME.png, likewise test")
    with unreadable_in_one_line(file), Image.open(file) as mask:
        raw = mask.tile[0][3] if mask.tile else None
        mask.load()
    if mask.format == "JPEG":
        raise UsageError(f"--data-root: the mask {file} is a JPEG file, which changes the numbers; "
                         "write it as PNG")
    if mask.mode not in ("L", "P", "1") and not mask.mode.startswith("I"):
        raise UsageError(f"--data-root: the mask {file} has pixels of the kind {mask.mode}; write "
                         "the number of the class in one channel of 8 bits")
    size = upright_size(path)              # a quarter turn in EXIF data: `decode` turns it back
    if size != mask.size:
        raise UsageError(f"--data-root: the mask {file} has {mask.size} pixels, its image "
                         f"{size}, upright; make them alike")
    numbers = np.array(mask).astype(np.int64) // SPREAD.get(raw, 1)
    if numbers.min() < 0 or numbers.max() > 255:           # of 16 or 32 bits
        raise UsageError(f"--data-root: the mask {file} has numbers from {numbers.min()} to "
                         f"{numbers.max()}; number the classes from 0 to 255")
    return torch.from_numpy(numbers.astype(np.uint8))


def masks_of(images, ids):
    """The masks of the images at ids: n, each H W uint8. Raises UsageError if there are none."""
    if "masks" in images.targets:
        return list(images.targets["masks"][torch.as_tensor(ids)])
    if images.paths is not None:
        return [read_mask(images.paths[i]) for i in ids]
    raise UsageError("--data: this set has no masks; use shapes, or an imagefolder of pairs "
                     "ROOT/<split>/NAME.jpg, ROOT/<split>annot/NAME.png")


def pixels_of_classes(masks, size, grid, classes, void=255):
    """Pixels of each class in each patch of the images of these masks: n N C."""
    return torch.stack([count_pixels(mask, size, grid, classes, void) for mask in masks])
