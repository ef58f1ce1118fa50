"""docs/course.md: its sessions fit, the changes that it shows can be made, and a run with them
ends."""

import re
import shutil
import subprocess
import sys

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


def test_four_sessions_fit():
    """Into 75 minutes, with ten to spare."""
    sessions = re.findall(r"^## Session \d.*?(?=^## )", TEXT, re.DOTALL | re.MULTILINE)
    assert len(sessions) == 4
    for session in sessions:
        assert sum(map(int, re.findall(r"^\| (\d+) \|", session, re.MULTILINE))) <= 65


def test_answers_are_folded():
    """Students read this page, too: what follows the heading for the lecturer stands in
    <details>."""
    before, after = TEXT.split("## For the lecturer\n")
    assert "<details>" not in before
    assert after.count("<details>") == after.count("</details>") == 5


def test_there_are_two_short_ones():
    assert len(CHANGES) == 2
    for _, _, diff in CHANGES:
        assert sum(line[:1] in "+-" for line in diff.splitlines()) < 20


@pytest.mark.parametrize("command, file, diff", CHANGES)
def test_fits(command, file, diff):
    compile(changed(file, diff), file, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("command, file, diff", CHANGES)
def test_trains(command, file, diff, tmp_path, small_flags):
    for path in (*ROOT.glob("*.py"), ROOT / "support"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    (tmp_path / file).write_text(changed(file, diff))
    found = subprocess.run([sys.executable, *command.split()[1:], *small_flags], cwd=tmp_path,
                           capture_output=True, text=True)
    assert found.returncode == 0 and "done: " in found.stderr, found.stderr
