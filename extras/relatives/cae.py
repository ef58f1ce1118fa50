"""CAE, context autoencoder (Chen et al., IJCV 2023, arXiv 2202.03026).

In MAE the decoder does two things: it finds out what is at the masked places, and it draws that.
CAE parts them: a *regressor* predicts what the encoder would make of the masked patches, and the
loss `align` compares that with what it does make of them. Only then a decoder draws, from these
predicted tokens alone; it never sees the visible ones.

    visible ─ encoder ─────────────┐ keys, values (and the mask tokens themselves)
    a mask token for all, places ──┴ regressor ─ latents ─ decoder ─ pred      rec: MSE with pixels
                                                    │
    masked ── the same encoder, no gradient ─ target ┴─ align: MSE             loss = rec + 2 align

What differs from MAE: who predicts, the loss `align`, half of the patches masked, in blocks.

An encoder that makes all tokens alike would make them easy to predict. Only `rec` forbids it. So
the log has the variance of the target beside `align`: the loss of predicting one token everywhere.
If both fall together, that is collapse.

Where the values are from: the order of the parts, the weight 2, half of the patches, 4 + 4 blocks
for a ViT-B, a regressor whose attention and MLP are scaled by 0.1 at first, with a norm between
them, and no moving average are those of the authors' code. Ours: the pixels of MAE in place of
DALL-E's tokens, so that only the architecture differs; blocks from smoothed noise; regressor and
decoder of half the depth of MAE's decoder each, but one block at least.

Left out: LayerScale and drop path in the encoder; a codebook of patches as the target of the
decoder, which would have to be trained first. No loss reads the class token: judge the mean token.

Letters:  B views in a micro-batch, N patches, V visible, M masked, D width of all parts, P numbers
          of a patch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import mae
import pseudo_labels
from extras.relatives import SHARED, check_fixed, pixel_loss
from support import settings
from support.command_line import option
from support.ranks import mean_over_ranks

SETTINGS = dict(SHARED, target="pixels", mask_ratio=0.5)


@dataclass
class Config(settings.Config):
    recipe: str = option("cae", "this one", choices=["cae"])
    align_weight: float = option(2.0, "weight of the alignment (CAE)", range=settings.POSITIVE)


def check(config):
    check_fixed(config, SETTINGS)


class CrossAttention(nn.Module):
    """Tokens look at others: queries B M D, keys and values B T D -> B M D."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, q, k, v):
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for layer, x in ((self.q, q), (self.k, k), (self.v, v)))      # B heads M D/heads
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class RegressorBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (
            nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.attn, self.mlp = CrossAttention(dim, num_heads), mae.Mlp(dim, round(dim * mlp_ratio))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 0.1)) for _ in range(2))

    def forward(self, x, visible, place, visible_place):
        """x B M D, visible B V D, the codes of their places -> B M D. A place counts in who looks
        at whom, not in what is seen there."""
        seen, places = torch.cat([visible, x], 1), torch.cat([visible_place, place], 1)  # B V+M D
        found = self.attn(self.norm_q(x + place), self.norm_k(seen + places), self.norm_v(seen))
        x = self.norm2(x + self.scale1 * found)            # the sum is normed, as in theirs
        return x + self.scale2 * self.mlp(x)


class Student(pseudo_labels.Student):
    def __init__(self, **arguments):
        super().__init__(**arguments | dict(target_dim=0))         # without MAE's decoder
        D, heads, ratio = (arguments[key] for key in ("embed_dim", "num_heads", "mlp_ratio"))
        depth, (ph, pw) = max(1, arguments["decoder_depth"] // 2), self.mae.encoder.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.regressor = nn.ModuleList(RegressorBlock(D, heads, ratio) for _ in range(depth))
        self.decoder = nn.ModuleList(mae.Block(D, heads, ratio) for _ in range(depth))
        self.norm, self.decoder_norm = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.pred = nn.Linear(D, ph * pw * arguments["in_chans"])
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.regressor, self.decoder, self.pred):
            part.apply(mae.init_weights)

    def forward(self, imgs, mask_ratio, noise):
        """pred B N P, 0 at visible places; mask B N; latents and target B M D."""
        encoder, B = self.mae.encoder, len(imgs)
        # Those of the most noise are masked. Means over 3 x 3 neighbours are high in blocks.
        noise = F.pad(noise.unflatten(1, encoder.grid), (1, 1, 1, 1), "replicate")
        noise = F.avg_pool2d(noise, 3, stride=1).flatten(1)                                # B N
        ids_keep, mask, ids_restore = mae.random_masking(noise, mask_ratio)
        ids = ids_restore.argsort(dim=1)[:, ids_keep.shape[1]:]            # B M, of masked patches
        places = encoder.pos_embed[:, 1:].expand(B, -1, -1)
        visible_place, place = (mae.gather_tokens(places, each) for each in (ids_keep, ids))

        visible = encoder(imgs, ids_keep)[:, 1:]                                         # B V D
        # After `visible`: autocast rounds a weight once, and keeps it, from here without gradient.
        with torch.no_grad():
            target = encoder(imgs, ids)[:, 1:]
        x = self.mask_token.expand(B, ids.shape[1], -1)                                  # B M D
        for block in self.regressor:
            x = block(x, visible, place, visible_place)
        latents = self.norm(x)
        x = latents + place
        for block in self.decoder:
            x = block(x)
        drawn = self.pred(self.decoder_norm(x))                                          # B M P
        pred = drawn.new_zeros(B, mask.shape[1], drawn.shape[-1])
        pred = pred.scatter(1, ids[..., None].expand_as(drawn), drawn)                   # B N P
        return {"pred": pred, "mask": mask, "latents": latents, "target": target}


def training_step(student, teachers, views, config):
    """As in train.py. The teacher has no task here."""
    out = student(views.student, config.mask_ratio, views.noise)
    rec = pixel_loss(out, views, config)
    latents, target = (mae.at_least_fp32(out[name]) for name in ("latents", "target"))
    align = F.mse_loss(latents, target)
    variance = (target - mean_over_ranks(target.mean((0, 1)))).square().mean()
    terms = {"rec": rec, "align": align, "align_variance": variance}
    return config.rec_weight * rec + config.align_weight * align, terms, {}, {}
