"""Draw the figure of the method: one step of `pl-mae`, from an image to its losses.

    python docs/draw_method.py        writes docs/method.png: some seconds on a CPU, no download

The pictures are real: a scene of `shapes`, cropped, recoloured and masked by the functions that
training uses. Labels and tokens are made up, as an example.

Everything stands on one axis, whose unit is an inch. The networks are three bands: the labelling
teacher above, the student, the reconstruction teacher below. So what a loss compares meets in the
gap between two bands, and hardly a line has to cross another. Where one does, it says something:
each view predicts the image pseudo label of the other one.
"""

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Line

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))              # so that a script in docs/ finds the modules

from data import crop_flip, recolour  # noqa: E402
from mae import patchify, random_masking, unpatchify  # noqa: E402
from support.shapes import SIDE, scene  # noqa: E402

matplotlib.use("Agg")                      # writes files, needs no screen

WIDTH, HEIGHT, DPI = 11, 6.95, 160
SMALL, NORMAL, LARGE = 10, 11, 13          # points; 10 are 11 pixels where the figure is 900 wide

# Each network has a colour, and a line style for those who print without colours.
INK = "#222222"
STUDENT = dict(color="#1f4e99", tint="#eef3fb", line="-")
LABELLING = dict(color="#b35900", tint="#fdf3e7", line="--")
RECONSTRUCTION = dict(color="#2b7a3d", tint="#edf6ee", line=":")
LOSS = "#9c1c2e"

SCENE = 69                                 # its crops share some objects
CROPS = [[8, 16, 46, 46], [2, 2, 46, 46]]  # top, left, height, width of view 1 and of view 2
STUDENT_COLOURS, TEACHER_COLOURS = (2, 9), (6, 11)         # seeds, for view 1 and for view 2
MASK_SEED, MASK_RATIO, PATCH = 18, 0.5, 8

# Made-up examples. A label is certain, a prediction less so. Views 1 and 2 predict each other's.
IMAGE_LABELS = [[0.02, 0.05, 0.03, 0.72, 0.08, 0.02, 0.06, 0.02],
                [0.03, 0.02, 0.05, 0.62, 0.02, 0.22, 0.02, 0.02]]
IMAGE_PREDICTIONS = [[0.07, 0.05, 0.10, 0.40, 0.07, 0.20, 0.05, 0.06],
                     [0.06, 0.11, 0.06, 0.46, 0.14, 0.04, 0.09, 0.04]]
PATCH_LABEL = [0.02, 0.75, 0.04, 0.02, 0.03, 0.08, 0.04, 0.02]
PATCH_PREDICTION = [0.07, 0.43, 0.09, 0.06, 0.08, 0.17, 0.06, 0.04]
PATCHES, VISIBLE, MASKED = range(5), (1, 3), (0, 2, 4)     # of the tokens that are drawn


# -------------------------------------------------------------------------------------- pictures

def draw_pictures():
    """The scene, and its two views {"student", "teacher", "masked": two pictures}."""
    image = torch.from_numpy(scene(SCENE)[0])[None] / 255                              # 1 C H W
    crops = crop_flip(image.expand(2, -1, -1, -1), torch.tensor(CROPS),
                      torch.tensor([False, False]), (SIDE, SIDE))                      # 2 C H W
    student = change_colours(crops, STUDENT_COLOURS)
    teacher = change_colours(crops, TEACHER_COLOURS)
    return to_pictures(image)[0], {"student": to_pictures(student),
                                   "teacher": to_pictures(teacher),
                                   "masked": to_pictures(hide_patches(student))}


