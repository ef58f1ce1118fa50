"""How good are frozen features? Features, simple classifiers on them, and their scores.

Letters:  B images in a chunk, n m images (or patches), N patches of an image, D width of a token
          or a feature, C classes.
"""

import math
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mae import patchify
from support.datasets import read

CHUNK = 200                                # images in the memory of the device at a time
LINEAR_RATES = (0.003, 0.03, 0.3, 3.0)     # learning rates tried, a wide net; validation chooses
# Strengths of the L2 penalty of logistic regression; validation chooses. On features of shapes the
# ends are rarely the best. With one image of each class all five score within half a point.
STRENGTHS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ONE_STRENGTH = 1e-3
# How many images may show their class: so many of each class, or such a share of all.
AMOUNTS = ("1", "2", "5", "10", "1%", "10%")


# ---------------------------------------------------------------------------------------- features

def subset(ids, n):
    """At most n of ids, evenly spread."""
    return ids[torch.linspace(0, len(ids) - 1, min(n, len(ids))).long()]


def standardised(images, ids, mean, std, device="cpu"):
    """The images at ids as networks want them: n C H W, on the device."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    return (read(images, ids).to(device).float() / 255 - mean) / std


@torch.no_grad()
def tokens_in_chunks(encoder, images, ids, mean, std, device):
    """Yield tokens b 1+N D of the images at ids, at most CHUNK at a time, on the device."""
    dtype = next(encoder.parameters()).dtype
    for part in ids.split(CHUNK):
        yield encoder(standardised(images, part, mean, std, device).to(dtype))


def features(encoder, images, ids, mean, std, device):
    """Features of the images at ids, on the device: {"class": n D, "mean": n D}.

    encoder None: {"pixels": n (C H W)}."""
    if encoder is None:
        parts = [standardised(images, part, mean, std, device).flatten(1)
                 for part in ids.split(CHUNK)]
        return {"pixels": torch.cat(parts)}
    found = {"class": [], "mean": []}
    for tokens in tokens_in_chunks(encoder, images, ids, mean, std, device):
        found["class"].append(tokens[:, 0].float())
        found["mean"].append(tokens[:, 1:].float().mean(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def patch_features(encoder, images, ids, patch_size, mean, std, device):
    """Features of each patch of the images at ids, on the CPU: n N D; of encoder None their
    pixels."""
    if encoder is None:
        return patchify(standardised(images, ids, mean, std), patch_size)
    chunks = tokens_in_chunks(encoder, images, ids, mean, std, device)
    return torch.cat([tokens[:, 1:].float().cpu() for tokens in chunks])


@torch.no_grad()
def class_attention(encoder, imgs):
    """How much the class token attends to each patch in the last block: B C H W -> B heads N.

    What is missing to 1 it attends to itself."""
    attention, seen = encoder.blocks[-1].attn, []
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(imgs)
    hook.remove()
    qkv = attention.qkv(seen[0]).unflatten(-1, (3, attention.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)                   # each B heads 1+N D/heads
    scores = q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1)[:, :, 0, 1:]


def first_components(x):
    """Features n D, n and D at least 2 -> their first two principal components n 2, and the share
    of the variance that each holds."""
    scores, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return scores[:, :2] * s[:2], (s[:2].square() / s.square().sum()).tolist()


# ------------------------------------------------------------------------------------ classifiers

def knn(x, y, test_x, classes, k=20, temperature=0.07):
    """Weighted k nearest neighbours by cosine: x n D, y n, test_x m D -> predicted classes m.

    A neighbour votes with exp(cosine / temperature); temperature as in Wu et al. 2018, k as in
    DINO."""
    x, test_x = F.normalize(x, dim=1), F.normalize(test_x, dim=1)
    predictions = []
    for queries in test_x.split(max(1, 2**28 // len(x))):  # a gigabyte of cosines at a time
        with torch.autocast(x.device.type, enabled=False):             # bf16 makes many ties
            cosine = queries @ x.T                                                           # b n
        cosine, neighbours = cosine.topk(min(k, len(x)), dim=1)                              # b k
        votes = torch.zeros(len(queries), classes, device=x.device)
        votes.scatter_add_(1, y[neighbours], (cosine / temperature).exp())             # b classes
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def linear(x, y, test_x, classes, rates=LINEAR_RATES, epochs=90, batch=1024):
    """Linear classifiers, one per learning rate, trained side by side: x n D, y n (or n classes:
    shares of the classes, which sum to 1), test_x m D -> predicted classes, rates m.

    Near MAE's protocol: BatchNorm without affine, then a linear layer; momentum 0.9, no weight
    decay, cosine, 90 epochs. Unlike it: features are computed once, of whole images (no random
    crops); no warm-up; SGD in place of LARS, as batches are small. The rate is for the whole
    batch."""
    g, R = torch.Generator().manual_seed(0), len(rates)
    norm = nn.BatchNorm1d(x.shape[1], affine=False, device=x.device)
    heads = nn.Linear(x.shape[1], R * classes, device=x.device)        # all of them in one product
    nn.init.zeros_(heads.weight)
    nn.init.zeros_(heads.bias)
    # All heads share an optimiser of rate 1. Without weight decay, to multiply the gradient of a
    # head by a rate is the same as to give the head that rate.
    rate = torch.tensor(rates, device=x.device).repeat_interleave(classes)             # R classes
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    batch = min(batch, len(x))
    steps = len(x) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=g)
        for ids in order[:steps * batch].view(-1, batch).to(x.device):
            logits = heads(norm(x[ids])).view(-1, classes)                     # (batch R) classes
            loss = R * F.cross_entropy(logits, y[ids].repeat_interleave(R, dim=0))
            optimizer.zero_grad()
            loss.backward()
            heads.weight.grad *= rate[:, None]
            heads.bias.grad *= rate
            optimizer.step()
            schedule.step()
    norm.eval()
    predictions = []
    with torch.no_grad():
        for part in test_x.split(100_000):                 # there may be many patches
            logits = heads(norm(part.to(x.device))).unflatten(1, (R, classes))
            predictions.append(logits.argmax(-1).T)                                # R m
    return torch.cat(predictions, dim=1)


def logistic_regression(x, y, classes, strength, start=None, iterations=1000):
    """Logistic regression with an L2 penalty: x n D, y n -> weights classes 1+D, the bias first.

    y n x classes of 0 and 1 (several classes to an image): each class is a question of its own,
    there or not. The loss is the mean over images, plus strength / 2 times the sum of the squared
    weights, biases left out: scikit-learn's with C = 1 / (strength n). It is convex, so L-BFGS
    finds its minimum from anywhere: no learning rate, no seed. `start`, weights, saves time."""
    if start is None:
        start = torch.zeros(classes, 1 + x.shape[1], device=x.device)
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=iterations, max_eval=2 * iterations,
                                  tolerance_grad=1e-6, tolerance_change=1e-9,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = predict(weights, x)
        if y.ndim == 1:
            loss = F.cross_entropy(logits, y)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, y.float()) * classes
        loss = loss + strength / 2 * weights[:, 1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def predict(weights, x):
    """What logistic regression says of x n D: logits n classes."""
    return x @ weights[:, 1:].T + weights[:, 0]


def centred(x, *others):
    """x and others, each m D or None, less the mean of x, then scaled to length 1; a list."""
    mean = x.mean(0)
    return [each if each is None else F.normalize(each - mean, dim=1) for each in (x, *others)]


# ---------------------------------------------------------------------- what is tuned, and on what

def classify(task, x, y, val, test_x, classes):
    """One token -> its validation accuracy, and predictions for test_x (None for None).

    val: n, True for validation images. What is tuned is tuned with the other rows against these;
    then all rows are used. What is right for test_x is not asked for."""
    fit_x, fit_y, val_x, val_y = x[~val], y[~val], x[val], y[val]
    if task == "knn":
        validation = accuracy(knn(fit_x, fit_y, val_x, classes), val_y)
        return validation, None if test_x is None else knn(x, y, test_x, classes)
    scores = [accuracy(p, val_y) for p in linear(fit_x, fit_y, val_x, classes)]
    best = place_of_highest(scores)
    if test_x is None:
        return scores[best], None
    return scores[best], linear(x, y, test_x, classes, rates=[LINEAR_RATES[best]])[0]


def place_of_highest(scores):
    return max(range(len(scores)), key=scores.__getitem__)


def pick_few(y, classes, pool, amount, seed):
    """Which images get to show their class: places in y.

    y: n, or n classes of 0 and 1; pool: n, True for those that may be picked. amount: "5" images of
    each class, "10%" of all of them (of each class its part, at least one image; where an image has
    several classes, of all images), or "all". With one seed, fewer images are among those of
    more. Where a class has fewer images than asked for, all of them."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    order = order[pool[order]]
    if amount == "all":
        return order
    if y.ndim == 2 and amount.endswith("%"):
        return order[:max(1, round(float(amount[:-1]) / 100 * len(y)))]
    picked = []
    for name in range(classes):
        belongs = (y == name) if y.ndim == 1 else y[:, name] == 1                          # n
        wanted = int(amount.rstrip("%"))
        if amount.endswith("%"):
            wanted = max(1, round(wanted / 100 * belongs.sum().item()))
        picked.append(order[belongs[order]][:wanted])
    return torch.cat(picked).unique()          # an image of several classes may be picked twice


