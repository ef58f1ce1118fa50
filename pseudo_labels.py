"""Pseudo labels: cluster assignments that a teacher makes of its tokens, and that a student learns
to predict. Nobody says what the clusters should be: no true class is used anywhere.

    head      token ─ MLP ─ unit vector ─ cosine with K learned prototypes = scores          S K
    labels    the teacher's softmax(scores / low temperature), balanced over the batch: q    S K
    loss      cross-entropy of the student's p = softmax(scores / temperature):  − Σ_k q_k log p_k

Each cluster has a *prototype*, a learned unit vector: the nearer a token is to it, the higher the
score. *Image pseudo labels* are made of the class token, *patch pseudo labels* of each patch token.
(Nandam et al. 2024 say: pseudo labels of the class token and of the data tokens.)

There are two ways to learn nothing:

    one cluster for all    Every sample gets the same cluster. The student predicts that at almost
                           no loss. Two ways to *balance* the labels forbid it: `sinkhorn` gives all
                           clusters like shares of each batch, `centring` subtracts from each
                           cluster its running mean score. A third way, ME-MAX, is a loss: it
                           rewards a student whose mean prediction is uniform. (`none` does
                           nothing. Then this is what happens: notebook 3 shows it.)
    1/K for everything     Every sample belongs to all clusters alike. The loss is then ln K. It is
                           logged beside the losses of pseudo labels, as the line to get below. A
                           low temperature of the teacher works against it, and `koleo`, which
                           keeps the tokens of different images apart.

To skip at first reading: `centring`, `me_max`, and *ranks* (the processes of a run on several GPUs;
each holds a part of the batch, and what is a sum over the batch is summed over ranks).

Letters:  B views in the batch, N patches, V visible ones, D and d widths of encoder and decoder,
          P numbers that are predicted of a patch, K clusters, S samples that are balanced together:
          the class tokens of all views, or all their patch tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mae import MaskedAutoencoder, at_least_fp32, init_weights, plain_norm, restore_tokens
from support.ranks import gather_over_ranks, mean_over_ranks, over_ranks

BALANCING = ("sinkhorn", "centring", "me-max", "none")
CENTRE_MOMENTUM = 0.9              # of the running mean score (DINO)


def full_precision(x):
    """A context in which products are computed in x's own precision, not in autocast's bf16.

    Cosines are divided by temperatures as low as 0.0125. A step of bf16 near 1 is 0.0039. Divided,
    it puts a log-probability off by 0.31."""
    return torch.autocast(x.device.type, enabled=False)


# ---------------------------------------------------------------------------- heads and the student

class Head(nn.Module):
    """Tokens ... D -> scores ... K in -1..1: an MLP onto the unit sphere, cosine with K prototypes.

    Without batch norm, so that what a token scores does not depend on the batch it is in."""

    def __init__(self, dim, hidden, bottleneck, clusters):
        """hidden: widths of the hidden layers, a tuple; bottleneck: length of the unit vectors."""
        super().__init__()
        widths = (dim, *hidden, bottleneck)
        layers = []
        for width_in, width_out in zip(widths, widths[1:]):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])             # no GELU at the end
        # Only their directions count, but a step of the optimiser turns a short vector further than
        # a long one. So they start with length 1. (SwAV sets them back to it after every step.)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(clusters, bottleneck), dim=1))
        self.mlp.apply(init_weights)

    def project(self, x):
        """... D -> unit vectors, ... bottleneck."""
        x = self.mlp(x)
        with full_precision(x):
            return F.normalize(at_least_fp32(x), dim=-1)

    def compare(self, unit):
        """Unit vectors ... bottleneck -> cosines ... K."""
        with full_precision(unit):
            return unit @ F.normalize(self.prototypes, dim=-1).T

    def forward(self, x):
        return self.compare(self.project(x))


class Student(nn.Module):
    """A masked autoencoder, and the heads that predict pseudo labels. 0 clusters leave a head out.

    Widths: image head D -> 8/3 D -> 8/3 D -> 2/3 D, patch head D -> 2 D -> 2/3 D. For D = 192 these
    are 512-512-128 and 384-128. Not tuned. Raises ValueError for a patch head without a decoder."""

    def __init__(self, image_clusters=0, patch_clusters=0, **mae_arguments):
        super().__init__()
        self.mae = MaskedAutoencoder(**mae_arguments)
        D = self.mae.encoder.cls_token.shape[-1]
        self.image_head = self.patch_head = self.decoder_label = None
        if image_clusters:
            self.image_head = Head(D, (8 * D // 3, 8 * D // 3), 2 * D // 3, image_clusters)
        if patch_clusters and self.mae.decoder is None:
            raise ValueError("patch pseudo labels need a decoder: target_dim must not be 0")
        if patch_clusters:
            d = self.mae.decoder.mask_token.shape[-1]
            self.patch_head = Head(D, (2 * D,), 2 * D // 3, patch_clusters)
            self.decoder_label = nn.Linear(d, D)           # a masked patch's state as a token
            self.decoder_label.apply(init_weights)

    def forward(self, imgs, mask_ratio, noise):
        """Views imgs (B C H W) under the masks that noise (B N) chooses.

        Returns a dictionary of what the student has the parts for:

        mask     B N            1 where a patch is masked
        unit     B bottleneck   the class token on the image head's sphere, for KoLeo
        image    B K            scores of the class token
        pred     B N P          what the decoder predicts of each patch: pixels, or a token
        patch    B N K          scores of the patches"""
        z, mask, ids_restore = self.mae.forward_encoder(imgs, mask_ratio, noise)         # B 1+V D
        out = {"mask": mask}
        if self.image_head is not None:
            out["unit"] = self.image_head.project(z[:, 0])
            out["image"] = self.image_head.compare(out["unit"])                          # B K
        if self.mae.decoder is not None:
            states = self.mae.forward_decoder(z, ids_restore)                            # B N d
            out["pred"] = self.mae.decoder.pred(states)                                  # B N P
        if self.patch_head is not None:
            # The label of a visible patch is predicted from the encoder's token; of a masked one
            # from the decoder's state, as the encoder has no token of it. The norm brings both to
            # one scale, so that one head serves both.
            nothing = z.new_zeros(1, 1, z.shape[-1])       # at masked places: replaced below
            visible = restore_tokens(z[:, 1:], ids_restore, fill=nothing)                # B N D
            masked = self.decoder_label(states)                                          # B N D
            y = torch.where(mask[..., None] == 1, masked, visible)                       # B N D
            out["patch"] = self.patch_head(plain_norm(y))                                # B N K
        return out


# --------------------------------------------------------------------------------- balanced labels

@torch.no_grad()
def sinkhorn(scores, temperature=0.05, iterations=3):
    """Sinkhorn-Knopp: scores S K -> labels S K. Rows (samples) sum to 1, columns (clusters) to
    nearly S / K.

    Columns and rows of exp(scores / temperature) are normalised in turn, each to a sum of 1; the
    samples of all ranks count. Rows come last, so these are exact. After three rounds columns of
    random cosines are off by 1 % on average at a temperature of 0.05; at 0.0125, that of `shapes`,
    by 30 %, single ones by a factor of two and more. In log space, as exp would overflow; in
    float32 at least (`at_least_fp32`). Temperature, iterations: SwAV's (Caron et al. 2020)."""
    log_q = at_least_fp32(scores) / temperature                                            # S K
    for _ in range(iterations):
        # Columns. To divide by the sum of a column is, in logs, to subtract its logsumexp. That is
        # over the samples of all ranks. Written as a maximum and a sum, it lets ranks exchange K
        # numbers and no samples. The maximum keeps exp in range.
        top = over_ranks(log_q.amax(0), "MAX")                                               # K
        total = over_ranks((log_q - top).exp().sum(0), "SUM")                                # K
        log_q = log_q - top - total.log()
        # Rows: the probabilities of a sample sum to 1.
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp()


