"""Encoders for other libraries, and runs that start from a file."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TOY, TOY_SIZE, record_of
from PIL import Image
from test_checkpoint import assert_same, saved, shaken

import train
from extras import finetune
from mae import SIZES, MaskedAutoencoder, VisionTransformer
from support import report, weights
from support.checkpoint import load_run
from support.command_line import UsageError
from support.weights import export, load_encoder, to_official

INFO = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.fixture(params=[16, (16, 24)], ids=["square", "not square"])
def exported(request, tmp_path):
    """An encoder, the folder it was exported to, what `export` said."""
    encoder = shaken(VisionTransformer(request.param, 4, embed_dim=32, depth=2, num_heads=2)).eval()
    return encoder, tmp_path / "out", export(encoder, INFO, tmp_path / "out")


def run_lines(lines, first):
    """Run the printed lines of one library -> images, its tokens."""
    start = [i for i, line in enumerate(lines) if line.startswith("#")]
    part = lines[lines.index(first):]
    end = next((i for i, line in enumerate(part[1:], 1) if line.startswith("#")), None)
    names = {}
    with torch.no_grad():
        exec("\n".join(lines[:start[0]] + part[:end]), names)
    return names["images"], names["tokens"]


@pytest.mark.parametrize("library, heading", [("timm", "# timm"),
                                              ("transformers", "# Hugging Face")])
@pytest.mark.filterwarnings("ignore")
def test_the_lines_that_are_printed_give_our_features(exported, library, heading):
    pytest.importorskip(library)
    encoder, folder, lines = exported
    images, tokens = run_lines(lines, heading)
    moved = folder.rename(folder.with_name("moved"))       # the file finds what lies beside it
    text = (moved / "load.py").read_text()
    assert text.endswith("\n".join(lines[1:]) + "\n")
    names = {"__file__": str(moved / "load.py")}
    exec(text.split("# timm" if library == "transformers" else "# Hugging")[0], names)
    assert names["folder"] == str(moved)
    torch.testing.assert_close(tokens, encoder(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (8, 32)])
def test_an_export_loads_with_its_size_and_heads_and_pixels(tmp_path, size):
    encoder = shaken(VisionTransformer(size, 4, embed_dim=32, depth=2, num_heads=2))
    export(encoder, INFO, tmp_path)
    back, _ = load_encoder(tmp_path / "encoder.pt")        # 2 heads of 16: shapes do not tell
    assert back.info["mean"] == INFO["mean"] and back.info["std"] == INFO["std"]
    imgs = torch.randn(2, 3, *size)
    torch.testing.assert_close(back(imgs), encoder.eval()(imgs))


def test_export_of_a_run_is_evaluated_as_the_run_is(
        small_run, photos, no_pictures, capsys, monkeypatch):
    train.main([*small_run, "--epochs", "1"])
    monkeypatch.setattr(VisionTransformer, "cpu", None)    # the encoder stays where it is
    run = Path(small_run[-1])
    record = record_of(capsys, "export", "--checkpoint", run / "checkpoint.pt")
    assert Path(record["folder"]) == run / "export"
    ours = record_of(capsys, "knn", "--checkpoint", run / "checkpoint.pt")
    other = record_of(capsys, "knn", "--checkpoint", run / "export" / "encoder.pt", "--data",
                      "imagefolder", "--data-root", photos)
    assert ours["tokens"] == other["tokens"]


# ------------------------------------------------------------------------------------------- --init

def started_from(path, flags, out, *more):
    """Student and teachers of a run of no steps that starts from a file; its config."""
    train.main([*flags, "--out", str(out), "--epochs", "0", "--init", str(path), *more])
    return load_run(out / "checkpoint.pt")


@pytest.fixture
def toy_flags(small_flags, no_pictures, monkeypatch):
    monkeypatch.setitem(SIZES, "micro", TOY_SIZE)
    return small_flags


def test_the_heads_of_a_run_are_those_of_its_flag(toy_flags, tmp_path, capsys):
    flags = [*toy_flags, "--epochs", "0", "--num-heads", "1", "--out"]
    train.main([*flags, str(tmp_path / "one")])
    path = tmp_path / "one" / "checkpoint.pt"
    with pytest.raises(UsageError, match="heads 1 there, 2 here; .* and --num-heads"):
        started_from(path, toy_flags, tmp_path / "two")
    capsys.readouterr()
    started_from(path, toy_flags, tmp_path / "three", "--num-heads", "1")
    assert "ignored" not in capsys.readouterr().err


def test_a_run_starts_from_official_weights_with_their_decoder(toy_flags, tmp_path):
    mae = shaken(MaskedAutoencoder(**TOY, target_dim=None))
    path = saved({"model": to_official(mae)}, tmp_path / "official.pth")
    student, teachers, config = started_from(path, [*toy_flags, "--recipe", "rc-mae"],
                                             tmp_path / "run")
    assert_same(student.mae.state_dict(), mae.state_dict())
    assert_same(teachers.reconstruction.encoder.state_dict(), mae.encoder.state_dict())
    assert config.mean == [0.485, 0.456, 0.406]            # what these weights are used to


def test_a_decoder_of_another_target_starts_anew(toy_flags, tmp_path, capsys):
    train.main([*toy_flags, "--out", str(tmp_path / "mae"), "--epochs", "1", "--recipe", "mae"])
    path = tmp_path / "mae" / "checkpoint.pt"
    before, _, config = load_run(path)
    student, teachers, found = started_from(path, toy_flags, tmp_path / "run")     # predicts tokens
    assert "its encoder, and the mean and std" in capsys.readouterr().err
    assert not torch.equal(student.mae.decoder.mask_token, before.mae.decoder.mask_token)
    assert_same(student.mae.encoder.state_dict(), before.mae.encoder.state_dict())
    assert_same(teachers.labelling.encoder.state_dict(), before.mae.encoder.state_dict())
    assert (found.mean, found.std) == (config.mean, config.std)


def test_codes_of_places_are_interpolated_for_images_of_another_size(toy_flags, tmp_path):
    encoder = VisionTransformer(32, 4, embed_dim=32, depth=2, num_heads=2)
    export(shaken(encoder), INFO, tmp_path)
    student, _, _ = started_from(tmp_path / "encoder.pt", toy_flags, tmp_path / "run")
    found, _ = load_encoder(tmp_path / "encoder.pt", img_size=16)
    assert_same(student.mae.encoder.state_dict(), found.state_dict())


def test_the_decoder_of_an_own_run_is_taken_over(toy_flags, tmp_path):
    train.main([*toy_flags, "--out", str(tmp_path / "first"), "--epochs", "1"])
    before, _, _ = load_run(tmp_path / "first" / "checkpoint.pt")
    student, _, _ = started_from(tmp_path / "first" / "checkpoint.pt", toy_flags, tmp_path / "run")
    assert_same(student.mae.state_dict(), before.mae.state_dict())


def test_a_run_that_started_from_a_file_continues(toy_flags, tmp_path):
    """Cut off or not, the end is the same."""
    export(shaken(VisionTransformer(16, 4, embed_dim=32, depth=2, num_heads=2)), INFO, tmp_path)
    flags = [*toy_flags, "--init", str(tmp_path / "encoder.pt"), "--epochs", "2"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    whole, _, _ = load_run(tmp_path / "whole" / "checkpoint.pt")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["mean"] == INFO["mean"]

    class Cut(Exception):
        pass

    def cut(*args):
        raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "curves", cut)                # after the first checkpoint
        with pytest.raises(Cut):
            train.main([*flags, "--out", str(tmp_path / "cut")])
    train.main([*flags, "--out", str(tmp_path / "cut")])
    after, _, _ = load_run(tmp_path / "cut" / "checkpoint.pt")
    assert_same(after.state_dict(), whole.state_dict())


def test_other_networks_are_refused(toy_flags, tmp_path):
    run = [*toy_flags, "--out", str(tmp_path / "run"), "--init"]
    with pytest.raises(UsageError, match="--init nowhere.pt: there is no such file"):
        train.main([*run, "nowhere.pt"])
    export(VisionTransformer(16, 8, embed_dim=32, depth=3, num_heads=2), INFO, tmp_path)
    words = "another network, patch_size .8, 8. there, .4, 4. here, depth 3 there, 2 here"
    with pytest.raises(UsageError, match=words):
        train.main([*run, str(tmp_path / "encoder.pt")])
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------- what others' files do not say

WIDE = dict(img_size=16, patch_size=4, embed_dim=128, depth=2, num_heads=4)


def test_what_shapes_do_not_tell_is_said_and_can_be_overruled(tmp_path, capsys):
    theirs = shaken(VisionTransformer(**WIDE)).eval()
    path = saved(theirs.state_dict(), tmp_path / "others.pth")
    found, _ = load_encoder(path)
    said = capsys.readouterr().err
    for words in ("taken as 2 heads (--num-heads)", "mean [0.485, 0.456, 0.406] (--pixel-mean)",
                  "std [0.229, 0.224, 0.225] of the pixels (--pixel-std)", "(16 x 16)"):
        assert words in said and len(said.splitlines()) == 1
    found, _ = load_encoder(path, num_heads=4, pixel_mean=[0.5], pixel_std=[0.5, 0.25, 0.125])
    assert capsys.readouterr().err == ""
    assert found.info["mean"] == [0.5] * 3 and found.info["std"] == [0.5, 0.25, 0.125]
    imgs = torch.randn(2, 3, 16, 16)
    assert torch.equal(found(imgs), theirs(imgs))
    for wrong in (dict(pixel_mean=[123.7]), dict(pixel_std=[0.0]), dict(pixel_mean=[0.5, 0.5])):
        with pytest.raises(UsageError, match="--pixel-.*give one number from"):
            load_encoder(path, **wrong)


def test_the_flags_are_the_same_wherever_a_file_is_read(toy_flags, photos, tmp_path, capsys):
    """eval.py, train.py --init and extras/."""
    theirs = shaken(VisionTransformer(16, 4, embed_dim=32, depth=2, num_heads=2))
    path = saved(theirs.state_dict(), tmp_path / "others.pth")
    flags = ["--pixel-mean", "0.5", "--pixel-std", "0.5,0.25,0.5"]
    images = ["--data", "imagefolder", "--data-root", str(photos), "--device", "cpu"]
    record_of(capsys, "export", "--checkpoint", path, "--num-heads", 2, *flags, *images[:4])
    info = load_encoder(tmp_path / "export-others" / "encoder.pt")[0].info
    assert info["std"] == [0.5, 0.25, 0.5]
    student, _, config = started_from(path, [*toy_flags, *flags], tmp_path / "run")
    assert (config.mean, config.std) == ([0.5] * 3, [0.5, 0.25, 0.5])
    assert "taken as 2 heads (--num-heads), square" in capsys.readouterr().err
    student, _, _ = started_from(path, [*toy_flags, "--num-heads", "4"], tmp_path / "four")
    assert student.mae.encoder.blocks[0].attn.num_heads == 4
    assert_same(student.mae.encoder.state_dict(), theirs.state_dict())
    finetune.main(["--checkpoint", str(path), *images, "--num-heads", "2", *flags, "--epochs", "1",
                   "--batch-size", "16", "--out", str(tmp_path / "tuned")])
    info = load_encoder(tmp_path / "tuned" / "checkpoint.pt")[0].info
    assert info["mean"] == [0.5] * 3 and info["std"] == [0.5, 0.25, 0.5]


def test_flags_that_say_nothing(toy_flags, tmp_path, capsys):
    export(VisionTransformer(16, 4, embed_dim=32, depth=2, num_heads=2), INFO, tmp_path)
    found, _ = load_encoder(tmp_path / "encoder.pt", num_heads=4)
    assert found.blocks[0].attn.num_heads == 2
    assert "--num-heads: ignored, as" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--pixel-mean, --pixel-std: are of the weights of --init"):
        train.main([*toy_flags, "--pixel-mean", "0.5"])
    with pytest.raises(UsageError, match="--num-heads 5: must divide the width of 32"):
        train.main([*toy_flags, "--num-heads", "5"])
    with pytest.raises(UsageError, match="--num-heads: is of the weights of --checkpoint"):
        finetune.main(["--from-scratch", "--num-heads", "2"])


@pytest.mark.parametrize("change, words", [
    (lambda x: (20 * x).to(torch.int8), "holds int8, not fractions"),
    (lambda x: x > 0, "holds bool"), (lambda x: x.to(torch.complex64), "holds complex64"),
    (lambda x: x * math.nan, "not finite"), (lambda x: x / 0, "not finite"),
    (lambda x: x.tolist(), "is no plain tensor"), (lambda x: x.to_sparse(), "is no plain tensor"),
    (lambda x: x.flatten(), "other numbers of axes"), (lambda x: x[:, :, 0], "numbers of axes"),
])
def test_numbers_that_cannot_be_weights_are_refused(change, words, toy_flags, tmp_path):
    state = shaken(VisionTransformer(16, 4, embed_dim=32, depth=2, num_heads=2)).state_dict()
    name = "patch_embed.proj.weight"
    path = saved(state | {name: change(state[name])}, tmp_path / "others.pth")
    with pytest.raises(UsageError, match=f"{path}.*{words}|{words}.*{path}"):
        load_encoder(path)
    with pytest.raises(UsageError, match="--init"):
        train.main([*toy_flags, "--init", str(path), "--out", str(tmp_path / "run")])


def test_halves_are_weights(tmp_path):
    state = shaken(VisionTransformer(**WIDE)).state_dict()
    path = saved({name: x.bfloat16() for name, x in state.items()}, tmp_path / "half.pth")
    assert load_encoder(path)[0].cls_token.dtype == torch.float32


def test_an_own_run_with_broken_numbers_is_refused(toy_flags, tmp_path):
    train.main([*toy_flags, "--epochs", "0", "--out", str(tmp_path / "run")])
    path = tmp_path / "run" / "checkpoint.pt"
    file = torch.load(path)
    file["student"]["mae.encoder.cls_token"] *= math.nan
    with pytest.raises(UsageError, match="cls_token holds numbers that are not finite"):
        load_encoder(saved(file, tmp_path / "nan.pt"))


@pytest.mark.parametrize("change", [
    lambda file: file["config"].pop("consistency_weight"), lambda file: file["arch"].pop("depth"),
    lambda file: file.pop("mean"), lambda file: file.update(arch=7),
    lambda file: file["student"].pop("mae.encoder.cls_token")])
def test_an_own_run_of_another_version_is_one_line(change, toy_flags, tmp_path):
    train.main([*toy_flags, "--epochs", "0", "--out", str(tmp_path / "run")])
    file = torch.load(tmp_path / "run" / "checkpoint.pt")
    change(file)
    with pytest.raises(UsageError, match="is not as this train.py writes it") as error:
        load_encoder(saved(file, tmp_path / "other.pt"))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- safetensors

def test_safetensors_are_read(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file
    theirs, path = shaken(VisionTransformer(**WIDE)), tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), path)
    assert_same(load_encoder(path)[0].state_dict(), theirs.state_dict())
    path.write_bytes(path.read_bytes()[:1000])             # cut off
    with pytest.raises(UsageError, match="no file of safetensors that can be read"):
        load_encoder(path)
    monkeypatch.setattr(weights, "load_file", None)
    with pytest.raises(UsageError, match="to read it, pip install safetensors"):
        load_encoder(path)


def test_without_safetensors_an_export_is_as_it_was(tmp_path, monkeypatch):
    encoder = shaken(VisionTransformer(**WIDE))
    if weights.save:
        export(encoder, INFO, tmp_path)
        assert not (tmp_path / "pytorch_model.bin").exists()
    monkeypatch.setattr(weights, "save", None)
    export(encoder, INFO, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(torch.load(tmp_path / "pytorch_model.bin"),
                weights.to_hugging_face(encoder.state_dict()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_hugging_face_loads_the_folder_and_prepares_images_alike(size, channels, tmp_path):
    transformers = pytest.importorskip("transformers")
    encoder = shaken(VisionTransformer(size, 4, in_chans=channels, embed_dim=32, depth=2,
                                       num_heads=2)).eval()
    info = {name: values[:channels] for name, values in INFO.items()}
    export(encoder, info, tmp_path)
    prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    _, transform = load_encoder(tmp_path / "encoder.pt")
    picture = Image.fromarray(torch.randint(0, 256, (size[0] * 2, size[1] * 2), dtype=torch.uint8)
                              .numpy()).convert("RGB" if channels == 3 else "L")
    if size[0] == size[1]:                                 # the centre, where it is not square
        picture = picture.resize((3 * size[0], 2 * size[0]))
    imgs = prepare(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(imgs[0], transform(picture), atol=0.05, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(imgs).last_hidden_state, encoder(imgs), atol=1e-5,
                                   rtol=1e-5)
