"""Pseudo labels: cluster assignments that a teacher makes of its tokens, and that a student learns to predict.

    head        token ─ MLP ─ unit vector ─ cosine with K learned prototypes = scores                      S K
    labels      the teacher's scores, sharpened and balanced over the batch, no gradient: q                S K
    loss        cross-entropy of the student's scores of *its* view of the same thing:  − Σ_k q_k log p_k

A prototype is the centre of a cluster. Nothing says which cluster is right, so all tokens could gather in one and the loss
would be zero: *balancing* forbids it. `sinkhorn` gives all clusters like shares of each batch; `centring` subtracts from
each cluster its running mean score; ME-MAX leaves the labels alone and rewards a student whose mean prediction is uniform.

A student that predicts 1/K for everything has a loss of ln K: the line of collapse, logged beside the label losses.

Letters:  S samples of one balancing call (tokens of all images of a micro-batch; a rank holds its part of them), K clusters,
          D width of the encoder, B images, N patches.
"""

import math

import torch
import torch.nn.functional as F
from torch import distributed, nn

from mae import MaskedAutoencoder, gather_tokens, init_weights

BALANCING = ("sinkhorn", "centring", "me-max")
CENTRE_MOMENTUM = 0.9              # of the running mean score (DINO)


class Head(nn.Module):
    """An MLP onto the unit sphere and the cosine with K prototypes: tokens ... D -> scores ... K, in -1..1.

    Without batch norm, so that what a token scores does not depend on the batch it is in."""

    def __init__(self, dim, hidden, bottleneck, clusters):
        """hidden: widths of the hidden layers, a tuple; bottleneck: width of the sphere."""
        super().__init__()
        widths = (dim, *hidden, bottleneck)
        layers = [layer for pair in zip(widths, widths[1:]) for layer in (nn.Linear(*pair), nn.GELU())]
        self.mlp = nn.Sequential(*layers[:-1])
        # Only their directions count. Of length 1 they turn as fast as SwAV's; longer ones would turn more slowly.
        self.prototypes = nn.Parameter(F.normalize(torch.randn(clusters, bottleneck), dim=1))
        self.mlp.apply(init_weights)

    def project(self, x):
        return F.normalize(self.mlp(x), dim=-1)                                                         # ... bottleneck

    def compare(self, unit):
        return unit @ F.normalize(self.prototypes, dim=-1).to(unit.dtype).T                             # ... K

    def forward(self, x):
        return self.compare(self.project(x))