@torch.no_grad()
def centring(scores, centre, temperature=0.05):
    """softmax((scores - centre) / temperature), S K; centre K (DINO, Caron et al. 2021)."""
    return (at_least_fp32(scores - centre) / temperature).softmax(dim=1)


@torch.no_grad()
def move_centre(centre, scores):
    """Move `centre` (K), the running mean of scores S K over micro-batches and ranks, in place."""
    mean = mean_over_ranks(at_least_fp32(scores).mean(0))
    centre.lerp_(mean.to(centre.dtype), 1 - CENTRE_MOMENTUM)


def balance(scores, centre, config):
    """Scores S K -> labels S K, by config.balancing and config.teacher_temperature.

    Raises ValueError for a way that there is not."""
    temperature = config.teacher_temperature
    if config.balancing == "sinkhorn":
        return sinkhorn(scores, temperature)
    if config.balancing == "centring":
        return centring(scores, centre, temperature)
    if config.balancing in ("me-max", "none"):             # labels are left alone: see `me_max`
        return (at_least_fp32(scores) / temperature).softmax(dim=1)
    raise ValueError(f"balancing {config.balancing!r}: there are {', '.join(BALANCING)}")


@torch.no_grad()
def remove_place(scores):
    """Scores of patches B N K less their mean at each place, over the views of all ranks.

    The easiest thing to know of a patch is where it is, so clusters tend to become places. After
    this no cluster scores higher at one place than at another, on average over the views. Only the
    teacher's scores are treated so."""
    return scores - mean_over_ranks(scores.mean(0))


