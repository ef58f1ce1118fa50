import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TOY
from torch import nn

import mae
from mae import (
    MaskedAutoencoder,
    gather_tokens,
    masked_mse,
    patchify,
    pixel_target,
    random_masking,
    restore_tokens,
    unpatchify,
)

# ------------------------------------------------------------------------------ patches and masks

@pytest.mark.parametrize("channels, size, patch", [
    (1, (8, 8), 4), (3, (8, 12), 2), (4, (6, 12), (3, 4)),
])
def test_patchify(channels, size, patch):
    """Row by row; inside a patch (row, column, channel)."""
    imgs = torch.randn(2, channels, *size)
    (ph, pw), patches = mae.pair(patch), patchify(imgs, patch)
    columns = size[1] // pw
    assert patches.shape == (2, size[0] // ph * columns, ph * pw * channels)
    assert torch.equal(unpatchify(patches, patch, size), imgs)
    for n in range(patches.shape[1]):
        row, column = divmod(n, columns)
        cut = imgs[:, :, row * ph:(row + 1) * ph, column * pw:(column + 1) * pw]
        assert torch.equal(patches[:, n], cut.permute(0, 2, 3, 1).flatten(1))


@pytest.mark.parametrize("N, ratio, visible", [
    (196, 0.75, 49), (64, 0.6, 25), (10, 0.9, 1), (49, 0.5, 24),
])
def test_masking(N, ratio, visible):
    noise = torch.rand(5, N)
    ids_keep, mask, ids_restore = random_masking(noise, ratio)
    assert ids_keep.shape == (5, visible)
    assert mask.sum(1).tolist() == [N - visible] * 5
    assert (mask.gather(1, ids_keep) == 0).all()
    for b in range(5):                                     # the visible ones have the least noise
        least = noise[b].sort().indices[:visible]
        assert set(ids_keep[b].tolist()) == set(least.tolist())
    shuffled = torch.cat([ids_keep, noise.argsort(1)[:, visible:]], 1)
    assert torch.equal(shuffled.gather(1, ids_restore), torch.arange(N).expand(5, N))


def test_restore_tokens_equals_a_loop():
    x, fill = torch.randn(3, 10, 4), torch.randn(1, 1, 4)
    ids_keep, mask, ids_restore = random_masking(torch.rand(3, 10), 0.6)
    restored = restore_tokens(gather_tokens(x, ids_keep), ids_restore, fill)
    assert restored.shape == x.shape
    for b in range(3):
        for n in range(10):
            assert torch.equal(restored[b, n], fill[0, 0] if mask[b, n] else x[b, n])


def test_pixel_target_is_standardised_per_patch():
    imgs = torch.rand(2, 3, 16, 16)
    target = pixel_target(imgs, 4)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 16), atol=1e-3, rtol=0)
    assert torch.equal(pixel_target(imgs, 4, norm_pix_loss=False), patchify(imgs, 4))


def test_masked_mse_equals_a_loop():
    pred, target = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
    loss = masked_mse(pred, target, mask)
    errors = []
    for b in range(2):
        for n in range(6):
            if mask[b, n]:
                errors.append(((pred[b, n] - target[b, n]) ** 2).mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    half = pred.bfloat16()                                 # a loss of bf16 is computed in fp32
    assert torch.equal(masked_mse(half, target, mask), masked_mse(half.float(), target, mask))


# ------------------------------------------------------------------------------------ the networks

def test_hidden_pixels_do_not_reach_the_prediction_nor_visible_ones_the_loss():
    model, noise = MaskedAutoencoder(**TOY), torch.rand(2, 16)
    imgs = torch.randn(2, 3, 16, 16)
    loss, pred, mask = model(imgs, 0.75, noise)
    assert pred.shape == (2, 16, 48) and mask.sum() == 24

    hidden = unpatchify(mask[..., None].expand(-1, -1, 48), 4, 16).bool()
    other = torch.where(hidden, torch.randn_like(imgs), imgs)
    assert torch.equal(model(other, 0.75, noise)[1], pred)

    target = pixel_target(imgs, 4)
    assert torch.equal(masked_mse(pred, target, mask), loss)
    changed = torch.where(mask[..., None].bool(), target, torch.randn_like(target))
    assert torch.equal(masked_mse(pred, changed, mask), loss)


def test_the_encoder_knows_a_patch_by_its_place():
    """Patches in another order are the same tokens in that order, and the same class token."""
    encoder, imgs = MaskedAutoencoder(**TOY).encoder.double(), torch.randn(2, 3, 16, 16).double()
    order = torch.rand(2, 16).argsort(1)
    tokens, moved = encoder(imgs), encoder(imgs, order)
    assert tokens.shape == (2, 17, 32)
    torch.testing.assert_close(moved[:, 0], tokens[:, 0])
    torch.testing.assert_close(moved[:, 1:], gather_tokens(tokens[:, 1:], order))


def test_token_target():
    model = MaskedAutoencoder(**TOY, target_dim=7)
    imgs, noise, target = torch.randn(2, 3, 16, 16), torch.rand(2, 16), torch.randn(2, 16, 7)
    loss, pred, mask = model(imgs, 0.5, noise, target=target)
    torch.testing.assert_close(loss, (pred - target)[mask.bool()].square().mean())
    with pytest.raises(ValueError, match="target"):
        model(imgs)


def test_no_target_no_decoder():
    model, imgs = MaskedAutoencoder(**TOY, target_dim=0), torch.randn(2, 3, 16, 16)
    assert model.decoder is None
    assert all(name.startswith("encoder.") for name in model.state_dict())
    latent, mask, _ = model.forward_encoder(imgs, 0.75)
    assert latent.shape == (2, 5, 32) and mask.sum(1).tolist() == [12, 12]
    with pytest.raises(ValueError, match="predicts 0 numbers"):
        model(imgs)


def test_non_square_and_four_channels():
    model = MaskedAutoencoder(**{**TOY, "img_size": (8, 24), "patch_size": (4, 6), "in_chans": 4})
    loss, pred, mask = model(torch.randn(3, 4, 8, 24))
    assert pred.shape == (3, 8, 96) and mask.sum(1).tolist() == [6] * 3
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="this model takes"):
        model.encoder(torch.randn(3, 4, 24, 8))


