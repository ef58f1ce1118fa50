"""How good is an encoder? Frozen features, computed once, and a simple classifier on top.

    python eval.py knn      --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt
    python eval.py linear   --checkpoint runs/mae-shapes-micro/checkpoint.pt --data cifar10
    python eval.py patches  --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt
    python eval.py diagnose --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt

`knn` asks whether images of a class lie together; `linear` whether a plane separates them. For a
masked autoencoder the second answer is much the better one. Which token is asked matters, so both
are reported: the class token, and the mean of the patch tokens. `top1` (a share, on the test split)
is that of the token that was better on validation images. These are the images of the training
split that the run held out (of another set, or if it held out none, a tenth of that split).
--split validation stops there and does not look at the test split.

`patches` asks what single patch tokens say of what is in their patch: a linear layer on them paints
each patch in one class, and is held against masks. They come with `shapes`, or as pairs of files
ROOT/<split>/NAME.jpg, ROOT/<split>annot/NAME.png.

`diagnose` looks at features and pseudo labels of validation images: have they collapsed, what do
pseudo labels agree with?

--network chooses the student or a teacher, or a yardstick. The last line printed is a JSON object,
appended to eval.jsonl beside the checkpoint.

Letters:  n m images, N patches, D width of a token, K clusters, C classes of pixels.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import NETWORKS, load_encoder, load_run, mae_arguments, resize_positions
from data import SETS, Batches, held_out, load_images, read, spread_out
from mae import MaskedAutoencoder, patchify, unpatchify
from pseudo_labels import balance, count_labels, health, plain_norm, remove_place
from teachers import Teacher, standardise
from utils.agreement import nmi, purity
from utils.command_line import Parser, UsageError, in_its_words, run_main, size
from utils.devices import choose_device
from utils.files import append_json
from utils.masks import classes_in, count_pixels, read_mask
from utils.pictures import to_pictures

LINEAR_RATES = (0.003, 0.03, 0.3, 3.0)     # learning rates tried, a wide net; validation chooses
MONITORED = 2000                           # held-out images that k-NN while training looks at
CHUNK = 200                                # images in the memory of the device at a time
SCORES = 2**27                             # scores of patches kept at a time: half a gigabyte
PATCHES = 400_000                          # patches, at most, that `patches` is trained on


# --------------------------------------------------------------------------------------- features

def subset(ids, n):
    """At most n of ids, evenly spread."""
    return ids[torch.linspace(0, len(ids) - 1, min(n, len(ids))).long()]


def standardised(images, ids, mean, std):
    """The images at ids as networks want them: n C H W, on the CPU."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (read(images, ids).float() / 255 - mean) / std


@torch.no_grad()
def tokens_in_chunks(encoder, images, ids, mean, std, device):
    """Yield tokens b 1+N D of the images at ids, at most CHUNK at a time, on the device."""
    dtype = next(encoder.parameters()).dtype
    for part in ids.split(CHUNK):
        yield encoder(standardised(images, part, mean, std).to(device, dtype))


