"""The run: settings, the loop, continuing, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TIMES, run

import eval as evaluation
import train
from mae import SIZES
from pseudo_labels import Student
from support import devices, settings
from support.command_line import UsageError, fail
from support.files import read_json_lines

WRITTEN = {"config.json", "metrics.jsonl", "checkpoint.pt", "previous.pt", ".lock", "curves.png",
           "reconstructions.png"}


def weights(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["student"]


def assert_same_run(a, b):
    """The same log, but for times, and the same weights."""
    logs = [[{k: v for k, v in r.items() if k not in TIMES}
             for r in read_json_lines(Path(folder) / "metrics.jsonl")] for folder in (a, b)]
    assert logs[0] == logs[1] and logs[0]
    ours, theirs = weights(a), weights(b)
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def power_cut_at(step, monkeypatch):
    """The learning rate of that step is never computed. Returns what repairs it."""
    rate = train.learning_rate

    def cut(now, *args):
        if now == step:
            raise OSError("power cut")
        return rate(now, *args)

    monkeypatch.setattr(train, "learning_rate", cut)
    return lambda: monkeypatch.setattr(train, "learning_rate", rate)


# ------------------------------------------------------------------------------------ settings

def test_learning_rate_at_both_ends():
    config = settings.Config(lr=2.0, warmup=0.1)
    assert train.learning_rate(0, 1000, config) == 0
    assert train.learning_rate(50, 1000, config) == pytest.approx(1.0)
    assert train.learning_rate(100, 1000, config) == 2.0
    assert train.learning_rate(550, 1000, config) == pytest.approx(1.0)
    assert 0 < train.learning_rate(999, 1000, config) < 1e-4
    assert train.learning_rate(0, 1000, settings.Config(lr=2.0, warmup=0.0)) == 2.0


def test_only_matrices_decay():
    student = Student(8, 8, **SIZES["micro"], img_size=32, patch_size=8)
    decayed, rest = (group["params"] for group in train.parameter_groups(student, 0.1))
    encoder, decoder = student.mae.encoder, student.mae.decoder
    ours = {id(p) for p in decayed}
    assert all(p.ndim >= 2 for p in decayed) and id(encoder.patch_embed.proj.weight) in ours
    for p in (encoder.cls_token, decoder.mask_token, encoder.norm.weight,
              student.image_head.prototypes, student.patch_head.prototypes):
        assert id(p) not in ours and any(p is q for q in rest)
    assert len(decayed) + len(rest) == sum(p.requires_grad for p in student.parameters())


def test_four_rows_the_later_one_wins(monkeypatch):
    """Defaults, data set, recipe, command line."""
    monkeypatch.setitem(settings.DATA_ROWS, "shapes", dict(mask_ratio=0.5, lr=3.0, colours=5.0))
    monkeypatch.setitem(settings.RECIPES, "mae", dict(mask_ratio=0.6, lr=4.0))
    config = settings.resolve(["--recipe", "mae", "--lr", "5", "--img-size", "16x24",
                               "--patch-size", "8", "--no-norm-pix-loss"])
    assert (config.lr, config.mask_ratio, config.colours) == (5.0, 0.6, 5.0)
    assert config.warmup == settings.Config.warmup
    assert (config.img_size, config.patch_size, config.norm_pix_loss) == ([16, 24], 8, False)
    cifar = settings.resolve(["--data", "cifar10", "--recipe", "mae"])
    assert cifar.colours == settings.Config.colours


def test_defaults_are_for_photographs_and_shapes_has_a_row():
    photographs, shapes = settings.resolve(["--data", "imagefolder"]), settings.resolve([])
    assert (photographs.colours, photographs.teacher_temperature, photographs.mask_ratio) == (
        1.0, 0.05, 0.75)
    assert (shapes.data, shapes.colours, shapes.teacher_temperature, shapes.mask_ratio) == (
        "shapes", 5.0, 0.0125, 0.5)


def test_resolved_settings_are_printed_and_kept(small_run, capsys):
    train.main([*small_run, "--recipe", "mae", "--epochs", "0"])
    printed, config = capsys.readouterr().err, json.loads(
        (Path(small_run[-1]) / "config.json").read_text())
    resolved = settings.resolve([*small_run, "--recipe", "mae", "--epochs", "0"])
    for name, value in vars(resolved).items():
        assert f"{name}={value}" in printed and config[name] == value
    saved = torch.load(Path(small_run[-1]) / "checkpoint.pt")["config"]
    assert saved == {k: v for k, v in config.items() if k not in ("mean", "std", "channels")}


# ------------------------------------------------------------------------------------- the run

def test_run_learns_and_writes_its_files(small_run):
    out = Path(small_run[-1])
    command = ["train.py", *small_run, "--epochs", 20, "--eval-every", 10, "--recipe", "mae"]
    run(*command)
    assert {path.name for path in out.iterdir()} == WRITTEN
    records = read_json_lines(out / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 80 and losses[-1] < 0.9 * losses[0]
    assert [r["step"] for r in records if "knn_mean" in r] == [0, 40, 80]
    assert {"lr", "grad_norm", *TIMES} <= records[1].keys()
    again = run(*command)
    assert "finished already: steps 80 to 80" in again.stderr
    assert read_json_lines(out / "metrics.jsonl") == records

    for task in ("knn", "linear"):
        result = run("eval.py", task, "--checkpoint", out / "checkpoint.pt")
        last = json.loads(result.stdout.splitlines()[-1])
        assert last["task"] == task and last["tokens"].keys() == {"class", "mean"}
        assert last["top1"] == last["tokens"][last["token"]] > 0.6      # classes differ in colour
        assert read_json_lines(out / "eval.jsonl")[-1] == last


@pytest.mark.parametrize("cut", [2, 6])    # before the first checkpoint after step 0; after it
def test_a_run_cut_off_and_continued_equals_one_that_was_not(
        small_flags, tmp_path, monkeypatch, no_pictures, cut):
    train.main([*small_flags, "--out", str(tmp_path / "whole")])
    flags = [*small_flags, "--out", str(tmp_path / "cut")]
    log = tmp_path / "cut" / "metrics.jsonl"
    repair = power_cut_at(cut, monkeypatch)
    with pytest.raises(OSError):
        train.main(flags)
    assert read_json_lines(log)[-1]["step"] == cut         # beyond the last checkpoint
    with open(log, "a") as file:
        file.write('{"step": 9, "lo')                      # a line that the power cut halved
    repair()
    train.main(flags)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert len(read_json_lines(log)) == 12 + 4             # steps, and looks


def test_workers_do_not_change_a_run(small_flags, tmp_path, no_pictures):
    for workers in ("0", "2"):
        train.main([*small_flags, "--workers", workers, "--resident-gb", "0", "--epochs", "1",
                    "--out", str(tmp_path / workers)])
    assert_same_run(tmp_path / "0", tmp_path / "2")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pl-mae", "rc-mae"])
def test_compiled_equals_not_compiled(small_flags, tmp_path, no_pictures, recipe):
    """On the CPU, in float64, so that another order of adding up does not show."""
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        train.main([*small_flags, "--precision", "fp64", "--recipe", recipe,
                    "--out", str(tmp_path / name), *more])
    logs = [[r["loss"] for r in read_json_lines(tmp_path / name / "metrics.jsonl") if "loss" in r]
            for name in ("plain", "compiled")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-8) and len(logs[0]) == 12


def test_in_fp16_the_scaler_is_part_of_the_run(small_flags, tmp_path, no_pictures, monkeypatch):
    """Older GPUs compute in fp16, where small gradients would become 0: they are scaled. The scale
    is in the checkpoint, so a run that was cut off goes on as if it had not been."""
    small_flags = [*small_flags, "--epochs", "2"]
    flags = [*small_flags, "--precision", "fp16", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    saved = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert saved["scaler"]["scale"] > 1
    train.main([*small_flags, "--out", str(tmp_path / "plain")])
    assert "scaler" not in torch.load(tmp_path / "plain" / "checkpoint.pt", weights_only=True)
    log = [read_json_lines(tmp_path / name / "metrics.jsonl")[-2]["loss"]
           for name in ("whole", "plain")]
    assert log[0] == pytest.approx(log[1], rel=0.05)

    steps = torch.amp.GradScaler.step
    def step_until(self, optimizer):
        if optimizer.state and next(iter(optimizer.state.values()))["step"] >= 6:
            raise KeyboardInterrupt
        return steps(self, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "step", step_until)
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, str(tmp_path / "cut")])
    train.main([*flags, str(tmp_path / "cut")])
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_keeps_its_precision(small_flags, tmp_path, no_pictures, monkeypatch, capsys):
    """It goes on in the precision it began with, on a processor that is faster in another."""
    flags = [*small_flags, "--precision", "auto", "--epochs", "1", "--out", str(tmp_path / "run")]
    train.main(flags)
    assert "computes in" not in capsys.readouterr().err
    monkeypatch.setattr(devices, "faster_in_bf16", lambda: True)
    train.main(flags)
    assert "computes in fp32, as it began; here bf16 would be faster" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["precision"] == "fp32"
    train.main([*flags[:-1], str(tmp_path / "other")])
    assert json.loads((tmp_path / "other" / "config.json").read_text())["precision"] == "bf16"


def test_a_loss_that_is_no_number_stops_the_run(small_run):
    result = run("train.py", *small_run, "--lr", 1e30, "--clip", 0, ok=False)
    assert result.returncode == 1 and "try a lower --lr" in result.stderr
    assert all(v.isfinite().all() for v in weights(small_run[-1]).values())


# ----------------------------------------------------------------------------- what is refused

def refused(command, capsys, monkeypatch):
    """The one line on stderr of a command that ends with exit code 2, and says nothing else."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.run_main(command)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out
    return captured.err