def score(logits, y):
    """Accuracy, or, where an image may have several classes, mean average precision."""
    return accuracy(logits.argmax(1), y) if y.ndim == 1 else mean_average_precision(logits, y)


def classify_few(x, y, classes, picked, val, strengths):
    """Logistic regression on the picked images -> what it scores on validation images, its
    strength, chosen on these, and its weights. x: `centred`; val: n, True for those images."""
    fits, scores, weights = [], [], None
    for strength in strengths:             # each starts from the one before: that saves iterations
        weights = logistic_regression(x[picked], y[picked], classes, strength, weights)
        fits.append(weights)
        scores.append(score(predict(weights, x[val]), y[val]))
    best = place_of_highest(scores)
    return scores[best], strengths[best], fits[best]


def paint(x, counts, val, test_x):
    """Patch tokens n N D, the pixels of each class in them n N C -> the mIoU on validation images,
    and a class for each patch of test_x, or, if that is None, of the validation images: m N.

    A linear layer predicts the shares of the classes in a patch. In the cross-entropy this is the
    same as predicting each pixel, all those of a patch alike. val as in `classify`."""
    def fit(x, counts, test_x, rates=LINEAR_RATES):
        seen = counts.sum(-1) > 0                          # not: patches without a known pixel
        shares = counts[seen] / counts[seen].sum(-1, keepdim=True)
        painted = linear(x[seen], shares, test_x.flatten(0, 1), counts.shape[-1], epochs=10,
                         batch=4096, rates=rates)
        return painted.unflatten(1, test_x.shape[:2])                                 # rates m N

    on_validation = fit(x[~val], counts[~val], x[val])
    scores = [mean_iou(painted, counts[val]) for painted in on_validation]
    best = place_of_highest(scores)
    if test_x is None:
        return scores[best], on_validation[best]
    return scores[best], fit(x, counts, test_x, rates=[LINEAR_RATES[best]])[0]


