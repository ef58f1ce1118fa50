"""The life of a run: one process a folder, an end when it is told, checkpoints that are checked, and
the same run wherever it is killed.

Runs are forked from this process, which has torch loaded: a hundred of them would otherwise spend
their time with imports."""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TIMES, TOY_SIZE, run

import train
from extras import finetune
from mae import SIZES
from support import checkpoint, devices, life, report
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command_line import UsageError, run_main
from support.files import read_json_lines, write_atomically

# The lines at which a run may be killed are those of these files: the loop, saving, the log.
TRACED = {str(ROOT / name) for name in (
    "train.py", "teachers.py", "support/checkpoint.py", "support/files.py", "support/life.py",
    "support/report.py", "extras/tuning.py")}


@pytest.fixture(autouse=True)
def quick(no_pictures, monkeypatch):
    """Small networks, no pictures, no look: what is tested is what comes between."""
    monkeypatch.setitem(SIZES, "micro", TOY_SIZE)
    monkeypatch.setattr(report, "monitor", lambda *args: {})
    monkeypatch.setattr(report, "agreements", lambda *args: {})


# ------------------------------------------------------------------------------- forked processes

def fork(call, log, rank=None, world=1, port=0):
    """call() in a process of its own -> its number. What it says goes to the file `log`."""
    number = os.fork()
    if number:
        return number
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)
        life.locked.clear()                                # those of the parent are not ours
        if rank is not None:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                           "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}
        sys.argv = ["train.py"]
        run_main(call)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code or 0)


def end_of(number):
    """Its exit code; of a process that a signal ended, minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def count_lines(at=None, kill=signal.SIGKILL):
    """Count the lines that this process executes in TRACED; at that one it is killed."""
    count = [0]

    def line(frame, event, arg):
        if event == "line":
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), kill)
        return line

    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename in TRACED else None)
    return count


def tear(nth):
    """The nth file that is saved is half written when the process is killed."""
    real, count = torch.save, [0]

    def save(content, file):
        real(content, file)
        count[0] += 1
        if count[0] == nth:
            file.flush()
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def free_port():
    import socket
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_once(main, flags, log, world=1, at=None, torn=None, kill=signal.SIGKILL):
    """One start of a run, killed at a line or in a save of rank 0 -> exit code of rank 0."""
    def call(rank):
        if rank == 0 and at is not None:
            count_lines(at, kill)
        if rank == 0 and torn is not None:
            tear(torn)
        main(flags)

    port = free_port() if world > 1 else 0
    ranks = [fork(lambda rank=rank: call(rank), log, rank if world > 1 else None, world, port)
             for rank in range(world)]
    code = end_of(ranks[0])
    for other in ranks[1:]:
        if code == -signal.SIGKILL:                        # torchrun does this
            os.kill(other, signal.SIGKILL)
        end_of(other)
    return code


def lines_of(main, flags, log, world):
    """How many lines a whole run executes, on rank 0."""
    found = Path(f"{log}.lines")

    def call(flags):
        count = count_lines()
        main(flags)
        sys.settrace(None)
        if os.environ.get("RANK", "0") == "0":
            found.write_text(str(count[0]))

    assert run_once(call, flags, log, world) == 0, Path(log).read_text()[-2000:]
    return int(found.read_text())


def same(a, b):
    """Whether two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, other):
    """Equal in weights, teachers, optimiser, scaler, and log but for times."""
    logs, files = [], []
    for folder in (one, other):
        records = read_json_lines(Path(folder) / "metrics.jsonl")
        logs.append([{k: v for k, v in r.items() if k not in TIMES} for r in records])
        file = load_checkpoint(Path(folder) / "checkpoint.pt")
        files.append({k: v for k, v in file.items() if k not in ("config", "seconds")})
    assert logs[0] == logs[1] and len(logs[0]) > 2
    for key in files[0]:
        assert same(files[0][key], files[1][key]), key
    assert files[0].keys() == files[1].keys()


def kill_and_compare(main, flags, folder, seed, kills, world=1):
    """A run left alone, and one that is killed so many times at random, to the end -> kills."""
    dice, log = random.Random(seed), str(folder / "log")
    # by the clock at every step: 1e-7 minutes
    whole = [*flags, "--save-minutes", "0", "--out", str(folder / "whole")]
    hurt = [*flags, "--save-minutes", "1e-7", "--out", str(folder / "hurt")]
    lines = lines_of(main, [*hurt[:-1], str(folder / "counted")], log, world)
    assert run_once(main, whole, log, world) == 0
    assert_same_run(folder / "whole", folder / "counted")  # the clock changes nothing
    killed = 0
    for number in range(kills):
        # of a run that goes on fewer lines are left; one kill of three is in the middle of a file
        how = dict(torn=dice.randint(1, 4)) if number % 3 == 2 else dict(
            at=dice.randint(1, max(1, int(lines * (0.9 if number == 0 else 0.4)))))
        code = run_once(main, hurt, log, world, **how)
        assert code in (0, -signal.SIGKILL), Path(log).read_text()[-3000:]
        killed += code != 0
        if code == 0:
            break
    assert run_once(main, hurt, log, world) == 0, Path(log).read_text()[-3000:]
    assert_same_run(folder / "whole", folder / "hurt")
    assert not list((folder / "hurt").glob(".checkpoint.pt.*"))
    return killed


RUN = ["--log-every", "3", "--eval-every", "2", "--epochs", "3", "--image-clusters", "4"]
STREAMED = ["--resident-gb", "0", "--workers", "1"]
WAYS = {
    "pl-mae": ["--accumulate", "2"],
    "pl-mae-one-teacher": STREAMED,
    "image-labels": ["--precision", "fp16"],
    "mim-cluster": ["--balancing", "centring", "--accumulate", "2"],
    "rc-mae": ["--precision", "bf16"],
    "mae": [*STREAMED, "--precision", "fp16", "--accumulate", "2"],
}


@pytest.mark.parametrize("recipe, world", [("pl-mae", 1), ("image-labels", 2)])
def test_killed_anywhere_it_is_the_same_run(small_flags, tmp_path, recipe, world):
    flags = [*small_flags, *RUN, "--recipe", recipe, *WAYS[recipe]]
    assert kill_and_compare(train.main, flags, tmp_path, 0, 3, world) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("recipe", WAYS)
def test_every_recipe_killed_anywhere(small_flags, tmp_path, recipe, world, seed):
    flags = [*small_flags, *RUN, "--recipe", recipe, *WAYS[recipe]]
    killed = kill_and_compare(train.main, flags, tmp_path, seed, 6, world)
    print(f"kills: {killed}")
    assert killed >= 2


def tune_flags(small_flags, photos, tmp_path):
    train.main([*small_flags, "--epochs", "0", "--out", str(tmp_path / "start")])
    return ["--checkpoint", str(tmp_path / "start" / "checkpoint.pt"), "--batch-size", "16",
            "--epochs", "3", "--eval-every", "2", "--log-every", "3", "--device", "cpu"]


def test_finetune_killed_anywhere(small_flags, photos, tmp_path):
    flags = tune_flags(small_flags, photos, tmp_path)
    assert kill_and_compare(finetune.main, flags, tmp_path, 0, 3) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_finetune_killed_anywhere_more_often(small_flags, photos, tmp_path, seed):
    flags = tune_flags(small_flags, photos, tmp_path)
    print(f"kills: {kill_and_compare(finetune.main, flags, tmp_path, seed, 6)}")