@pytest.mark.parametrize("flags, words", [
    (["--patch-size", "5"],
     "--patch-size 5 does not divide --img-size 16; these do: 1, 2, 4, 8\n"),
    (["--patch-size", "16"], "--patch-size 16: the whole image is one patch"),
    (["--labelling-half-life", "0.01"], "'0.01' is none: write 1% (of the run) or 30 (steps)"),
    (["--labelling-half-life", "soon"], "'soon' is none: write 1% (of the run) or 30 (steps)"),
    (["--mask-ratio", "1"], "--mask-ratio"),
    (["--mask-ratio", "0.99"], "--mask-ratio"),
    (["--data-root", "/nowhere"], "--data-root /nowhere: there is no such folder"),
    (["--batch-size", "1000", "--image-clusters", "40"],
     "use 65 or less, with --image-clusters 32 or less"),
    (["--batch-size", "15", "--accumulate", "2"], "--batch-size 15: must be a multiple"),
    (["--device", "abacus"], "--device abacus"),
    (["--epochs", "-1"], "--epochs -1"),
    (["--img-size", "wide"], "--img-size: 'wide' is none: write N or HxW"),
    (["--recipe", "cake"], "--recipe"),
    (["--patch", "4"], "--patch"),
    (["--lr", "nan"], "--lr nan"),
    (["--lr", "inf"], "--lr inf"),
    (["--seed", "99999999999999999999999"], "--seed"),
    (["--out", str(Path(__file__) / "below")], "--out"),
    (["--data", "shapes", "--data-root", __file__], "--data-root"),
    (["--data", "fashion-mnist", "--img-size", "28", "--patch-size", "1", "--recipe", "mae"],
     "--patch-size 1: a patch of one number"),
])
def test_bad_input_is_one_line_and_writes_nothing(small_run, flags, words, capsys, monkeypatch):
    error = refused(lambda: train.main(small_run + flags), capsys, monkeypatch)
    assert error.count("\n") == 1 and words in error
    assert not Path(small_run[-1]).exists()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore words"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")])
