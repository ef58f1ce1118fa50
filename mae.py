"""The masked autoencoder (MAE): mask most patches of an image (here three quarters), encode the few
visible ones, predict the masked ones.

    images ─ patches ─ keep a random quarter ─ encoder (wide and deep; sees the class token and the
                                               V visible patches) ─ latent
    latent, with one learned mask token, the same at every masked place ─ decoder (narrow; sees the
                                               class token and all N patches) ─ states
    states ─ one linear layer ─ pred; loss = mean squared error at the masked patches

An encoder that never sees the masked patches is cheap to train (a quarter of the tokens) and cannot
cheat.

Letters:  B images (or views: crops of them), C channels, H W height and width, p_h p_w height and
          width of a patch, N patches of an image, V visible ones, M = N - V masked ones, D width of
          the encoder, d width of the decoder, P numbers of a patch: its p_h p_w C pixels, or as
          many as are predicted of it (target_dim).

`VisionTransformer` is the encoder: what one keeps after training. Its parameters have the names of
timm's VisionTransformer. `Decoder` is what one trains it with. `MaskedAutoencoder` holds the two.
`support/weights.py` reads and writes the official MAE files (He et al., CVPR 2022).

    model = MaskedAutoencoder(img_size=32, patch_size=4, **SIZES["micro"])
    loss, pred, mask = model(torch.rand(8, 3, 32, 32), mask_ratio=0.75)
"""

import torch
import torch.nn.functional as F
from torch import nn

# Encoders: base and large are the ViTs of Dosovitskiy et al. 2021, tiny and small those of DeiT
# (Touvron et al. 2021), micro is ours, for CPUs. Decoders: those of base and large are MAE's, the
# narrower ones are ours.
SIZES = {
    "micro": dict(embed_dim=96, depth=4, num_heads=3,
                  decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2),
    "tiny": dict(embed_dim=192, depth=12, num_heads=3,
                 decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4),
    "small": dict(embed_dim=384, depth=12, num_heads=6,
                  decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8),
    "base": dict(embed_dim=768, depth=12, num_heads=12,
                 decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16),
    "large": dict(embed_dim=1024, depth=24, num_heads=16,
                  decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16),
}


def pair(size):
    """An int, or two ints (H, W), as (H, W)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def at_least_fp32(x):
    """x in float32, or wider where it is. Losses and statistics of a batch are computed in it: bf16
    has 8 bits of precision, and small errors and differences would be rounded away."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------ patches and masks

def patchify(imgs, patch_size):
    """Cut images into patches: B C H W -> B N P.

    Patches come row by row; the numbers in a patch are ordered (row, column, channel).
    Raises ValueError if the patch size, an int or (p_h, p_w), does not divide the image."""
    (ph, pw), (B, C, H, W) = pair(patch_size), imgs.shape
    if H % ph or W % pw:
        raise ValueError(f"patches of {ph} x {pw} do not divide an image of {H} x {W}")
    x = imgs.reshape(B, C, H // ph, ph, W // pw, pw)        # B C rows ph columns pw
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, ph * pw * C)                         # B N P


