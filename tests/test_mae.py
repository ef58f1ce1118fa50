import argparse

import pytest
import torch
from conftest import TOY
from extras.weights import load_weights, read_encoder
from PIL import Image
from torch import nn

import mae
from mae import (
    MaskedAutoencoder,
    VisionTransformer,
    load_encoder,
    patchify,
    random_masking,
    unpatchify,
)
from utils.images import IMAGENET_MEAN, IMAGENET_STD


@pytest.mark.parametrize("channels, size, patch", [(1, (8, 8), 4), (3, (8, 12), 2), (4, (6, 12), (3, 4))])
def test_patchify(channels, size, patch):
    imgs = torch.randn(2, channels, *size)
    (ph, pw), patches = mae.pair(patch), patchify(imgs, patch)
    assert torch.equal(unpatchify(patches, patch, size), imgs)
    for n in range(patches.shape[1]):                      # against a loop: row by row, (row, column, channel) inside
        r, c = divmod(n, size[1] // pw)
        cut = imgs[:, :, r * ph:(r + 1) * ph, c * pw:(c + 1) * pw]
        assert torch.equal(patches[:, n], cut.permute(0, 2, 3, 1).flatten(1))


@pytest.mark.parametrize("n, ratio, visible", [(196, 0.75, 49), (64, 0.6, 25), (10, 0.9, 1), (49, 0.5, 24)])
def test_masking(n, ratio, visible):
    noise = torch.rand(5, n)
    ids_keep, mask, ids_restore = random_masking(noise, ratio)
    assert ids_keep.shape == (5, visible) and mask.sum(1).tolist() == [n - visible] * 5
    assert (mask.gather(1, ids_keep) == 0).all()
    for b in range(5):                                     # the visible ones have the least noise
        assert set(ids_keep[b].tolist()) == set(noise[b].sort().indices[:visible].tolist())
    shuffled = torch.cat([ids_keep, noise.argsort(1)[:, visible:]], 1)
    assert torch.equal(shuffled.gather(1, ids_restore), torch.arange(n).expand(5, n))


def test_hidden_pixels_do_not_reach_the_prediction_nor_visible_ones_the_loss():
    model, noise = MaskedAutoencoder(**TOY), torch.rand(2, 16)
    imgs = torch.randn(2, 3, 16, 16)
    loss, pred, mask = model(imgs, 0.75, noise)
    assert pred.shape == (2, 16, 48) and mask.sum() == 24
    hidden = unpatchify(mask[..., None].expand(-1, -1, 48), 4, 16).bool()
    other = torch.where(hidden, torch.randn_like(imgs), imgs)
    assert torch.equal(model(other, 0.75, noise)[1], pred)                     # hidden pixels change: same prediction
    target = model.pixel_target(imgs)
    changed = torch.where(mask[..., None].bool(), target, torch.randn_like(target))
    assert torch.equal(model.forward_loss(pred, changed, mask), loss)          # visible targets change: same loss
    loop = [((pred[b, n] - target[b, n]) ** 2).mean() for b in range(2) for n in range(16) if mask[b, n]]
    torch.testing.assert_close(loss, torch.stack(loop).mean())


def test_pixel_target_is_standardised_per_patch():
    target = MaskedAutoencoder(**TOY).pixel_target(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 16), atol=1e-3, rtol=0)


def test_token_target():
    model = MaskedAutoencoder(**TOY, target_dim=7)
    imgs, noise, target = torch.randn(2, 3, 16, 16), torch.rand(2, 16), torch.randn(2, 16, 7)
    loss, pred, mask = model(imgs, 0.5, noise, target=target)
    torch.testing.assert_close(loss, (pred - target)[mask.bool()].square().mean())
    with pytest.raises(ValueError, match="target"):
        model(imgs)


def test_non_square_and_four_channels():
    model = MaskedAutoencoder(**{**TOY, "img_size": (8, 24), "patch_size": (4, 6), "in_chans": 4})
    loss, pred, mask = model(torch.randn(3, 4, 8, 24))
    assert pred.shape == (3, 8, 96) and mask.sum(1).tolist() == [6] * 3
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("arguments", [dict(patch_size=5), dict(num_heads=3), dict(embed_dim=30)])
def test_impossible_geometry(arguments):
    with pytest.raises(ValueError):
        MaskedAutoencoder(**{**TOY, **arguments})


