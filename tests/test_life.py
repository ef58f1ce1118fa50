"""The life of a run: one process a folder, an end when it is told, checkpoints that are checked,
and the same run wherever it is killed.

Runs are forked from this process, which has torch loaded: a hundred of them would otherwise spend
their time with imports."""

import os
import random
import shutil
import signal
import socket
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
from support import devices, life, report
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
        if code:                                           # torchrun does this
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
    """A run left alone, and one that is killed or told to end so many times at random, to the end
    -> how often it was killed."""
    dice, log = random.Random(seed), str(folder / "log")
    # by the clock at every step: 1e-7 minutes
    whole = [*flags, "--save-minutes", "0", "--out", str(folder / "whole")]
    hurt = [*flags, "--save-minutes", "1e-7", "--out", str(folder / "hurt")]
    lines = lines_of(main, [*hurt[:-1], str(folder / "counted")], log, world)
    assert run_once(main, whole, log, world) == 0
    assert_same_run(folder / "whole", folder / "counted")  # the clock changes nothing
    killed = 0
    for number in range(kills):
        # of a run that goes on fewer lines are left
        how = dict(at=dice.randint(1, max(1, int(lines * (0.9 if number == 0 else 0.4)))))
        if number % 3 == 1:                                # in the middle of a file
            how = dict(torn=dice.randint(1, 4))
        if number % 3 == 2:                                # not killed, but told to end
            how["kill"] = signal.SIGTERM
        code = run_once(main, hurt, log, world, **how)
        if code == 0:
            break
        assert code == (128 + signal.SIGTERM if "kill" in how else -signal.SIGKILL), (
            Path(log).read_text()[-3000:])
        killed += code == -signal.SIGKILL
    assert run_once(main, hurt, log, world) == 0, Path(log).read_text()[-3000:]
    assert_same_run(folder / "whole", folder / "hurt")
    assert not list((folder / "hurt").glob(".checkpoint.pt.*"))
    return killed


RUN = ["--log-every", "3", "--eval-every", "2", "--epochs", "3", "--image-clusters", "4"]
STREAMED = ["--resident-gb", "0", "--workers", "1"]
WAYS = {
    "pl-mae": ["--accumulate", "2"],
    "pl-mae-one-teacher": STREAMED,
    "image-labels": ["--precision", "fp16", "--balancing", "centring"],
    "mim-cluster": ["--balancing", "centring", "--accumulate", "2"],
    "rc-mae": ["--precision", "bf16"],
    "mae": [*STREAMED, "--precision", "fp16", "--accumulate", "2"],
}


@pytest.mark.parametrize("recipe, world", [("pl-mae", 1), ("image-labels", 2)])
def test_killed_anywhere_it_is_the_same_run(small_flags, tmp_path, recipe, world):
    flags = [*small_flags, *RUN, "--recipe", recipe, *WAYS[recipe]]
    assert kill_and_compare(train.main, flags, tmp_path, 0, 3, world) >= 1


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


# ---------------------------------------------------------------------------- the test has teeth

def test_a_part_that_is_left_out_of_the_checkpoint_is_noticed(small_flags, tmp_path, monkeypatch):
    """A run is stopped in the middle of a line of its log. Each part of its checkpoint in turn is
    put back to what it was at the start; then the comparison has to fail."""
    flags = [*small_flags, *RUN, "--precision", "fp16", "--out"]
    make = torch.amp.GradScaler                            # a scale that rises every second step
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: make(
        *args, growth_interval=2, **kwargs))
    train.main([*flags, str(tmp_path / "whole")])

    def told(self, saved):
        self.steps = getattr(self, "steps", 0) + 1
        return signal.SIGTERM if self.steps == 5 else 0

    with monkeypatch.context() as patch:
        patch.setattr(life.Watch, "told", told)
        with pytest.raises(SystemExit):
            train.main([*flags, str(tmp_path / "stopped")])
    stopped, start = (load_checkpoint(tmp_path / "stopped" / name)
                      for name in ("checkpoint.pt", "previous.pt"))
    assert (stopped["step"], start["step"]) == (5, 0)
    for part in (None, "student", "labelling_teacher", "reconstruction_teacher", "optimizer",
                 "scaler", "step", "meter"):
        out = tmp_path / str(part)
        shutil.copytree(tmp_path / "stopped", out)
        if part is None:
            train.main([*flags, str(out)])
            assert_same_run(tmp_path / "whole", out)
            continue
        save_checkpoint(out / "checkpoint.pt", stopped | {part: start[part]})
        with pytest.raises((AssertionError, ArithmeticError)):         # a line of no steps: 0 / 0
            train.main([*flags, str(out)])
            assert_same_run(tmp_path / "whole", out)