def unpatchify(patches, patch_size, img_size):
    """The inverse of `patchify`: B N P -> B C H W; img_size is the (H, W) of the images."""
    (ph, pw), (H, W) = pair(patch_size), pair(img_size)
    B = patches.shape[0]
    x = patches.reshape(B, H // ph, W // pw, ph, pw, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)                              # B C H W


def count_visible(num_patches, mask_ratio):
    """V, the number of visible patches: N (1 - mask_ratio), rounded down as in the official code.

    The 1e-6 keeps floating point from losing a patch: 10 * (1 - 0.9) is 0.9999999999999998."""
    return int(num_patches * (1 - mask_ratio) + 1e-6)


def random_masking(noise, mask_ratio):
    """Choose the visible patches of each image: the V (`count_visible`) with the smallest noise.

    noise B N -> ids_keep B V, mask B N (floats: 1 masked, 0 visible), ids_restore B N.

    List all patches of an image by their noise: this shuffles them. ids_keep is the beginning of
    the list. ids_restore says for each patch where in the list it stands: gathering shuffled tokens
    by it puts each back at its patch. Four patches:

        noise        0.7  0.1  0.9  0.4
        ids_keep       1    3                the list is 1 3 0 2; half are masked
        mask           1    0    1    0
        ids_restore    2    0    3    1      patch 0 stands at index 2 of the list"""
    V = count_visible(noise.shape[1], mask_ratio)
    # Argsort twice: the first one makes the list, the second one inverts it.
    ids_shuffle = noise.argsort(dim=1)                                                       # B N
    ids_restore = ids_shuffle.argsort(dim=1)                                                 # B N
    mask = (ids_restore >= V).to(noise.dtype)                                                # B N
    return ids_shuffle[:, :V], mask, ids_restore


def gather_tokens(x, ids):
    """Tokens of x (B N D) at the places ids (B V), as B V D."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def restore_tokens(visible, ids_restore, fill):
    """The tokens of visible patches back at their patches, and `fill` at the masked ones.

    visible B V D, in shuffled order; ids_restore B N; fill 1 1 D -> B N D."""
    (B, V, D), N = visible.shape, ids_restore.shape[1]
    masked = fill.to(visible.dtype).expand(B, N - V, D)                                    # B M D
    return gather_tokens(torch.cat([visible, masked], dim=1), ids_restore)                 # B N D


def plain_norm(x):
    """Each token of x (... D) to mean 0, variance 1: LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:])


def standardise_patches(patches):
    """Each patch to mean 0, variance 1 (B N P): the target of norm_pix_loss.

    Without it the loss is mostly about the brightness of a patch, which its neighbours give away.
    Unbiased variance and 1e-6 under the root, as in MAE's code."""
    mean = patches.mean(-1, keepdim=True)
    variance = patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def pixel_target(imgs, patch_size, norm_pix_loss=True):
    """What the decoder predicts where it predicts pixels: B C H W -> B N P."""
    patches = patchify(imgs, patch_size)
    return standardise_patches(patches) if norm_pix_loss else patches


def masked_mse(pred, target, mask):
    """Mean squared error of a patch (pred and target B N P), averaged over the masked patches (mask
    B N, 1 masked) -> a number. Visible patches do not count; at least one has to be masked."""
    per_patch = (at_least_fp32(pred) - at_least_fp32(target)).square().mean(-1)              # B N
    return (per_patch * mask).sum() / mask.sum()


def sincos_positions(dim, grid):
    """Fixed sine-cosine code of each place of a grid (rows, columns): 1 1+N dim.

    The class token has no place: zeros. In the layout of the official checkpoints the first half of
    the channels encodes the *column* and the second half the row; each half has all sines first,
    then all cosines, with wavelengths from 2 pi to almost 10000 * 2 pi patches."""
    if dim % 4:
        raise ValueError(f"a width of {dim} is not a multiple of 4 (sine, cosine; row, column)")
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))        # dim/4
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    column = columns.repeat(len(rows))                                                         # N
    row = rows.repeat_interleave(len(columns))                                                 # N
    parts = []
    for place in (column, row):
        angle = place[:, None] * omega                                                   # N dim/4
        parts += [angle.sin(), angle.cos()]
    code = torch.cat([torch.zeros(1, dim), torch.cat(parts, dim=1).float()])             # 1+N dim
    return code[None]


# -------------------------------------------------------------------------------- the transformer

class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                           # B tokens dim
        B, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(B, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)              # each B heads tokens dim/heads
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":   # faster there, for few tokens
            x = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, tokens, dim))


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
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A linear map of each patch, written as a convolution whose stride is its kernel.

    B C H W -> B N D."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, imgs):
        return self.proj(imgs).flatten(2).transpose(1, 2)


