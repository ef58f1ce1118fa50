import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import train
from checkpoint import load_checkpoint, save_checkpoint, write_atomically
from utils.command_line import UsageError


def blobs(n, seed=0, classes=3, dim=8):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return 3 * torch.eye(classes, dim)[y] + torch.randn(n, dim, generator=g), y


def test_knn_equals_brute_force():
    (x, y), (test_x, _) = blobs(90), blobs(30, seed=1)
    want = []
    for q in test_x:
        similarity = sorted(((F.cosine_similarity(q, v, dim=0).item(), k.item()) for v, k in zip(x, y)), reverse=True)[:5]
        votes = [sum(torch.tensor(s / 0.07).exp().item() for s, k in similarity if k == c) for c in range(3)]
        want.append(votes.index(max(votes)))
    assert evaluation.knn(x, y, test_x, 3, k=5).tolist() == want
    assert evaluation.knn(x[:2], y[:2], test_x, 3).shape == (30,)                # fewer images than neighbours


def test_linear_separates_what_a_plane_separates():
    (x, y), (test_x, test_y) = blobs(600), blobs(300, seed=1)
    scores = [evaluation.accuracy(p, test_y) for p in evaluation.linear(x, y, test_x, 3, epochs=10)]
    assert max(scores) > 0.95 and len(scores) == len(evaluation.LINEAR_RATES)
    alone = evaluation.linear(x, y, test_x, 3, rates=evaluation.LINEAR_RATES[1:2], epochs=10)
    both = evaluation.linear(x, y, test_x, 3, epochs=10)[1]
    assert torch.equal(alone[0], both)                     # heads trained side by side do not touch each other


@pytest.fixture
def untrained(small_run):
    train.main([str(f) for f in small_run] + ["--epochs", "0"])
    return small_run[-1] / "checkpoint.pt"


@pytest.mark.parametrize("network, tokens", [("student", {"class", "mean"}), ("untrained", {"class", "mean"}), ("pixels", {"pixels"})])
def test_networks(untrained, capsys, network, tokens):
    evaluation.main(["knn", "--checkpoint", str(untrained), "--network", network, "--device", "cpu"])
    record = evaluation.json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["tokens"].keys() == tokens and record["network"] == network and record["test_images"] == 18


def test_the_yardstick_untrained_is_the_network_before_its_training(small_run):
    train.main([str(f) for f in small_run] + ["--epochs", "0", "--seed", "3"])
    networks = [evaluation.load_network(SimpleNamespace(checkpoint=str(small_run[-1] / "checkpoint.pt"), network=name, num_heads=None))[0]
                for name in ("student", "untrained")]
    assert all(torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in networks)))


def refused(capsys, monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["eval.py"])
    with pytest.raises(SystemExit) as stop:
        evaluation.run_main(lambda: evaluation.main([str(f) for f in flags]))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1
    return captured.err


