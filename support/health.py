"""What do networks make of images? Health of features and pseudo labels, and signs of collapse.

True classes are not needed. Where there are some, k-NN and agreement with them are measured too.
train.py looks at this while it trains; `python eval.py diagnose` looks at a checkpoint.

Letters:  n images, N patches, D width of a token, K clusters.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import Batches
from mae import patchify, plain_norm, unpatchify
from pseudo_labels import balance, remove_place
from support.checkpoint import load_run
from support.masks import classes_in, masks_of, pixels_of_classes
from support.pictures import to_pictures
from support.probes import CHUNK, accuracy, features, knn, standardised, subset, tokens_in_chunks
from teachers import standardise

MONITORED = 2000                           # held-out images that k-NN while training looks at
SCORES = 2**27                             # scores of patches kept at a time: half a gigabyte


# ------------------------------------------------------------------------------- of pseudo labels

def count_labels(labels):
    """What `health` needs of labels ... K: one vector of 2 K + 1 numbers, each a mean over samples,
    so that it can be averaged over steps and ranks. Nothing is read by the host."""
    labels = labels.flatten(0, -2)                                                         # S K
    each = torch.full_like(labels[:, 0], 1 / len(labels))                                    # S
    best = torch.zeros_like(labels[0]).scatter_add_(0, labels.argmax(1), each)               # K
    entropy = -torch.special.xlogy(labels, labels).sum(1).mean()
    return torch.cat([labels.mean(0), best, entropy[None]])


def health(counts):
    """Averaged counts of labels -> numbers that say whether they are worth predicting:

    entropy     mean entropy of a label, in nats: ln K where it says nothing, 0 where it is certain
    clusters    how many clusters are the most probable one of some sample
    effective   exp of the entropy of the mean label, 1..K: clusters in use if all were used alike
    largest     share of the samples whose most probable cluster is the commonest one"""
    mean, best = counts[:-1].chunk(2)
    return {"entropy": counts[-1].item(),
            "clusters": int((best > 0).sum()),
            "effective": torch.special.xlogy(mean, mean).sum().neg().exp().item(),
            "largest": best.max().item()}


# ----------------------------------------------------------------------------------- while training

def monitor(encoder, images, train_ids, val_ids, mean, std, device):
    """While training runs, on held-out images: {"knn_class", "knn_mean", "effective_rank_class",
    "effective_rank_mean"}; {} where no class is known; of one class no k-NN.

    At most 2,000 images to test, and to compare with a quarter of the others, 2,000 to 10,000: a
    curve, quickly. `python eval.py knn` uses all."""
    train_ids = train_ids[images.y[train_ids] >= 0]
    if len(val_ids) == 0 or len(train_ids) == 0:
        return {}
    compared = max(MONITORED, min(5 * MONITORED, len(train_ids) // 4))
    train_ids, val_ids = subset(train_ids, compared), subset(val_ids, MONITORED)
    x = features(encoder, images, train_ids, mean, std, device)
    test_x = features(encoder, images, val_ids, mean, std, device)
    y, test_y = (images.y[ids].to(device) for ids in (train_ids, val_ids))
    found = {}
    for token in x:
        if len(images.classes) > 1:
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
            scores["image"].append(teacher.image_head(tokens[:, 0]))                         # b K
        if teacher.patch_head is not None:
            K = len(teacher.patch_head.prototypes)
            room = max(1, SCORES // (K * (tokens.shape[1] - 1))) - kept
            part = teacher.patch_head(plain_norm(tokens[:max(0, room), 1:]))               # b N K
            scores["patch"].append(part)
            kept += len(part)
    found = {}
    for name, parts in scores.items():
        if parts:
            cosines = each = torch.cat(parts)                                            # n (N) K
            if name == "patch" and config.remove_place:
                each = remove_place(cosines)
            labels = balance(each.flatten(0, -2), teacher.centres[name], config).view_as(each)
            cluster = labels.argmax(-1)
            cosine = cosines.gather(-1, cluster[..., None]).squeeze(-1)
            found[name] = Assigned(labels.cpu(), cluster.cpu(), cosine.cpu())
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
    s = torch.linalg.svdvals((x - x.mean(0)).cpu())        # few devices have it
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
        found |= diagnose_labels(teachers.labelling, config, images, ids, mean, std, device)
    return found


def diagnose_labels(teacher, config, images, ids, mean, std, device):
    """What `diagnose` says of pseudo labels, those of the labelling teacher."""
    labels = assign(teacher.to(device), config, images, ids, mean, std, device)
    found = {}
    for name, (q, _, _) in labels.items():
        found[f"{name}_ln_k"] = round(math.log(q.shape[-1]), 4)
        for key, value in health(count_labels(q)).items():
            found[f"{name}_{key}"] = round(value, 4)
    return found | agreements(labels, teacher, config, images, ids, mean, std, device)


def agreements(labels, teacher, config, images, ids, mean, std, device):
    """What do pseudo labels agree with? labels: what `assign` made of the images at ids. A
    dictionary of numbers, each beside that of chance.

    image, patch   NMI and purity with the true class of the image
    patch          NMI with the place of the patch in the image, with its mean colour, and, on
                   `shapes`, with the class of most of its pixels
    image          how often two views of an image get the same one. Balanced ones look healthy
                   also where they are noise; noise does not agree with itself"""
    found = {}
    classes = images.y[ids]                                                               # n
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


def purest_and_least_pure(name, cluster, images, ids, grid, each=3, least=8):
    """{cluster: "cluster 10: 86% lattice"}, the share of its commonest class: the purest clusters,
    and the least pure ones, of those that `least` images share; {} where nothing tells true classes
    apart.

    Of the pseudo labels `name` of the images at ids, cluster n or n N. The class of a patch is that
    of most of its pixels; where that is mostly ground (0), a cluster is left out."""
    if name == "image" and len(images.classes) > 1 and (images.y[ids] >= 0).all():
        of, names = images.y[ids], images.classes
    elif name == "patch" and "masks" in images.targets:
        masks = masks_of(images, ids[:len(cluster)])
        of = pixels_of_classes(masks, images.size, grid, classes_in(masks)).argmax(-1)
        names = [None, *images.classes]
    else:
        return {}
    counts = table(cluster.flatten(), of.flatten())                                # clusters x C
    rows = [(of_it.max() / of_it.sum(), number, names[of_it.argmax()])
            for number, of_it in enumerate(counts)
            if (cluster == number).view(len(cluster), -1).any(1).sum() >= least]
    rows = sorted((row for row in rows if row[2] is not None), reverse=True)
    shown = rows[:each] + rows[max(each, len(rows) - each):]
    return {number: f"cluster {number}: {share:.0%} {of_it}" for share, number, of_it in shown}


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
    if images.pixels is not None:          # these alone on the device, beside those of the training
        images, ids = replace(images, pixels=images.pixels[ids]), torch.arange(len(ids))
    batches = Batches(
        images, ids, mean, std, seed=0, batch=n, patches=teacher.encoder.num_patches, views=2,
        smallest=config.crop, colours=config.colours, teacher_view=config.teacher_view,
        device=device, dtype=next(teacher.parameters()).dtype)
    scores = []
    for views in batches.run(0, batches.steps_per_epoch):
        tokens = teacher.encode(views.teacher)                                       # 2n 1+N D
        scores.append(teacher.image_head(tokens[:, 0]).unflatten(0, (2, n)))              # 2 n K
    scores = torch.cat(scores, dim=1)
    labels = balance(scores.flatten(0, 1), teacher.centres["image"], config)
    one, other = labels.argmax(1).chunk(2)
    K = labels.shape[1]
    chance = (one.bincount(minlength=K) * other.bincount(minlength=K)).sum() / len(one) ** 2
    return {"image_two_views": accuracy(one, other),
            "image_two_views_chance": round(chance.item(), 4)}


# ---------------------------------------------------------------- two labellings of n samples
# Arrays or CPU tensors of n integers from 0.

def table(a, b):
    """How often label i of a meets label j of b -> counts I J."""
    a = np.asarray(a)
    b = np.asarray(b)
    columns = b.max() + 1
    cells = np.bincount(a * columns + b, minlength=(a.max() + 1) * columns)
    return cells.reshape(-1, columns)


def entropy(p):
    """Of probabilities of any shape, in nats; 0 ln 0 is 0."""
    p = p[p > 0]
    return -(p * np.log(p)).sum()


def nmi(a, b):
    """Normalised mutual information, 2 I(a; b) / (H(a) + H(b)): 0 for unrelated labellings, 1 for
    the same one under other names.

    With many clusters and few samples unrelated labellings reach well above 0 too: compare with
    shuffled ones, or runs of equal K and n."""
    p = table(a, b) / len(a)                                                             # I J
    both = entropy(p.sum(0)) + entropy(p.sum(1))
    if both == 0:                                           # one label each: the same labelling
        return 1.0
    return float(2 * (both - entropy(p)) / both)


def purity(clusters, classes):
    """The share of samples whose class is the commonest one of their cluster, up to 1.

    It is the accuracy of naming each cluster after a class, of these samples. Chance is not
    1 / classes: it grows with the number of clusters, up to 1 where each sample has its own. So
    compare with purity(clusters, shuffled classes)."""
    return float(table(clusters, classes).max(1).sum() / len(clusters))


# ------------------------------------------------------------------------------ signs of collapse

def signs_of_collapse(record):
    """Sentences on what looks wrong in a record of the log: a set, empty in health."""
    signs = set()
    for name in ("image", "patch"):
        if f"{name}_ln_k" not in record:
            continue
        ln_k = record[f"{name}_ln_k"]
        clusters = math.exp(ln_k)
        if record[name] > 0.99 * ln_k:
            signs.add(f"the loss of the {name} pseudo labels stays at ln K = {ln_k:.2f}: they are "
                      "not being predicted")
        if record[f"{name}_entropy"] > 0.98 * ln_k:
            signs.add(f"the {name} pseudo labels are nearly uniform: they say nothing; try a lower "
                      "--teacher-temperature")
        if record[f"{name}_effective"] < min(max(2, 0.1 * clusters), 0.75 * clusters):
            signs.add(f"the {name} pseudo labels gather in few of their clusters: try --balancing "
                      "sinkhorn or fewer clusters")
    if record.get("rec_between", 1) < 0.05:
        signs.add("the token targets hardly differ between images: they can be predicted without "
                  "looking")
    if record.get("align_variance", 1) < 0.05:             # of a new network more than twice that
        signs.add("the tokens to be predicted hardly differ, so that their variance falls with the "
                  "alignment: the encoder makes all alike; try a lower --align-weight")
    return signs
