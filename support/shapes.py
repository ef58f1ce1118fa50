"""`shapes`: a data set that needs no download.

A scene has 64 x 64 pixels: one to four overlapping objects on a textured ground. It is a function
of its index. Objects are turned, stretched, shaded, partly hidden or partly outside. Their colours
and textures say nothing about their kind, so comparing pixels (k-NN) is of little use.

Known of a scene: its class (the kind of the object with the largest visible area), which kinds are
visible (multi-label), a segmentation mask, and of each object its box and its pixels. 6,000 scenes
to train on and 2,000 to test on are drawn once, in a quarter of a minute, and kept under the data
root.

How it came to be. Version 1 was the first of six drafts on which the k-NN of the recipe `mae` rose
within minutes. Since then drafts were compared by two numbers that no recipe has a part in:

- k-NN on the pixels of held-out images, which has to be low;
- k-NN of a *supervised* micro encoder after so many views, one run each, which has to be high.

| draft | k-NN on pixels | supervised | views |
|---|---|---|---|
| version 1 | 24.9 % | 33 % | 26,880 |
| version 2: more colours, weaker textures | 21.3 % | 33 % | 21,504 |
| version 3: kinds differ in their parts too | 20.5 % | 70 % (49 % after 10,752) | 21,504 |
| the same, objects further out: **in use** | 18.5 % | 65 % (41 % after 10,752) | 21,504 |
| the same, still further out | 17.7 % | 41 % | 10,752 |
| the same, grounds lighter than objects in half of the scenes | 19.0 % | 38 % | 10,752 |

Kinds of versions 1 and 2 differed in the outline alone (heart, crescent, ...), which takes a small
network long to learn; those of version 3 also have holes, teeth or bars. `pl-mae` was run on the
first draft of version 3 (35 % after 8 epochs) before the other three were drawn. The version is
part of the file's name on the disk.

    python -m support.shapes [PICTURE.png]        draws some scenes with their masks and boxes
"""

import sys
from pathlib import Path

import numpy as np
import torch

from support.command_line import make_folder
from support.files import write_atomically

SIDE = 64
OBJECTS = 4                                                    # the most in a scene
VERSION = 3                                                    # of how scenes are drawn
KEPT = 1                                                       # of what is kept of them
SCENES = {"train": (0, 6000), "test": (1_000_000, 2000)}       # first index, number


# ----------------------------------------------------------------------------------------- kinds
# Each function says which points (u, v) of the square -1..1 belong to its kind.

def disc(u, v):
    return u**2 + v**2 < 0.7


def triangle(u, v):
    return np.maximum(-v, np.sqrt(0.75) * np.abs(u) + v / 2) < 0.45


def star(u, v):
    r, angle = polar(u, v)
    return r * (1 + 0.9 * np.abs(((angle * 5 / np.pi) % 2) - 1)) < 1


def ring(u, v):
    return np.abs(np.hypot(u, v) - 0.75) < 0.2


def cross(u, v):
    bars = np.minimum(np.abs(u), np.abs(v)) < 0.28
    return bars & within(0.95, u, v)


def gear(u, v):
    r, angle = polar(u, v)
    return (r < 0.7 + 0.22 * np.sign(np.cos(9 * angle))) & (r > 0.25)


def target(u, v):
    r = np.hypot(u, v)
    return (r < 0.95) & (np.cos(r * 2.5 * np.pi) > 0)


def stripes(u, v):
    return within(0.85, u, v) & (np.cos(v * 3 / 0.85 * np.pi) < 0)


def lattice(u, v):
    across, along = np.cos(u * 3 / 0.85 * np.pi), np.cos(v * 3 / 0.85 * np.pi)
    return within(0.85, u, v) & (np.minimum(across, along) < 0.1)


def dots(u, v):
    waves = np.cos(u * 3.33 * np.pi) + np.cos(v * 3.33 * np.pi)
    return within(0.9, u, v) & (waves > 0.3)


def polar(u, v):
    return np.hypot(u, v), np.arctan2(v, u)


def within(side, u, v):
    return np.maximum(np.abs(u), np.abs(v)) < side


KINDS = {
    "disc": disc,
    "triangle": triangle,
    "star": star,
    "ring": ring,
    "cross": cross,
    "gear": gear,
    "target": target,
    "stripes": stripes,
    "lattice": lattice,
    "dots": dots,
}


# ---------------------------------------------------------------------------------------- scenes

def texture(rng, x, y, colour):
    """Two colours around `colour`, mixed by a few random waves: 3 H W."""
    value = np.zeros_like(x)
    for _ in range(3):
        angle = rng.uniform(0, 2 * np.pi)
        frequency = rng.uniform(1, 5)
        phase = rng.uniform(0, 2 * np.pi)
        value += np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    mix = 1 / (1 + np.exp(-rng.uniform(0.5, 4) * value))
    a, b = colour[:, None, None] + rng.uniform(-0.1, 0.1, (2, 3, 1, 1))
    return a * mix + b * (1 - mix)


def random_colour(rng, low, high):
    """A colour with a brightness in low..high (a channel that leaves 0..1 is clipped later)."""
    chroma = rng.uniform(-1, 1, 3)
    return rng.uniform(low, high) + 0.35 * (chroma - chroma @ [0.3, 0.59, 0.11])


