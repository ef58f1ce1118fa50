import torch
import torch.nn.functional as F

from extras import real_images

SMALL = ["--img-size", "16", "--patch-size", "4", "--batch-size", "16", "--epochs", "1",
         "--device", "cpu"]


def test_attention_is_torchs():
    q, k, v = torch.randn(3, 2, 3, 17, 8, dtype=torch.float64)
    ours = real_images.attention(q, k, v)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v))


def test_trains_judges_and_prints(photos, tmp_path, monkeypatch, capsys):
    for folder in ("data", "docs", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "photos").symlink_to(photos)
    runs = {
        "mae": ["--recipe", "mae", *SMALL],
        "mim-cluster": ["--recipe", "mim-cluster", "--image-clusters", "4",
                        "--patch-clusters", "16", *SMALL],
    }
    monkeypatch.setattr(real_images, "RESULTS", tmp_path / "results" / "results.jsonl")
    monkeypatch.setattr(real_images, "SETS", {"photos": ["--data", "imagefolder"]})
    monkeypatch.setattr(real_images, "RUNS", runs)
    # `main` replaces torch's attention; this puts it back after the test.
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)

    flags = [str(tmp_path / "data"), str(tmp_path / "runs"), "--sets", "photos",
             "--runs", "mae", "mim-cluster", "pixels", "untrained"]
    real_images.main(flags)
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| photos |")]
    assert [row.split(" | ")[1] for row in rows] == ["pixels", "untrained", "mae", "mim-cluster"]

    real_images.main(flags)                                             # nothing is done twice
    assert capsys.readouterr().out.splitlines()[2:] == rows

    real_images.main(["--table"])
    assert (tmp_path / "docs" / "real-images.png").stat().st_size > 10_000


def test_the_flags_of_all_runs_are_valid():
    for flags in real_images.SETS.values():
        for name, run in real_images.RUNS.items():
            config = real_images.train.resolve([*flags, *run])
            assert config.batch_size * config.views == 256, name
            assert config.epochs * config.views == 40, name
