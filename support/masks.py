"""Segmentation masks: of each pixel a number, that of its class. And files that hold such masks.

Letters:  n images, N patches of an image, H W height and width.
"""

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as TF

from support.command_line import UsageError

ORIENTATION = 0x0112               # the number of that entry in EXIF data


def seen_part(mask, size):
    """The part of a mask H W that the network sees of its image: the centre of the shape of `size`
    (H, W), as in `support.images.fit`. It is not resized."""
    H, W = mask.shape
    scale = max(size[0] / H, size[1] / W)
    return TF.center_crop(mask, [min(H, round(size[0] / scale)), min(W, round(size[1] / scale))])


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


def read_mask(path):
    """The mask of the image at path: H W uint8. Raises UsageError for one that is none."""
    file = mask_path(path)
    try:
        mask = Image.open(file)
        mask.load()
    except (UnidentifiedImageError, OSError) as error:
        raise UsageError(f"--data-root: {path} has no mask {file} ({type(error).__name__}); "
                         "each image needs one, DIR/train/NAME.jpg and DIR/trainannot/NAME.png, "
                         "likewise test") from error
    if mask.mode not in ("L", "P", "1"):
        raise UsageError(f"--data-root: the mask {file} has pixels of the kind {mask.mode}; write "
                         "the number of the class in one channel of 8 bits")
    with Image.open(path) as image:
        size = image.size
        if image.getexif().get(ORIENTATION, 1) > 4:        # a quarter turn: `decode` turns it back
            size = size[::-1]
    if size != mask.size:
        raise UsageError(f"--data-root: the mask {file} has {mask.size} pixels, its image "
                         f"{size}, upright; make them alike")
    return torch.from_numpy(np.array(mask, dtype=np.uint8))


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
