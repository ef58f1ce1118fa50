"""The pictures of a run: curves of its log, and reconstructions of a few fixed images."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from checkpoint import read_json_lines, write_atomically
from mae import patchify, unpatchify


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
def clusters(*a):
    pass


@torch.no_grad()
def reconstructions(model, teacher, config, imgs, noise, mean, std, path):
    """Original, masked, prediction (with the visible patches in place) of the standardised images B C H W.

    A model of standardised patches says nothing about a patch's own brightness and contrast; the picture lends it those of
    the original. Without that, its predictions look like grey noise."""
    if config.target == 'tokens':
        return
    imgs = imgs[:8]
    out = model.forward(imgs, config.mask_ratio, noise)
    pred, mask = out['pred'], out['mask']     # not model(...): eight images are not worth compiling for
    patches = patchify(imgs, model.patch_size)                                                          # B N P
    if model.norm_pix_loss:
        pred = pred * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    hidden = mask[..., None].bool()
    grey = torch.zeros_like(patches)                                          # zero is the mean of the data set
    rows = [patches, torch.where(hidden, grey, patches), torch.where(hidden, pred, patches)]
    shown = [unpatchify(r, model.patch_size, model.img_size).cpu().float() for r in rows]               # 3 x (B C H W)
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    figure, axes = plt.subplots(3, len(imgs), figsize=(1.3 * len(imgs) + 0.9, 4.2), squeeze=False, layout="constrained")
    for row, images, name in zip(axes, shown, ("original", "masked", "prediction")):
        row[0].set_ylabel(name)
        for axis, image in zip(row, (images * std + mean).clamp(0, 1)):
            axis.imshow((image.permute(1, 2, 0) if len(image) == 3 else image[0]).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    save(figure, path)
