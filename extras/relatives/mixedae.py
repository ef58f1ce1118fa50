"""MixedAE, mixed autoencoder (Chen et al., CVPR 2023, arXiv 2303.17152). A READING OF THE ABSTRACT.
There is no public code: all values and all details here are ours.
Patches of G images share one sequence, and each image is reconstructed from its own patches. Mixing
alone makes features worse. So the network must also find out which patches are of one image: each
looks only at those most like it (TopK attention), and a contrast pulls tokens of an image together.

    images  a, b (G = 2), patches 1..4      mix  a1 b2 b3 a4       one sequence, all four places
    encoder with TopK attention ─ tokens  A1 B2 B3 A4 ─ MLP ─ contrast   (A1 near A4, B2 near B3)
          un-mixed:  A1 .. .. A4 ─ MAE's decoder ─ a2 a3 ┐
                     .. B2 B3 .. ─ MAE's decoder ─ b1 b4 ┴ rec           loss = rec + 0.1 contrast

What differs from MAE: foreign patches stand where MAE has nothing. If each looked at patches of its
own image alone, and not at the class token, this would be MAE on G views with complementary masks.
The contrast asks each token which others are of its image. It lies between ln(N - 1), where all are
equally likely, and ln(V - 1), where its own alone are. G is 1 / (1 - mask ratio). A patch looks at
V = N / G patches, often itself too, and at the class token, which looks at all. Evaluation uses
plain attention. A segment code, added to the patches of an image, says what belongs together: a
flag, and off, as with it the contrast can be solved without looking (tests/test_relatives.py).

Letters:  B views in a micro-batch, G of them in a mix, X = B / G mixes, N patches, V of each view,
          D width of the encoder, P numbers of a patch.
"""

import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import mae
import pseudo_labels
from extras.relatives import SHARED, check_fixed, pixel_loss
from support import settings
from support.command_line import UsageError, option

SETTINGS = dict(SHARED, target="pixels", mask_ratio=0.75)


@dataclass
class Config(settings.Config):
    recipe: str = option("mixedae", "this one", choices=["mixedae"])
    contrast_weight: float = option(0.1, "weight of the contrast (ours)", range=settings.POSITIVE)
    contrast_temperature: float = option(0.25, "of the contrast (ours)", range=(1e-3, math.inf))
    segment_code: bool = option(False, "tell the network which patches are of one image")
    of_student = ("segment_code",)


