"""Draw what each relative of MAE changes: six panels of one form.

    python docs/draw_relatives.py     writes docs/relatives.png: some seconds on a CPU, no download

From left to right a panel has what the network sees, who predicts, and what is compared. What a
method changes in MAE is in its colour; what it shares with MAE is grey. The pictures are real:
scenes of `shapes`, masked as training masks them.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]             # so that a script in docs/ finds them

from draw_method import (  # noqa: E402
    DPI,
    LABELLING,
    LARGE,
    RECONSTRUCTION,
    SMALL,
    STUDENT,
    arrow,
    box,
    picture,
    rounded,
    text,
)

from data import recolour  # noqa: E402
from extras.relatives.sdae import fold_tokens  # noqa: E402
from mae import patchify, random_masking, unpatchify  # noqa: E402
from support.shapes import SIDE, scene  # noqa: E402

WIDTH, HEIGHT, PATCH = 11, 8.4, 8
GREY, HIDDEN = "#777777", 0.93
PANELS = {                                 # name: what it changes, in a line
    "MAE": "predicts the pixels of masked patches",
    "SdAE": "predicts a teacher's tokens, made fold by fold",
    "CAE": "a regressor predicts tokens, a decoder draws them",
    "MixedAE": "four images share one sequence",
    "GreenMIM": "window attention on visible patches, in groups",
    "this project": "pseudo labels, and two teachers",
}


# -------------------------------------------------------------------------------------- pictures

def images(numbers):
    """Scenes n C H W, 0..1."""
    return torch.stack([torch.from_numpy(scene(number)[0]) for number in numbers]) / 255


def show(imgs, seen):
    """Images n C H W with light grey in place of the patches that are not seen (n N)."""
    patches = patchify(imgs, PATCH)
    shown = unpatchify(torch.where(seen[..., None], patches, HIDDEN), PATCH, SIDE)
    return shown.permute(0, 2, 3, 1).numpy()


def noise_of(seed):
    return torch.rand(1, 64, generator=torch.Generator().manual_seed(seed))


def draw_pictures():
    """{name: pictures of what the encoder sees}, and of its teacher or of the alignment."""
    one, noise = images([69]), noise_of(18)
    visible = random_masking(noise, 0.75)[1] == 0                                          # 1 N
    random_half = random_masking(noise, 0.5)[1] == 0
    recoloured = recolour(one, torch.tensor([[0.0, 0.6, 0.5, 0.6, 0.95, 1.0]]), strength=5.0)
    found = {"other colours": show(recoloured, torch.ones_like(visible))[0],
             "visible": show(one, visible)[0],
             "random half": show(one, random_half)[0]}
    # SdAE: the folds that its teacher gets.
    ids, _ = fold_tokens(lambda imgs, ids: torch.zeros(len(imgs), 1 + ids.shape[1], 4), one, 0.75,
                         noise, 3)
    folds = torch.zeros(3, 64, dtype=torch.bool).scatter(1, ids.view(3, 16), True)
    found["folds"] = show(one.expand(3, -1, -1, -1), folds)
    # CAE: half, in blocks.
    blocks = F.avg_pool2d(F.pad(noise.view(1, 8, 8), (1, 1, 1, 1), "replicate"), 3, 1).flatten(1)
    half = random_masking(blocks, 0.5)[1] == 0
    found["half"], found["other half"] = show(one, half)[0], show(one, ~half)[0]
    # MixedAE: four images in the places of one.
    four = images([69, 5, 12, 23])
    owner = noise[0].argsort().argsort() // 16                                             # N
    mix = patchify(four, PATCH)[owner, torch.arange(64)]                                   # N P
    found["four"] = show(four, torch.ones(4, 64, dtype=torch.bool))
    found["mix"] = unpatchify(mix[None], PATCH, SIDE)[0].permute(1, 2, 0).numpy()
    return found


# ---------------------------------------------------------------------------------------- panels

def panel(axis, left, bottom, name, style):
    """The ground of a panel, its name, and what it changes."""
    rounded(axis, left, bottom, 5.3, 2.56, 0.1, facecolor=style["tint"], edgecolor=style["color"],
            linestyle=style["line"], linewidth=1.5)
    title = axis.text(left + 0.14, bottom + 2.28, name, size=LARGE, color=style["color"],
                      weight="bold")
    axis.annotate(PANELS[name], (1, 0), xycoords=title, xytext=(8, 0), textcoords="offset points",
                  size=SMALL, va="bottom")


def student_row(axis, x, y, image, color=GREY, says="encoder"):
    """What is seen, the encoder, the decoder, the loss. color: of the encoder."""
    picture(axis, image, x + 0.14, y - 0.4, 0.8, grid=8)
    box(axis, x + 1.75, y, 0.95, 0.5, says, color)
    box(axis, x + 3.05, y, 0.95, 0.5, "decoder", GREY)
    box(axis, x + 4.5, y, 1.2, 0.5, "pixels, MSE", GREY)
    for start, end in ((0.97, 1.25), (2.25, 2.55), (3.55, 3.88)):
        arrow(axis, (x + start, y), (x + end, y))


def draw_mae(axis, x, y, shown):
    panel(axis, x, y, "MAE", dict(color=GREY, tint="#f5f5f5", line="-"))
    student_row(axis, x, y + 1.3, shown["visible"])
    text(axis, x + 0.54, y + 0.74, "a quarter", SMALL)
    text(axis, x + 3.05, y + 0.86, "with mask tokens", SMALL)


def draw_sdae(axis, x, y, shown):
    color = RECONSTRUCTION["color"]
    panel(axis, x, y, "SdAE", RECONSTRUCTION)
    picture(axis, shown["visible"], x + 0.14, y + 1.3, 0.8, grid=8)
    box(axis, x + 1.75, y + 1.7, 0.95, 0.5, "encoder", GREY)
    box(axis, x + 3.05, y + 1.7, 0.95, 0.5, "decoder", GREY)
    for start, end in ((0.97, 1.25), (2.25, 2.55)):
        arrow(axis, (x + start, y + 1.7), (x + end, y + 1.7))
    for number, fold in enumerate(shown["folds"]):
        picture(axis, fold, x + 0.14 + 0.62 * number, y + 0.42, 0.56, grid=8)
    box(axis, x + 2.75, y + 0.7, 1.15, 0.5, "encoder,\naverage", color)
    arrow(axis, (x + 1.98, y + 0.7), (x + 2.15, y + 0.7))
    box(axis, x + 4.5, y + 1.2, 1.2, 0.5, "tokens\ncosine", color, 2)
    arrow(axis, (x + 3.55, y + 1.7), (x + 4.5, y + 1.7), (x + 4.5, y + 1.48))
    arrow(axis, (x + 3.35, y + 0.7), (x + 4.5, y + 0.7), (x + 4.5, y + 0.92))
    text(axis, x + 0.14, y + 0.22, "the rest, in three folds, one at a time", SMALL, "left")


def draw_cae(axis, x, y, shown):
    color = LABELLING["color"]
    panel(axis, x, y, "CAE", LABELLING)
    for image, height, words in ((shown["half"], 1.3, "encoder"),
                                 (shown["other half"], 0.25, "the same,\nno gradient")):
        picture(axis, image, x + 0.14, y + height, 0.8, grid=8)
        own = GREY if height > 1 else color
        box(axis, x + 1.6, y + height + 0.4, 0.95, 0.5, words, own)
        arrow(axis, (x + 0.97, y + height + 0.4), (x + 1.1, y + height + 0.4))
    box(axis, x + 2.72, y + 1.7, 0.9, 0.5, "regressor", color)
    box(axis, x + 3.93, y + 1.7, 0.78, 0.5, "decoder", color)
    box(axis, x + 4.84, y + 1.7, 0.6, 0.5, "pixels\nMSE", GREY)
    for start, end in ((2.1, 2.25), (3.19, 3.52), (4.34, 4.52)):
        arrow(axis, (x + start, y + 1.7), (x + end, y + 1.7))
    box(axis, x + 3.3, y + 0.65, 1.2, 0.5, "tokens, MSE:\nalign", color, 2)
    arrow(axis, (x + 2.1, y + 0.65), (x + 2.68, y + 0.65))
    arrow(axis, (x + 3.3, y + 1.7), (x + 3.3, y + 0.93))


def draw_mixedae(axis, x, y, shown):
    color = "#6b3fa0"
    panel(axis, x, y, "MixedAE", dict(color=color, tint="#f5f0fb", line="-."))
    for number, image in enumerate(shown["four"]):
        picture(axis, image, x + 0.14 + 0.43 * (number % 2), y + 1.35 - 0.43 * (number // 2), 0.4)
    picture(axis, shown["mix"], x + 1.25, y + 0.92, 0.83, grid=8)
    arrow(axis, (x + 1, y + 1.34), (x + 1.22, y + 1.34))
    box(axis, x + 2.78, y + 1.34, 0.95, 0.62, "encoder,\nTopK", color)
    arrow(axis, (x + 2.1, y + 1.34), (x + 2.28, y + 1.34))
    box(axis, x + 3.95, y + 1.75, 0.85, 0.5, "decoder", GREY)
    box(axis, x + 4.88, y + 1.75, 0.66, 0.5, "pixels\nMSE", GREY)
    box(axis, x + 4.4, y + 0.75, 1.5, 0.5, "contrast: who is\nof one image", color, 2)
    arrow(axis, (x + 3.28, y + 1.45), (x + 3.38, y + 1.75), (x + 3.5, y + 1.75))
    arrow(axis, (x + 4.4, y + 1.75), (x + 4.53, y + 1.75))
    arrow(axis, (x + 3.28, y + 1.2), (x + 3.38, y + 0.75), (x + 3.62, y + 0.75))
    text(axis, x + 3.95, y + 1.35, "each by itself", SMALL)
    text(axis, x + 1.66, y + 0.74, "a quarter of each", SMALL)


def draw_greenmim(axis, x, y, shown):
    color = "#00707a"
    panel(axis, x, y, "GreenMIM", dict(color=color, tint="#eaf6f6", line=(0, (5, 1, 1, 1))))
    student_row(axis, x, y + 1.62, shown["visible"], color, "grouped\nattention")
    for line in (0.2, 0.4, 0.6):                           # the windows
        axis.plot([x + 0.14, x + 0.94], [y + 1.22 + line] * 2, color=color, linewidth=1, zorder=4)
        axis.plot([x + 0.14 + line] * 2, [y + 1.22, y + 2.02], color=color, linewidth=1, zorder=4)
    left, letters = x + 0.2, ("AAAA", "BCCC", "DD··")
    for number, letters_of in enumerate(letters):
        for i, letter in enumerate(letters_of):
            place = left + 1.05 * number + 0.22 * i
            shade = {"A": "#bfe0e2", "B": "#7fc2c6", "C": "#d9efef", "D": "#a0d2d5"}
            face = shade.get(letter, "white")
            axis.add_patch(plt.Rectangle((place, y + 0.55), 0.22, 0.26, facecolor=face,
                                         edgecolor=color, zorder=3))
            text(axis, place + 0.11, y + 0.67, letter, SMALL, zorder=4)
    text(axis, left, y + 0.3, "windows A to D in groups of four places", SMALL, "left")
    text(axis, x + 3.35, y + 0.68, "two stages: half as wide,\nthen merged 2 × 2", SMALL, "left")


def draw_ours(axis, x, y, shown):
    color = STUDENT["color"]
    panel(axis, x, y, "this project", STUDENT)
    picture(axis, shown["random half"], x + 0.14, y + 1.28, 0.8, grid=8)
    picture(axis, shown["other colours"], x + 0.14, y + 0.2, 0.8)
    box(axis, x + 1.75, y + 1.68, 0.95, 0.5, "encoder", GREY)
    box(axis, x + 3, y + 1.92, 0.9, 0.34, "heads", color)
    box(axis, x + 3, y + 1.42, 0.9, 0.34, "decoder", GREY)
    box(axis, x + 2.1, y + 0.6, 1.65, 0.6, "two averages\nof the encoder", color)
    box(axis, x + 4.3, y + 1.92, 1.15, 0.36, "pseudo labels", color, 2)
    box(axis, x + 4.3, y + 1.42, 1.15, 0.36, "tokens, MSE", color, 2)
    for start, end, height in ((0.97, 1.25, 1.68), (3.47, 3.7, 1.92), (3.47, 3.7, 1.42),
                               (0.97, 1.25, 0.6)):
        arrow(axis, (x + start, y + height), (x + end, y + height))
    for height in (1.92, 1.42):
        arrow(axis, (x + 2.25, y + 1.68), (x + 2.35, y + height), (x + 2.53, y + height))
    arrow(axis, (x + 2.95, y + 0.45), (x + 5.1, y + 0.45), (x + 5.1, y + 1.92), (x + 4.9, y + 1.92))
    arrow(axis, (x + 2.95, y + 0.75), (x + 4.3, y + 0.75), (x + 4.3, y + 1.22))
    text(axis, x + 3, y + 0.9, "slow", SMALL, "left")
    text(axis, x + 3, y + 0.3, "fast", SMALL, "left")


def main():
    shown = draw_pictures()
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    draw = (draw_mae, draw_sdae, draw_cae, draw_mixedae, draw_greenmim, draw_ours)
    for number, each in enumerate(draw):
        each(axis, 0.13 + 5.44 * (number % 2), 5.71 - 2.79 * (number // 2), shown)
    axis.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")        # last: imshow changes them
    figure.savefig(ROOT / "docs" / "relatives.png", dpi=DPI)


if __name__ == "__main__":
    main()
