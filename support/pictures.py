"""The pictures of a run: curves of its log, reconstructions of a few fixed images, and what shares
a pseudo label.

Here arrays are drawn, and nothing of the method is computed. A *picture* is an array that
matplotlib's imshow takes: H W 3 or H W, numbers in 0..1.

Letters:  B images, n samples, N patches of an image, D width of a token, C H W an image.
"""

import io
import math
from itertools import pairwise
from statistics import median_low

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

from support.files import write_atomically

matplotlib.use("Agg")                      # writes files, needs no screen

# Key of a loss in the log: its name in the legend, and key and name of the line that it should go
# below. A loss at its line has learned nothing: ln K is what it costs to predict 1/K for all
# clusters, the best constant is the best prediction that does not look at the image.
LOSSES = {
    "rec": ("reconstruction", "rec_constant", "best constant"),
    "image": ("image pseudo labels", "image_ln_k", "ln K (image)"),
    "patch": ("patch pseudo labels", "patch_ln_k", "ln K (patch)"),
    "consistency": ("consistency", None, None),
    "align": ("alignment", "align_variance", "variance of its target"),
    "contrast": ("contrast", "contrast_alike", "ln(N - 1)"),
}
LABELS = ("image", "patch")


def save(figure, path):
    """Write a figure as a PNG file, never half of one, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


# ------------------------------------------------------------------------------------------ curves

def curves(records, path):
    """Draw the log of a run over its epochs: records, the list of what metrics.jsonl holds.

    Left: the losses; dotted the line that each should go below. Middle, if there are pseudo labels:
    their health. Right: k-NN on held-out images, if there are any."""
    losses = whole_lines([r for r in records if "loss" in r])
    tests = [r for r in records if "knn_mean" in r]
    labelled = [name for name in LABELS if any(name in r for r in losses)]
    panels = 1 + bool(labelled) + bool(tests)
    figure, [axes] = plt.subplots(1, panels, figsize=(5 * panels, 4.5), squeeze=False,
                                  layout="constrained")
    draw_losses(axes[0], losses)
    if labelled:
        draw_health(axes[1], losses, labelled)
    if tests:
        draw_knn(axes[-1], tests)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            columns = 1 if labelled and axis is axes[1] else 2
            below = (0.5, -0.15)                             # inside the axis it would hide curves
            axis.legend(loc="upper center", bbox_to_anchor=below, ncols=columns, frameon=False)
    save(figure, path)


def whole_lines(records):
    """Those that are means over about as many steps as most. The others, of the few steps before a
    look, would be kinks."""
    steps = [math.inf, *(b["step"] - a["step"] for a, b in pairwise(records))]
    return [r for r, n in zip(records, steps) if 2 * n >= median_low(steps)]


def draw_losses(axis, records):
    """Each loss and, dotted in its colour, its line."""
    axis.set_title("training losses")
    for number, (key, (name, _, _)) in enumerate(LOSSES.items()):
        draw_line(axis, records, key, color=f"C{number}", label=name)
    for number, (_, bound, name) in enumerate(LOSSES.values()):
        draw_line(axis, records, bound, color=f"C{number}", linestyle=":", label=name)


def draw_health(axis, records, labelled):
    """Entropy and clusters in use of each kind of pseudo labels, as shares of what is possible."""
    axis.set(title="health of the pseudo labels", ylim=(0, 1.05))
    for name in labelled:
        color = f"C{list(LOSSES).index(name)}"
        ln_k = next(r[f"{name}_ln_k"] for r in records if f"{name}_ln_k" in r)
        legend = LOSSES[name][0]
        draw_line(axis, records, f"{name}_entropy", unit=ln_k, color=color,
                  label=f"{legend}: entropy / ln K")
        draw_line(axis, records, f"{name}_effective", unit=math.exp(ln_k), color=color,
                  linestyle="--", label=f"{legend}: effective clusters / K")


def draw_knn(axis, records):
    """Accuracy of k-NN on held-out images, of both tokens."""
    axis.set_title("k-NN on held-out images")
    axis.set_ylabel("accuracy, %")
    draw_line(axis, records, "knn_class", unit=0.01, color="C4", label="class token")
    draw_line(axis, records, "knn_mean", unit=0.01, color="C5", label="mean of patch tokens")


def draw_line(axis, records, key, unit=1.0, **style):
    """What the records hold under a key, in units, over the epochs; nothing if none holds it."""
    records = [r for r in records if key in r]
    if not records:
        return
    epochs = [r["epoch"] for r in records]
    values = [r[key] / unit for r in records]
    marker = "." if len(records) < 20 else None          # one or two points make no visible line
    axis.plot(epochs, values, marker=marker, **style)


# -------------------------------------------------------------------------------- rows of pictures

def to_pictures(imgs, mean, std):
    """Standardised images B C H W -> B pictures. mean, std: of each channel, as numbers."""
    mean = torch.tensor(mean)[:, None, None]
    std = torch.tensor(std)[:, None, None]
    imgs = (imgs.detach().cpu().float() * std + mean).clamp(0, 1)
    if imgs.shape[1] == 1:
        return list(imgs[:, 0].numpy())
    return list(imgs.permute(0, 2, 3, 1).numpy())


def mosaic(axis, rows, gap=0.08):
    """Draw rows, {name: pictures}, into an axis. gap: between pictures, as a share of their size.

    All is one image, since an axis for each picture would be slow to draw. Smaller pictures are
    magnified towards the size of the largest, by whole numbers."""
    everything = [picture for pictures in rows.values() for picture in pictures]
    height = max(picture.shape[0] for picture in everything)
    width = max(picture.shape[1] for picture in everything)
    border = max(1, round(gap * min(height, width)))
    columns = max(len(pictures) for pictures in rows.values())
    sheet_size = (len(rows) * (height + border) - border, columns * (width + border) - border, 3)
    sheet = np.ones(sheet_size)                                                          # white
    for row, pictures in enumerate(rows.values()):
        for column, picture in enumerate(pictures):
            if picture.ndim == 2:
                picture = picture[..., None]                        # grey: one value for 3 channels
            picture = picture.repeat(height // picture.shape[0], axis=0)
            picture = picture.repeat(width // picture.shape[1], axis=1)
            top = row * (height + border)
            left = column * (width + border)
            sheet[top:top + picture.shape[0], left:left + picture.shape[1]] = picture
    axis.imshow(sheet, interpolation="nearest")
    middles = [row * (height + border) + height / 2 for row in range(len(rows))]
    axis.set(xticks=[], yticks=middles, yticklabels=list(rows))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def draw_rows(rows, path):
    """Draw rows of pictures, {name: pictures}: reconstructions.png, attention.png."""
    columns = max(len(pictures) for pictures in rows.values())
    size = (1.3 * columns + 1.5, 1.4 * len(rows))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    mosaic(axis, rows)
    save(figure, path)


# ----------------------------------------------------------------------- what shares a pseudo label

def surroundings(picture, place, grid, reach=1):
    """A patch of a picture and `reach` >= 1 patches around it, grey beyond the edge; the patch is
    framed in white, on the pixels next to it.

    place: number of the patch, row by row; grid: rows and columns of patches."""
    patch_h = picture.shape[0] // grid[0]
    patch_w = picture.shape[1] // grid[1]
    margin_h = reach * patch_h
    margin_w = reach * patch_w
    margins = ((margin_h, margin_h), (margin_w, margin_w), (0, 0))
    padded = np.pad(picture, margins[:picture.ndim], constant_values=0.5)

    row, column = divmod(place, grid[1])
    top = row * patch_h                                   # of the cut: the margin has moved it
    left = column * patch_w
    cut = padded[top:top + patch_h + 2 * margin_h, left:left + patch_w + 2 * margin_w].copy()

    inside = (slice(margin_h, margin_h + patch_h), slice(margin_w, margin_w + patch_w))
    frame = np.zeros(cut.shape[:2], bool)
    frame[margin_h - 1:margin_h + patch_h + 1, margin_w - 1:margin_w + patch_w + 1] = True
    frame[inside] = False
    cut[frame] = 1
    return cut


def galleries(labels, certainty, pictures, grid=None, clusters=6, columns=8, chosen=()):
    """{cluster: pictures} of the samples that share a pseudo label, in each cluster the most
    certain samples first, at most one of an image.

    labels      integers, n (of images) or n N (of patches; then with grid, and shown in their
                surroundings)
    certainty   floats of the same shape: the cosine of a token with the prototype of its cluster.
                The labels' own probabilities would not do: at a low temperature all are 1
    pictures    n or more
    chosen      clusters to show; if empty, the commonest ones"""
    patches = 1 if grid is None else labels.shape[1]
    labels = np.asarray(labels).ravel()                                                  # (n N)
    certainty = np.asarray(certainty).ravel()
    sizes = np.bincount(labels)
    commonest = np.argsort(-sizes, kind="stable")[:clusters]
    rows = {}
    for cluster in chosen or commonest[sizes[commonest] > 0].tolist():
        members = np.flatnonzero(labels == cluster)
        members = members[np.argsort(-certainty[members], kind="stable")]
        _, first = np.unique(members // patches, return_index=True)       # the best of each image
        rows[cluster] = []
        for member in members[np.sort(first)][:columns].tolist():
            image, place = divmod(member, patches)
            picture = pictures[image]
            rows[cluster].append(picture if grid is None else surroundings(picture, place, grid))
    return rows


def clusters(found, pictures, grid, path):
    """Draw clusters.png: images, and patches in their surroundings, a row for each cluster.

    found: {"image": (labels n, cosines n, titles), "patch": (labels m N, cosines m N, titles)},
    one or both; they are of the first n and the first m of the pictures. titles: {cluster: text} of
    the clusters to show; if empty, the commonest."""
    titles = {
        "image": "images that share an image pseudo label",
        "patch": "patches that share a patch pseudo label",
    }
    size = (9 * len(found), 7)
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, (labels, cosines, chosen)) in zip(axes[0], found.items()):
        rows = galleries(labels, cosines, pictures, grid if name == "patch" else None,
                         chosen=list(chosen))
        axis.set_title(titles[name])
        mosaic(axis, {chosen.get(cluster, f"cluster {cluster}"): shown
                      for cluster, shown in rows.items()})
    save(figure, path)


# ------------------------------------------------------------------------------------- evaluations

def draw_neighbours(rows, title, path):
    """Draw neighbours.png. Each row is an image and those nearest to it: (picture, (caption, its
    colour)) of each."""
    columns = max(map(len, rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.2 * columns, 1.4 * len(rows)),
                                squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for each, row in zip(axes, rows):
        for axis, (picture, (caption, colour)) in zip(each, row):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axis.set_title(caption, fontsize=8, color=colour)
    figure.suptitle(f"{title}: an image, and those nearest to it", fontsize=9)
    save(figure, path)


def draw_components(points, shares, y, classes, title, path):
    """Draw components.png: points n 2, shares of the variance on each axis, y n (-1: unknown).

    The ten commonest classes have colours."""
    figure, axis = plt.subplots(figsize=(7, 5.5), layout="constrained")
    known = y[y >= 0]
    coloured = known.bincount().argsort(descending=True)[:10].sort().values if len(known) else []
    others = ~torch.isin(y, torch.as_tensor(coloured, dtype=y.dtype))
    axis.scatter(*points[others].T, s=8, color="lightgrey")
    for number, each in enumerate(coloured):
        axis.scatter(*points[y == each].T, s=8, color=f"C{number}", label=classes[each])
    for name, share, set_label in zip(("first", "second"), shares,
                                      (axis.set_xlabel, axis.set_ylabel)):
        set_label(f"{name} principal component ({share:.0%} of the variance)")
    axis.set_title(title, fontsize=9)
    if len(coloured):
        figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


def draw_few(curves, ylabel, guessing, path):
    """Draw scores over the number of training images. curves: {name: amounts (texts: "5", "10%"),
    images, scores, deviations}, four lists alike. guessing: the score of that, None if they differ.

    Images of each class and shares of all images are two lines, since a share may be fewer images
    or more."""
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    ticks = {}                             # where, and what is written there
    for number, (name, columns) in enumerate(curves.items()):
        for shares, style in ((False, "-"), (True, ":")):
            rows = [row for row in zip(*columns) if row[0].isdigit() != shares]
            _, images, scores, deviations = zip(*sorted(rows, key=lambda row: row[1]))
            axis.errorbar(images, [100 * each for each in scores],
                          [100 * each for each in deviations] if any(deviations) else None,
                          marker="o", markersize=4, capsize=3, color=f"C{number}", linestyle=style,
                          label=None if shares else name)
        for text, images, *_ in zip(*columns):
            ticks.setdefault(images, f"{text} each" if text.isdigit() else text)
    if guessing is not None:
        axis.axhline(100 * guessing, color="grey", linewidth=1, label="guessing")
    axis.set_xscale("log")
    axis.set_xticks(list(ticks), [f"{text} ({n})" for n, text in ticks.items()], fontsize=7,
                    rotation=60)
    axis.minorticks_off()
    axis.set(xlabel="training images: so many of each class, or (dotted) a share of all; in "
             "brackets the number", ylabel=f"{ylabel}, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)
