"""docs/course.md: the changes that it shows can be made, and a run with them ends."""

import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

TEXT = (ROOT / "docs" / "course.md").read_text()
CHANGES = re.findall(r"then `(python train.py [^`]+)`.*?```diff\n--- (\S+)\n(.*?)```", TEXT,
                     re.DOTALL)                # command, file, diff


def changed(file, diff):
    """The source of a file after the changes: each part of a diff stands in it once."""
    source = (ROOT / file).read_text()
    for part in diff.split("...\n"):
        lines = part.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def test_there_are_three_short_ones():
    assert len(CHANGES) == 3
    for _, _, diff in CHANGES:
        assert sum(line[:1] in "+-" for line in diff.splitlines()) < 20


@pytest.mark.parametrize("command, file, diff", CHANGES)
def test_fits(command, file, diff):
    compile(changed(file, diff), file, "exec")


def write_kmnist(root):
    """64 images of noise, in the files that torchvision keeps of KMNIST."""
    folder = root / "KMNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        head = struct.pack(">IIII", 2051, 64, 28, 28)
        pixels = np.random.default_rng(0).integers(0, 256, 64 * 28 * 28, np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = bytes(i % 10 for i in range(64))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 64) + labels)


@pytest.mark.slow
@pytest.mark.parametrize("command, file, diff", CHANGES)
def test_trains(command, file, diff, tmp_path, small_flags):
    for path in (*ROOT.glob("*.py"), ROOT / "support"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    (tmp_path / file).write_text(changed(file, diff))
    flags = small_flags
    if "kmnist" in command:
        write_kmnist(tmp_path / "data")
        flags = ["--batch-size", "16", "--image-clusters", "8"]
    found = subprocess.run([sys.executable, *command.split()[1:], *flags], cwd=tmp_path,
                           capture_output=True, text=True)
    assert found.returncode == 0 and "done: " in found.stderr, found.stderr
