"""GreenMIM, green hierarchical masked image modelling (Huang et al., NeurIPS 2022; 2205.13515).
MAE is cheap because its encoder takes the visible patches alone. Where tokens look only at those of
their own window (Swin), some windows have more visible ones than others. GreenMIM packs windows
into groups of one size and computes attention group by group, masked between windows.

    windows, visible tokens    A A A A | B | C C C | D D
    groups of 4, the fullest   [A A A A]  [B C C C]  [D D · ·]       C does not look at B
    fine patches ─ D/2 wide, grouped attention ─ merge 2 x 2 ─ D wide, grouped attention ─ decoder

What differs from MAE: the encoder, and one mask for all images. From the authors' code: the
knapsack, groups as large as the fullest window, windows shifted in every other block, masks in
units of merged patches. Ours: two stages, not four, windows of 4, not 7, MAE's decoder, sine-cosine
codes for Swin's relative bias. Left out: a class token (the mean stands in its place). It cannot
do: other sizes of images, export, attention pictures, --compile.

Letters:  B views in a micro-batch, N units (patches of --patch-size, four fine ones each), V
          visible, T tokens of a stage, S places in a group, D width of the encoder.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

import mae
import pseudo_labels
from extras.relatives import SHARED, check_fixed, pixel_loss
from support import settings
from support.command_line import UsageError, option
from support.ranks import of_each_rank

SETTINGS = dict(SHARED, target="pixels", mask_ratio=0.75, compile=False)       # packs every step


@dataclass
class Config(settings.Config):
    recipe: str = option("greenmim", "this one", choices=["greenmim"])
    window: int = option(4, "tokens on a side of a window (ours)", range=(2, math.inf))
    of_student = ("window",)


def check(config):
    check_fixed(config, SETTINGS)
    if any(side % 2 for side in mae.pair(config.patch_size)):
        raise UsageError(f"--patch-size {config.patch_size}: is cut into 2 x 2; use an even one")


def pack(counts, size):
    """Windows, by how many tokens they have, into groups of at most `size`, each as full as it can
    be: [3, 1, 2, 2], 4 -> [[0, 1], [2, 3]]. All sums that windows can make are tried."""
    left, groups = list(range(len(counts))), []
    while left:
        made = {0: []}                                     # a sum: windows that make it
        for window in left:
            for total, windows in list(made.items()):
                if total + counts[window] <= size:
                    made.setdefault(total + counts[window], [*windows, window])
        groups.append(made[max(made)])
        left = [each for each in left if each not in groups[-1]]
    return groups


def group(places, width, window, shift):
    """Tokens at places (T, row by row in a grid of that width) -> ids groups S: a token, or T where
    a place is empty; allowed groups 1 S S: who may look at whom (empty places at each other)."""
    windows = torch.stack([places // width + shift, places % width + shift]) // window     # 2 T
    _, of_window, counts = windows.unique(dim=1, return_inverse=True, return_counts=True)
    members = of_window.argsort(stable=True).split(counts.tolist())        # tokens of each window
    groups = pack(counts.tolist(), max(counts.tolist()))
    parts = [torch.cat([members[each] for each in windows]) for windows in groups]
    ids = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=len(places))
    owner = torch.cat([of_window, of_window.new_tensor([-1])])[ids]                    # groups S
    return ids, (owner[:, None] == owner[..., None])[:, None]


class GroupedAttention(mae.Attention):
    def forward(self, x, ids, allowed):
        """x B T D, and what `group` gives -> B T D."""
        B, T, D = x.shape
        x = torch.cat([x, x.new_zeros(B, 1, D)], dim=1)[:, ids]                    # B groups S D
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)            # each B groups heads S D/heads
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, -math.inf)
        x = (scores.softmax(-1) @ v).transpose(2, 3).reshape(B, -1, D)             # B (groups S) D
        return self.proj(x[:, ids.flatten().argsort()[:T]])        # empty places are the last ones


class Encoder(nn.Module):
    """B C H W, visible units ids_keep B V, alike in all images -> tokens B 1+V D."""

    def __init__(self, window, img_size, patch_size, in_chans, embed_dim, depth, num_heads,
                 mlp_ratio, **of_decoder):
        super().__init__()
        self.img_size, self.patch_size = mae.pair(img_size), mae.pair(patch_size)
        self.grid = rows, columns = [side // p for side, p in zip(self.img_size, self.patch_size)]
        self.in_chans, self.num_patches = in_chans, rows * columns
        self.window, self.first, D = window, min(2, depth // 2), embed_dim         # first: D/2 wide
        self.patch_embed = mae.PatchEmbed([p // 2 for p in self.patch_size], in_chans, D // 2)
        self.pos_embed = nn.Parameter(mae.sincos_positions(D // 2, (2 * rows, 2 * columns)), False)
        sizes = [(D // 2, max(1, num_heads // 2))] * self.first + [(D, num_heads)] * depth
        self.blocks = nn.ModuleList(mae.Block(*size, mlp_ratio) for size in sizes[:depth])
        for block, size in zip(self.blocks, sizes):
            block.attn = GroupedAttention(*size)
        self.merge = nn.Sequential(nn.LayerNorm(2 * D, eps=1e-6), nn.Linear(2 * D, D))
        self.cls_token, self.norm = nn.Parameter(torch.zeros(1, 1, D)), nn.LayerNorm(D, eps=1e-6)
        self.apply(mae.init_weights)

    def forward(self, imgs, ids_keep=None):
        if imgs.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(f"images of {tuple(imgs.shape[1:])}: not of the size of this model")
        (rows, columns), N = self.grid, self.num_patches
        units = torch.arange(N, device=imgs.device) if ids_keep is None else ids_keep[0]       # V
        # The four fine patches of a unit stand side by side, so that merging them is a reshape.
        fine = torch.arange(4 * N, device=imgs.device).view(rows, 2, columns, 2).transpose(1, 2)
        places, width = fine.reshape(N, 4)[units].flatten(), 2 * columns                      # 4V
        x = (self.patch_embed(imgs) + self.pos_embed[:, 1:])[:, places]                  # B 4V D/2
        for i, block in enumerate(self.blocks):
            if i == self.first:
                x, places, width = self.merge(x.unflatten(1, (-1, 4)).flatten(2)), units, columns
            shift = self.window // 2 * ((i - self.first) % 2)
            x = x + block.attn(block.norm1(x), *group(places, width, self.window, shift))
            x = x + block.mlp(block.norm2(x))
        x = self.norm(x)
        return torch.cat([x.mean(1, keepdim=True) + self.cls_token, x], dim=1)           # B 1+V D


class Student(pseudo_labels.Student):
    def __init__(self, window, **arguments):
        super().__init__(**arguments)
        self.mae.encoder = Encoder(window, **arguments)

    def forward(self, imgs, mask_ratio, noise):            # one mask: that of the first process
        return super().forward(imgs, mask_ratio, of_each_rank(noise[:1])[0].expand_as(noise))


def training_step(student, teachers, views, config):
    """As in train.py. The teacher has no task here."""
    rec = pixel_loss(student(views.student, config.mask_ratio, views.noise), views, config)
    return config.rec_weight * rec, {"rec": rec}, {}, {}