def change_colours(views, seeds):
    """Views B C H W, recoloured as strongly as in training on `shapes`."""
    numbers = [torch.rand(6, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    numbers = torch.stack(numbers)                                                         # B 6
    numbers[:, 0] = 0                      # of five views four are changed: these are among them
    return recolour(views, numbers, strength=5.0)


def hide_patches(views):
    """Views B C H W with light grey in place of the masked patches."""
    patches = patchify(views, PATCH)                                                     # B N P
    noise = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(MASK_SEED))
    _, mask, _ = random_masking(noise, MASK_RATIO)                                         # B N
    return unpatchify(torch.where(mask[..., None] == 1, 0.93, patches), PATCH, SIDE)


def to_pictures(imgs):
    """Images B C H W -> B H W C, as arrays."""
    return imgs.permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------------------------- pieces

def text(axis, x, y, words, size=NORMAL, ha="center", **more):
    """Words whose middle is at the height y."""
    axis.text(x, y, words, size=size, color=INK, ha=ha, va="center", linespacing=1.2, **more)


def rectangle(axis, left, bottom, width, height, zorder, face="white", edge=INK, **more):
    """zorder: what has more of it lies on top."""
    axis.add_patch(Rectangle((left, bottom), width, height, facecolor=face, edgecolor=edge,
                             zorder=zorder, **more))


def rounded(axis, left, bottom, width, height, radius, **more):
    """A rectangle with round corners."""
    style = f"round,pad=0,rounding_size={radius}"
    axis.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, **more))


def band(axis, bottom, top, name, says, style):
    """The ground of a network, with its name and what it sees."""
    rounded(axis, 1.7, bottom, 9.2, top - bottom, 0.1, facecolor=style["tint"],
            edgecolor=style["color"], linestyle=style["line"], linewidth=1.5)
    title = axis.text(4.1, top - 0.26, name, size=LARGE, color=style["color"], weight="bold")
    axis.annotate(says, (1, 0), xycoords=title, xytext=(8, 0), textcoords="offset points",
                  size=NORMAL, color=INK, va="bottom")


def box(axis, x, y, width, height, words, color, linewidth=1.3):
    """A part of a network, or a loss, centred at x, y."""
    rounded(axis, x - width / 2, y - height / 2, width, height, 0.05, facecolor="white",
            edgecolor=color, linewidth=linewidth, zorder=3)
    text(axis, x, y - 0.01, words, zorder=4)


def arrow(axis, *points, width=1.3):
    """A line along the points, with a head at the last one."""
    axis.add_patch(FancyArrowPatch(
        path=Line(points), arrowstyle="-|>,head_length=5,head_width=2.5", shrinkA=0, shrinkB=0,
        color=INK, linewidth=width, joinstyle="miter", capstyle="butt", zorder=5))


def badge(axis, x, y, number):
    """The number of a view, in a disc."""
    axis.add_patch(Circle((x, y), 0.1, facecolor="white", edgecolor=INK, linewidth=1, zorder=6))
    text(axis, x, y - 0.01, number, SMALL, weight="bold", zorder=7)


def picture(axis, image, left, bottom, side, number=None, grid=1):
    """An image as a square. number: of the view. grid: lines between so many patches a side."""
    axis.imshow(image, extent=(left, left + side, bottom, bottom + side), zorder=2,
                interpolation="nearest")
    inner = np.arange(1, grid) / grid * side
    axis.vlines(left + inner, bottom, bottom + side, color="#b5b5b5", linewidth=0.5, zorder=2.5)
    axis.hlines(bottom + inner, left, left + side, color="#b5b5b5", linewidth=0.5, zorder=2.5)
    rectangle(axis, left, bottom, side, side, 3, face="none", linewidth=1)
    if number:
        badge(axis, left, bottom + side, number)


def bars(axis, left, bottom, values, color, number=None):
    """A label or a prediction: a small bar chart over K clusters. number: of the view."""
    width, height, margin = 0.6, 0.46, 0.04
    rectangle(axis, left, bottom, width, height, 3, linewidth=0.9)
    step = (width - 2 * margin) / len(values)
    for i, value in enumerate(values):
        rectangle(axis, left + margin + i * step, bottom, 0.8 * step, 1.2 * value * height, 3.5,
                  face=color, edge="none")
    if number:
        badge(axis, left, bottom + height, number)