class Fit(NamedTuple):
    """Logistic regression on one draw of images."""
    images: int                # that it was fitted to
    strength: float            # of the penalty
    validation: float          # score
    score: float               # on test images, or, if these are not looked at, the same
    classes: dict | None       # of "all" images: average precision of each class


def fit_draws(x, y, classes, val, amounts, draws, test_x, test_y):
    """{amount: [Fit]}: so many draws of each of the amounts, one of "all".

    Features are centred on the mean of all training images, which takes no classes."""
    x, test_x = centred(x, test_x)
    return {amount: [fit_draw(x, y, classes, val, amount, seed, test_x, test_y)
                     for seed in range(1 if amount == "all" else draws)] for amount in amounts}


def fit_draw(x, y, classes, val, amount, seed, test_x, test_y):
    """The strength of the penalty is chosen on validation images, whose classes are all used. With
    one image of each class it is fixed, so that nothing at all is chosen there."""
    C = len(classes)
    picked = pick_few(y, C, ~val, amount, seed)
    strengths = (ONE_STRENGTH,) if amount == "1" else STRENGTHS
    validation, strength, weights = classify_few(x, y, C, picked, val, strengths)
    scored, scored_y = (x[val], y[val]) if test_x is None else (test_x, test_y)
    if amount == "all" and test_x is not None:             # now those that validated train too
        picked, weights = torch.arange(len(y)), logistic_regression(x, y, C, strength)
    logits, of_class = predict(weights, scored), None
    if amount == "all":
        of_class = by_name(classes, average_precision(logits, scored_y))
    return Fit(len(picked), strength, validation, score(logits, scored_y), of_class)


