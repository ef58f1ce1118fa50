"""Simple classifiers on frozen features, and how their answers are scored.

Letters:  n m images (or patches), N patches of an image, D width of a feature, C classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

LINEAR_RATES = (0.003, 0.03, 0.3, 3.0)     # learning rates tried, a wide net; validation chooses
# Strengths of the L2 penalty of logistic regression; validation chooses. On features of shapes the
# ends are rarely the best. With one image of each class all five score within half a point.
STRENGTHS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ONE_STRENGTH = 1e-3


# ------------------------------------------------------------------------------------ classifiers

def knn(x, y, test_x, classes, k=20, temperature=0.07):
    """Weighted k nearest neighbours by cosine: x n D, y n, test_x m D -> predicted classes m.

    A neighbour votes with exp(cosine / temperature); k and temperature as in Wu et al. 2018 and
    DINO."""
    x, test_x = F.normalize(x, dim=1), F.normalize(test_x, dim=1)
    predictions = []
    for queries in test_x.split(max(1, 2**28 // len(x))):  # a gigabyte of cosines at a time
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
    """x and others, each m D, less the mean of x, then scaled to length 1; a list."""
    mean = x.mean(0)
    return [F.normalize(each - mean, dim=1) for each in (x, *others)]


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
    for score, there in zip(scores.cpu().T, y.cpu().T.double(), strict=True):
        score, order = score.sort(descending=True)
        hits = there[order].cumsum(0)
        last = torch.ones_like(score, dtype=torch.bool)
        last[:-1] = score[:-1] != score[1:]                # of those with one score
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