def test_block_is_torchs_transformer_layer():
    block = mae.Block(32, 4, 4.0).double()
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
                                       norm_first=True).double()
    theirs = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
              "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
    nn.init.normal_(block.attn.qkv.bias)
    layer.load_state_dict({a + end: block.state_dict()[b + end] for a, b in theirs.items() for end in ("weight", "bias")})
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x), layer(x), atol=1e-12, rtol=1e-12)


def test_positions_of_the_official_layout():
    code = mae.sincos_positions(16, (2, 3))[0]
    assert code.shape == (7, 16) and not code[0].any()
    row, column = 1, 2
    omega = [10000 ** (-i / 4) for i in range(4)]
    want = [f(torch.tensor(place * w)) for place in (column, row) for f in (torch.sin, torch.cos) for w in omega]
    torch.testing.assert_close(code[1 + row * 3 + column], torch.stack(want))


def test_names_and_shapes_of_official_checkpoints():
    """ViT-B/16: the names and shapes that the official code's pretraining model has (its mae_vit_base_patch16)."""
    with torch.device("meta"):
        state = {k: tuple(v.shape) for k, v in MaskedAutoencoder(**mae.SIZES["base"]).state_dict().items()}
    block = lambda prefix, d: {f"{prefix}.{k}": s for k, s in {
        "norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
        "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,), "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,)}.items()}
    official = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "mask_token": (1, 1, 512),
                "decoder_pos_embed": (1, 197, 512), "patch_embed.proj.weight": (768, 3, 16, 16),
                "patch_embed.proj.bias": (768,), "norm.weight": (768,), "norm.bias": (768,),
                "decoder_embed.weight": (512, 768), "decoder_embed.bias": (512,), "decoder_norm.weight": (512,),
                "decoder_norm.bias": (512,), "decoder_pred.weight": (768, 512), "decoder_pred.bias": (768,)}
    for i in range(12):
        official |= block(f"blocks.{i}", 768)
    for i in range(8):
        official |= block(f"decoder_blocks.{i}", 512)
    assert state == official


def test_encoder_is_timms_and_back(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5).double().eval()
    ours = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=12, num_heads=3).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    load_weights(ours, theirs.state_dict())
    assert "skipped, no place for them: head.weight, head.bias" in capsys.readouterr().err
    torch.testing.assert_close(ours(x), theirs.forward_features(x), atol=1e-10, rtol=1e-10)

    torch.save(theirs.float().state_dict(), tmp_path / "timm.pth")               # a file without a word on its geometry
    encoder, _ = load_encoder(tmp_path / "timm.pth")
    torch.testing.assert_close(encoder(x.float()), theirs.forward_features(x.float()), atol=1e-4, rtol=1e-4)

    back = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)
    back.load_state_dict(VisionTransformer(img_size=32, patch_size=8, embed_dim=192, num_heads=3).state_dict(), strict=True)


def test_official_file_loads_strictly_and_an_encoder_alone_says_what_is_missing(tmp_path, capsys):
    model = MaskedAutoencoder(**{**TOY, "embed_dim": 128})
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "official.pth")
    copy = MaskedAutoencoder(**{**TOY, "embed_dim": 128})
    load_weights(copy, read_encoder(tmp_path / "official.pth", num_heads=2)[0])
    assert capsys.readouterr().err == ""
    x, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    assert torch.equal(model(x, 0.75, noise)[0], copy(x, 0.75, noise)[0])

    encoder, transform = load_encoder(tmp_path / "official.pth")                 # three lines to features
    picture = transform(Image.new("L", (40, 20), 128))
    assert encoder(picture[None]).shape == (1, 17, 128)
    torch.testing.assert_close(picture[:, 0, 0], (128 / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD))

    load_weights(copy, encoder.state_dict())
    assert "not in the file, left as they were: mask_token, decoder_pos_embed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="geometry"):
        load_weights(MaskedAutoencoder(**TOY), encoder.state_dict())


def test_one_batch_is_overfitted():
    torch.manual_seed(0)
    model = MaskedAutoencoder(**{**TOY, "decoder_embed_dim": 64})      # as wide as the 48 hidden patches are many
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss, _, _ = model(imgs, 0.75, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05                                     # guessing the mean gives 1