@pytest.mark.parametrize("arguments", [dict(patch_size=5), dict(num_heads=3), dict(embed_dim=30)])
def test_impossible_geometry(arguments):
    with pytest.raises(ValueError):
        MaskedAutoencoder(**{**TOY, **arguments})


def test_block_is_torchs_transformer_layer():
    block = mae.Block(32, 4, 4.0).double()
    layer = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
        norm_first=True).double()
    for p in block.parameters():                           # biases are 0 at first, norms 1
        nn.init.normal_(p, std=0.3)
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
             "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
    ours, theirs = block.state_dict(), {}
    for torchs, name in names.items():
        for end in ("weight", "bias"):
            theirs[torchs + end] = ours[name + end]
    layer.load_state_dict(theirs)
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x), layer(x), atol=1e-12, rtol=1e-12)


def test_positions_of_the_official_layout():
    """Column first, then row; of each all sines, then all cosines."""
    code = mae.sincos_positions(16, (2, 3))[0]
    assert code.shape == (7, 16) and not code[0].any()
    for n in range(6):
        row, column = divmod(n, 3)
        want = []
        for place in (column, row):
            for function in (torch.sin, torch.cos):
                want += [function(torch.tensor(place * 10000 ** (-i / 4))) for i in range(4)]
        torch.testing.assert_close(code[1 + n], torch.stack(want))


def test_one_batch_is_overfitted():
    model = MaskedAutoencoder(**{**TOY, "decoder_embed_dim": 64})      # 48 patches are hidden
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss, _, _ = model(imgs, 0.75, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05                                     # guessing the mean gives 1


# ------------------------------------------------------------------------------- the file by itself

def test_mae_needs_torch_alone(tmp_path):
    """A copy of the file in an empty folder works, and looks for nothing else of the project, which
    it could find."""
    shutil.copy(ROOT / "mae.py", tmp_path)
    code = """
import sys, torch, mae
model = mae.MaskedAutoencoder(img_size=32, patch_size=4, **mae.SIZES["micro"])
loss, pred, mask = model(torch.rand(2, 3, 32, 32), mask_ratio=0.75)
loss.backward()
print(mae.__file__, *pred.shape, int(mask.sum()))
print(*sys.modules)
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True).stdout
    said, modules = output.splitlines()
    assert said == f"{tmp_path}/mae.py 2 64 48 96"
    loaded = {name.split(".")[0] for name in modules.split()}
    project = {path.stem for path in ROOT.glob("*.py")} | {"support", "extras", "results"}
    assert loaded & (project | {"torchvision", "PIL", "matplotlib"}) == {"mae"}


def test_attention_in_bf16_on_a_processor_is_the_librarys():
    """It is written out there, as that is faster."""
    attention = mae.Attention(32, 4)
    x = torch.randn(2, 17, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(x)
    torch.testing.assert_close(ours.float(), attention(x), atol=0.02, rtol=0.02)