# ------------------------------------------------------------------------------- signals, the lock

@pytest.mark.parametrize("number, resident", [(signal.SIGTERM, True), (signal.SIGINT, True),
                                              (signal.SIGTERM, False)])
@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_ends_a_run_after_the_step(small_flags, tmp_path, number, resident, world):
    """Between two lines of the log; streamed runs have workers, which get it too."""
    flags = [*small_flags, *RUN, *([] if resident else STREAMED), "--out"]
    log = tmp_path / "log"
    assert run_once(train.main, [*flags, str(tmp_path / "whole")], log, world) == 0
    real = train.learning_rate

    def signal_in_step_4(step, *args):
        if step == 4 and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), number)
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children"
                              ).read_text().split():
                os.kill(int(child), number)
        return real(step, *args)

    train.learning_rate = signal_in_step_4
    try:
        code = run_once(train.main, [*flags, str(tmp_path / "cut")], log, world)
    finally:
        train.learning_rate = real
    text, done = log.read_text(), 5 if world == 1 else 6   # with others, one more
    assert code == 128 + number, text
    assert f"{number.name}: stopped after step {done}, which is saved in" in text
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == done
    assert run_once(train.main, [*flags, str(tmp_path / "cut")], log, world) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_second_signal_ends_a_run_at_once(small_flags, tmp_path, monkeypatch):
    def twice(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(train, "training_step", twice)
    flags = [*small_flags, "--out", str(tmp_path / "run")]
    assert run_once(train.main, flags, tmp_path / "log") == -signal.SIGINT
    assert "once more ends it at once" in (tmp_path / "log").read_text()


def test_a_signal_before_the_loop_is_one_line(small_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    flags = [*small_flags, "--out", str(tmp_path / "run")]
    assert run_once(train.main, flags, tmp_path / "log") == 128 + signal.SIGTERM
    assert (tmp_path / "log").read_text().endswith(
        "interrupted; the same command continues a training run from its last checkpoint\n")


def test_a_folder_has_one_run_and_a_kill_frees_it(small_flags, tmp_path, monkeypatch):
    """Also where workers outlive a killed run."""
    flags = [*small_flags, *STREAMED, "--log-every", "1", "--out", str(tmp_path / "run")]
    log, real = tmp_path / "log", train.learning_rate

    def wait(step, *args):
        if step == 6:
            (tmp_path / "waits").touch()
            time.sleep(60)
        return real(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", wait)
        first = fork(lambda: train.main(flags), log)
    patience = time.monotonic() + 60
    while not (tmp_path / "waits").exists():
        assert time.monotonic() < patience, log.read_text()
        time.sleep(0.05)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    second = tmp_path / "second"
    assert run_once(train.main, flags, second) == 2
    assert second.read_text().count("\n") == 1
    assert f"another run writes there (process {first} of" in second.read_text()
    third = ["--from-scratch", *small_flags[:4], "--device", "cpu", *flags[-2:]]
    assert run_once(finetune.main, third, second) == 2
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    os.kill(first, signal.SIGKILL)
    end_of(first)
    assert run_once(train.main, flags, log) == 0


# -------------------------------------------------------------------------------------- checksums

def test_a_flipped_bit_or_a_cut_is_noticed_or_harmless(tmp_path):
    """Of 1,500 flips and 200 cuts, each is refused, or what is read is what was written."""
    path, dice = tmp_path / "checkpoint.pt", random.Random(0)
    content = dict(student={"weight": torch.randn(5, 7), "bias": torch.arange(9.0)}, step=7)
    save_checkpoint(path, content)
    data, noticed = path.read_bytes(), 0
    for _ in range(1500):
        flipped = bytearray(data)
        flipped[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(load_checkpoint(path), content)
        except UsageError:
            noticed += 1
    assert noticed > 600
    for _ in range(200):
        path.write_bytes(data[:dice.randrange(len(data))])
        with pytest.raises(UsageError):
            load_checkpoint(path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(small_flags, tmp_path, capsys):
    flags = [*small_flags, "--epochs", "2", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    out = tmp_path / "run"
    train.main([*flags, str(out)])
    newest, previous = out / "checkpoint.pt", out / "previous.pt"
    assert (load_checkpoint(newest)["step"], load_checkpoint(previous)["step"]) == (8, 4)
    whole = newest.read_bytes()

    def flip(data):
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1:]

    newest.write_bytes(flip(whole))
    result = run("eval.py", "knn", "--checkpoint", newest, ok=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"{newest}: is damaged" in result.stderr
    assert f"use {previous}, the one before" in result.stderr
    for damage, what in ((flip, "damaged"), (lambda data: data[:-999], "damaged"),
                         (None, "missing")):
        newest.unlink()
        if damage:
            newest.write_bytes(damage(whole))
        capsys.readouterr()
        train.main([*flags, str(out)])
        said = capsys.readouterr().err
        assert f"{newest} is {what}: goes on from the one before it, of step 4" in said
        assert "continues: steps 4 to 8" in said
        assert_same_run(tmp_path / "whole", out)
        assert load_checkpoint(previous)["step"] == 4
    newest.write_bytes(flip(whole))
    previous.write_bytes(b"PK")
    with pytest.raises(UsageError, match="both damaged; delete that folder"):
        train.main([*flags, str(out)])


def test_weights_that_are_no_numbers_are_not_saved(small_flags, tmp_path, capsys):
    """The clock may strike between the step that spoils them and the line of the log that ends the
    run."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        train.main([*small_flags, "--lr", "1e30", "--clip", "0", "--log-every", "50",
                    "--save-minutes", "1e-7", "--eval-every", "3", "--out", str(out)])
    said = capsys.readouterr().err
    assert "not saved: some weights are no numbers" in said and "try a lower --lr" in said
    for name in ("checkpoint.pt", "previous.pt"):
        assert all(v.isfinite().all() for v in load_checkpoint(out / name)["student"].values())


def test_the_file_before_is_kept_at_every_moment(tmp_path, monkeypatch):
    """Also where the new one fails."""
    path, keep = tmp_path / "a", tmp_path / "before"
    for text in (b"1", b"2", b"3"):
        write_atomically(path, lambda file: file.write(text), keep)
    assert (path.read_bytes(), keep.read_bytes()) == (b"3", b"2")
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda file: 1 / 0, keep)
    assert (path.read_bytes(), keep.read_bytes()) == (b"3", b"2")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.pt")), ids=lambda p: p.name)
def test_checkpoints_from_before_load(path):
    assert load_checkpoint(path)["config"]


# ---------------------------------------------------------------------- leftovers of torchrun

@pytest.mark.parametrize("there, words", [
    (dict(WORLD_SIZE="2", RANK="0"), "MASTER_ADDR, MASTER_PORT missing"),
    (dict(WORLD_SIZE="2"), "RANK, MASTER_ADDR, MASTER_PORT missing"),
    (dict(RANK="1"), "WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"),
    (dict(LOCAL_RANK="3"), "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"),
    (dict(RANK="2", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"), "ranks go from 0"),
    (dict(RANK="x", WORLD_SIZE="2"), "RANK is no number"),
    (dict(RANK="0", WORLD_SIZE=""), "WORLD_SIZE is no number"),
    (dict(RANK="-1", WORLD_SIZE="2"), "RANK is no number"),
])
def test_leftovers_of_torchrun_are_one_line(small_flags, tmp_path, monkeypatch, there, words):
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words) as error:
        train.main([*small_flags, "--out", str(tmp_path / "run")])
    assert f"`unset {' '.join(n for n in devices.TORCHRUN if n in there)}`" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_come_are_one_line(monkeypatch):
    """A whole set of leftovers: the others will never come."""
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=str(free_port())).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "MEETING", devices.timedelta(seconds=1))
    with pytest.raises(UsageError, match="the 2 processes did not meet"):
        devices.start_processes(torch.device("cpu"))


@pytest.mark.parametrize("there", [dict(), dict(RANK="0", WORLD_SIZE="1"), dict(LOCAL_RANK="0"),
                                   dict(MASTER_ADDR="node7", MASTER_PORT="29500")])
def test_what_does_no_harm_is_not_refused(monkeypatch, there):
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert devices.choose_device("cpu") == torch.device("cpu")
    assert devices.start_processes(torch.device("cpu")) == (0, 1)
