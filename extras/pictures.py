"""The pictures of a run: curves of its log, and reconstructions of a few fixed images."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from checkpoint import read_json_lines, write_atomically
from mae import patchify, unpatchify
from pseudo_labels import make_labels
from teachers import standardise


def save(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def curves(log, path):
    """Training loss and held-out k-NN over the epochs, from metrics.jsonl."""
    records = read_json_lines(log)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    losses = [r for r in records if "loss" in r]
    left.plot([r["epoch"] for r in losses], [r["loss"] for r in losses], marker="." if len(losses) < 20 else None)
    left.set(title="training loss", xlabel="epoch", ylabel="mean squared error, masked patches")
    tests = [r for r in records if "knn_mean" in r]
    for token, label in (("class", "class token"), ("mean", "mean of patch tokens")):
        right.plot([r["epoch"] for r in tests], [100 * r[f"knn_{token}"] for r in tests], marker=".", label=label)
    right.set(title="k-NN on held-out images", xlabel="epoch", ylabel="accuracy, %")
    if tests:
        right.legend()
    else:
        right.text(0.5, 0.5, "no labelled images held out", ha="center", transform=right.transAxes)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save(figure, path)


@torch.no_grad()
def to_pictures(imgs, mean, std):
    """Standardised images B C H W -> arrays for imshow, H W 3 or H W, in 0..1."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    imgs = (imgs.detach().cpu().float() * std + mean).clamp(0, 1)
    return [(x.permute(1, 2, 0) if len(x) == 3 else x[0]).numpy() for x in imgs]


def principal_colours(tokens, *others):
    """Tokens n D -> colours n 3 in 0..1, their first three principal components; and others in the same colours."""
    centre = tokens.mean(0)
    components = torch.linalg.svd(tokens - centre, full_matrices=False).Vh[:3].T                        # D 3
    low, high = ((tokens - centre) @ components).quantile(torch.tensor([0.02, 0.98], dtype=tokens.dtype), dim=0)
    return [(((x - centre) @ components - low) / (high - low)).clamp(0, 1) for x in (tokens, *others)]


@torch.no_grad()
def reconstruct(model, teacher, config, imgs, noise, mean, std):
    """{name of a row: pictures} of standardised images B C H W under the masks of noise B N: original, masked, and what the
    decoder says of the masked patches, in pixels, or as principal components of tokens beside the teacher's.

    A model of standardised patches says nothing about a patch's own brightness and contrast; the picture lends it those of
    the original. Without that, its predictions look like grey noise."""
    out = model.forward(imgs, config.mask_ratio, noise)     # not model(...): eight images are not worth compiling for
    pred, hidden = out["pred"], out["mask"][..., None] == 1                                             # B N P, B N 1
    patches = patchify(imgs, model.patch_size)                                                          # B N P
    rows = dict(original=patches, masked=torch.where(hidden, torch.zeros_like(patches), patches))       # 0: mean of the set
    if config.target == "pixels":
        if model.norm_pix_loss:
            pred = pred * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        rows["prediction"] = torch.where(hidden, pred, patches)
    rows = {k: to_pictures(unpatchify(v, model.patch_size, model.img_size), mean, std) for k, v in rows.items()}
    if config.target == "tokens":
        target = standardise(teacher.encode(imgs)[:, 1:], config.standardise).cpu()                     # B N D
        shown = torch.where(hidden.cpu(), pred.to(target.dtype).cpu(), target)
        colours = principal_colours(target.flatten(0, 1), shown.flatten(0, 1))
        for name, c in zip(("teacher's tokens", "prediction"), colours):
            rows[name] = list(c.view(len(imgs), *model.grid, 3).numpy())
    return rows


def picture_rows(rows, path=None):
    """{name: pictures} as a figure, saved to path or returned."""
    columns = max(map(len, rows.values()))
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns + 0.9, 1.4 * len(rows)), squeeze=False, layout="constrained")
    for row, (name, pictures) in zip(axes, rows.items()):
        row[0].set_ylabel(name)
        for axis, picture in zip(row, pictures):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for axis in row:
            axis.set(xticks=[], yticks=[])
    return figure if path is None else save(figure, path)


def reconstructions(model, teacher, config, imgs, noise, mean, std, path):
    picture_rows(reconstruct(model, teacher, config, imgs, noise, mean, std), path)


@torch.no_grad()
def assign(teacher, config, centres, imgs):
    """Pseudo labels of standardised images B C H W by the labelling teacher: {"class": B K, "data": B N K}, what there is."""
    u = torch.cat([teacher.encode(part) for part in imgs.split(100)])                                   # B 1+N D
    labels = make_labels(teacher, u, config.balancing, config.teacher_temperature, {k: v.clone() for k, v in centres.items()})
    return {name: q.cpu() for name, q in labels.items()}


def surroundings(picture, place, grid, reach=1):
    """The patch at place of a picture H W (3) with `reach` patches around it, grey beyond the edge; the patch is framed."""
    ph, pw = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    edge = ((reach * ph, reach * ph), (reach * pw, reach * pw), (0, 0))[:picture.ndim]
    r, c = divmod(place, grid[1])
    x = np.pad(picture, edge, constant_values=0.5)[r * ph:(r + 2 * reach + 1) * ph, c * pw:(c + 2 * reach + 1) * pw].copy()
    y0, y1, x0, x1 = reach * ph - 1, (reach + 1) * ph, reach * pw - 1, (reach + 1) * pw
    for rows, columns in ((y0, slice(x0, x1 + 1)), (y1, slice(x0, x1 + 1)), (slice(y0, y1 + 1), x0), (slice(y0, y1 + 1), x1)):
        x[rows, columns] = 1
    return x


def galleries(labels, pictures, grid=None, clusters=6, columns=8):
    """{cluster: pictures} of the samples that share a label, the commonest clusters, their most certain samples first, at most
    one of an image. labels B K: of images. labels B N K with grid: of patches, shown in their surroundings."""
    K, N = labels.shape[-1], 1 if grid is None else labels.shape[1]
    certain, cluster = labels.reshape(-1, K).max(1)                                                     # (B N)
    rows = {}
    for k in cluster.bincount(minlength=K).argsort(descending=True)[:clusters].tolist():
        members = torch.nonzero(cluster == k).flatten()
        members, seen, chosen = members[certain[members].argsort(descending=True, stable=True)].tolist(), set(), []
        for m in members:
            if m // N not in seen:
                seen.add(m // N)
                chosen.append(pictures[m // N] if grid is None else surroundings(pictures[m // N], m % N, grid))
        rows[f"{k}"] = chosen[:columns]
    return rows


def clusters(teacher, config, centres, imgs, mean, std, path):
    """clusters.png: images, and patches in their surroundings, that share a pseudo label; a row for a cluster."""
    pictures, labels = to_pictures(imgs, mean, std), assign(teacher, config, centres, imgs)
    sides = [(name, galleries(q, pictures, teacher.grid if name == "data" else None)) for name, q in labels.items()]
    figure = plt.figure(figsize=(9 * len(sides), 7.5), layout="constrained")
    for part, (name, rows) in zip(np.atleast_1d(figure.subfigures(1, len(sides))), sides):
        part.suptitle({"class": "images that share a label of the class token", "data": "patches that share a label"}[name])
        for row, (cluster, shown) in zip(part.subplots(6, 8, squeeze=False), rows.items()):
            row[0].set_ylabel(f"cluster {cluster}")
            for axis, picture in zip(row, shown):
                axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            for axis in row:
                axis.set(xticks=[], yticks=[])
    save(figure, path)
