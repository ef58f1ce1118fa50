"""SdAE, self-distillated masked autoencoder (Chen et al., ECCV 2022, arXiv 2208.00449).

The student predicts tokens in place of pixels: those that a moving average of its own encoder
makes of the masked patches. That teacher does not see the whole image, as it would then know much
more than the student can. It sees the masked patches in a few disjoint *folds*, one at a time, each
about as many as the student's.

    patches, shuffled        a b c d | e f g h   i j k l   m n o p     visible | 3 folds of masked
    student                  a b c d ─ encoder ─ decoder ─ pred e .. p       (with gradient)
    teacher, three times               e f g h ─ encoder ─┐
                                       i j k l ─ encoder ─┼ tokens e .. p    (no gradient)
                                       m n o p ─ encoder ─┘
    loss = 2 (1 - cosine of pred and token), each less its mean, averaged over the masked patches
    after each step: teacher <- m teacher + (1 - m) student

What differs from MAE: the target, and the teacher. What differs from `pl-mae`, which also predicts
tokens: folds in place of a whole view, the cosine, a teacher that sees the student's colours.

Where the values are from: three folds, normed tokens, a cosine, a mask of 75 %, and a teacher that
moves once in an epoch, with m from 0.96 to 0.99 over 300 epochs, are those of the authors' code.
That is a half-life of 17 epochs, 5.7 % of the run, at first, and of 23 % at last. Ours: the teacher
moves after every step, with these half-lives; the prediction is normed like the token, so that the
loss is a mean squared error, `masked_mse`.

Left out: drop path in the student. Masked patches that are left over when M is no multiple of the
folds are in no fold and not in the loss; in the authors' code likewise.

Letters:  B views in a micro-batch, N patches, V visible, M masked, D width of the encoder, F folds
          of S patches each.
"""

from dataclasses import dataclass

import torch

import pseudo_labels
from extras.relatives import SHARED, check_fixed
from mae import count_visible, gather_tokens, masked_mse, pair, plain_norm
from support import settings
from support.command_line import UsageError, option
from support.ranks import over_ranks

SETTINGS = dict(SHARED, target="tokens", standardise="token", mask_ratio=0.75,
                reconstruction_half_life="5.7%:23%")


@dataclass
class Config(settings.Config):
    recipe: str = option("sdae", "this one", choices=["sdae"])
    folds: int = option(3, "parts that the masked patches are shown to the teacher in (SdAE)",
                        range=settings.COUNT)


def check(config):
    check_fixed(config, SETTINGS)
    (H, W), (ph, pw) = pair(config.img_size), pair(config.patch_size)
    M = H // ph * (W // pw) - count_visible(H // ph * (W // pw), config.mask_ratio)
    if config.folds > M:
        raise UsageError(f"--folds {config.folds}: more than the {M} masked patches; use {M} or "
                         "less")


class Student(pseudo_labels.Student):
    """An MAE that predicts tokens. Only their direction counts, so they are normed."""

    def forward(self, imgs, mask_ratio, noise):
        """B C H W, noise B N -> a dictionary with pred B N D, mask B N and others."""
        out = super().forward(imgs, mask_ratio, noise)
        return out | {"pred": plain_norm(out["pred"])}                                     # B N D


@torch.no_grad()
def fold_tokens(encoder, imgs, mask_ratio, noise, folds):
    """What the teacher's encoder makes of the masked patches, fold by fold.

    B C H W, noise B N -> ids B (F S) of the patches in a fold, their normed tokens B (F S) D."""
    B, N = noise.shape
    masked = noise.argsort(dim=1)[:, count_visible(N, mask_ratio):]        # B M, in random order
    S = masked.shape[1] // folds
    ids = masked[:, :folds * S]                                                        # B (F S)
    tokens = encoder(imgs.repeat_interleave(folds, dim=0), ids.reshape(B * folds, S))
    return ids, plain_norm(tokens[:, 1:]).reshape(B, folds * S, -1)        # without class tokens


def training_step(student, teachers, views, config):
    """As in train.py."""
    ids, tokens = fold_tokens(teachers.reconstruction.encoder, views.student, config.mask_ratio,
                              views.noise, config.folds)
    pred = student(views.student, config.mask_ratio, views.noise)["pred"]                  # B N D
    with pseudo_labels.full_precision(pred):
        folded = torch.ones_like(ids, dtype=tokens.dtype)                              # B (F S)
        rec = masked_mse(gather_tokens(pred, ids), tokens, folded)
        terms = {"rec": rec, "rec_constant": loss_of_places(ids, tokens, pred.shape[1])}
    return config.rec_weight * rec, terms, {}, {}


@torch.no_grad()
def loss_of_places(ids, tokens, N):
    """The loss of a blind guess, the mean of all tokens of a place; below it one looks at images.

    ids B (F S), tokens B (F S) D, over the micro-batches of all ranks -> a number."""
    D = tokens.shape[-1]
    places = tokens.new_zeros(N, D).index_add(0, ids.flatten(), tokens.flatten(0, 1))      # N D
    mean = plain_norm(over_ranks(places))                  # the sum: its direction is the mean's
    return masked_mse(mean[ids], tokens, torch.ones_like(ids, dtype=tokens.dtype))
