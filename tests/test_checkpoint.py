"""Files: what goes in comes out, others' weights compute the same here, what does not fit is
refused in one line."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY
from PIL import Image

import train
from mae import SIZES, MaskedAutoencoder, VisionTransformer
from support.checkpoint import (
    continue_from,
    load_checkpoint,
    load_run,
    precision_before,
    save_checkpoint,
)
from support.command_line import UsageError
from support.datasets import Images, mean_std
from support.files import write_atomically
from support.images import IMAGENET_MEAN, IMAGENET_STD
from support.weights import fill, load_encoder, official_name, resize_positions, to_official

WIDE = {**TOY, "embed_dim": 128}               # two heads of 64, as load_encoder takes them to be


def refused(call, *args, **kwargs):
    """The one line that it says."""
    with pytest.raises(UsageError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def saved(content, path):
    torch.save(content, path)
    return path


@torch.no_grad()
def shaken(module):
    """The module with noise on all its weights: biases, norms and positions of a fresh one are all
    alike, and would not tell if they were mixed up."""
    for p in module.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return module


def from_official(mae, state):
    fill(mae, {official_name(name): name for name in mae.state_dict()}, state)


def assert_same(state, other):
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


# ----------------------------------------------------------------- names of the official MAE code

def official_block(prefix, d):
    shapes = {
        "norm1.weight": (d,), "norm1.bias": (d,),
        "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d), "attn.proj.bias": (d,),
        "norm2.weight": (d,), "norm2.bias": (d,),
        "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,),
    }
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def test_names_and_shapes_of_official_checkpoints():
    """Those of the official code's pretraining model of ViT-B/16, mae_vit_base_patch16."""
    official = {
        "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
        "norm.weight": (768,), "norm.bias": (768,),
        "mask_token": (1, 1, 512), "decoder_pos_embed": (1, 197, 512),
        "decoder_embed.weight": (512, 768), "decoder_embed.bias": (512,),
        "decoder_norm.weight": (512,), "decoder_norm.bias": (512,),
        "decoder_pred.weight": (768, 512), "decoder_pred.bias": (768,),
    }
    for i in range(12):
        official |= official_block(f"blocks.{i}", 768)
    for i in range(8):
        official |= official_block(f"decoder_blocks.{i}", 512)
    with torch.device("meta"):
        ours = to_official(MaskedAutoencoder(**SIZES["base"]))
    assert {name: tuple(value.shape) for name, value in ours.items()} == official


def test_to_official_and_back_is_the_same_network():
    mae, copy = shaken(MaskedAutoencoder(**TOY)), MaskedAutoencoder(**TOY)
    from_official(copy, to_official(mae))
    assert_same(copy.state_dict(), mae.state_dict())
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    assert torch.equal(copy(imgs, 0.75, noise)[0], mae(imgs, 0.75, noise)[0])


def test_weights_that_do_not_fit_are_refused():
    mae = MaskedAutoencoder(**TOY)
    before, state = {k: v.clone() for k, v in mae.state_dict().items()}, to_official(shaken(mae))
    mae.load_state_dict(before)
    lacking = {name: value for name, value in state.items() if name != "decoder_norm.bias"}
    assert "lacks decoder_norm.bias" in refused(from_official, mae, lacking)
    more = state | {"blocks.0.ls1.gamma": torch.ones(32)}
    assert "no place for blocks.0.ls1.gamma" in refused(from_official, mae, more)
    both = refused(from_official, mae, lacking | {"fc_norm.bias": torch.ones(32)})
    assert "lacks decoder_norm.bias" in both and "no place for fc_norm.bias" in both
    larger = state | {"pos_embed": torch.zeros(1, 26, 32)}
    line = refused(from_official, mae, larger)
    assert "pos_embed is [1, 26, 32] in the file, [1, 17, 32] in this network" in line
    assert_same(mae.state_dict(), before)                  # and nothing was loaded


# ------------------------------------------------------------------------ equality with references

def test_encoder_is_timms_and_back(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    theirs = shaken(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8,
                                      num_classes=5)).eval()
    # a file without a word on its geometry
    ours, _ = load_encoder(saved(theirs.state_dict(), tmp_path / "timm.pth"))
    assert "left out: head.weight, head.bias" in capsys.readouterr().err
    imgs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours.double()(imgs), theirs.double().forward_features(imgs),
                               atol=1e-10, rtol=1e-10)

    ours = shaken(VisionTransformer(img_size=32, patch_size=8, embed_dim=192, num_heads=3)).double()
    back = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)
    back.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(back.double().eval().forward_features(imgs), ours(imgs),
                               atol=1e-10, rtol=1e-10)


