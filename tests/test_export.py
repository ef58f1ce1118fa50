"""Encoders for other libraries, and runs that start from a file."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TOY, TOY_SIZE, record_of
from test_checkpoint import assert_same, saved, shaken

import train
from mae import SIZES, MaskedAutoencoder, VisionTransformer
from support import report
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
    assert (folder / "load.py").read_text() == "\n".join(lines) + "\n"
    torch.testing.assert_close(tokens, encoder(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (8, 32)])
def test_an_export_loads_with_its_size_and_heads_and_pixels(tmp_path, size):
    encoder = shaken(VisionTransformer(size, 4, embed_dim=32, depth=2, num_heads=2))
    export(encoder, INFO, tmp_path)
    back, _ = load_encoder(tmp_path / "encoder.pt")        # 2 heads of 16: shapes do not tell
    assert back.info["mean"] == INFO["mean"] and back.info["std"] == INFO["std"]
    imgs = torch.randn(2, 3, *size)
    torch.testing.assert_close(back(imgs), encoder.eval()(imgs))


def test_export_of_a_run_is_evaluated_as_the_run_is(small_run, photos, no_pictures, capsys):
    train.main([*small_run, "--epochs", "1"])
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
