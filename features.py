"""Frozen features: what an encoder makes of images, in chunks that fit into memory.

Letters:  B images in a chunk, n images, N patches, D width of a token, P numbers in a patch of
          pixels, C H W an image.
"""

import torch

from data import read
from mae import patchify

CHUNK = 200                                # images in the memory of the device at a time


def subset(ids, n):
    """At most n of ids, evenly spread."""
    return ids[torch.linspace(0, len(ids) - 1, min(n, len(ids))).long()]


def standardised(images, ids, mean, std):
    """The images at ids as networks want them: n C H W, on the CPU."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (read(images, ids).float() / 255 - mean) / std


@torch.no_grad()
def tokens_in_chunks(encoder, images, ids, mean, std, device):
    """Yield tokens b 1+N D of the images at ids, at most CHUNK at a time, on the device."""
    dtype = next(encoder.parameters()).dtype
    for part in ids.split(CHUNK):
        yield encoder(standardised(images, part, mean, std).to(device, dtype))


def features(encoder, images, ids, mean, std, device):
    """Features of the images at ids, on the CPU: {"class": n D, "mean": n D}.

    encoder None: {"pixels": n (C H W)}."""
    if encoder is None:
        parts = [standardised(images, part, mean, std).flatten(1) for part in ids.split(CHUNK)]
        return {"pixels": torch.cat(parts)}
    found = {"class": [], "mean": []}
    for tokens in tokens_in_chunks(encoder, images, ids, mean, std, device):
        found["class"].append(tokens[:, 0].float().cpu())
        found["mean"].append(tokens[:, 1:].float().mean(1).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def patch_features(encoder, images, ids, patch_size, mean, std, device):
    """Features of each patch of the images at ids, on the CPU: n N D; of encoder None their
    pixels."""
    if encoder is None:
        return patchify(standardised(images, ids, mean, std), patch_size)
    chunks = tokens_in_chunks(encoder, images, ids, mean, std, device)
    return torch.cat([tokens[:, 1:].float().cpu() for tokens in chunks])


@torch.no_grad()
def class_attention(encoder, imgs):
    """How much the class token attends to each patch in the last block: B C H W -> B heads N.

    What is missing to 1 it attends to itself."""
    attention, seen = encoder.blocks[-1].attn, []
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(imgs)
    hook.remove()
    qkv = attention.qkv(seen[0]).unflatten(-1, (3, attention.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)                   # each B heads 1+N D/heads
    scores = q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1)[:, :, 0, 1:]