def test_out_of_memory_is_one_line(small_run, capsys, monkeypatch, no_pictures, error):
    """The last checkpoint stays, and the flags that help are named."""
    def too_large(*args):
        raise error

    monkeypatch.setattr(train, "training_step", too_large)
    words = refused(lambda: train.main(small_run), capsys, monkeypatch).splitlines()[-1]
    assert "error: --batch-size 16:" in words and "--accumulate (now 1)" in words
    assert weights(small_run[-1])


def test_another_error_keeps_its_traceback(small_run, monkeypatch, no_pictures):
    def wrong(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "training_step", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        train.run_main(lambda: train.main(small_run))


def test_other_images_are_refused(small_run, photos, tmp_path, no_pictures):
    train.main([*small_run, "--epochs", "0"])
    shutil.copytree(photos, tmp_path / "fewer")
    (tmp_path / "fewer/train/red/0.png").unlink()
    with pytest.raises(UsageError, match="other images"):
        train.main([*small_run, "--epochs", "0", "--data-root", str(tmp_path / "fewer")])
    shutil.copytree(photos, tmp_path / "swapped")
    shutil.copy(photos / "test/red/0.png", tmp_path / "swapped/train/red/0.png")
    with pytest.raises(UsageError, match="other images"):
        train.main([*small_run, "--epochs", "0", "--data-root", str(tmp_path / "swapped")])


def test_what_comes_next_is_named_and_works(
        small_run, photos, tmp_path, no_pictures, capsys, monkeypatch):
    train.main([*small_run, "--epochs", "0"])
    assert "; next: python eval.py linear --checkpoint" in capsys.readouterr().err
    shutil.copytree(photos / "train", tmp_path / "alone" / "train")
    train.main([*small_run, "--epochs", "1", "--data-root", str(tmp_path / "alone"),
                "--out", str(tmp_path / "run2")])
    printed = capsys.readouterr().err
    assert "; next: python eval.py linear --split validation --checkpoint" in printed
    assert "k-NN on 7 held-out images" in printed
    assert "guessing gives 42.9%" in printed and "warning: 4 optimiser steps in all" in printed
    assert "two views of an image have one image pseudo label in" in printed
    assert "patch pseudo labels agree (0 not at all, 1 entirely) with the place" in printed
    [_, look] = [r for r in read_json_lines(tmp_path / "run2" / "metrics.jsonl") if "knn_mean" in r]
    for name in ("image_two_views", "patch_nmi_place", "patch_nmi_colour", "image_nmi"):
        assert 0 <= look[name] <= 1
    assert "patch_nmi_mask" not in look                    # these images have no masks
    train.main([*small_run, "--epochs", "0", "--data-root", str(photos / "train/red"),
                "--out", str(tmp_path / "run3")])
    printed = capsys.readouterr().err
    flags = ["features", "--split", "train", "--pictures", "--network", "student", "untrained",
             "pixels"]
    assert f"; next: python eval.py {' '.join(flags)} --checkpoint" in printed
    evaluation.main([*flags, "--checkpoint", str(tmp_path / "run3/checkpoint.pt")])
    for name in ("student", "untrained", "pixels"):
        assert (tmp_path / f"run3/neighbours-{name}.png").exists()
    for part, images in (("train", "test/red"), ("test", "train/green")):    # of a test split, too
        shutil.copytree(photos / images, tmp_path / "flat" / part)
    drawn = []
    monkeypatch.setattr("support.report.draw_neighbours", lambda rows, *rest: drawn.extend(rows))
    evaluation.main(["features", "--split", "test", "--pictures", "--data-root",
                     str(tmp_path / "flat"), "--checkpoint", str(tmp_path / "run3/checkpoint.pt")])
    assert drawn and all(name.endswith(".png") for row in drawn for _, (name, _) in row)


def test_another_config_is_refused_and_the_run_left_alone(small_run, no_pictures):
    flags, out = [*small_run, "--epochs", "0"], Path(small_run[-1])
    train.main(flags)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match="lr was 0.001, now 0.1; use another --out .there --init"):
        train.main([*flags, "--lr", "0.1"])
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    train.main([*flags, "--eval-every", "7", "--workers", "1"])      # these may change


def test_help_says_something_of_every_setting(capsys):
    with pytest.raises(SystemExit):
        settings.resolve(["--help"])
    text = "".join(capsys.readouterr().out.split())        # argparse breaks lines where it likes
    for name, field in settings.Config.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in text
        assert "".join(field.metadata["help"].split()) in text
        if field.default is not None:
            assert f"(default:{field.default})" in text


def test_an_error_of_a_worker_is_one_line(capsys):
    """A DataLoader worker hands its error on as a traceback with the class's full name in the last
    line."""
    name = f"{UsageError.__module__}.{UsageError.__qualname__}"
    text = (f"Caught UsageError in DataLoader worker process 0.\nTraceback ...\n{name}: "
            "--data-root: a.png cannot be decoded")
    assert fail(text) == 2
    assert capsys.readouterr().err.endswith(": error: --data-root: a.png cannot be decoded\n")
