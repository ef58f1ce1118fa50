"""The same MAE by other libraries, for extras/bench.py to measure ours beside.

Each function takes the settings of a run and the number of channels. It gives the network, and a
function of images (B C H W) and noise (B N, which chooses the masks) that computes the loss. They
import their libraries when they are called, since `pip install transformers timm lightly` is only
for this.

Letters:  B images, C channels, H W height and width, N patches, V visible ones, D and d widths of
          encoder and decoder.
"""

import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mae
from support import devices

EPOCHS = 3                                 # that are timed of a training program, after a first one


def hugging_face(config, channels):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    size = mae.SIZES[config.model]
    D, d = size["embed_dim"], size["decoder_embed_dim"]
    network = ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=D, intermediate_size=4 * D, num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"], decoder_hidden_size=d,
        decoder_intermediate_size=4 * d, decoder_num_hidden_layers=size["decoder_depth"],
        decoder_num_attention_heads=size["decoder_num_heads"], image_size=config.img_size,
        patch_size=config.patch_size, num_channels=channels, mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss, layer_norm_eps=1e-6))
    return network.train(), lambda imgs, noise: network(imgs, noise=noise).loss


class MAEOfTimm(nn.Module):
    """MAE of timm's blocks, with the names that its parameters have in official files."""

    def __init__(self, config, channels):
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block
        super().__init__()
        self.config, size = config, mae.SIZES[config.model]
        D, d, norm = size["embed_dim"], size["decoder_embed_dim"], partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, mlp_ratio=4, qkv_bias=True, norm_layer=norm)
        self.patch_embed = PatchEmbed(config.img_size, config.patch_size, channels, D)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, n)) for n in (D, d))
        self.pos_embed, self.decoder_pos_embed = (nn.Parameter(mae.sincos_positions(
            n, self.patch_embed.grid_size), requires_grad=False) for n in (D, d))
        self.blocks = nn.Sequential(*[block(D, size["num_heads"]) for _ in range(size["depth"])])
        self.decoder_blocks = nn.Sequential(*[
            block(d, size["decoder_num_heads"]) for _ in range(size["decoder_depth"])])
        self.norm, self.decoder_norm, self.decoder_embed = norm(D), norm(d), nn.Linear(D, d)
        self.decoder_pred = nn.Linear(d, channels * config.patch_size ** 2)

    def forward(self, imgs, noise):
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]                               # B N D
        keep, mask, restore = mae.random_masking(noise, self.config.mask_ratio)
        x = x.gather(1, keep[..., None].repeat(1, 1, x.shape[-1]))                       # B V D
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = self.decoder_embed(self.norm(self.blocks(torch.cat([cls, x], 1))))         # B 1+V d
        masked = self.mask_token.repeat(len(x), restore.shape[1] + 1 - x.shape[1], 1)
        patches = torch.cat([x[:, 1:], masked], 1)
        patches = patches.gather(1, restore[..., None].repeat(1, 1, x.shape[-1]))        # B N d
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed                 # B 1+N d
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        target = mae.pixel_target(imgs, self.config.patch_size, self.config.norm_pix_loss)
        return mae.masked_mse(pred, target, mask)


def timm_blocks(config, channels):
    network = MAEOfTimm(config, channels)
    return network, network


def lightly(config, channels):
    """As in lightly's example of MAE, but with MAE's standardised targets and the masks of the
    noise. Its encoder has a mask token of its own, D numbers, that is not used."""
    from lightly.models import modules, utils
    from timm.models.vision_transformer import VisionTransformer
    size = mae.SIZES[config.model]
    vit = VisionTransformer(config.img_size, config.patch_size, channels, num_classes=0,
                            **{name: size[name] for name in ("embed_dim", "depth", "num_heads")})
    encoder, N = modules.MaskedVisionTransformerTIMM(vit=vit), vit.patch_embed.num_patches
    with warnings.catch_warnings(action="ignore"):         # 1.6 says that it has a new name
        decoder = modules.MAEDecoderTIMM(N, config.patch_size, channels, **{
            name: size[name] for name in ("embed_dim", "decoder_embed_dim", "decoder_depth",
                                          "decoder_num_heads")})
    V = mae.count_visible(N, config.mask_ratio)

    def loss(imgs, noise):
        class_token_first = torch.cat([noise.new_full((len(noise), 1), -1), noise], 1)
        order = class_token_first.argsort(1)
        keep, hidden = order[:, :1 + V], order[:, 1 + V:]
        x = decoder.embed(encoder.encode(imgs, idx_keep=keep))                         # B 1+V d
        masked = utils.repeat_token(decoder.mask_token, (len(imgs), 1 + N))
        x = decoder.decode(utils.set_at_index(masked, keep, x.type_as(masked)))        # B 1+N d
        pred = decoder.predict(utils.get_at_index(x, hidden))
        target = mae.pixel_target(imgs, config.patch_size, config.norm_pix_loss)
        return F.mse_loss(pred.float(), utils.get_at_index(target, hidden - 1))
    return nn.ModuleList([encoder, decoder]), loss


# Function, the packages that it needs, parameters that it has and we do not.
PEERS = {"hugging face": (hugging_face, ("transformers",), lambda D: 0),
         "timm's blocks": (timm_blocks, ("timm",), lambda D: 0),
         "lightly": (lightly, ("lightly", "timm"), lambda D: D)}


def train_hugging_face(config, device):
    """Images/s of each epoch but the first, on files in config.data_root/train/<class>.

    Hugging Face's script for MAE (run_mae.py) in short: torchvision crops and flips in the workers
    of a DataLoader. Ours draws as many numbers, so workers stay from epoch to epoch here too."""
    from torchvision import datasets
    from torchvision import transforms as T
    dtype, compute = devices.choose_precision(config.precision, device)
    network, loss = hugging_face(config, 3)
    network.to(device, dtype)
    views = T.Compose([
        T.RandomResizedCrop(config.img_size, scale=(0.2, 1), interpolation=Image.BICUBIC),
        T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.5] * 3, [0.25] * 3)])
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(Path(config.data_root) / "train", views), config.batch_size,
        shuffle=True, drop_last=True, num_workers=config.workers,
        persistent_workers=config.workers > 0, pin_memory=device.type == "cuda")
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=device.type == "cuda")
    rates = []
    for _ in range(1 + EPOCHS):
        start = time.perf_counter()
        for imgs, _ in loader:
            imgs = imgs.to(device, dtype, non_blocking=True)
            with torch.autocast(device.type, compute, enabled=compute is not None):
                value = loss(imgs, None)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        value.item()                                       # waits for the device
        rates.append(len(loader) * config.batch_size / (time.perf_counter() - start))
    return rates[1:]