def features(encoder, images, ids, mean, std, device):
    """Features of the images at ids, on the CPU: {"class": n D, "mean": n D}.

    encoder None: {"pixels": n (C H W)}."""
    if encoder is None:
        return {"pixels": standardised(images, ids, mean, std).flatten(1)}
    found = {"class": [], "mean": []}
    for tokens in tokens_in_chunks(encoder, images, ids, mean, std, device):
        found["class"].append(tokens[:, 0].float().cpu())
        found["mean"].append(tokens[:, 1:].float().mean(1).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def patch_features(encoder, images, ids, patch_size, mean, std, device):
    """Features of each patch of the images at ids, on the CPU: n N D; of encoder None their
    pixels."""
    if encoder is None:
        return patchify(standardised(images, ids, mean, std), patch_size)
    chunks = tokens_in_chunks(encoder, images, ids, mean, std, device)
    return torch.cat([tokens[:, 1:].float().cpu() for tokens in chunks])


def masks_of(images, ids):
    """The masks of the images at ids: n, each H W uint8. Raises UsageError if there are none."""
    if "masks" in images.targets:
        return list(images.targets["masks"][ids])
    if images.paths is not None:
        return [read_mask(images.paths[i]) for i in ids]
    raise UsageError("--data: this set has no masks; use shapes, or an imagefolder of pairs "
                     "ROOT/<split>/NAME.jpg, ROOT/<split>annot/NAME.png")


def pixels_of_classes(masks, size, grid, classes, void=255):
    """Pixels of each class in each patch of the images of these masks: n N C."""
    return torch.stack([count_pixels(mask, size, grid, classes, void) for mask in masks])


# ------------------------------------------------------------------------------------ classifiers

def knn(x, y, test_x, classes, k=20, temperature=0.07):
    """Weighted k nearest neighbours by cosine: x n D, y n, test_x m D -> predicted classes m.

    A neighbour votes with exp(cosine / temperature); k and temperature as in Wu et al. 2018 and
    DINO."""
    x, test_x = F.normalize(x, dim=1), F.normalize(test_x, dim=1)
    predictions = []
    for queries in test_x.split(1000):
        cosine, neighbours = (queries @ x.T).topk(min(k, len(x)), dim=1)                     # b k
        votes = torch.zeros(len(queries), classes, device=x.device)
        votes.scatter_add_(1, y[neighbours], (cosine / temperature).exp())             # b classes
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def linear(x, y, test_x, classes, rates=LINEAR_RATES, epochs=90, batch=1024, seed=0):
    """Linear classifiers, one per learning rate, trained side by side: x n D, y n (or n classes:
    shares of the classes, which sum to 1), test_x m D -> predicted classes, rates m.

    MAE's protocol: BatchNorm without affine, then a linear layer; momentum 0.9, no weight decay,
    cosine, 90 epochs. SGD in place of LARS, as batches are small. The rate is for the whole
    batch."""
    g = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(x.shape[1], affine=False, device=x.device)
    heads = [nn.Linear(x.shape[1], classes, device=x.device) for _ in rates]
    for head in heads:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    groups = [dict(params=head.parameters(), lr=rate) for head, rate in zip(heads, rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    batch = min(batch, len(x))
    steps = len(x) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=g)
        for ids in order[:steps * batch].view(-1, batch).to(x.device):
            inputs = norm(x[ids])
            # no weight is shared, so each head gets its own gradient
            loss = sum(F.cross_entropy(head(inputs), y[ids]) for head in heads)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    norm.eval()
    predictions = []
    with torch.no_grad():
        for part in test_x.split(100_000):                 # there may be many patches
            inputs = norm(part.to(x.device))
            predictions.append(torch.stack([head(inputs).argmax(1) for head in heads]))
    return torch.cat(predictions, dim=1)


def accuracy(predictions, y):
    return round((predictions == y).float().mean().item(), 4)


def classify(task, x, y, val, test_x, classes):
    """One token -> its validation accuracy, and predictions for test_x (None for None).

    val: n, True for validation images. What is tuned is tuned with the other rows against these;
    then all rows are used. The test labels are not asked for."""
    fit_x, fit_y, val_x, val_y = x[~val], y[~val], x[val], y[val]
    if task == "knn":
        validation = accuracy(knn(fit_x, fit_y, val_x, classes), val_y)
        return validation, None if test_x is None else knn(x, y, test_x, classes)
    scores = [accuracy(p, val_y) for p in linear(fit_x, fit_y, val_x, classes)]
    best = max(range(len(scores)), key=scores.__getitem__)
    if test_x is None:
        return scores[best], None
    return scores[best], linear(x, y, test_x, classes, rates=[LINEAR_RATES[best]])[0]


def paint(x, counts, val, test_x):
    """Patch tokens n N D, the pixels of each class in them n N C -> the mIoU on validation images,
    and a class for each patch of test_x, or, if that is None, of the validation images: m N.

    A linear layer predicts the shares of the classes in a patch. In the cross-entropy this is the
    same as predicting each pixel, all those of a patch alike. val as in `classify`."""
    def fit(x, counts, test_x, **rates):
        seen = counts.sum(-1) > 0                          # not: patches without a known pixel
        shares = counts[seen] / counts[seen].sum(-1, keepdim=True)
        painted = linear(x[seen], shares, test_x.flatten(0, 1), counts.shape[-1], epochs=10,
                         batch=4096, **rates)
        return painted.unflatten(1, test_x.shape[:2])                                 # rates m N

    on_validation = fit(x[~val], counts[~val], x[val])
    scores = [mean_iou(painted, counts[val]) for painted in on_validation]
    best = max(range(len(scores)), key=scores.__getitem__)
    if test_x is None:
        return scores[best], on_validation[best]
    return scores[best], fit(x, counts, test_x, rates=[LINEAR_RATES[best]])[0]


def iou(painted, counts):
    """Intersection over union of each class, in pixels: C; NaN for a class that is not there.

    painted m N: the class that a patch is painted in. counts m N C: pixels of each class in it."""
    C = counts.shape[-1]
    confusion = torch.zeros(C, C, dtype=torch.float64)     # painted as a row, of the class a column
    confusion.index_add_(0, painted.flatten().cpu(), counts.flatten(0, 1).cpu().double())
    hit, truth = confusion.diagonal(), confusion.sum(0)
    return torch.where(truth > 0, hit / (truth + confusion.sum(1) - hit), math.nan)


def mean_iou(painted, counts):
    """The mean over the classes that are there."""
    return round(iou(painted, counts).nanmean().item(), 4)


def monitor(encoder, images, train_ids, val_ids, mean, std, device):
    """While training runs, on held-out images: {"knn_class", "knn_mean", "effective_rank_class",
    "effective_rank_mean"}; {} without labels.

    At most 10,000 labelled images to compare with and 2,000 to test: a curve, quickly. `python
    eval.py knn` uses all."""
    train_ids = train_ids[images.labels[train_ids] >= 0]
    if len(val_ids) == 0 or len(train_ids) == 0:
        return {}
    train_ids, val_ids = subset(train_ids, 10_000), subset(val_ids, MONITORED)
    x = features(encoder, images, train_ids, mean, std, device)
    test_x = features(encoder, images, val_ids, mean, std, device)
    y, test_y = images.labels[train_ids], images.labels[val_ids]
    found = {}
    for token in x:
        predictions = knn(x[token], y, test_x[token], len(images.classes))
        found[f"knn_{token}"] = accuracy(predictions, test_y)
        found[f"effective_rank_{token}"] = effective_rank(test_x[token])
    return found


# -------------------------------------------------------------------- what networks make of images

class Assigned(NamedTuple):
    """Pseudo labels of images or patches, on the CPU."""
    labels: torch.Tensor       # n (N) K, rows sum to 1
    cluster: torch.Tensor      # n (N), the most probable one
    cosine: torch.Tensor       # n (N), of the token with the prototype of that cluster


@torch.no_grad()
def assign(teacher, config, images, ids, mean, std, device):
    """Pseudo labels that a labelling teacher makes of the images at ids, whole, in no other
    colours: {"image": Assigned, "patch": Assigned} as far as it has heads.

    Patch pseudo labels are of the first images only, where there would be more than SCORES scores.
    The centres of centring stay where they are."""
    scores = {"image": [], "patch": []}
    kept = 0
    for tokens in tokens_in_chunks(teacher.encoder, images, ids, mean, std, device):
        if teacher.image_head is not None:
            scores["image"].append(teacher.image_head(tokens[:, 0]).cpu())                   # b K
        if teacher.patch_head is not None:
            K = len(teacher.patch_head.prototypes)
            room = max(1, SCORES // (K * (tokens.shape[1] - 1))) - kept
            part = teacher.patch_head(plain_norm(tokens[:max(0, room), 1:]))               # b N K
            scores["patch"].append(part.cpu())
            kept += len(part)
    found = {}
    for name, parts in scores.items():
        if parts:
            cosines = each = torch.cat(parts)                                            # n (N) K
            if name == "patch" and config.remove_place:
                each = remove_place(cosines)
            centre = teacher.centres[name].cpu()
            labels = balance(each.flatten(0, -2), centre, config).view_as(each)
            cluster = labels.argmax(-1)
            cosine = cosines.gather(-1, cluster[..., None]).squeeze(-1)
            found[name] = Assigned(labels, cluster, cosine)
    return found


def principal_colours(tokens, *others):
    """The first three principal components of tokens n D as red, green and blue, n 3 in 0..1.

    Returns a list: the colours of tokens, then of each of others (m D), on the same scale."""
    centre = tokens.mean(0)
    components = torch.linalg.svd(tokens - centre, full_matrices=False).Vh[:3].T         # D 3
    ends = torch.tensor([0.02, 0.98], dtype=tokens.dtype, device=tokens.device)
    low, high = ((tokens - centre) @ components).quantile(ends, dim=0)
    width = (high - low).clamp(min=1e-12)
    return [(((x - centre) @ components - low) / width).clamp(0, 1) for x in (tokens, *others)]


@torch.no_grad()
def reconstruct(student, teacher, config, images, ids, noise, mean, std, device):
    """{name of a row: pictures}, of as many of the images at ids, evenly spread, as there are rows
    of noise (b N): original, masked, and what the decoder says of the masked patches: pixels, or
    tokens beside the teacher's, as the colours of their principal components.

    Targets are standardised over all images at ids. A model of standardised patches says nothing
    about a patch's own brightness and contrast: the picture lends it those of the original. Without
    that, its predictions look like grey noise."""
    encoder = student.mae.encoder
    chosen = subset(torch.arange(len(ids)), len(noise))                                        # b
    imgs = standardised(images, ids[chosen], mean, std)                                  # b C H W
    dtype = encoder.cls_token.dtype
    out = student(imgs.to(device, dtype), config.mask_ratio,
                  noise[:len(imgs)].to(device, dtype))
    pred = out["pred"].float().cpu()                                                       # b N P
    masked = out["mask"][..., None].cpu() == 1                                             # b N 1
    patches = patchify(imgs, encoder.patch_size)                                           # b N P

    def as_pictures(x):
        return to_pictures(unpatchify(x, encoder.patch_size, encoder.img_size), mean, std)

    rows = {"original": as_pictures(patches),
            "masked": as_pictures(patches.masked_fill(masked, 0))}         # 0: the mean of the set
    if config.target == "pixels":
        if config.norm_pix_loss:
            spread = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            pred = pred * spread + patches.mean(-1, keepdim=True)
        rows["prediction"] = as_pictures(torch.where(masked, pred, patches))
    else:
        chunks = tokens_in_chunks(teacher.encoder, images, ids, mean, std, device)
        tokens = torch.cat([each[:, 1:].float().cpu() for each in chunks])                 # n N D
        target = standardise(tokens, config.standardise)[chosen]                           # b N D
        shown = torch.where(masked, pred, target)
        colours = principal_colours(target.flatten(0, 1), shown.flatten(0, 1))     # 2 x ((b N) 3)
        for name, each in zip(("teacher's tokens", "prediction"), colours):
            rows[name] = list(each.view(len(imgs), *encoder.grid, 3).numpy())
    return rows


# -------------------------------------------------------------------------------------- diagnosis

def effective_rank(x):
    """exp of the entropy of the normalised singular values of centred features n D: how many
    directions are in use, 1 to D (RankMe, Garrido et al. 2023, who do not centre)."""
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s / s.sum().clamp(min=1e-12)
    return round(torch.special.xlogy(p, p).sum().neg().exp().item(), 2)


def spread(x):
    """Standard deviation of L2-normalised features n D, mean over D, times sqrt(D): 0 if all are
    alike, 1 if they point everywhere (SimSiam)."""
    deviation = F.normalize(x, dim=1).std(0, unbiased=False).mean().item()
    return round(deviation * x.shape[1] ** 0.5, 4)


def centred_cosine(a, b):
    """Mean cosine of features a and b (n D) of the same images, each about its own mean."""
    cosine = F.cosine_similarity(a - a.mean(0), b - b.mean(0), dim=1)
    return round(cosine.mean().item(), 4)


def diagnose(path, network, images, ids, mean, std, device):
    """The state of features and pseudo labels on the images at ids: a dictionary of numbers, of
    pseudo labels in nats. Their agreement with true classes stands beside that of shuffled ones."""
    student, teachers, config = load_run(path)
    encoders = {"student": student.mae.encoder}
    for name, teacher in teachers.named().items():
        encoders[f"{name}-teacher"] = teacher.encoder
    found_features = {name: features(encoder.to(device), images, ids, mean, std, device)
                      for name, encoder in encoders.items()}
    found = {}
    for token, x in found_features[network].items():
        found[f"effective_rank_{token}"] = effective_rank(x)
        found[f"spread_{token}"] = spread(x)
    for name, by_token in found_features.items():
        if name != "student":
            for token, x in by_token.items():
                found[f"student_vs_{name}_{token}"] = centred_cosine(
                    found_features["student"][token], x)
    if teachers.labelling is not None:
        found |= diagnose_labels(student, teachers.labelling, config, images, ids, mean, std,
                                 device)
    return found


def diagnose_labels(student, teacher, config, images, ids, mean, std, device):
    """What `diagnose` says of pseudo labels, those of the labelling teacher."""
    as_teacher = Teacher(student, heads=True)              # the labels that the student would make
    for name, centre in as_teacher.centres.items():
        centre.copy_(teacher.centres[name])
    labels, students = (assign(each.to(device), config, images, ids, mean, std, device)
                        for each in (teacher, as_teacher))
    found = {}
    for name, (q, cluster, _) in labels.items():
        found[f"{name}_ln_k"] = round(math.log(q.shape[-1]), 4)
        for key, value in health(count_labels(q)).items():
            found[f"{name}_{key}"] = round(value, 4)
        agrees = (students[name].cluster == cluster).float().mean().item()
        found[f"{name}_student_agrees"] = round(agrees, 4)
    return found | agreements(labels, teacher, config, images, ids, mean, std, device)


def agreements(labels, teacher, config, images, ids, mean, std, device):
    """What do pseudo labels agree with? labels: what `assign` made of the images at ids. A
    dictionary of numbers, each beside that of chance.

    image, patch   NMI and purity with the true class of the image
    patch          NMI with the place of the patch in the image, with its mean colour, and, on
                   `shapes`, with the class of most of its pixels
    image          how often two views of an image get the same label. Balanced labels look healthy
                   also where they are noise; noise does not agree with itself"""
    found = {}
    classes = images.labels[ids]                                                               # n
    for name, (_, cluster, _) in labels.items():           # cluster n, or n N
        if (classes >= 0).all():
            of_image = classes[:len(cluster)].view(-1, *[1] * (cluster.ndim - 1))
            of_image = of_image.expand_as(cluster)
            found |= beside_chance(f"{name}_nmi", nmi, cluster, of_image)
            found |= beside_chance(f"{name}_purity", purity, cluster, of_image)
    if "patch" in labels:
        cluster, grid = labels["patch"].cluster, teacher.encoder.grid                        # n N
        ids = ids[:len(cluster)]
        place = torch.arange(cluster.shape[1]).expand_as(cluster)
        found |= beside_chance("patch_nmi_place", nmi, cluster, place)
        imgs = standardised(images, ids, mean, std)
        colours = colour_bins(patchify(imgs, teacher.encoder.patch_size), images.channels)
        found |= beside_chance("patch_nmi_colour", nmi, cluster, colours)
        if "masks" in images.targets:
            masks = masks_of(images, ids)
            counts = pixels_of_classes(masks, images.size, grid, classes_in(masks))
            found |= beside_chance("patch_nmi_mask", nmi, cluster, counts.argmax(-1))
    if "image" in labels:
        found |= two_views_agree(teacher, config, images, ids, mean, std, device)
    return found


def beside_chance(name, agreement, cluster, other):
    """The agreement of two labellings, and what is left of it when one of them is shuffled."""
    cluster, other = cluster.flatten(), other.flatten()
    shuffled = other[torch.randperm(len(other), generator=torch.Generator().manual_seed(0))]
    return {name: round(agreement(cluster, other), 4),
            f"{name}_shuffled": round(agreement(cluster, shuffled), 4)}


def colour_bins(patches, channels):
    """Patches n N P -> the bin of their mean colour, n N: 4 bins of red, green and blue each, 64 of
    grey. The ends of the bins are quantiles, so that there is as much in each."""
    means = patches.unflatten(-1, (-1, channels)).mean(2)                            # n N channels
    bins = {1: 64, 3: 4}[channels]
    number = torch.zeros(means.shape[:2], dtype=torch.long)
    for mean in means.permute(2, 0, 1).contiguous():                                     # n N
        ends = mean.quantile(torch.arange(1, bins) / bins)
        number = number * bins + torch.bucketize(mean, ends)
    return number


@torch.no_grad()
def two_views_agree(teacher, config, images, ids, mean, std, device):
    """Two views of each image at ids, as the labelling teacher sees them in training: how often
    both have the same image pseudo label, and how often by chance."""
    n = min(len(ids), CHUNK)               # images of a batch; a last, incomplete one is left out
    batches = Batches(
        images, ids, mean, std, seed=0, batch=n, patches=teacher.encoder.num_patches, views=2,
        smallest=config.crop, colours=config.colours, teacher_view=config.teacher_view,
        dtype=next(teacher.parameters()).dtype)
    scores = []
    for views in batches.run(0, batches.steps_per_epoch):
        tokens = teacher.encoder(views.teacher.to(device))                           # 2n 1+N D
        scores.append(teacher.image_head(tokens[:, 0]).cpu().unflatten(0, (2, n)))        # 2 n K
    scores = torch.cat(scores, dim=1)
    labels = balance(scores.flatten(0, 1), teacher.centres["image"].cpu(), config)
    one, other = labels.argmax(1).chunk(2)
    K = labels.shape[1]
    chance = (one.bincount(minlength=K) * other.bincount(minlength=K)).sum() / len(one) ** 2
    return {"image_two_views": accuracy(one, other),
            "image_two_views_chance": round(chance.item(), 4)}


# ------------------------------------------------------------------------------------ the command

def load_network(options):
    """--checkpoint and --network -> the encoder of the student, of a teacher, or a new one, and
    what the file says of it."""
    named = options.network if options.network in NETWORKS else None
    encoder, _ = load_encoder(options.checkpoint, options.num_heads, named)
    if encoder.in_chans not in (1, 3):
        raise UsageError(f"--checkpoint {options.checkpoint}: takes {encoder.in_chans} channels; "
                         "data sets here have 1 or 3")
    info = dict(encoder.info)
    if options.network == "untrained":
        if "arch" not in info:
            raise UsageError("--network untrained: needs a checkpoint of train.py; `train.py "
                             "--epochs 0` writes one")
        torch.manual_seed(info["config"]["seed"])      # the very weights that the run began with
        encoder = MaskedAutoencoder(**mae_arguments(info["arch"])).encoder.eval()
    info["network"] = options.network or info["network"]
    if options.img_size:
        resize_positions(encoder, options.img_size)
    return encoder, info


def choose_data(options, config):
    """--data and --data-root, or what the checkpoint was trained on -> name, root."""
    data = options.data or config.get("data")
    if data is None:
        raise UsageError("--data: this checkpoint does not name a data set; name one")
    if data == config.get("data"):
        return data, options.data_root or config["data_root"]
    if data == "imagefolder" and not options.data_root:
        raise UsageError("--data-root: name the folder of the images")
    return data, options.data_root or "data"


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=["knn", "linear", "patches", "diagnose"])
    parser.add_argument("--checkpoint", required=True, metavar="FILE",
                        help="of train.py, of the official MAE code or timm")
    parser.add_argument("--network", choices=[*NETWORKS, "untrained", "pixels"],
                        help="untrained: the same encoder with random weights; pixels: no encoder "
                        "(default: student; of rc-mae its teacher)")
    parser.add_argument("--token", choices=["class", "mean"],
                        help="default: the better one on validation images")
    parser.add_argument("--split", choices=["test", "validation"], default="test",
                        help="validation: do not look at the test split (default: test)")
    parser.add_argument("--void", type=int, default=255, metavar="N",
                        help="of patches: pixels of a mask with this number have no class "
                        "(default: 255)")
    parser.add_argument("--data", choices=SETS, help="default: what the checkpoint was trained on")
    parser.add_argument("--data-root", metavar="DIR", help="default: that of the training run; for "
                        "another set than its own: data")
    parser.add_argument("--img-size", type=in_its_words(size), metavar="N or HxW",
                        help="another size than the encoder was trained on: its codes of places "
                        "are interpolated")
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    parser.add_argument("--num-heads", type=int,
                        help="for others' weights whose heads are not 64 wide")
    options = parser.parse_args(argv)
    start = time.perf_counter()

    device = choose_device(options.device)
    if options.network == "pixels" and options.token:
        raise UsageError(f"--token {options.token}: raw pixels have no tokens; leave it out")
    if options.network in ("untrained", "pixels") and options.task == "diagnose":
        raise UsageError(f"--network {options.network}: has no pseudo labels and no teachers; name "
                         f"{', '.join(NETWORKS)}")
    if options.img_size and options.task == "diagnose":
        raise UsageError("--img-size: diagnose looks at a run at its own size; leave it out")
    if not 0 <= options.void <= 255:
        raise UsageError(f"--void {options.void}: pixels of masks are 0 to 255")
    if options.token and options.task in ("patches", "diagnose"):
        raise UsageError(f"--token {options.token}: {options.task} uses all tokens; leave it out")
    encoder, info = load_network(options)
    data, root = choose_data(options, info.get("config", {}))
    record = {"task": options.task, "network": info["network"], "data": data,
              "step": info.get("step")}
    if options.task != "diagnose":
        record["split"] = options.split
    if options.img_size:
        record["img_size"] = options.img_size
    task = {"diagnose": run_diagnosis, "patches": run_patches}.get(options.task, run_classifier)
    record |= task(options, encoder, info, data, root, device)
    record |= {"checkpoint": options.checkpoint, "seconds": round(time.perf_counter() - start, 1)}
    append_json(Path(options.checkpoint).parent / "eval.jsonl", record)
    print(json.dumps(record))


def kept_out(data, config):
    """The share of the training split that validates: what the run held out, on its own set."""
    fraction = config.get("val_fraction", 0.1) if data == config.get("data") else 0.1
    return fraction or 0.1


def run_diagnosis(options, encoder, info, data, root, device):
    images = load_images(data, root, "train", encoder.img_size, encoder.in_chans)
    _, ids = held_out(images, kept_out(data, info.get("config", {})))
    if len(ids) == 0:                                      # no image has a label
        ids = torch.arange(len(images))
    ids = subset(ids, 2000)
    found = diagnose(options.checkpoint, info["network"], images, ids, info["mean"], info["std"],
                     device)
    return {"images": len(ids)} | found


def run_classifier(options, encoder, info, data, root, device):
    train = load_images(data, root, "train", encoder.img_size, encoder.in_chans)
    if not train.classes:
        raise UsageError(f"--data-root {root}: the training images have no labels; use "
                         "ROOT/train/<class>/*")
    ids = torch.nonzero(train.labels >= 0).flatten()
    if len(ids) < 10:
        raise UsageError(f"--data-root {root}: {len(ids)} labelled training images; at least 10 "
                         "are needed, one to validate on")
    test = None
    if options.split == "test":
        test = load_images(data, root, "test", encoder.img_size, encoder.in_chans)
        if train.classes != test.classes:
            differ = sorted(set(train.classes) ^ set(test.classes))[:5]
            raise UsageError(f"--data-root {root}: {len(train.classes)} classes to train on and "
                             f"{len(test.classes)} to test on, different: {', '.join(differ)}")

    network = None if options.network == "pixels" else encoder.to(device)
    x = features(network, train, ids, info["mean"], info["std"], device)
    y, classes = train.labels[ids].to(device), len(train.classes)
    _, val_ids = held_out(train, kept_out(data, info.get("config", {})))
    val = torch.isin(ids, val_ids).to(device)
    test_x = dict.fromkeys(x)                              # None of each token
    if test is not None:
        test_x = features(network, test, torch.arange(len(test)), info["mean"], info["std"], device)
        test_x = {token: each.to(device) for token, each in test_x.items()}

    validation, accuracies = {}, {}
    for token in x:
        validation[token], predictions = classify(
            options.task, x[token].to(device), y, val, test_x[token], classes)
        if test is not None:
            accuracies[token] = accuracy(predictions.cpu(), test.labels)
    token = options.token or max(validation, key=validation.get)
    if not options.token and len(validation) > 1:
        print(f"reported: the {token} token, better on validation images; guessing gives "
              f"{1 / classes:.1%}", file=sys.stderr)
    accuracies = accuracies or validation
    return {"top1": accuracies[token], "token": token, "tokens": accuracies,
            "validation": validation, "images": len(ids),
            "test_images": 0 if test is None else len(test)}


def run_patches(options, encoder, info, data, root, device):
    N, grid, void = encoder.num_patches, encoder.grid, options.void
    network = None if options.network == "pixels" else encoder.to(device)
    images, ids, masks, x, counts = {}, {}, {}, {}, {}
    for split in ("train", "test") if options.split == "test" else ("train",):
        images[split] = load_images(data, root, split, encoder.img_size, encoder.in_chans)
        number = len(images[split])
        room = max(10, PATCHES // N) if split == "train" else number
        ids[split] = subset(torch.arange(number), room)
        masks[split] = masks_of(images[split], ids[split])
    if len(ids["train"]) < 10:
        raise UsageError(f"--data-root {root}: {len(ids['train'])} training images; at least 10 "
                         "are needed, one to validate on")
    classes = max(classes_in(each, void) for each in masks.values())
    if classes < 2:
        raise UsageError(f"--void {void}: beside it the masks hold no number but 0; number the "
                         "classes from 0, and name with --void the number of pixels without one")
    for split in images:
        x[split] = patch_features(network, images[split], ids[split], encoder.patch_size,
                                  info["mean"], info["std"], device)
        counts[split] = pixels_of_classes(masks[split], encoder.img_size, grid, classes, void)

    fraction = kept_out(data, info.get("config", {}))
    _, val_ids = held_out(images["train"], fraction)
    val = torch.isin(ids["train"], val_ids)
    if not val.any():                                      # no image has a class of its own
        val = spread_out(len(val), fraction)
    validation, painted = paint(x["train"].to(device), counts["train"].to(device), val,
                                x.get("test"))
    judged = counts["test"] if "test" in counts else counts["train"][val]                  # m N C
    by_place = counts["train"][~val].sum(0).argmax(-1).expand(judged.shape[:2])
    names = ["ground", *images["train"].classes] if data == "shapes" else range(classes)
    by_class = {str(name): None if math.isnan(each) else round(each, 4)
                for name, each in zip(names, iou(painted, judged).tolist())}
    print(f"painting each patch alike gives at most an mIoU of about "
          f"{mean_iou(judged.argmax(-1), judged):.1%}; knowing only its place, "
          f"{mean_iou(by_place, judged):.1%}", file=sys.stderr)
    return {"miou": mean_iou(painted, judged), "iou": by_class,
            "miou_place": mean_iou(by_place, judged),
            "miou_majority": mean_iou(judged.argmax(-1), judged), "validation": validation,
            "images": len(val), "test_images": len(x.get("test", []))}


if __name__ == "__main__":
    run_main(main)
