"""Two teachers: exponential moving averages (EMA) of the student, one for labels, one for token targets.

    labelling teacher         encoder and heads   sees the whole view, makes the pseudo labels
    reconstruction teacher    encoder             sees the whole view, its patch tokens are what the decoder predicts

A teacher is never trained: after every optimiser step its weights move a little towards the student's,

    T  <-  m T + (1 - m) student

so it is an average of recent students, steadier than any of them. How recent is said by its half-life: after h steps the
weight of what the student was has halved, m = 0.5^(1/h). Labels want to stay the same for long, targets want to be
up to date, or the other way round: that the two jobs need not share a half-life is why there are two teachers. With equal
half-lives (and the same input) two teachers are one.

Letters:  B images, N patches, D width of the encoder.
"""

import copy
import math

import torch
import torch.nn.functional as F

from pseudo_labels import mean_over_ranks

STANDARDISE = ("token", "feature", "position", "none")


# ----------------------------------------------------------------------------------------------------------- the teachers

def make_teacher(student, without=()):
    """A copy of the student that shares no storage with it, takes no gradient, and lacks the parts whose names begin with
    one of `without`."""
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    for name in [n for n, _ in (*teacher.named_children(), *teacher.named_parameters(recurse=False))]:
        if name.startswith(tuple(without)):
            setattr(teacher, name, None)
    return teacher


@torch.no_grad()
def ema_update(teacher, student, m):
    """T <- m T + (1 - m) student, for every parameter the teacher has; buffers (no weights, so not to be averaged) are copied.

    m = 0 copies the student exactly, m = 1 changes nothing."""
    parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
    for name, p in teacher.named_parameters():
        p.lerp_(parameters[name], 1 - m)
    for name, b in teacher.named_buffers():
        b.copy_(buffers[name])


# ---------------------------------------------------------------------------------------------------------- the schedules

def half_life(text):
    """The type of a half-life setting, a text: "0.01", one hundredth of the run; "173", steps; "173:inf", first and last."""
    if not 1 <= len(ends := [float(h) for h in text.split(":")]) <= 2 or not all(h >= 0 for h in ends):
        raise ValueError(text)
    return text


def momentum(step, total, half_life):
    """m after optimiser step number `step` (0 is the first) of the `total` of the whole run.

    half_life: "h", or "first:last", between which m goes by a cosine, as in BYOL. Below 1, h is a share of the run; from 1
    on, a number of steps. 0 is a teacher that copies the student, inf one that never changes. m from 0.996 to 1 (DINO,
    RC-MAE) is "173:inf"."""
    ends = [h if h >= 1 else h * total for h in map(float, half_life.split(":"))]
    first, last = (0.5 ** (1 / h) if h > 0 else 0.0 for h in (ends[0], ends[-1]))
    return last - (last - first) * (1 + math.cos(math.pi * min(1, step / max(1, total - 1)))) / 2


# ------------------------------------------------------------------------------------------------------ the token targets

@torch.no_grad()
def standardise(tokens, how):
    """The reconstruction teacher's tokens B N D as targets B N D, mean 0 and variance 1

    token      within each token, over its D features (LayerNorm without parameters; data2vec, SdAE)
    feature    of each feature, over the tokens of the micro-batch on all ranks
    position   of each feature at each position, over the images of the micro-batch on all ranks
    none       left as they are"""
    if how == "none":
        return tokens
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if how == "token":
        return F.layer_norm(tokens, tokens.shape[-1:])
    over = {"feature": (0, 1), "position": 0}[how]
    tokens = tokens - mean_over_ranks(tokens.mean(over))
    return tokens / (mean_over_ranks(tokens.square().mean(over)) + 1e-6).sqrt()


@torch.no_grad()
def between_images(tokens):
    """Of tokens B N D: the variance between images at the same position, and its share of the whole variance.

    The first is the loss of the best prediction that does not look at the image (the mean token of each position): a token
    loss that does not go below it has learned positions only. A share near 0 means that targets say where, not what."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    position = mean_over_ranks(tokens.mean(0))                                                          # N D
    between = mean_over_ranks((tokens - position).square().mean())
    whole = between + (position - position.mean(0)).square().mean()
    return between, between / whole.clamp(min=1e-12)
