"""The masked autoencoder (MAE): hide most patches of an image, encode the few visible ones, predict the hidden ones.

    imgs ─ patches ─ keep a random quarter ─ encoder (wide, deep, sees V patches) ─ latent
    latent + one learned mask token per hidden patch, back in place ─ decoder (narrow, shallow, sees N) ─ pred
    loss = mean squared error between pred and the pixels of the hidden patches

An encoder that never sees the hidden patches is cheap to train (a quarter of the tokens) and cannot cheat.

Letters:  B images, C channels, H W height and width, N patches of an image, V visible ones, M = N - V masked ones,
          D width of the encoder, d of the decoder, P = p_h * p_w * C numbers in a patch.

`VisionTransformer` is the encoder alone: what one keeps after training. `MaskedAutoencoder` is that encoder with a
decoder: what one trains. Parameter names and shapes are those of the official MAE code (He et al., CVPR 2022), whose
encoder part has the names of timm's VisionTransformer, so weights move between the three in both directions.
"""

import torch
import torch.nn.functional as F
from torch import nn

from extras.weights import load_encoder                    # noqa: F401  what one comes here for after training

# Encoder sizes: small, base, large are the ViTs of Dosovitskiy et al. 2021, tiny that of DeiT; micro is ours, for CPUs.
# Decoders: base and large are MAE's; the narrower ones of the small models are our choice.
SIZES = {
    "micro": dict(embed_dim=96, depth=4, num_heads=3, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2),
    "tiny": dict(embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4),
    "small": dict(embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8),
    "base": dict(embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16),
}


def pair(size):
    """An int, or two ints (H, W), as (H, W)."""
    return (size, size) if isinstance(size, int) else tuple(size)


# ---------------------------------------------------------------------------------------------------- patches and masks

def patchify(imgs, patch_size):
    """Cut images into patches: B C H W -> B N P, patches row by row, numbers in a patch ordered (row, column, channel).

    Raises ValueError if the patch size (int or (p_h, p_w)) does not divide the image."""
    (ph, pw), (B, C, H, W) = pair(patch_size), imgs.shape
    if H % ph or W % pw:
        raise ValueError(f"patches of {ph} x {pw} do not divide an image of {H} x {W}")
    x = imgs.reshape(B, C, H // ph, ph, W // pw, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, ph * pw * C)                                      # B N P


def unpatchify(patches, patch_size, img_size):
    """The inverse of `patchify`: B N P -> B C H W; img_size is the (H, W) of the images."""
    (ph, pw), (H, W), B = pair(patch_size), pair(img_size), patches.shape[0]
    x = patches.reshape(B, H // ph, W // pw, ph, pw, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)                                             # B C H W


def count_visible(num_patches, mask_ratio):
    """V, the number of visible patches: N (1 - mask_ratio) rounded down, as in the official code.

    The 1e-6 keeps floating point from losing a patch: 10 * (1 - 0.9) is 0.9999999999999998."""
    return int(num_patches * (1 - mask_ratio) + 1e-6)


def random_masking(noise, mask_ratio):
    """Choose the visible patches of each image: those with the smallest noise.

    noise B N -> ids_keep B V, mask B N (0 keep, 1 remove), ids_restore B N.

    Argsort twice: the first gives the patches in random order, ids_shuffle[j] = the patch at place j of that order. The
    second inverts it, ids_restore[i] = the place of patch i. Gathering by ids_restore puts shuffled tokens back."""
    V = count_visible(noise.shape[1], mask_ratio)
    ids_shuffle = noise.argsort(dim=1)                                                                  # B N
    ids_restore = ids_shuffle.argsort(dim=1)                                                            # B N
    mask = (ids_restore >= V).to(noise.dtype)                                                           # B N
    return ids_shuffle[:, :V], mask, ids_restore


def gather_tokens(x, ids):
    """Tokens of x (B N D) at the places ids (B V), as B V D."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def standardise_patches(patches):
    """Each patch to mean 0, variance 1 (B N P): the target of norm_pix_loss. Without it the loss is mostly about the
    brightness of a patch, which its neighbours give away. Unbiased variance and 1e-6 under the root as in MAE's code."""
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def sincos_positions(dim, grid):
    """Fixed sine-cosine code of each place of a grid (rows, columns): 1 1+N dim, zeros for the class token.

    In the layout of the official checkpoints the first half of the channels encodes the *column* and the second half the
    row, each half first all sines, then all cosines, with wavelengths from 2 pi to 10000 * 2 pi patches."""
    if dim % 4:
        raise ValueError(f"a width of {dim} is not a multiple of 4, which sine and cosine of row and column need")
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]                                  # 2 x (N dim/4)
    code = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)                     # N dim
    return torch.cat([torch.zeros(1, dim), code.float()])[None]                                         # 1 1+N dim