def from_hugging_face(state):
    """A state_dict of transformers' ViTMAEForPreTraining in the names of the official code."""
    renamed = [
        ("vit.embeddings.", ""), ("position_embeddings", "pos_embed"),
        ("patch_embeddings.projection", "patch_embed.proj"),
        ("vit.layernorm", "norm"), ("vit.layers", "blocks"),
        ("decoder.", ""), ("decoder_layers", "decoder_blocks"),
        ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
        ("attention.o_proj", "attn.proj"), ("attention.q_proj", "attn.qkv"),
    ]
    official = {}
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:                             # queries, keys, values: one matrix
            value = torch.cat([state[name.replace(".q_", f".{part}_")] for part in "qkv"])
        for theirs, ours in renamed:
            name = name.replace(theirs, ours)
        official[name] = value
    return official


def test_mae_is_that_of_hugging_face():
    transformers = pytest.importorskip("transformers", minversion="5")     # names of version 5
    config = transformers.ViTMAEConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=64, layer_norm_eps=1e-6,
        norm_pix_loss=True, mask_ratio=0.75)
    theirs = shaken(transformers.ViTMAEForPreTraining(config).double().eval())
    ours = MaskedAutoencoder(**TOY).double()
    from_official(ours, from_hugging_face(theirs.state_dict()))

    imgs, noise = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.rand(3, 16)
    want = theirs(imgs, noise=noise)
    loss, pred, mask = ours(imgs, 0.75, noise)
    torch.testing.assert_close(pred, want.logits, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(loss, want.loss, atol=1e-10, rtol=1e-10)
    assert torch.equal(mask, want.mask.to(mask.dtype))


# -------------------------------------------------------------------------------- a run's own file

@pytest.fixture
def run_of(small_run, no_pictures):
    """run_of(recipe): the path of a checkpoint that train.py wrote, and its content, in which each
    network has other weights, and other centres."""
    def make(recipe, *flags):
        train.main([*small_run, "--epochs", "0", "--recipe", recipe, *flags])
        path = Path(small_run[-1]) / "checkpoint.pt"
        content = load_checkpoint(path)
        for network in ("student", "labelling_teacher", "reconstruction_teacher"):
            for value in content.get(network, {}).values():
                value.normal_()
        return saved(content, path), content
    return make


def test_load_run_gives_back_student_and_two_teachers(run_of):
    path, content = run_of("pl-mae")
    student, teachers, config = load_run(path)
    assert_same(student.state_dict(), content["student"])
    assert_same(teachers.labelling.state_dict(), content["labelling_teacher"])
    assert_same(teachers.reconstruction.state_dict(), content["reconstruction_teacher"])
    assert torch.equal(teachers.labelling.centres["image"],
                       content["labelling_teacher"]["image_centre"])
    assert config == SimpleNamespace(**content["config"], mean=content["mean"], std=content["std"])
    assert config.recipe == "pl-mae" and len(config.mean) == 3
    for network in (student, teachers.labelling, teachers.reconstruction):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_load_run_gives_back_one_teacher_in_both_roles(run_of):
    path, content = run_of("pl-mae-one-teacher")
    _, teachers, _ = load_run(path)
    assert teachers.labelling is teachers.reconstruction
    assert_same(teachers.labelling.state_dict(), content["labelling_teacher"])
    assert "reconstruction_teacher" not in content


@pytest.mark.parametrize("recipe", ["mae", "rc-mae"])
def test_load_run_gives_back_the_average_of_a_run_without_labels(run_of, recipe):
    path, content = run_of(recipe)
    student, teachers, _ = load_run(path)
    assert teachers.labelling is None and student.image_head is None
    assert_same(teachers.reconstruction.state_dict(), content["reconstruction_teacher"])
    assert (teachers.reconstruction.decoder is not None) == (recipe == "rc-mae")


def test_load_run_wants_a_run(tmp_path):
    path = saved(to_official(MaskedAutoencoder(**WIDE)), tmp_path / "official.pth")
    assert f"{path}: is not of this train.py" in refused(load_run, path)


@pytest.mark.parametrize("network", ["student", "labelling-teacher", "reconstruction-teacher"])
def test_load_encoder_of_a_run(run_of, network):
    path, content = run_of("pl-mae")
    encoder, transform = load_encoder(path, network=network)
    student, teachers, config = load_run(path)
    whole = {"student": student.mae, "labelling-teacher": teachers.labelling,
             "reconstruction-teacher": teachers.reconstruction}[network]
    assert_same(encoder.state_dict(), whole.encoder.state_dict())
    imgs = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder(imgs), whole.encoder(imgs))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert encoder.info == {"network": network, "step": 0, "mean": config.mean, "std": config.std,
                            "arch": content["arch"], "config": content["config"]}
    grey = transform(Image.new("RGB", (40, 20), (128, 128, 128)))
    want = (128 / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    torch.testing.assert_close(grey, want[:, None, None].expand(3, 16, 16))


def test_an_encoder_at_another_size(run_of):
    """At its own size it is what it was. At twice the size, places are between those it knew."""
    path, _ = run_of("mae")
    encoder, _ = load_encoder(path)
    same, _ = load_encoder(path, img_size=16)
    torch.testing.assert_close(same.pos_embed, encoder.pos_embed)
    larger, transform = load_encoder(path, img_size=(32, 24))
    assert larger(transform(Image.new("RGB", (40, 40)))[None]).shape[:2] == (1, 1 + 8 * 6)
    row = torch.arange(4.0).repeat_interleave(4)           # a code that is the row
    same.pos_embed[0, 1:, 0] = row
    resize_positions(same, 32)
    rows = same.pos_embed[0, 1:, 0].view(8, 8)
    torch.testing.assert_close(rows[3:5, 2], torch.tensor([1.25, 1.75]), atol=0.05, rtol=0)
    assert torch.equal(larger.pos_embed[:, 0], encoder.pos_embed[:, 0])
    assert "use 32x24" in refused(load_encoder, path, img_size=(33, 22))


@pytest.mark.parametrize("recipe, network", [
    ("pl-mae", "student"), ("rc-mae", "reconstruction-teacher"),
])
def test_a_recipe_is_judged_by_its_network(run_of, recipe, network):
    path, _ = run_of(recipe)
    encoder, chosen = load_encoder(path)[0], load_encoder(path, network=network)[0]
    assert encoder.info["network"] == network
    assert_same(encoder.state_dict(), chosen.state_dict())


def test_networks_that_a_run_does_not_have(run_of):
    path, _ = run_of("mae")
    line = refused(load_encoder, path, network="labelling-teacher")
    assert f"checkpoint {path} has none; it has student, reconstruction-teacher" in line


# --------------------------------------------------------------------------------- others' encoders

@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 9},
    lambda state: {"model": state, "epoch": 9, "args": argparse.Namespace(lr=1.0)},    # MAE's own
    lambda state: {"state_dict": state, "arch": "visiontransformer"},                  # timm's own
], ids=["bare", "state_dict", "official", "timm"])
def test_load_encoder_of_an_official_file(wrap, tmp_path, capsys):
    mae = shaken(MaskedAutoencoder(**WIDE))
    path = saved(wrap(to_official(mae)), tmp_path / "others.pth")
    encoder, transform = load_encoder(path)
    said = capsys.readouterr().err
    assert "taken as 2" in said and "left out: mask_token, decoder_pos_embed" in said
    assert_same(encoder.state_dict(), mae.encoder.state_dict())
    picture = transform(Image.new("L", (40, 20), 128))[None]
    want = (128 / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(picture[0, :, 0, 0], want)
    assert torch.equal(encoder(picture), mae.encoder(picture))
    assert "no teachers" in refused(load_encoder, path, network="labelling-teacher")


def test_geometry_is_read_off_the_weights(tmp_path):
    kinds = [
        dict(img_size=16, patch_size=4, in_chans=1, embed_dim=64, depth=3, num_heads=1),
        dict(img_size=(12, 24), patch_size=(3, 6), embed_dim=96, depth=1, num_heads=3,
             mlp_ratio=2.5),
    ]
    for i, kind in enumerate(kinds):
        theirs = shaken(VisionTransformer(**kind))
        path = saved(theirs.state_dict(), tmp_path / f"{i}.pth")
        ours, _ = load_encoder(path, num_heads=kind["num_heads"])
        imgs = torch.randn(2, theirs.in_chans, *theirs.img_size)
        assert torch.equal(ours(imgs), theirs(imgs))
        assert len(ours.info["mean"]) == theirs.in_chans
    assert "--num-heads 5" in refused(load_encoder, path, num_heads=5)
    assert "--num-heads 0" in refused(load_encoder, path, num_heads=0)


@pytest.mark.parametrize("kind, words", [
    (dict(init_values=1e-5), "no place for blocks.0.ls1.gamma"),
    (dict(pre_norm=True), "norm_pre"),
    (dict(global_pool="avg"), "lacks norm.bias, norm.weight; no place for fc_norm.bias"),
    (dict(reg_tokens=4), "no place for reg_token"),
    (dict(class_token=False, global_pool="avg", fc_norm=False), "lacks cls_token"),
    (dict(no_embed_class=True), "pos_embed"),
    (dict(qk_norm=True), "no place for blocks.0.attn.k_norm"),
    (dict(qkv_bias=False), "lacks blocks.0.attn.qkv.bias"),
], ids=str)
def test_vits_that_are_not_plain_are_refused(kind, words, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1,
                                           num_heads=1, num_classes=3, **kind)
    path = saved(theirs.state_dict(), tmp_path / "timm.pth")
    line = refused(load_encoder, path)
    assert str(path) in line and words in line


@pytest.mark.parametrize("content", [
    torch.zeros(3),
    [1, 2],
    {"vit.embeddings.cls_token": torch.zeros(1, 1, 64)},   # Hugging Face's names
    {"model": torch.zeros(3)},
    {"model": "vit_base", "step": 3},
], ids=["tensor", "list", "hugging face", "model is a tensor", "model is a word"])
def test_files_without_a_vision_transformer(content, tmp_path):
    path = saved(content, tmp_path / "other.pt")
    assert f"{path}: holds no vision transformer" in refused(load_encoder, path)


def test_files_that_are_no_checkpoints(tmp_path):
    text, empty, missing = tmp_path / "text.pt", tmp_path / "empty.pt", tmp_path / "missing.pt"
    text.write_text("hello")
    empty.touch()
    for load in (load_checkpoint, load_run, load_encoder):
        assert f"{text}: not a checkpoint" in refused(load, text)
        assert f"{empty}: not a checkpoint" in refused(load, empty)
        assert f"{missing}: there is no such file" in refused(load, missing)


# --------------------------------------------------------------------------------- safe and whole

class Evil:
    """Where it is unpickled as any object would be, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("wrap", [
    lambda evil: evil,
    lambda evil: {"student": {}, "config": evil},
    lambda evil: {"model": {}, "args": argparse.Namespace(lr=evil)},
], ids=["bare", "in a run", "in MAE's arguments"])
def test_code_in_a_checkpoint_is_not_run(wrap, tmp_path):
    made = tmp_path / "made"
    path = saved(wrap(Evil(made)), tmp_path / "evil.pt")
    for load in (load_checkpoint, load_run, load_encoder):
        assert "safely" in refused(load, path)
    assert not made.exists()
    torch.load(path, weights_only=False)                   # the code does work
    assert made.exists()


class Broken:
    def __reduce__(self):
        raise OSError("disk full")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, dict(step=1))

    def half(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, dict(weights=torch.zeros(1000), then=Broken()))
    assert load_checkpoint(path) == dict(step=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


# ---------------------------------------------------------------------------------------- continue

@pytest.fixture
def set_threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def test_the_same_images_continue_under_another_number_of_threads(tmp_path, set_threads):
    """Of one channel, as torch shares such a sum out among its threads: float sums differ then."""
    pixels = torch.randint(0, 256, (120, 1, 40, 40), dtype=torch.uint8)
    images = Images(torch.zeros(120), [], (40, 40), 1, pixels)
    config, path = dict(out="run", lr=1.0, device="cpu"), tmp_path / "checkpoint.pt"
    mean, std = mean_std(images)
    save_checkpoint(path, dict(student={}, arch={}, config=config, mean=mean, std=std, images=120))
    for threads in (2, 3, 8):
        set_threads(threads)
        assert mean_std(images) == (mean, std)
        assert continue_from(path, config, (), mean_std(images)[0], 120)["std"] == std

    pixels[5, 0, 0, 0] ^= 1                                # one grey level of one pixel
    other, _ = mean_std(images)
    assert "other images" in refused(continue_from, path, config, (), other, 120)
    assert "other images" in refused(continue_from, path, config, (), mean, 121)


def test_only_free_settings_may_change(tmp_path):
    config, path = dict(out="run", lr=1.0, device="cpu"), tmp_path / "checkpoint.pt"
    assert continue_from(path, config, (), [0.5], 9) is None
    save_checkpoint(path, dict(student={}, arch={}, config=config, mean=[0.5], images=9))
    moved = dict(config, device="cuda")
    assert continue_from(path, moved, {"device"}, [0.5], 9)["config"] == config
    line = refused(continue_from, path, dict(moved, lr=2.0), {"device"}, [0.5], 9)
    assert "--out run" in line and "lr was 1.0, now 2.0" in line and "device" not in line
    save_checkpoint(path, to_official(MaskedAutoencoder(**TOY)))
    assert "not of this program" in refused(continue_from, path, config, (), [0.5], 9)


def test_a_run_keeps_its_precision(small_run, no_pictures):
    """That of config.json, also where the checkpoint beside it is damaged."""
    out = Path(small_run[-1])
    assert precision_before(out) is None
    train.main([*small_run, "--epochs", "0", "--precision", "fp16"])
    (out / "checkpoint.pt").write_bytes(b"damaged")
    assert precision_before(out) == "fp16"
    (out / "checkpoint.pt").unlink()                       # of another program
    assert precision_before(out) is None