def cards(axis, left, bottom, values, color):
    """A bar chart for each patch, as a stack of them."""
    for shift in (0.12, 0.06):
        rectangle(axis, left + shift, bottom + shift, 0.6, 0.46, 2.5 - shift, linewidth=0.9)
    bars(axis, left, bottom, values, color)


def class_token(axis, x, y, color):
    """A disc, so that it is not taken for the token of a patch."""
    axis.add_patch(Circle((x, y), 0.085, facecolor=color, edgecolor=INK, linewidth=1, zorder=4))


def patch_tokens(axis, x, y, color, shown, masked=()):
    """The tokens of patches, as a column of squares around x, y: masked ones are hatched."""
    for i in (*shown, *masked):
        token = dict(face="white", hatch="//////") if i in masked else dict(face=color)
        rectangle(axis, x - 0.07, y + 0.235 - 0.15 * i, 0.14, 0.13, 4, linewidth=0.9, **token)


def vectors(axis, left, bottom, doubt):
    """A token for each masked patch, as a row of numbers in greys. doubt: 0 for the targets, more
    for predictions of them."""
    rows, width, height = len(MASKED), 1.08, 0.13
    values = np.random.default_rng(3).uniform(0.1, 1, (rows, 9))
    values = values + doubt * (0.55 - values)
    for i, row in enumerate(values):
        y = bottom + i * height
        axis.imshow(row[None], cmap="gray", vmin=0, vmax=1, zorder=3, interpolation="nearest",
                    extent=(left, left + width, y, y + 0.1))
        rectangle(axis, left, y, width, 0.1, 4, face="none", linewidth=0.8)


# ---------------------------------------------------------------------------------------- figure

