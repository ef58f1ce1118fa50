"""Exercises: their tests fail without the function, and pass with it."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from extras import exercise
from support.command_line import UsageError


def run_tests(folder, name):
    """pytest, as the exercise says -> numbers of tests that failed and that passed, the output."""
    found = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                            *exercise.command(name)], cwd=folder, capture_output=True, text=True)
    numbers = {word: int(n) for n, word in re.findall(r"(\d+) (failed|passed)", found.stdout)}
    return numbers.get("failed", 0), numbers.get("passed", 0), found.stdout


@pytest.mark.parametrize("name", [
    each if each == "sinkhorn" else pytest.param(each, marks=pytest.mark.slow)
    for each in exercise.EXERCISES])
def test_an_exercise_marks_itself(name, tmp_path, capsys):
    exercise.main([name, "--out", str(tmp_path / "copy")])
    assert exercise.command(name)[0] in capsys.readouterr().out
    failed, passed, output = run_tests(tmp_path / "copy", name)
    assert failed and not passed and output.count("NotImplementedError: your turn") >= failed
    file = exercise.EXERCISES[name].file
    (tmp_path / "copy" / file).write_text((ROOT / file).read_text())
    failed, passed, output = run_tests(tmp_path / "copy", name)
    assert passed and not failed, output


@pytest.mark.parametrize("name", exercise.EXERCISES)
def test_only_the_body_is_gone(name):
    source = (ROOT / exercise.EXERCISES[name].file).read_text()
    blank = exercise.without_body(source, name)
    head, tail = blank.split(f"    {exercise.BODY}\n")
    assert source.startswith(head) and source.endswith(tail)
    assert head.rstrip().endswith('"""') and f"def {name}(" in head
    compile(blank, name, "exec")
    body = source.removeprefix(head).removesuffix(tail)
    assert body.strip() and "def " not in body.replace("def closure", "")


def test_two_can_be_open_at_once(tmp_path, monkeypatch, capsys):
    """Each has a folder of its own name."""
    monkeypatch.chdir(tmp_path)
    for name in ("koleo", "momentum"):
        exercise.main([name])
        assert f"cd exercise/{name} &&" in capsys.readouterr().out
        file = tmp_path / "exercise" / name / exercise.EXERCISES[name].file
        assert exercise.BODY in file.read_text()


def test_what_was_written_is_not_lost(tmp_path):
    (tmp_path / "copy").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        exercise.main(["koleo", "--out", str(tmp_path / "copy")])
