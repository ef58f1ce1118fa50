import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)                                   # on tiny tensors a second thread costs more than it brings
sys.path.insert(0, str(ROOT))

from checkpoint import read_json_lines

TOY = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16,
           decoder_depth=1, decoder_num_heads=2)


def run(*args, processes=None, ok=True, **kwargs):
    """Run `train.py ...` or `eval.py ...` as a user would, in a process of its own; under torchrun with `processes`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    result = subprocess.run([sys.executable, *launcher, str(ROOT / args[0]), *map(str, args[1:])], capture_output=True,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240, **kwargs)
    assert not ok or result.returncode == 0, result.stderr
    return result


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)                                   # a test draws the same numbers alone and among others


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An image folder of 3 classes (hue of a gradient), 24 + 6 PNG files of various sizes each, 16 pixels at least."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for k, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                h, w = rng.integers(16, 30, 2)
                picture = rng.integers(0, 90, (h, w, 3)) + np.linspace(0, 60, w).astype(int)[None, :, None]
                picture[..., 2 - k] += 100
                Image.fromarray(picture.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def small_run(photos, tmp_path):
    """Flags of a run of a few seconds: 65 of 72 images, patches of 4 x 4 of 16 x 16 pixels, 4 steps an epoch."""
    return ["--data", "imagefolder", "--data-root", photos, "--img-size", 16, "--patch-size", 4, "--batch-size", 16,
            "--class-clusters", 4, "--data-clusters", 16, "--epochs", 3, "--eval-every", 1, "--log-every", 1, "--device", "cpu", "--out", tmp_path / "run"]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b, exact=True):
    """Two runs: the same log (but for times) and the same weights."""
    logs = [[{k: v for k, v in r.items() if k not in ("images_per_s", "data_wait", "eta_s")}
             for r in read_json_lines(out / "metrics.jsonl")] for out in (a, b)]
    states = [weights(out / "checkpoint.pt") for out in (a, b)]
    if exact:
        assert logs[0] == logs[1] and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    else:
        for x, y in zip(*logs, strict=True):
            assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), abs=1e-8)
        assert max((v - states[1][k]).abs().max().item() for k, v in states[0].items()) < 1e-8
    return len(logs[0])
