"""The pictures of a run: curves of its log, reconstructions of a few fixed images, and what shares a pseudo label."""

import io
import math

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
    """From metrics.jsonl, over the epochs: reconstruction and label losses (dotted: the line of collapse, ln K or the best constant), the
    health of the labels where there are any, held-out k-NN."""
    records = read_json_lines(log)
    losses, tests = [r for r in records if "loss" in r], [r for r in records if "knn_mean" in r]
    last = losses[-1] if losses else {}
    labelled = [name for name in ("class", "data") if name in last]
    figure, axes = plt.subplots(1, 3 if labelled else 2, figsize=(15 if labelled else 10, 4), layout="constrained", squeeze=False)
    left, *middle, right = axes[0]

    def line(axis, key, scale=1.0, of=None, **style):
        shown = [r for r in losses if key in r]
        axis.plot([r["epoch"] for r in shown], [r[key] / (r[of] if of else scale) for r in shown],
                  marker="." if len(shown) < 20 else None, **style)

    for i, (name, bound) in enumerate((("rec", "rec_constant"), ("consistency", None), ("class", "class_ln_k"), ("data", "data_ln_k"))):
        if name in last:
            line(left, name, color=f"C{i}", label={"rec": "reconstruction", "class": "class labels", "data": "data labels"}.get(name, name))
        if bound in last:
            line(left, bound, color=f"C{i}", linestyle=":", label="best constant" if name == "rec" else f"{name}: ln K")
    left.set(title="training losses", xlabel="epoch")
    for i, name in enumerate(labelled, start=2):
        line(middle[0], f"{name}_entropy", of=f"{name}_ln_k", color=f"C{i}", label=f"{name} labels: entropy / ln K")
        line(middle[0], f"{name}_effective", math.exp(last[f"{name}_ln_k"]), color=f"C{i}", linestyle="--", label=f"{name} labels: effective clusters / K")
        middle[0].set(title="health of the labels", xlabel="epoch", ylim=(0, 1.05))
    for token, label in (("class", "class token"), ("mean", "mean of patch tokens")):
        right.plot([r["epoch"] for r in tests], [100 * r[f"knn_{token}"] for r in tests], marker=".", label=label)
    right.set(title="k-NN on held-out images", xlabel="epoch", ylabel="accuracy, %")
    if not tests:
        right.text(0.5, 0.5, "no labelled images held out", ha="center", transform=right.transAxes)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)      # below: on top it hides curves
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


def mosaic(axis, rows, gap=0.08):
    """Draw {name of a row: pictures H W (3) in 0..1} into an axis, each picture magnified to the size of the largest, as one
    image (an axis for each picture would be slow to draw)."""
    rows = {name: [p if p.ndim == 3 else np.repeat(p[..., None], 3, 2) for p in pictures] for name, pictures in rows.items()}
    h, w = (max(p.shape[i] for pictures in rows.values() for p in pictures) for i in (0, 1))
    border, columns = max(1, round(gap * min(h, w))), max(map(len, rows.values()))
    sheet = np.ones((len(rows) * (h + border) - border, columns * (w + border) - border, 3))
    for i, pictures in enumerate(rows.values()):
        for j, p in enumerate(pictures):
            p = p.repeat(h // p.shape[0], 0).repeat(w // p.shape[1], 1)
            sheet[i * (h + border):i * (h + border) + p.shape[0], j * (w + border):j * (w + border) + p.shape[1]] = p
    axis.imshow(sheet, interpolation="nearest")
    axis.set(xticks=[], yticks=[i * (h + border) + h / 2 for i in range(len(rows))], yticklabels=list(rows))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def reconstructions(rows, path):
    """reconstructions.png, of what `reconstruct` returns."""
    figure, axis = plt.subplots(figsize=(1.3 * max(map(len, rows.values())) + 1.5, 1.4 * len(rows)), layout="constrained")
    mosaic(axis, rows)
    save(figure, path)


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
    for k in cluster.bincount().argsort(descending=True)[:min(clusters, len(cluster.unique()))].tolist():
        members = torch.nonzero(cluster == k).flatten()
        members, seen, chosen = members[certain[members].argsort(descending=True, stable=True)].tolist(), set(), []
        for m in members:
            if m // N not in seen:
                seen.add(m // N)
                chosen.append(pictures[m // N] if grid is None else surroundings(pictures[m // N], m % N, grid))
        rows[k] = chosen[:columns]
    return rows


def clusters(labels, imgs, grid, mean, std, path):
    """clusters.png: images, and patches in their surroundings, that share a pseudo label; a row for a cluster. labels: what
    `assign` returns for the standardised images B C H W."""
    pictures = to_pictures(imgs, mean, std)
    figure, axes = plt.subplots(1, len(labels), figsize=(9 * len(labels), 7), squeeze=False, layout="constrained")
    for axis, (name, q) in zip(axes[0], labels.items()):
        axis.set_title({"class": "images that share a label of the class token", "data": "patches that share a label"}[name])
        mosaic(axis, {f"cluster {k}": shown for k, shown in galleries(q, pictures, grid if name == "data" else None).items()})
    save(figure, path)
