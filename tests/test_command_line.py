"""Paths as people type them; and what is said where the machine lacks something."""

import errno
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY_SIZE, run

import eval
import train
from extras import compare, exercise, finetune
from mae import SIZES
from support import command_line, files, settings
from support.checkpoint import save_checkpoint
from support.command_line import UsageError, run_main, what_ran_out
from support.files import append_json, read_json, read_json_lines, write_atomically


def test_a_name_with_a_line_break_leaves_a_message_whole():
    assert str(UsageError("--data-root: a\nb.png is empty")) == "--data-root: a b.png is empty"


# ------------------------------------------------------------------------------------------- paths

@pytest.mark.parametrize("text, want", [
    ("~/runs/x", "HOME/runs/x"), ("~", "HOME"), ("a b/Fußgänger", "a b/Fußgänger"),
    ("runs\\x\\checkpoint.pt", "runs/x/checkpoint.pt"), ("./~x", "./~x")])
def test_a_path_is_what_people_mean(text, want, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert command_line.path(text) == want.replace("HOME", "/home/someone")


@pytest.mark.parametrize("text, words", [("", "is empty"), (" ", "is empty"),
                                         ("~nobody-here/x", "nobody here has this name")])
def test_a_path_that_cannot_be_is_one_line(text, words, capsys):
    for name in ("--out", "--data-root", "--init"):
        with pytest.raises(SystemExit) as stop:
            settings.resolve([f"{name}={text}"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and words in said and name in said
        assert len(said.splitlines()) == 1


def test_a_file_with_a_backslash_in_its_name_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a\\b").touch()
    assert command_line.path("a\\b") == "a\\b"


def test_the_home_folder_in_each_flag(photos, small_flags, tmp_path, monkeypatch, no_pictures):
    home, elsewhere = tmp_path / "Übung eins", tmp_path / "else where"
    elsewhere.mkdir()
    shutil.copytree(photos, home / "photos")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    monkeypatch.setitem(SIZES, "micro", TOY_SIZE)
    flags = [*small_flags, "--data-root=~/photos", "--epochs", "1"]
    train.main([*flags, "--out=~/run"])
    train.main([*flags, "--out=~/second", "--init=~/run/checkpoint.pt"])
    eval.main(["knn", "--checkpoint=~/run/checkpoint.pt", "--data-root=~/photos"])
    eval.main(["features", "--checkpoint=~/run/checkpoint.pt", "--out=~/f.npz"])
    eval.main(["lowshot", "--checkpoint=~/run/checkpoint.pt", "--draws", "1", "--plot=~/few.png"])
    finetune.main(["--checkpoint=~/run/checkpoint.pt", "--data-root=~/photos", "--epochs", "1",
                   "--batch-size", "16", "--device", "cpu", "--out=~/tuned"])
    compare.main(["~/run", "~/second", "--out=~/compare.png"])
    exercise.main(["sinkhorn", "--out=~/exercise"])
    for name in ("f.npz", "few.png", "tuned/result.json", "compare.png", "exercise/train.py"):
        assert (home / name).is_file()
    assert list(elsewhere.iterdir()) == []


def test_programs_run_as_files(tmp_path):
    """One of each folder is tried, from another one; of all the lines are there, in this order."""
    for program in ("extras/finetune.py", "results/tables.py"):
        assert "usage" in run(program, "--help", cwd=tmp_path).stdout
    for path in [*(ROOT / "extras").glob("*.py"), *(ROOT / "results").glob("*.py")]:
        text = path.read_text("utf-8")
        if "run_main(main)" in text:
            own = min(text.find(f"\n{words}") % len(text) for words in (
                "from support", "from extras", "import eval"))
            assert -1 < text.find("\nsys.path.insert(0, ") < own, path


# ----------------------------------------------------------------------------------- what runs out

def line_of(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "No space left on device", "/nowhere/x.pt"), "/nowhere/x.pt: No space"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "MB are free); make room"),
    (OSError(errno.EMFILE, "Too many open files", "/x"), "ulimit -n"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied; see who"),
    (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only"),
    (OSError(errno.EIO, "Input/output error", "/x"), "the disk or its connection fails"),
    (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on "
                  "device (28)"), "--shm-size"),
    (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"),
     "--shm-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."), "use --workers 0"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "fewer --workers"),
    (RuntimeError("Caught OSError in DataLoader worker process 0.\nTraceback\nOSError: [Errno 24] "
                  "Too many open files"), "ulimit -n"),
    (MemoryError(), "the memory is too small"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "smaller --batch-size"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
     "another --device"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "the memory is too small"),
])
def test_what_runs_out_is_one_line_with_the_remedy(error, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    assert words in line_of(error, capsys)


def test_a_bug_shows_its_traceback():
    for error in (KeyError("x"), RuntimeError("shapes differ"), ValueError("no")):
        assert what_ran_out(error) is None


class Full(io.BytesIO):
    """A temporary file on a disk with room for 1,000 bytes."""
    name = None

    def write(self, data):
        if self.tell() + len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("how", ["bytes", "torch", "flush"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(how, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def temporary(dir, prefix, delete):
        file = Full()
        file.name = str(tmp_path / f"{prefix}x")
        Path(file.name).touch()
        return file
    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", temporary)
    if how == "flush":
        monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(
            OSError(errno.ENOSPC, "No space left on device")))
        monkeypatch.setattr(Full, "fileno", lambda self: 0, raising=False)
    content = {"step": 2, "weights": torch.zeros(10_000)}
    with pytest.raises((OSError, RuntimeError)) as error:
        if how == "torch":
            save_checkpoint(path, content)
        else:
            write_atomically(path, lambda file: file.write(bytes(10 if how == "flush" else 2000)))
    assert what_ran_out(error.value).startswith(f"{path}: No space left on device (")
    assert torch.load(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_line_of_the_log_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    append_json(path, {"step": 1})

    class Half(io.FileIO):                                 # writes three bytes, then no more
        def write(self, data):
            if len(data) < 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:3])
    monkeypatch.setattr(files, "open", lambda path, mode, buffering: Half(path, mode),
                        raising=False)
    with pytest.raises(OSError) as error:
        append_json(path, {"step": 2})
    assert what_ran_out(error.value).startswith(str(path))
    monkeypatch.undo()
    append_json(path, {"step": 3})
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("text", ["{", "[1, 2]", "7", "\xff"])
def test_json_that_is_none_is_one_line(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="config.json: "):
        read_json(path)
    path.write_bytes(b'{"step": 1}\n' + text.encode("latin-1") + b"\n")
    with pytest.raises(UsageError, match="config.json, line 2: "):
        read_json_lines(path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no such folder here")
def test_a_full_shared_memory_is_one_line(small_flags, tmp_path):
    """In a namespace of its own, where that is allowed, with 64 kB."""
    flags = [*small_flags, "--resident-gb", "0", "--workers", "1", "--img-size", "64",
             "--patch-size", "16", "--out", str(tmp_path / "run")]
    words = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "
             f"{sys.executable} {ROOT}/train.py {' '.join(flags)}"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=240)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if found.returncode in (1, 32) and "mount" in found.stderr + found.stdout or (
            "unshare" in found.stderr):
        pytest.skip("not allowed here")
    assert found.returncode == 2 and "--shm-size 8g" in found.stderr
    assert "Traceback" not in found.stderr
