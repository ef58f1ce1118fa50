"""The life of a run: one process writes to a folder, and what ends it loses nothing.

`lock` keeps a second process out of --out. `Watch` tells the loop when to save between two looks,
and when to end: SIGTERM (sent by queues and by torchrun) and SIGINT (Ctrl-C) let the step be
finished and saved first.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import distributed

from support.command_line import UsageError
from support.devices import LONGEST_WAIT
from support.ranks import world_size

try:
    import fcntl
except ImportError:                                        # Windows has no such locks
    fcntl = None

SAVE = 1                                                   # what `Watch.told` says
locked = {}                                                # folder: the open file, kept for ever


def lock(out):
    """Keep other processes from writing to the folder `out` for as long as this one lives.

    The kernel lets go of the lock when the process dies, however it dies. It is fcntl's lock of a
    process. That of flock lives on in forked processes, so that workers which outlive a killed run
    by some seconds would still hold it. Raises UsageError while another process has it."""
    out = Path(out).resolve()
    if fcntl is None or out in locked:
        return
    try:
        file = open(out / ".lock", "a+")
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written to ({error.strerror}); use another "
                         "--out") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise UsageError(f"--out {out}: another run writes there ({file.read() or 'a process'}); "
                         "wait until it ends, or use another --out") from error
    except OSError:                                        # file systems that cannot lock
        pass
    locked[out] = file
    with suppress(OSError):                                # a full disk; the lock holds without it
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()


class Watch:
    """Tells the loop when to save and when to end.

        with Watch(minutes, rank) as watch:
            for each step:
                ...
                told = watch.told(saved)       # 0; or SAVE, by the clock; or the number of a signal

    All ranks are told the same at the same step. With one process that is a look at the clock. With
    several, each sends its wish while the next step is computed, and reads the answer after it. So
    they end one step later. The 8 bytes go over the CPUs (gloo): nobody waits for a GPU, and CPUs
    that are a step apart do not wait for one another."""

    def __init__(self, minutes, rank=0):
        self.minutes, self.rank, self.process = minutes, rank, os.getpid()
        self.since, self.signal, self.asked = time.monotonic(), 0, None
        self.group = distributed.new_group(
            backend="gloo", timeout=LONGEST_WAIT) if world_size() > 1 else None

    def __enter__(self):
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():      # the only one that may
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        """The first signal is kept in mind; the kernel ends the process at a second one."""
        self.signal = number
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL)
        if self.rank == 0 and os.getpid() == self.process:             # workers are forked from it
            # print is not for handlers of signals
            os.write(2, b"\nfinishes the step, then saves and ends; once more ends it at once\n")

    def told(self, saved=False):
        """0 go on, SAVE, or the signal to end by. saved: there is a checkpoint of this step."""
        agreed = 0
        if self.asked:
            work, number = self.asked
            work.wait()
            agreed = number.item()
        if saved or agreed:
            self.since = time.monotonic()
        late = self.minutes and time.monotonic() - self.since > 60 * self.minutes
        mine = self.signal or (SAVE if late and self.rank == 0 else 0)
        if self.group is None:
            self.since = time.monotonic() if mine else self.since
            return mine
        number = torch.tensor(mine)
        work = distributed.all_reduce(number, distributed.ReduceOp.MAX, self.group, async_op=True)
        self.asked = work, number
        return agreed

    def end_if_signalled(self, told, step, out, saved=True):
        """After the checkpoint of the step was saved: end with 128 + signal, all ranks together."""
        if told <= SAVE:
            return
        if self.rank == 0:
            where = f"which is saved in {out}; the same command continues there" if saved else (
                f"which is not saved; what {out} holds is intact")
            print(f"{signal.Signals(told).name}: stopped after step {step}, {where}",
                  file=sys.stderr, flush=True)
        if self.group is not None:         # torchrun ends the others as soon as one has ended
            distributed.barrier()
            distributed.destroy_process_group()
        sys.exit(128 + told)