def init_weights(module):
    """MAE's initialisation: Xavier-uniform matrices, zero biases. The patch convolution counts as a
    matrix. (MAE leaves that one's bias at PyTorch's default; here it is zero too.)"""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """The encoder. Sizes are ints or (H, W).

    Raises ValueError for a patch that does not divide the image or heads that do not divide D."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12, mlp_ratio=4.0):
        super().__init__()
        self.img_size, self.patch_size, self.in_chans = pair(img_size), pair(patch_size), in_chans
        (H, W), (ph, pw) = self.img_size, self.patch_size
        if H % ph or W % pw:
            raise ValueError(f"patches of {ph} x {pw} do not divide an image of {H} x {W}")
        self.grid = (H // ph, W // pw)                     # rows and columns of patches
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def forward(self, imgs, ids_keep=None):
        """Images B C H W -> tokens B 1+V D: the class token, then the patches at ids_keep (B V).

        Without ids_keep all patches, in order: B 1+N D."""
        if imgs.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(f"images of {tuple(imgs.shape[1:])}: this model takes "
                             f"{(self.in_chans, *self.img_size)}")
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]                                 # B N D
        if ids_keep is not None:
            x = gather_tokens(x, ids_keep)                                                 # B V D
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)          # B 1 D
        x = torch.cat([cls, x], dim=1)                                                   # B 1+V D
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """From the visible tokens to a state, and a prediction, for every patch.

    `target_dim` numbers are predicted for each patch. `grid`: rows and columns of patches."""

    def __init__(self, grid, encoder_dim, dim, depth, num_heads, target_dim, mlp_ratio=4.0):
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, target_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(init_weights)

    def forward(self, latent, ids_restore):
        """latent B 1+V D, ids_restore B N -> states B N d.

        States, not predictions: `pred` makes these of them, and patch pseudo labels
        (pseudo_labels.py) are predicted from them too."""
        x = self.embed(latent)                                                           # B 1+V d
        patches = restore_tokens(x[:, 1:], ids_restore, self.mask_token)                   # B N d
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed                       # B 1+N d
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]                                                         # B N d


class MaskedAutoencoder(nn.Module):
    """The encoder and its decoder. Arguments have the names of the official code.

    target_dim: how many numbers are predicted for a patch; None stands for its pixels.
    target_dim=0 leaves the decoder out: image pseudo labels need none."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16,
                 mlp_ratio=4.0, norm_pix_loss=True, target_dim=None):
        super().__init__()
        self.norm_pix_loss = norm_pix_loss
        self.encoder = VisionTransformer(img_size, patch_size, in_chans, embed_dim, depth,
                                         num_heads, mlp_ratio)
        if target_dim is None:
            ph, pw = pair(patch_size)
            target_dim = ph * pw * in_chans
        self.target_dim = target_dim
        self.decoder = Decoder(
            self.encoder.grid, embed_dim, decoder_embed_dim, decoder_depth, decoder_num_heads,
            target_dim, mlp_ratio) if target_dim else None

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        """B C H W -> latent B 1+V D, mask B N (1 masked, 0 visible), ids_restore B N.

        noise B N chooses the patches; without it they are drawn at random."""
        if noise is None:
            noise = torch.rand(imgs.shape[0], self.encoder.num_patches, device=imgs.device)
        ids_keep, mask, ids_restore = random_masking(noise, mask_ratio)
        return self.encoder(imgs, ids_keep), mask, ids_restore

    def forward_decoder(self, latent, ids_restore):
        """latent B 1+V D -> states B N d. `self.decoder.pred` turns a state into a prediction."""
        return self.decoder(latent, ids_restore)

    def forward(self, imgs, mask_ratio=0.75, noise=None, target=None):
        """B C H W -> loss, pred B N P, mask B N (1 masked). This is MAE by itself.

        target: B N target_dim, the pixels by default. Raises ValueError if it is not target_dim
        wide."""
        if target is None:
            target = pixel_target(imgs, self.encoder.patch_size, self.norm_pix_loss)
        if target.shape[-1] != self.target_dim:
            raise ValueError(f"this model predicts {self.target_dim} numbers for a patch, but the "
                             f"target has {target.shape[-1]}: pass target, B N {self.target_dim}")
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.decoder.pred(self.forward_decoder(latent, ids_restore))                # B N P
        return masked_mse(pred, target, mask), pred, mask