def draw_views(axis, image, views):
    """The image, its two crops, and these in the colours of the student and of the teachers."""
    left, bottom, side = 0.15, 2.85, 1.15
    picture(axis, image, left, bottom, side)
    text(axis, left + side / 2, bottom + side + 0.17, "image")
    text(axis, left + side / 2, bottom - 0.33, "two views:\nrandom crops")
    for number, (top, start, height, width) in enumerate(CROPS, start=1):
        x, y = left + start / SIDE * side, bottom + (1 - (top + height) / SIDE) * side
        width, height = width / SIDE * side, height / SIDE * side
        rectangle(axis, x, y, width, height, 3, face="none", edge="white", linewidth=1.6,
                  linestyle="-" if number == 1 else "--")
        badge(axis, *((x + width, y) if number == 1 else (x, y + height)), number)

    for number, y in enumerate((3.47, 2.57)):
        picture(axis, views["student"][number], 1.9, y, 0.74, number + 1)
        picture(axis, views["masked"][number], 3.06, y, 0.74, number + 1, SIDE // PATCH)
        for start, end in ((1.36, 1.87), (2.67, 3.03), (3.83, 4.12)):
            arrow(axis, (start, y + 0.37), (end, y + 0.37))
    for bottom in (5.58, 0.66):
        for number, x in enumerate((1.9, 2.82)):
            picture(axis, views["teacher"][number], x, bottom, 0.74, number + 1)
        arrow(axis, (3.59, bottom + 0.37), (4.12, bottom + 0.37))
    for end in (5.95, 1.03):                               # both views go to both teachers
        arrow(axis, (1.6, 3.4), (1.6, end), (1.87, end))
    text(axis, 1.5, 4.9, "teachers: same\ncrops, other\ncolours", ha="right")


def draw_labelling_teacher(axis):
    """Patch tokens above the class token, as the image pseudo labels have to leave downwards."""
    color = LABELLING["color"]
    box(axis, 4.6, 5.95, 0.95, 1.06, "encoder", color)
    patch_tokens(axis, 5.42, 6.12, color, PATCHES)
    class_token(axis, 5.42, 5.58, color)
    box(axis, 6.23, 5.95, 1, 1.06, "heads with\nprototypes", color)
    box(axis, 7.42, 5.95, 0.92, 1.06, "Sinkhorn\nbalancing", color)
    for y in (5.58, 6.12):
        arrow(axis, (5.08, y), (5.32, y))
        arrow(axis, (5.53, y), (5.72, y))
        arrow(axis, (6.74, y), (6.95, y))
    arrow(axis, (7.89, 5.66), (8.12, 5.66))
    arrow(axis, (7.89, 6.36), (9.96, 6.36))
    text(axis, 8.86, 6.2, "image pseudo labels", SMALL)
    text(axis, 10.82, 6.74, "patch pseudo labels", SMALL, ha="right")
    for number, x in enumerate((8.15, 8.89)):
        bars(axis, x, 5.54, IMAGE_LABELS[number], color, number + 1)
    cards(axis, 9.99, 6, PATCH_LABEL, color)


def draw_student(axis):
    """Above, what the class token predicts; below, what the patches do."""
    color = STUDENT["color"]
    box(axis, 4.6, 3.34, 0.95, 1.42, "encoder", color)
    # The class token predicts the image pseudo label.
    class_token(axis, 5.42, 3.92, color)
    text(axis, 5.56, 3.75, "class token $z_c$", SMALL, ha="left")
    box(axis, 7.06, 3.92, 1, 0.3, "image head", color)
    arrow(axis, (5.08, 3.92), (5.32, 3.92))
    arrow(axis, (5.52, 3.92), (6.55, 3.92))
    arrow(axis, (7.57, 3.92), (8.12, 3.92))
    for number, x in enumerate((8.15, 8.89)):
        bars(axis, x, 3.74, IMAGE_PREDICTIONS[number], color, number + 1)
    # The patch tokens go into the decoder, with a mask token at each masked place.
    patch_tokens(axis, 5.42, 3.05, color, VISIBLE)
    patch_tokens(axis, 6.15, 3.05, color, VISIBLE, MASKED)
    text(axis, 5.42, 2.56, "visible", SMALL)
    text(axis, 5.78, 2.56, "+ mask tokens", SMALL, ha="left")
    box(axis, 7.06, 3.05, 1, 0.72, "decoder", color)
    patch_tokens(axis, 8.02, 3.05, color, (), MASKED)
    for start, end in ((5.08, 5.32), (5.53, 6.02), (6.28, 6.53), (7.57, 7.9)):
        arrow(axis, (start, 3.05), (end, 3.05))
    # From its states a token and a cluster are predicted; of a visible patch only a cluster.
    arrow(axis, (5.42, 3.3), (5.42, 3.54), (8.35, 3.54))
    arrow(axis, (8.13, 3.3), (8.35, 3.3))
    box(axis, 8.87, 3.42, 0.98, 0.38, "patch head", color)
    arrow(axis, (9.37, 3.42), (9.96, 3.42))
    cards(axis, 9.99, 3.22, PATCH_PREDICTION, color)
    text(axis, 10.82, 3.08, "predicted clusters", SMALL, ha="right")
    arrow(axis, (8.13, 2.75), (8.6, 2.75))
    vectors(axis, 8.65, 2.57, 0.45)
    text(axis, 9.85, 2.7, "predicted\ntokens", SMALL, ha="left")


def draw_reconstruction_teacher(axis):
    """Its patch tokens are the targets; its class token has no use and is not drawn."""
    color = RECONSTRUCTION["color"]
    box(axis, 4.6, 1.03, 0.95, 0.75, "encoder", color)
    patch_tokens(axis, 5.42, 1.03, color, PATCHES)
    box(axis, 6.37, 1.03, 1.1, 0.4, "standardise", color)
    for start, end in ((5.08, 5.32), (5.53, 5.8), (6.93, 8.6)):
        arrow(axis, (start, 1.03), (end, 1.03))
    text(axis, 7.72, 1.18, "at masked places", SMALL)
    vectors(axis, 8.65, 0.85, 0)
    text(axis, 9.85, 1.03, "target\ntokens", SMALL, ha="left")


def draw_legend(axis):
    """What the signs mean, in the corner below the image."""
    grey, x = "#777777", 0.34
    class_token(axis, x, 1.66, grey)
    patch_tokens(axis, x, 1.12, grey, (0,))
    patch_tokens(axis, x, 0.88, grey, (), (0,))
    bars(axis, 0.15, 0.55, PATCH_PREDICTION, grey)
    words = ("class token", "patch token", "masked", "$K$ clusters")
    for y, left, meaning in zip((1.66, 1.42, 1.18, 0.78), (0.56, 0.56, 0.56, 0.86), words):
        text(axis, left, y, meaning, SMALL, ha="left")


def draw_losses(axis):
    """Each between what is predicted and what should have been; their sum at the foot."""
    box(axis, 8.82, 4.83, 1.3, 0.5, r"$L_\mathrm{image}$" "\ncross-entropy", LOSS, 2)
    box(axis, 10.22, 4.83, 1.3, 0.5, r"$L_\mathrm{patch}$" "\ncross-entropy", LOSS, 2)
    box(axis, 9.19, 2.07, 2.1, 0.34, r"$L_\mathrm{rec}$  mean squared error", LOSS, 2)
    # Each view predicts the image pseudo label of the other one.
    arrow(axis, (8.45, 5.53), (9.19, 5.1))
    arrow(axis, (9.19, 5.53), (8.45, 5.1))
    text(axis, 8.06, 4.83, "each view predicts\nthe other's pseudo label", SMALL, ha="right")
    for x, start in ((8.45, 4.22), (9.19, 4.22), (10.29, 3.8)):
        arrow(axis, (x, start), (x, 4.56))
    arrow(axis, (10.29, 5.98), (10.29, 5.1))
    arrow(axis, (9.19, 2.55), (9.19, 2.26))
    arrow(axis, (9.19, 1.24), (9.19, 1.88))
    terms = [rf"w_\mathrm{{{name}}}\,L_\mathrm{{{name}}}"
             for name in ("rec", "image", "patch", "koleo")]
    text(axis, 1.7, 0.28, r"$L \;=\; " + r" \;+\; ".join(terms) + "$", LARGE, ha="left")
    text(axis, 10.9, 0.28, r"$L_\mathrm{koleo}$ keeps class tokens of different images apart",
         SMALL, ha="right")


def draw_averages(axis):
    """After each optimiser step both teachers follow the student."""
    for start, end in ((4.46, 5.32), (2.4, 1.78)):
        head = end - 0.15 * np.sign(end - start)
        axis.plot([4.6, 4.6], [start, head], color=INK, linewidth=2.2, linestyle=(0, (3, 1.5)))
        arrow(axis, (4.6, head), (4.6, end), width=2.2)
    text(axis, 4.76, 4.9, "EMA after each step:\nencoder and heads,\nown half-life", ha="left")
    text(axis, 4.76, 2.08, "EMA after each step:\nencoder, own half-life", ha="left")


def main():
    image, views = draw_pictures()
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")

    sees_all = "sees whole views, no gradient"
    band(axis, 5.35, 6.9, "labelling teacher", sees_all, LABELLING)
    band(axis, 2.4, 4.46, "student", "sees the visible patches only", STUDENT)
    band(axis, 0.55, 1.75, "reconstruction teacher", sees_all, RECONSTRUCTION)
    draw_views(axis, image, views)
    draw_labelling_teacher(axis)
    draw_student(axis)
    draw_reconstruction_teacher(axis)
    draw_losses(axis)
    draw_legend(axis)
    draw_averages(axis)

    # Last, as imshow changes the limits.
    axis.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    figure.savefig(ROOT / "docs" / "method.png", dpi=DPI)


if __name__ == "__main__":
    main()
