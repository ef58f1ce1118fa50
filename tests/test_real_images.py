import torch
import torch.nn.functional as F

from extras import real_images


def test_attention_is_torchs():
    q, k, v = torch.randn(3, 2, 3, 17, 8, dtype=torch.float64)
    torch.testing.assert_close(real_images.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_trains_judges_and_prints(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "photos").symlink_to(photos)
    small = ["--img-size", "16", "--patch-size", "4", "--batch-size", "16", "--epochs", "1", "--device", "cpu"]
    (tmp_path / "docs").mkdir(), (tmp_path / "results").mkdir()
    monkeypatch.setattr(real_images, "RESULTS", tmp_path / "results" / "results.jsonl")
    monkeypatch.setattr(real_images, "SETS", {"photos": ["--data", "imagefolder"]})
    monkeypatch.setattr(real_images, "RUNS", {"mae": ["--recipe", "mae", *small], "mim-cluster": [
        "--recipe", "mim-cluster", "--class-clusters", "4", "--data-clusters", "16", *small]})
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)        # put back after the test
    flags = [str(tmp_path / "data"), str(tmp_path / "runs"), "--sets", "photos", "--runs", "mae", "mim-cluster", "pixels", "untrained"]
    real_images.main(flags)
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| photos |")]
    assert [row.split(" | ")[1] for row in rows] == ["pixels", "untrained", "mae", "mim-cluster"]
    real_images.main(flags)                                # nothing is done twice
    assert [row for row in capsys.readouterr().out.splitlines() if row] [2:] == rows
    real_images.main(["--table"])
    assert (tmp_path / "docs" / "real-images.png").stat().st_size > 10_000
