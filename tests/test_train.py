import json
import shutil
from pathlib import Path

import pytest

import train
from checkpoint import read_json_lines
from conftest import run, same, weights
from extras.command_line import UsageError, fail


def test_learning_rate_at_both_ends():
    config = train.Config(lr=2.0, warmup=0.1)
    assert train.learning_rate(0, 1000, config) == 0 and train.learning_rate(50, 1000, config) == pytest.approx(1.0)
    assert train.learning_rate(100, 1000, config) == 2.0 and train.learning_rate(550, 1000, config) == pytest.approx(1.0)
    assert 0 < train.learning_rate(999, 1000, config) < 1e-4
    assert train.learning_rate(0, 1000, train.Config(lr=2.0, warmup=0.0)) == 2.0


def test_only_matrices_decay():
    model = train.Student(**train.SIZES["micro"], img_size=32, patch_size=8)
    decayed, rest = (g["params"] for g in train.parameter_groups(model, 0.1))
    assert all(p.ndim >= 2 for p in decayed) and not any(p is model.cls_token or p is model.mask_token for p in decayed)
    assert any(p is model.patch_embed.proj.weight for p in decayed) and any(p is model.norm.weight for p in rest)
    assert len(decayed) + len(rest) == sum(p.requires_grad for p in model.parameters())


def test_flags_go_before_the_recipe(monkeypatch):
    monkeypatch.setitem(train.RECIPES, "mae", dict(mask_ratio=0.5, lr=3.0))
    config = train.parse(["--recipe", "mae", "--lr", "2", "--img-size", "16x24", "--patch-size", "8", "--no-norm-pix-loss"])
    assert (config.lr, config.mask_ratio, config.img_size, config.patch_size, config.norm_pix_loss) == (2.0, 0.5, [16, 24], 8, False)