@torch.no_grad()
def make_labels(teacher, tokens, config):
    """The labelling teacher's tokens B 1+N D -> pseudo labels {"image": B K, "patch": B N K}, of
    the heads that it has. With centring, its centres move on.

    config: of support/settings.py; here its balancing, teacher_temperature and remove_place."""
    scores, labels = {}, {}
    if teacher.image_head is not None:
        scores["image"] = teacher.image_head(tokens[:, 0])                                 # B K
    if teacher.patch_head is not None:
        scores["patch"] = teacher.patch_head(plain_norm(tokens[:, 1:]))                    # B N K
        if config.remove_place:
            scores["patch"] = remove_place(scores["patch"])
    for name, each in scores.items():
        samples = each.flatten(0, -2)                      # B K stays, B N K becomes (B N) K
        labels[name] = balance(samples, teacher.centres[name], config).view_as(each)
        if config.balancing == "centring":
            move_centre(teacher.centres[name], samples)
    return labels


def swap_views(labels, views):
    """Each view gets the label of the other view of its image: what two crops share is content.

    labels B K, all first views, then all second ones. With one view it keeps its own. Only of image
    pseudo labels: the patches of two crops show different things. Raises ValueError for two views
    in an odd batch."""
    if views == 1:
        return labels
    if len(labels) % 2:
        raise ValueError(f"{len(labels)} rows are not two views of some images")
    return labels.roll(len(labels) // 2, dims=0)


# --------------------------------------------------------------------------------------- the losses

def label_loss(scores, labels, temperature=0.1):
    """Cross-entropy of each sample: the student's scores ... K, labels ... K -> ..., in nats.

    The least it can be is the entropy of the label, not 0. Temperature as in iBOT and MC-SSL."""
    return -(labels * F.log_softmax(scores / temperature, dim=-1)).sum(-1)


def image_label_loss(scores, labels, temperature=0.1):
    """Scores of class tokens B K against image pseudo labels B K: a number."""
    return label_loss(scores, labels, temperature).mean()


def patch_label_loss(scores, labels, mask, which="both", temperature=0.1):
    """Scores of patches B N K against patch pseudo labels B N K: a number.

    Each patch has its `label_loss`. mask: B N, 1 masked; every view has patches of both kinds.
    which: the mean over all "masked" patches of the batch, over all "visible" ones, or ("both") the
    mean of these two means."""
    loss = label_loss(scores, labels, temperature)                                         # B N
    masked = (loss * mask).sum() / mask.sum()
    visible = (loss * (1 - mask)).sum() / (1 - mask).sum()
    if which == "both":
        return (masked + visible) / 2
    return {"masked": masked, "visible": visible}[which]


def me_max(scores, temperature=0.1):
    """ln K - H(mean prediction over samples and ranks): 0 where all clusters are used alike, ln K
    where one is used. The mean-entropy maximisation of MSN (Assran et al. 2022) as a loss.

    scores ... K of the student, with gradient."""
    mean = mean_over_ranks((scores / temperature).softmax(-1).flatten(0, -2).mean(0))          # K
    # The mean of a cluster that nobody uses can underflow to 0. The gradient would then be log 0,
    # minus infinity. So the logarithm sees the smallest positive number in its place.
    least = mean.clamp(min=torch.finfo(mean.dtype).tiny)
    return math.log(len(mean)) + torch.special.xlogy(mean, least).sum()


def koleo(unit, images):
    """Mean over class tokens of -log of the distance to the nearest one of another image
    (Sablayrolles et al. 2019; DINOv2), on any rank; 0 where there is no other image. The nearest
    one gets no gradient. The distance is Euclidean, plus 1e-6, as log 0 is infinite.

    unit: B bottleneck, of the image head. images: how many there are of them; row i is of image
    i % images, so with 2 images in 2 views the rows are of images 0 1 0 1.

    It spreads the tokens of different images over the sphere. Without it the labels of a fresh
    network stay vague: its tokens lie close together, all scores are alike, and predicting 1/K is
    nearly right."""
    own = torch.arange(len(unit), device=unit.device) % images         # the image of each row: B
    units, image, own = gather_over_ranks(unit, own, images)           # of all ranks, no gradient
    same = own[:, None] == image                           # B rows, a column for each of units
    cosine = unit.detach() @ units.T
    nearest = cosine.masked_fill(same, -2).argmax(1)                                         # B
    distance = (unit - units[nearest]).norm(dim=1)                                           # B
    loss = -(distance + 1e-6).log().mean()
    return loss * (~same).any()