class Student(MaskedAutoencoder):
    """The masked autoencoder with the heads that predict labels; a head with 0 clusters is not there.

    Class head D -> 8/3 D -> 8/3 D -> 2/3 D, data head D -> 2 D -> 2/3 D: for width 192 the 512-512-128 and 384-128 of our start."""

    def __init__(self, class_clusters=0, data_clusters=0, **arch):
        super().__init__(**arch)
        D, d = self.decoder_embed.in_features, self.decoder_embed.out_features
        self.class_head = Head(D, (8 * D // 3, 8 * D // 3), 2 * D // 3, class_clusters) if class_clusters else None
        self.data_head = Head(D, (2 * D,), 2 * D // 3, data_clusters) if data_clusters else None
        self.decoder_label = nn.Linear(d, D).apply(init_weights) if data_clusters else None

    def forward(self, imgs, mask_ratio, noise, decode=True):
        """Views B C H W under the k masks that noise (k B) N chooses -> mask (k B) N; pred, what the decoder predicts of the
        target (k B) N P; class and data, scores (k B) K and (k B) N K; unit, what the class head compares with prototypes.
        With decode=False no pred and no data."""
        imgs = imgs.repeat(len(noise) // len(imgs), 1, 1, 1)                                            # k B C H W
        z, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)                            # k B 1+V D
        out = dict(mask=mask)
        if self.class_head is not None:
            out["unit"] = self.class_head.project(z[:, 0])                                              # k B bottleneck
            out["class"] = self.class_head.compare(out["unit"])                                         # k B K
        if decode:
            states = self.forward_decoder(z, ids_restore)                                               # k B N d
            out["pred"] = self.decoder_pred(states)                                                     # k B N P
        if decode and self.data_head is not None:
            hidden = ids_restore.shape[1] + 1 - z.shape[1]
            visible = gather_tokens(F.pad(z[:, 1:], (0, 0, 0, hidden)), ids_restore)                    # k B N D, unshuffled
            y = torch.where(mask[..., None] == 1, self.decoder_label(states), visible)                  # k B N D
            out["data"] = self.data_head(plain_norm(y))                                                 # k B N K
        return out


def plain_norm(x):
    """LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:])


# ------------------------------------------------------------------------------------------------------ over all ranks

def over_ranks(x, operation="SUM"):
    """x summed (or "MAX") over the processes of a torchrun, on each of them; x itself where there is one process."""
    if distributed.is_initialized():
        x = x.clone()
        distributed.all_reduce(x, getattr(distributed.ReduceOp, operation))
    return x


def mean_over_ranks(x):
    """The mean of x over the processes. Each has an equal part of the batch, so a mean of means is the mean.

    Where x carries gradient, the gradient of the mean is handed to x undivided: DistributedDataParallel averages the gradients
    of the parameters over ranks later, and that is the division."""
    if not distributed.is_initialized():
        return x
    return x + (over_ranks(x.detach()) / distributed.get_world_size() - x.detach())


# ----------------------------------------------------------------------------------------------------- balanced labels

@torch.no_grad()
def sinkhorn(scores, temperature=0.05, iterations=3):
    """Sinkhorn-Knopp: labels S K whose rows sum to 1 and whose columns (clusters) sum to nearly S / K.

    exp(scores / temperature) has its columns and rows normalised in turn, rows last, so that these are exact. Three rounds bring
    columns of random cosines within 1 % at 0.05, 30 % at 0.0125. In log space, at least float32: plain exp would overflow. Over
    several ranks only K numbers travel. Temperature and iterations as in SwAV (Caron et al. 2020)."""
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature                   # S K
    for _ in range(iterations):
        top = over_ranks(log_q.amax(0), "MAX")                                                          # K
        log_q = log_q - top - over_ranks((log_q - top).exp().sum(0)).log()     # clusters: logsumexp over all samples is 0
        log_q = log_q.log_softmax(dim=1)                                       # samples: probabilities of a row sum to 1
    return log_q.exp()


@torch.no_grad()
def centring(scores, centre, temperature=0.05):
    """softmax((scores - centre) / temperature), S K (DINO, Caron et al. 2021). `centre` (K), the running mean of the scores
    over micro-batches and ranks, is moved in place, after its use."""
    labels = ((scores - centre).to(torch.promote_types(scores.dtype, torch.float32)) / temperature).softmax(dim=1)
    centre.lerp_(mean_over_ranks(scores.mean(0)).to(centre.dtype), 1 - CENTRE_MOMENTUM)
    return labels


def balance(scores, how, temperature, centre):
    """The teacher's scores S K as labels S K, by one of BALANCING. ME-MAX leaves the labels unbalanced: see `me_max`."""
    if how == "sinkhorn":
        return sinkhorn(scores, temperature)
    return centring(scores, centre if how == "centring" else torch.zeros_like(centre), temperature)


@torch.no_grad()
def make_labels(teacher, u, how, temperature, centres):
    """The labelling teacher's tokens u B 1+N D -> pseudo labels {"class": B K, "data": B N K}, of the heads that it has.
    centres: of "centring", {"class": K, "data": K}."""
    labels = {}
    for name, head, x in (("class", teacher.class_head, u[:, 0]), ("data", teacher.data_head, plain_norm(u[:, 1:]))):
        if head is not None:
            scores = head(x)                                                                            # B (N) K
            labels[name] = balance(scores.flatten(0, -2), how, temperature, centres[name]).view_as(scores)
    return labels


# ------------------------------------------------------------------------------------------------------------ the losses

def label_loss(scores, labels, temperature=0.1):
    """Cross-entropy of each sample: student's scores ... K, labels ... K -> ...; between H(labels) and infinity."""
    return -(labels * F.log_softmax(scores / temperature, dim=-1)).sum(-1)


def class_token_loss(scores, labels, temperature=0.1):
    """Class tokens' scores B K against the labels of the other view of the image (or of the same, if there is one): scalar."""
    return label_loss(scores, labels, temperature).mean()


def data_token_loss(scores, labels, mask, where="both", temperature=0.1):
    """Patches' scores B N K against labels B N K, mask B N (1 masked): the mean over the masked patches, predicted from the
    decoder's states, over the visible ones, predicted from the encoder's tokens, or the mean of these two means."""
    loss = label_loss(scores, labels, temperature)                                                      # B N
    masked, visible = (loss * mask).sum() / mask.sum(), (loss * (1 - mask)).sum() / (1 - mask).sum()
    return {"masked": masked, "visible": visible, "both": (masked + visible) / 2}[where]


def me_max(scores, temperature=0.1):
    """ln K - H(mean prediction over samples and ranks) >= 0, 0 where all clusters are used alike: the mean-entropy
    maximisation of MSN (Assran et al. 2022), as a loss; scores ... K of the student, with gradient."""
    mean = mean_over_ranks((scores / temperature).softmax(-1).flatten(0, -2).mean(0))                   # K
    return math.log(len(mean)) + torch.special.xlogy(mean, mean).sum()


def koleo(unit, images):
    """Unit vectors B d of the student's class tokens -> mean of -log of the distance to the nearest one of another image, which
    stands still. Row i is of image i % images: all views and masks of the same few images, one after the other; over all ranks.

    It spreads the tokens of different images over the sphere (Sablayrolles et al. 2019; DINOv2). Without it labels of a fresh
    network stay vague: its tokens lie close together, all scores are alike, and predicting 1/K is nearly right."""
    whose = torch.arange(len(unit), device=unit.device) % images                                        # B
    others, theirs = unit.detach(), whose
    if distributed.is_initialized():
        ranks = [torch.empty_like(others) for _ in range(distributed.get_world_size())]
        distributed.all_gather(ranks, others.contiguous())
        others, theirs = torch.cat(ranks), torch.cat([whose + images * r for r in range(len(ranks))])
        whose = whose + images * distributed.get_rank()
    same = whose[:, None] == theirs                                                                     # B B'
    near = (unit.detach() @ others.T).masked_fill(same, -2).argmax(1)                                   # B
    return -((unit - others[near]).norm(dim=1) + 1e-6).log().mean() * (~same).any()        # 0 where there is no other image


# --------------------------------------------------------------------------------------------- the health of the labels

def count_labels(labels):
    """What `health` needs of labels ... K, as one vector that can be added up over steps and ranks: 2 K + 2 numbers."""
    labels = labels.flatten(0, -2)                                                                      # S K
    hits = torch.zeros_like(labels[0]).scatter_add_(0, labels.argmax(1), torch.ones_like(labels[:, 0]))
    entropy = -torch.special.xlogy(labels, labels).sum()
    return torch.cat([labels.sum(0), hits, torch.stack([entropy, entropy.new_tensor(len(labels))])])


def health(counts):
    """Counts of labels -> numbers that say whether they are worth predicting:

    entropy     mean entropy of a label, in nats: ln K where labels say nothing, 0 where they are certain
    clusters    how many clusters are the most probable one of some sample
    effective   exp of the entropy of the mean label, 1..K: clusters in use if all were used alike
    largest     share of the samples whose most probable cluster is the commonest one"""
    (mass, hits), (entropy, samples) = counts[:-2].chunk(2), counts[-2:]
    mean = mass / samples
    return dict(entropy=(entropy / samples).item(), clusters=int((hits > 0).sum()),
                effective=torch.special.xlogy(mean, mean).sum().neg().exp().item(), largest=(hits.max() / samples).item())
