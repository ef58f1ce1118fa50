import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
from support import devices, report  # noqa: E402
from support.datasets import Images  # noqa: E402

torch.set_num_threads(1)                   # on tiny tensors a second thread costs more
# The first backward decides whether there are threads for GPUs, and a process that has them cannot
# be forked (test_life.py). So it comes before a GPU is played (test_devices.py).
torch.zeros(1, requires_grad=True).sum().backward()

TOY = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=32, depth=2, num_heads=2,
           decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
TOY_SIZE = {name: TOY[name] for name in TOY if name not in ("img_size", "patch_size", "in_chans")}
TIMES = ("images_per_s", "data_wait", "eta_s")             # keys of the log that differ every time


def run(*args, processes=None, ok=True, **kwargs):
    """Run `train.py ...`, `eval.py ...` or `extras.finetune ...` as a user would, in a process of
    its own; under torchrun with `processes`."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    if args[0].startswith(("extras.", "results.")):                      # which are run as modules
        command += ["-m", *map(str, args)]
    else:
        command += [str(ROOT / args[0]), *map(str, args[1:])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)
    assert not ok or result.returncode == 0, result.stderr
    return result


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)                   # a test draws the same numbers alone and among others


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch):
    """A processor that gains nothing by bf16, so that tests compute alike on all."""
    monkeypatch.setattr(devices, "faster_in_bf16", lambda: False)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An image folder of 3 classes (hue of a gradient), 24 + 6 PNG files each, of various sizes
    from 16 pixels on."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for number, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                h, w = rng.integers(16, 30, 2)
                gradient = np.linspace(0, 60, w).astype(int)[None, :, None]
                picture = rng.integers(0, 90, (h, w, 3)) + gradient
                picture[..., 2 - number] += 100
                Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def small_flags(photos):
    """Flags of a run of a few seconds: 65 of 72 images of 16 x 16 pixels, patches of 4 x 4, 4 steps
    an epoch."""
    return ["--data", "imagefolder", "--data-root", str(photos), "--img-size", "16",
            "--patch-size", "4", "--batch-size", "16", "--image-clusters", "4",
            "--patch-clusters", "16", "--epochs", "3", "--eval-every", "1", "--log-every", "1",
            "--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def small_run(small_flags, tmp_path):
    """The same, with the folder of the run as the last word."""
    return [*small_flags, "--out", str(tmp_path / "run")]


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs that are not about pictures draw none: most of a small run's time is matplotlib's."""
    for name in ("curves", "draw_rows", "clusters"):
        monkeypatch.setattr(report, name, lambda *args: None)


# ------------------------------------------------------------------------------ images in memory

MEAN, STD = [0.5, 0.4, 0.6], [0.2, 0.3, 0.25]


def some_images(n, y=None, classes=()):
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)
    y = torch.full((n,), -1) if y is None else y
    return Images(y, list(classes), (16, 16), 3, pixels)


def inputs(images, ids, dtype=torch.float64):
    """What a network should see of the images at ids."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return ((images.pixels[ids] / 255 - mean) / std).to(dtype)


def record_of(capsys, *flags):
    """What eval.py prints last."""
    capsys.readouterr()
    evaluation.main([*map(str, flags), "--device", "cpu"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])
