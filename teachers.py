"""Two teachers: exponential moving averages (EMA) of the student, one for pseudo labels, one for
what the decoder predicts.

    labelling teacher         encoder and heads   sees the whole view, nothing masked, and makes the
                                                  pseudo labels
    reconstruction teacher    encoder             sees the whole view; its patch tokens are what the
                                                  decoder predicts

(RC-MAE, Lee et al. 2023, is an MAE that also predicts the pixels a teacher predicts. In that recipe
the reconstruction teacher has a decoder and sees the student's masks.)

A teacher is never trained. After every optimiser step its weights move a little towards the
student's,

    T  <-  m T + (1 - m) student

so it is an average of recent students, steadier than any of them. How recent is said by its
*half-life* h: a student of h steps ago counts half of what the present one counts, m = 0.5^(1/h).
The two jobs need not want the same half-life: with two teachers each has its own. By default labels
follow fast (0.3 % of the run) and targets slowly (3 %). Whether it helps: docs/results.md. With
equal half-lives, and the same input, two teachers are one.

Letters:  B views in the batch, N patches, V visible ones, D width of the encoder, P numbers that
          are predicted of a patch, K clusters.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from mae import at_least_fp32, plain_norm, random_masking
from support.ranks import mean_over_ranks

STANDARDISE = ("token", "feature", "position", "none")


# ------------------------------------------------------------------------------------ the teachers

def frozen_copy(module):
    """A copy that shares no storage with the module and takes no gradient. Of None, None."""
    return None if module is None else copy.deepcopy(module).eval().requires_grad_(False)


class Teacher(nn.Module):
    """Copies of modules of the student, which follow it: the encoder, and what its job asks for.

    heads: also the heads, for a labelling teacher. decoder: also the decoder, for RC-MAE, whose
    teacher predicts pixels."""

    def __init__(self, student, heads=False, decoder=False):
        super().__init__()
        self.encoder = frozen_copy(student.mae.encoder)
        self.decoder = frozen_copy(student.mae.decoder) if decoder else None
        self.image_head = frozen_copy(student.image_head) if heads else None
        self.patch_head = frozen_copy(student.patch_head) if heads else None
        # The running mean score of each cluster, for centring. A buffer: it does not follow anyone.
        for name, head in (("image", self.image_head), ("patch", self.patch_head)):
            if head is not None:
                self.register_buffer(f"{name}_centre", torch.zeros_like(head.prototypes[:, 0]))
        self.eval()

    @property
    def centres(self):
        """{"image": K, "patch": K} as far as there are heads."""
        return {name.removesuffix("_centre"): centre
                for name, centre in self.named_buffers(recurse=False)}

    def encode(self, imgs):
        """Whole views B C H W -> tokens B 1+N D, the class token first."""
        return self.encoder(imgs)

    def predict_pixels(self, imgs, mask_ratio, noise):
        """RC-MAE's teacher alone: it sees masked views, as the student does.

        Views B C H W under the masks of noise B N -> what its decoder predicts, B N P."""
        ids_keep, _, ids_restore = random_masking(noise, mask_ratio)
        latent = self.encoder(imgs, ids_keep)                                          # B 1+V D
        return self.decoder.pred(self.decoder(latent, ids_restore))

    @torch.no_grad()
    def follow(self, student, m):
        """Every parameter: T <- m T + (1 - m) student. 0 copies the student, 1 stands still."""
        averages, weights = [], []
        for own, theirs in ((self.encoder, student.mae.encoder),
                            (self.decoder, student.mae.decoder),
                            (self.image_head, student.image_head),
                            (self.patch_head, student.patch_head)):
            if own is not None:                            # copies: parameters in the same order
                averages += own.parameters()
                weights += theirs.parameters()
        ema_update(averages, weights, m)


@torch.no_grad()
def ema_update(averages, weights, m):
    """averages <- m averages + (1 - m) weights, in place: two lists of tensors. One call for all of
    them, as a GPU would spend more time on starting a hundred small ones than on computing."""
    torch._foreach_lerp_(averages, weights, 1 - m)


@dataclass
class Teachers:
    """None if absent. One object in both roles is one teacher."""
    labelling: Teacher | None
    reconstruction: Teacher | None

    def named(self):
        """{"labelling": teacher, "reconstruction": teacher}: each teacher once."""
        named = {"labelling": self.labelling, "reconstruction": self.reconstruction}
        if self.labelling is self.reconstruction:
            del named["reconstruction"]
        return {name: teacher for name, teacher in named.items() if teacher is not None}

    def follow(self, student, momenta):
        """After an optimiser step; momenta: {"labelling": m, "reconstruction": m}."""
        for name, teacher in self.named().items():
            teacher.follow(student, momenta[name])


def make_teachers(student, config):
    """The teachers that config asks for, fresh copies of the student.

    pseudo labels   a labelling teacher
    token target    a reconstruction teacher; with config.teachers = 1 the labelling teacher is it
    consistency     a reconstruction teacher with a decoder (the recipe rc-mae)
    none of these   a reconstruction teacher without a task (the recipe mae): the average of the
                    weights, kept to be judged beside the student"""
    labelled = student.image_head is not None or student.patch_head is not None
    labelling = Teacher(student, heads=True) if labelled else None
    if config.consistency_weight:
        reconstruction = Teacher(student, decoder=True)
    elif config.target == "tokens" and labelled and config.teachers == 1:
        reconstruction = labelling
    elif config.target == "tokens" or not labelled:
        reconstruction = Teacher(student)
    else:
        reconstruction = None          # pixels are the target, or nothing is
    return Teachers(labelling, reconstruction)


# ----------------------------------------------------------------------------------- the schedules

def half_life(text):
    """A half-life as it is written in a setting: "1%" of the run, "30" steps, "inf" for a teacher
    that never changes, "0" for one that copies the student. "173:inf" goes from the first to the
    last of these. Returns the text; raises ValueError, with what to write, for anything else."""
    possible = text.count(":") <= 1
    for part in text.split(":"):
        try:
            h = in_steps(part, 100)        # of a run of 100 steps "1%" is 1
        except ValueError:
            h = math.nan                   # no number: not possible either
        # "0.01" is refused: it is easily meant as a share of the run, which is written "1%"
        possible = possible and (0 <= h <= 100 if part.endswith("%") else h == 0 or h >= 1)
    if not possible:
        raise ValueError(f"{text!r} is none: write 1% (of the run) or 30 (steps), or A:B to go "
                         "from A to B")
    return text


def in_steps(part, total):
    """The text "1%" or "30" as a number of steps, of a run of `total`."""
    return float(part[:-1]) / 100 * total if part.endswith("%") else float(part)


def momentum(step, total, half_life):
    """m after optimiser step number `step` (0 is the first) of the `total` of the whole run.

    half_life: a text as above. From "first" to "last" of "first:last" m goes by a cosine, as in
    BYOL. m from 0.996 to 1 (DINO, RC-MAE) is "173:inf"."""
    ends = [in_steps(part, total) for part in half_life.split(":")]
    first, last = (0.5 ** (1 / h) if h > 0 else 0.0 for h in (ends[0], ends[-1]))
    progress = min(1, step / max(1, total - 1))
    return last - (last - first) * (1 + math.cos(math.pi * progress)) / 2


# ---------------------------------------------------------------------------------- token targets

@torch.no_grad()
def standardise(tokens, how):
    """The reconstruction teacher's tokens B N D as targets B N D, mean 0 and variance 1 (but for
    "none")

    token      within each token, over its D features (LayerNorm without parameters; data2vec, SdAE)
    feature    of each feature, over the tokens of the micro-batch on all ranks
    position   of each feature at each position, over the images of the micro-batch on all ranks
    none       left as they are"""
    tokens = at_least_fp32(tokens)
    if how == "none":
        return tokens
    if how == "token":
        return plain_norm(tokens)
    over = {"feature": (0, 1), "position": 0}[how]
    tokens = tokens - mean_over_ranks(tokens.mean(over))
    return tokens / (mean_over_ranks(tokens.square().mean(over)) + 1e-6).sqrt()


@torch.no_grad()
def between_images(tokens):
    """Tokens B N D -> two numbers. First, the variance between images at the same position. It is
    the loss of predicting the mean token of each position without looking at the image: a token
    loss that does not fall below it has learned positions only. Second, its share of the whole
    variance. Near 0, targets say where a patch is and not what it shows."""
    tokens = at_least_fp32(tokens)
    position = mean_over_ranks(tokens.mean(0))                                               # N D
    between = mean_over_ranks((tokens - position).square().mean())
    whole = between + (position - position.mean(0)).square().mean()
    return between, between / whole.clamp(min=1e-12)