def check(config):
    check_fixed(config, SETTINGS)
    (H, W), (ph, pw) = mae.pair(config.img_size), mae.pair(config.patch_size)
    N = H // ph * (W // pw)
    V = mae.count_visible(N, config.mask_ratio)
    if N % V or V == 1:
        raise UsageError(f"--mask-ratio {config.mask_ratio}: leaves an image {V} of {N} patches; "
                         "use 0.5 or 0.75, so that images of two patches or more fill the places")
    views = config.batch_size // config.accumulate // int(os.environ.get("WORLD_SIZE", 1))
    if views % (N // V):
        raise UsageError(f"--batch-size {config.batch_size}: a process has {views} images at once; "
                         f"make it a multiple of the {N // V} that are mixed")


def mixed_attention(attn, x, keep):
    """`attn` of x (X 1+N D), where each looks only at those most alike -> that, and at whom."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5                                     # X heads 1+N 1+N
    allowed = most_alike(scores, keep)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2)), allowed


def most_alike(scores, keep):
    """A patch may look at the `keep` patches of the highest scores and at the class token, which
    may look at all: X heads 1+N 1+N."""
    patches = scores[..., 1:, 1:]
    nearest = patches.topk(keep, dim=-1).indices                                # X heads N keep
    allowed = torch.zeros_like(patches, dtype=torch.bool).scatter(-1, nearest, True)
    return F.pad(allowed, (1, 0, 1, 0), value=True)


class Student(pseudo_labels.Student):
    def __init__(self, segment_code, **arguments):
        super().__init__(**arguments)
        self.segment_code = segment_code
        self.projector = mae.Mlp(arguments["embed_dim"], arguments["embed_dim"])
        self.projector.apply(mae.init_weights)

    def forward(self, imgs, mask_ratio, noise):
        """As an MAE, pred B N P and mask B N; tokens X N D for the contrast, and whose they are,
        owner X N; attention_own: the share of the own image in what the last block keeps."""
        encoder, B, N = self.mae.encoder, *noise.shape
        V = mae.count_visible(N, mask_ratio)
        G, device = N // V, imgs.device
        wrapped = torch.arange(-(-B // G) * G, device=device) % B          # for pictures of a few
        # The ranks of the first view's noise, such as 2 0 3 1, say whose each place is: 1 0 1 0.
        rank = noise[wrapped[::G]].argsort(1).argsort(1)[:, None]                        # X 1 N
        owner = rank[:, 0] // V                                                            # X N
        # Shifted, 0 2 1 3 for view 1, they are a noise that makes just its own places visible.
        shifted = (rank - V * torch.arange(G, device=device)[:, None]) % N               # X G N
        ids_keep, mask, ids_restore = mae.random_masking(
            shifted.flatten(0, 1).to(noise.dtype), mask_ratio)                             # B N
        x = (encoder.patch_embed(imgs) + encoder.pos_embed[:, 1:])[wrapped].unflatten(0, (-1, G))
        if self.segment_code:
            x = x + mae.sincos_positions(x.shape[-1], (1, G))[0, 1:, None].to(x)         # G 1 D
        x = x.take_along_dim(owner[:, None, :, None], 1)[:, 0]                             # X N D
        cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)                                                   # X 1+N D
        for block in encoder.blocks:
            added, allowed = mixed_attention(block.attn, block.norm1(x), V)
            x = x + added + block.mlp(block.norm2(x + added))
        x = encoder.norm(x)
        own = mae.gather_tokens(x[:, 1:].repeat_interleave(G, 0), ids_keep)              # B V D
        latent = torch.cat([x[:, :1].repeat_interleave(G, 0), own], dim=1)               # B 1+V D
        pred = self.mae.decoder.pred(self.mae.forward_decoder(latent, ids_restore))
        same, kept = (owner[:, None] == owner[..., None])[:, None], allowed[..., 1:, 1:]
        return {"pred": pred[:B], "mask": mask[:B], "tokens": self.projector(x[:, 1:]),
                "owner": owner, "attention_own": (same & kept).sum() / kept.sum()}


def contrast(tokens, owner, temperature):
    """Cross-entropy: which other patches are of the image of this one? All of them are right, with
    like shares. What is likely goes by the cosine. tokens X N D, owner X N -> a number."""
    itself = torch.eye(owner.shape[1], device=owner.device) == 1                           # N N
    with pseudo_labels.full_precision(tokens):
        unit = F.normalize(mae.at_least_fp32(tokens), dim=-1)
        cosine = (unit @ unit.mT / temperature).masked_fill(itself, -math.inf)           # X N N
    positive = (owner[:, None] == owner[..., None]) & ~itself                            # X N N
    return -cosine.log_softmax(-1).masked_fill(~positive, 0).sum() / positive.sum()


def training_step(student, teachers, views, config):
    """As in train.py. The teacher has no task here."""
    out = student(views.student, config.mask_ratio, views.noise)
    rec = pixel_loss(out, views, config)
    near = contrast(out["tokens"], out["owner"], config.contrast_temperature)
    N = out["mask"].shape[1]
    lines = {"contrast_alike": N - 1, "contrast_apart": mae.count_visible(N, config.mask_ratio) - 1}
    terms = {"rec": rec, "contrast": near, "attention_own": out["attention_own"]}
    terms |= {name: rec.new_tensor(math.log(number)) for name, number in lines.items()}
    return config.rec_weight * rec + config.contrast_weight * near, terms, {}, {}