# ------------------------------------------------------------------------------------------------------ the transformer

class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                                               # B T D
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)               # 3 x (B h T D/h)
        x = F.scaled_dot_product_attention(q, k, v)                                                     # B h T D/h
        return self.proj(x.transpose(1, 2).reshape(B, T, D))                                            # B T D


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + Attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A linear map of each patch, written as a convolution whose stride is its kernel: B C H W -> B N D."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, imgs):
        return self.proj(imgs).flatten(2).transpose(1, 2)


def init_weights(module):
    """MAE's initialisation: Xavier-uniform matrices (the patch convolution seen as one matrix), zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """The encoder. Sizes are ints or (H, W). Raises ValueError for a patch that does not divide or heads that do not."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0):
        super().__init__()
        self.img_size, self.patch_size, self.in_chans = pair(img_size), pair(patch_size), in_chans
        if any(s % p for s, p in zip(self.img_size, self.patch_size)):
            raise ValueError(f"patches of {self.patch_size} do not divide an image of {self.img_size}")
        if embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {embed_dim}")
        self.grid = tuple(s // p for s, p in zip(self.img_size, self.patch_size))
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def encode(self, imgs, ids_keep=None):
        """B C H W -> B 1+V D: the class token, then the patches at ids_keep (B V), or all of them in order."""
        if imgs.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(f"images of {tuple(imgs.shape[1:])}: this model takes {(self.in_chans, *self.img_size)}")
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]                                              # B N D
        if ids_keep is not None:
            x = gather_tokens(x, ids_keep)                                                              # B V D
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)                       # B 1 D
        x = torch.cat([cls, x], dim=1)                                                                  # B 1+V D
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, imgs):
        return self.encode(imgs)


class MaskedAutoencoder(VisionTransformer):
    """The encoder and its decoder. Arguments have the names of the official code; sizes are ints or (H, W).

    target_dim: numbers predicted per patch; None stands for the P pixels of the patch, else `forward` wants a target."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12,
                 decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, mlp_ratio=4.0, norm_pix_loss=True,
                 target_dim=None):
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio)
        self.norm_pix_loss, self.target_dim = norm_pix_loss, target_dim
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(
            decoder_embed_dim, target_dim or self.patch_size[0] * self.patch_size[1] * in_chans)
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_weights)

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        """B C H W -> latent B 1+V D, mask B N (0 keep, 1 remove), ids_restore B N; noise B N chooses the patches."""
        if noise is None:
            noise = torch.rand(imgs.shape[0], self.num_patches, device=imgs.device)
        ids_keep, mask, ids_restore = random_masking(noise, mask_ratio)
        return self.encode(imgs, ids_keep), mask, ids_restore

    def forward_decoder(self, latent, ids_restore):
        """latent B 1+V D -> the decoder's states at all patches, B N d. `decoder_pred` turns a state into a prediction."""
        x = self.decoder_embed(latent)                                                                  # B 1+V d
        masked = self.mask_token.expand(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], -1)          # B M d
        patches = gather_tokens(torch.cat([x[:, 1:], masked.to(x.dtype)], dim=1), ids_restore)          # B N d, unshuffled
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed                              # B 1+N d
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]                                                              # B N d

    def pixel_target(self, imgs):
        """What the decoder predicts in pixel mode: B C H W -> B N P."""
        patches = patchify(imgs, self.patch_size)
        return standardise_patches(patches) if self.norm_pix_loss else patches

    @staticmethod
    def forward_loss(pred, target, mask):
        """Mean over the masked patches of the mean squared error of a patch; visible patches do not count."""
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))         # autocast's bf16 would round small errors off
        per_patch = (pred - target).square().mean(-1)                                                   # B N
        return (per_patch * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75, noise=None, target=None):
        """B C H W -> loss, pred B N P (or target_dim), mask B N. target (B N target_dim) is needed with target_dim.
        The MAE by itself; train.py's is `Student` of pseudo_labels.py, whose forward leaves the losses to train.py."""
        if target is None:
            if self.target_dim is not None:
                raise ValueError("this model predicts tokens (target_dim): pass forward(..., target=B N target_dim)")
            target = self.pixel_target(imgs)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.decoder_pred(self.forward_decoder(latent, ids_restore))                             # B N P
        return self.forward_loss(pred, target, mask), pred, mask