def test_run_learns_and_writes_its_files(small_run):
    out = small_run[-1]
    run("train.py", *small_run, "--epochs", 20, "--eval-every", 10, "--model", "micro", "--colours", 1, "--recipe", "mae")
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt", "curves.png", "reconstructions.png"}
    records = read_json_lines(out / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 80 and losses[-1] < 0.9 * losses[0]
    assert [r["step"] for r in records if "knn_mean" in r] == [0, 40, 80]
    assert {"lr", "grad_norm", "images_per_s", "data_wait", "eta_s"} <= records[1].keys()
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == "mae" and len(config["mean"]) == 3
    again = run("train.py", *small_run, "--epochs", 20, "--eval-every", 10, "--model", "micro", "--colours", 1, "--recipe", "mae")
    assert "finished already: steps 80 to 80" in again.stderr and read_json_lines(out / "metrics.jsonl") == records

    for task in ("knn", "linear"):
        last = json.loads(run("eval.py", task, "--checkpoint", out / "checkpoint.pt").stdout.splitlines()[-1])
        assert last["task"] == task and last["tokens"].keys() == {"class", "mean"} and last["top1"] == last["tokens"][last["token"]]
        assert last["top1"] > 0.6                          # three classes that differ in colour
        assert read_json_lines(out / "eval.jsonl")[-1] == last


@pytest.mark.parametrize("cut", [2, 6])                    # before the first checkpoint but that of step 0, and after it
def test_a_run_cut_off_and_continued_equals_one_that_was_not(small_run, tmp_path, monkeypatch, cut):
    flags = [str(f) for f in small_run[:-1]]
    train.main(flags + [str(tmp_path / "whole")])
    rate = train.learning_rate

    def power_cut(step, *args):
        if step == cut:
            raise OSError("power cut")
        return rate(step, *args)

    monkeypatch.setattr(train, "learning_rate", power_cut)
    with pytest.raises(OSError):
        train.main(flags + [str(tmp_path / "cut")])
    assert read_json_lines(tmp_path / "cut" / "metrics.jsonl")[-1]["step"] == cut        # beyond the last checkpoint
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')                      # a line that the power cut halved
    monkeypatch.setattr(train, "learning_rate", rate)
    train.main(flags + [str(tmp_path / "cut")])
    assert same(tmp_path / "whole", tmp_path / "cut") == 12 + 4


def test_workers_do_not_change_a_run(small_run, tmp_path):
    for workers in (0, 2):
        train.main([str(f) for f in [*small_run[:-1], tmp_path / str(workers), "--workers", workers, "--resident-gb", 0, "--epochs", 1]])
    same(tmp_path / "0", tmp_path / "2")


def test_two_processes_equal_one(small_run, tmp_path):
    """Same global batch, float64, 20 steps; the two processes also compute each step in two micro-batches."""
    flags = [*small_run[:-1], tmp_path / "one", "--precision", "fp64", "--epochs", 5, "--eval-every", 5, "--colours", 1, "--recipe", "mae"]
    run("train.py", *flags)
    flags[flags.index(tmp_path / "one")] = tmp_path / "two"
    run("train.py", *flags, "--accumulate", 2, processes=2)
    assert same(tmp_path / "one", tmp_path / "two", exact=False) == 20 + 2


@pytest.mark.parametrize("flags, words", [
    (["--patch-size", "5"], "--patch-size 5 does not divide --img-size 16; these do: 1, 2, 4, 8, 16"),
    (["--mask-ratio", "1"], "--mask-ratio"),
    (["--mask-ratio", "0.99"], "--mask-ratio"),
    (["--data-root", "/nowhere"], "--data-root /nowhere: there is no such folder"),
    (["--batch-size", "1000"], "use 65 or less"),
    (["--batch-size", "15", "--accumulate", "2"], "--batch-size 15: must be a multiple"),
    (["--device", "abacus"], "--device abacus"),
    (["--epochs", "-1"], "--epochs -1"),
    (["--img-size", "wide"], "--img-size"),
    (["--recipe", "cake"], "--recipe"),
    (["--patch", "4"], "--patch"),
    (["--lr", "nan"], "--lr nan"),
    (["--lr", "inf"], "--lr inf"),
    (["--seed", "99999999999999999999999"], "--seed"),
    (["--out", str(Path(__file__) / "below")], "--out"),
    (["--data", "shapes", "--data-root", __file__], "--data-root"),
    (["--data", "fashion-mnist", "--img-size", "28", "--patch-size", "1", "--data-root", __file__], "--data-root"),
])
def test_bad_input_is_one_line_and_writes_nothing(small_run, flags, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        train.run_main(lambda: train.main([str(f) for f in small_run] + flags))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and words in captured.err and not captured.out
    assert not small_run[-1].exists()


def test_other_images_are_refused(small_run, photos, tmp_path):
    train.main([str(f) for f in small_run] + ["--epochs", "0"])
    shutil.copytree(photos, tmp_path / "other")
    (tmp_path / "other/train/red/0.png").unlink()
    with pytest.raises(UsageError, match="other images"):
        train.main([str(f) for f in small_run] + ["--epochs", "0", "--data-root", str(tmp_path / "other")])


def test_another_config_is_refused_and_the_run_left_alone(small_run):
    flags = [str(f) for f in small_run] + ["--epochs", "0"]
    train.main(flags)
    before = {p.name: p.read_bytes() for p in small_run[-1].iterdir()}
    with pytest.raises(UsageError, match="lr was 0.001, now 0.1"):
        train.main(flags + ["--lr", "0.1"])
    assert before == {p.name: p.read_bytes() for p in small_run[-1].iterdir()}
    train.main(flags + ["--eval-every", "7", "--workers", "1"])                          # these may change


def test_a_loss_that_is_no_number_stops_the_run(small_run):
    result = run("train.py", *small_run, "--lr", 1e30, "--clip", 0, ok=False)
    assert result.returncode == 1 and "try a lower --lr" in result.stderr
    assert all(v.isfinite().all() for v in weights(small_run[-1] / "checkpoint.pt").values())


def test_help_documents_every_field():
    text = run("train.py", "--help").stdout
    assert all("--" + f.replace("_", "-") in text for f in train.Config.__dataclass_fields__)


def test_an_error_of_a_worker_is_one_line(capsys):
    """A DataLoader worker hands its error on as a traceback with the class's full name in the last line."""
    name = f"{UsageError.__module__}.{UsageError.__qualname__}"
    assert fail(f"Caught UsageError in DataLoader worker process 0.\nTraceback ...\n{name}: --data-root: a.png cannot be decoded") == 2
    assert capsys.readouterr().err.endswith(": error: --data-root: a.png cannot be decoded\n")