def test_bad_input(untrained, photos, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    assert "no such file" in refused(capsys, monkeypatch, "knn", "--checkpoint", tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert "not a checkpoint" in refused(capsys, monkeypatch, "knn", "--checkpoint", tmp_path / "text.pt")
    (tmp_path / "empty.pt").touch()
    assert "not a checkpoint" in refused(capsys, monkeypatch, "knn", "--checkpoint", tmp_path / "empty.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "no vision transformer" in refused(capsys, monkeypatch, "knn", "--checkpoint", tmp_path / "tensor.pt")
    assert "--device" in refused(capsys, monkeypatch, "knn", "--checkpoint", untrained, "--device", "abacus")
    assert "--token" in refused(capsys, monkeypatch, "knn", "--checkpoint", untrained, "--network", "pixels", "--token", "class")
    assert "invalid choice" in refused(capsys, monkeypatch, "dance", "--checkpoint", untrained)
    torch.save(torch.load(untrained)["model"], tmp_path / "bare.pt")
    bare = ["knn", "--checkpoint", tmp_path / "bare.pt", "--num-heads", 3]
    assert "--data" in refused(capsys, monkeypatch, *bare)
    assert "--network untrained" in refused(capsys, monkeypatch, *bare, "--network", "untrained")
    assert "--num-heads 5" in refused(capsys, monkeypatch, *bare[:-1], 5)
    shutil.copytree(photos, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "test" / "red")
    words = refused(capsys, monkeypatch, "knn", "--checkpoint", untrained, "--data-root", tmp_path / "fewer")
    assert "3 classes to train on and 2 to test on" in words and "red" in words
    assert not (untrained.parent / "eval.jsonl").exists()


def test_others_weights_can_be_judged(untrained, photos, tmp_path, capsys):
    torch.save(torch.load(untrained)["model"], tmp_path / "bare.pt")
    evaluation.main(["knn", "--checkpoint", str(tmp_path / "bare.pt"), "--data", "imagefolder", "--data-root", str(photos),
                     "--num-heads", "3", "--device", "cpu"])
    assert evaluation.json.loads(capsys.readouterr().out)["top1"] > 0.5


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, dict(step=1))

    def broken(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomically(path, broken)
    assert load_checkpoint(path) == dict(step=1) and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)
    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(UsageError, match="safely"):
        load_checkpoint(tmp_path / "evil.pt")


def test_diagnose(small_run, capsys):
    """Of a finished run: features and labels in numbers; a teacher that copied the student agrees with it entirely."""
    train.main([str(f) for f in small_run] + ["--labelling-half-life", "0", "--reconstruction-half-life", "20"])
    for network in ("student", "labelling-teacher", "reconstruction-teacher"):
        capsys.readouterr()
        evaluation.main(["diagnose", "--checkpoint", str(small_run[-1] / "checkpoint.pt"), "--network", network, "--device", "cpu"])
        record = evaluation.json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["task"] == "diagnose" and record["network"] == network and record["images"] == 7
        assert record["student_vs_labelling-teacher_class"] == pytest.approx(1) and record["class_student_agrees"] == 1
        assert record["student_vs_reconstruction-teacher_class"] < 1
        assert 0 <= record["class_entropy"] <= record["class_ln_k"] and 0 <= record["data_nmi_position"] <= 1
        assert 1 <= record["effective_rank_class"] <= 7 and 0 <= record["class_matched_accuracy"] <= 1


def test_effective_rank_and_spread():
    x = torch.randn(400, 16)
    x[:, 4:] = 0
    assert 3.5 < evaluation.effective_rank(x) <= 4
    assert evaluation.spread(torch.randn(2000, 16)) == pytest.approx(1, abs=0.02)
    assert evaluation.spread(torch.ones(50, 16) + 1e-4 * torch.randn(50, 16)) < 0.01


def test_networks_that_are_not_there(small_run, photos, capsys, monkeypatch):
    train.main([str(f) for f in small_run] + ["--epochs", "0", "--recipe", "mae"])
    path = small_run[-1] / "checkpoint.pt"
    capsys.readouterr()
    assert "it has student, reconstruction-teacher" in refused(capsys, monkeypatch, "knn", "--checkpoint", path, "--network", "labelling-teacher")
    assert "has no labels" in refused(capsys, monkeypatch, "diagnose", "--checkpoint", path, "--network", "pixels")
    torch.save(torch.load(path)["model"], path.parent / "bare.pt")
    assert "not of train.py" in refused(capsys, monkeypatch, "diagnose", "--checkpoint", path.parent / "bare.pt", "--num-heads", 3,
                                        "--data", "imagefolder", "--data-root", photos)


def test_rc_mae_is_judged_by_its_teacher(small_run, capsys):
    train.main([str(f) for f in small_run] + ["--epochs", "0", "--recipe", "rc-mae"])
    capsys.readouterr()
    evaluation.main(["knn", "--checkpoint", str(small_run[-1] / "checkpoint.pt"), "--device", "cpu"])
    assert evaluation.json.loads(capsys.readouterr().out)["network"] == "reconstruction-teacher"