def halve(a):
    """Means of squares of 2 x 2: 2H 2W -> H W."""
    return a.reshape(SIDE, 2, SIDE, 2).mean((1, 3))


def scene(index):
    """Scene number `index`: image, label, multilabel, mask, owner, boxes.

    image 3 H W uint8, multilabel (10), mask H W uint8 (0 the ground, 1 + kind), owner H W uint8 (0
    the ground, 1 + number of the object), boxes 4 5: of each object left, top, right, bottom in
    pixels, and the kind; rows of -1 of objects that are not there or not to be seen."""
    rng = np.random.default_rng([VERSION, index])
    fine = (np.arange(2 * SIDE) + 0.5) / SIDE - 1              # two samples a pixel: smooth edges
    fine_y, fine_x = np.meshgrid(fine, fine, indexing="ij")
    x, y = halve(fine_x), halve(fine_y)

    image = texture(rng, x, y, random_colour(rng, 0.15, 0.45))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    owner = np.zeros((SIDE, SIDE), np.uint8)                   # 1 + the object on top
    count = rng.integers(1, OBJECTS + 1)
    largest = rng.uniform(0.45, 0.7)
    radii = largest * np.concatenate([[1], rng.uniform(0.25, 0.5, count - 1)])
    kinds = rng.integers(0, len(KINDS), count)
    for k in rng.permutation(count):                           # the last one lies on top
        turn = rng.uniform(0, 2 * np.pi)
        stretch = rng.uniform(0.8, 1.25)
        centre_x, centre_y = rng.uniform(-1, 1, 2) * (1 - 0.5 * radii[k])
        cos, sin = np.cos(turn), np.sin(turn)
        dx, dy = (fine_x - centre_x) / radii[k], (fine_y - centre_y) / radii[k]
        u, v = (cos * dx + sin * dy) * stretch, (cos * dy - sin * dx) / stretch
        belongs = list(KINDS.values())[kinds[k]](u, v)
        cover = halve(belongs.astype(float))                   # share of each pixel that it covers

        light = rng.uniform(0, 2 * np.pi)
        towards = np.cos(light) * (x - centre_x) + np.sin(light) * (y - centre_y)
        shade = 1 + 0.35 * np.clip(towards / radii[k], -1, 1)
        surface = np.clip(texture(rng, x, y, random_colour(rng, 0.55, 0.85)) * shade, 0, 1)
        image = image * (1 - cover) + surface * cover
        mask[cover > 0.5] = 1 + kinds[k]
        owner[cover > 0.5] = 1 + k
    image = np.clip(image + rng.normal(0, 0.01, image.shape), 0, 1)

    multilabel = np.zeros(len(KINDS), np.uint8)
    boxes = np.full((OBJECTS, 5), -1, np.int16)
    areas = np.array([(owner == 1 + k).sum() for k in range(count)])
    for k in np.flatnonzero(areas):
        rows, columns = np.nonzero(owner == 1 + k)
        boxes[k] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, kinds[k]
        multilabel[kinds[k]] = 1
    image = (image * 255).round().astype(np.uint8)
    return image, kinds[areas.argmax()], multilabel, mask, owner, boxes


def load_shapes(root, split):
    """pixels, y, classes, targets of a split, drawn if they are not under root yet.

    pixels n 3 64 64 uint8; targets: multilabel n 10, masks and owners n 64 64, boxes n 4 5."""
    path = Path(root) / "shapes" / f"{split}-v{VERSION}.{KEPT}.npz"
    if not path.exists():
        make_folder(path.parent, "--data-root")
        print(f"drawing the {split} scenes of shapes (once; kept in {path})", file=sys.stderr)
        first, number = SCENES[split]
        scenes = [scene(first + i) for i in range(number)]
        names = ("pixels", "labels", "multilabel", "masks", "owners", "boxes")
        columns = {name: np.stack(column) for name, column in zip(names, zip(*scenes))}
        write_atomically(path, lambda file: np.savez(file, **columns))
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    return arrays.pop("pixels"), arrays.pop("labels"), list(KINDS), arrays


# --------------------------------------------------------------------------------------- a look

def draw_scenes(path):
    """A picture of 30 scenes; below each its mask and boxes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(6, 10, figsize=(15, 9.5))
    for i, (top, bottom) in enumerate(zip(axes[::2].flat, axes[1::2].flat)):
        image, kind, _, mask, _, boxes = scene(i)
        top.imshow(image.transpose(1, 2, 0))
        top.set_title(list(KINDS)[kind], fontsize=9)
        bottom.imshow(mask, cmap="tab20", vmin=0, vmax=len(KINDS), interpolation="nearest")
        for left, upper, right, lower, _ in boxes[boxes[:, 4] >= 0]:
            corner, width, height = (left - 0.5, upper - 0.5), right - left, lower - upper
            bottom.add_patch(plt.Rectangle(corner, width, height, fill=False, color="white"))
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    draw_scenes(sys.argv[1] if len(sys.argv) > 1 else "shapes.png")