def of_each(rows, field):
    """{token: {amount: [Fit]}} -> the same of one field of each `Fit`."""
    return {token: {amount: [getattr(each, field) for each in fits] for amount, fits in row.items()}
            for token, row in rows.items()}


def by_name(names, scores):
    """{name of a class: its score}, None for a class that is not there."""
    return {str(name): None if math.isnan(each) else round(each, 4)
            for name, each in zip(names, scores.tolist(), strict=True)}


def guessing(y):
    """What is scored without looking at an image, on images of these classes: accuracy of always
    the commonest class; or mean average precision of scores all alike, which is the share of the
    images that are of a class."""
    shares = y.bincount() / len(y) if y.ndim == 1 else y.double().mean(0)
    return round((shares.max() if y.ndim == 1 else shares[shares > 0].mean()).item(), 4)


def warn_of_small_classes(y, pool, classes):
    """Say which classes have fewer images to pick from than the ten of `AMOUNTS`."""
    there = y[pool].bincount(minlength=len(classes)) if y.ndim == 1 else y[pool].sum(0)
    few = [f"{name} ({n})" for name, n in zip(classes, there.tolist()) if n < 10]
    if few:
        print("fewer than ten images to draw from, so columns that ask for more use all: "
              f"{', '.join(few[:5])}{', ...' * (len(few) > 5)}", file=sys.stderr)


# ----------------------------------------------------------------------------------------- scores

def accuracy(predictions, y):
    return round((predictions == y).float().mean().item(), 4)


def average_precision(scores, y):
    """Of each class, how well its images come first when sorted by score: scores n C, y n C of 0
    and 1 -> C; NaN for a class that no image has.

    Images are gone through from the highest score down. Precision is the share of them so far that
    are of the class, recall the share of the class found so far. The average is of the precision,
    each weighted with what the recall gains there (scikit-learn's definition, nothing
    interpolated). Images with one score come together."""
    found = []
    for values, there in zip(scores.cpu().T, y.cpu().T.double(), strict=True):
        values, order = values.sort(descending=True)
        hits = there[order].cumsum(0)
        last = torch.ones_like(values, dtype=torch.bool)
        last[:-1] = values[:-1] != values[1:]              # of those with one score
        hits, place = hits[last], last.nonzero().flatten() + 1
        gains = hits.diff(prepend=hits.new_zeros(1))
        found.append((gains * hits / place).sum() / hits[-1])
    return torch.stack(found)


def mean_average_precision(scores, y):
    """The mean over the classes that some image has."""
    return round(average_precision(scores, y).nanmean().item(), 4)


def iou(painted, counts):
    """Intersection over union of each class, in pixels: C; NaN for a class that is not there.

    painted m N: the class that a patch is painted in. counts m N C: pixels of each class in it."""
    C = counts.shape[-1]
    confusion = torch.zeros(C, C, dtype=torch.float64)
    confusion.index_add_(0, painted.flatten().cpu(), counts.flatten(0, 1).cpu().double())
    return overlaps(confusion)


def overlaps(confusion):
    """Intersection over union of each class: C; NaN for a class that is not there.

    confusion C C: how many pixels were painted in the class of the row and are of that of the
    column."""
    hit, truth = confusion.diagonal(), confusion.sum(0)
    return torch.where(truth > 0, hit / (truth + confusion.sum(1) - hit), math.nan)


def mean_iou(painted, counts):
    """The mean over the classes that are there."""
    return round(iou(painted, counts).nanmean().item(), 4)
