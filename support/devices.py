"""Which device, how many processes, which precision."""

import os
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from support.command_line import UsageError, lacks_memory
from support.ranks import over_ranks, world_size

LONGEST_WAIT = timedelta(hours=2)          # of ranks for rank 0, which may download or look
MEETING = timedelta(minutes=5)             # of processes that were started together
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# --precision: dtype of the weights, and what networks compute in where it is another (autocast).
PRECISIONS = {
    "fp64": (torch.float64, None),
    "fp32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
}


def choose_device(name):
    """--device -> torch.device; "auto" is the first of cuda, mps, cpu that is there.

    A GPU always gets its number (cuda:0, not cuda), as `torch.cuda.set_device` wants one. Under
    torchrun each process of a machine takes the GPU of its own number, LOCAL_RANK. Call this before
    any tensor is made: the device becomes the current one. Raises UsageError."""
    check_environment()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            return choose_gpu(name, device.index)
        if device.type not in ("cpu", "mps"):
            raise UsageError(f"--device {name}: use auto, cpu, cuda, cuda:1 or mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: not to be had here; use auto, cpu, cuda, cuda:1 or "
                         "mps, of which cpu is always there") from error
    return device


def choose_gpu(name, index):
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no GPU is to be had here; use --device cpu")
    local_rank, there = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if local_rank is not None:
        if index is not None and index != int(local_rank):
            raise UsageError(f"--device {name}: torchrun gives each process a GPU of its own; use "
                             "--device cuda")
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > there:
            raise UsageError(f"--nproc-per-node: use {there} or fewer, as there are {there} GPUs")
        index = int(local_rank)
    if index is None:
        index = torch.cuda.current_device()
    if index >= there:
        raise UsageError(f"--device {name}: there are {there} GPUs, and the first is cuda:0")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def check_environment():
    """Raises UsageError for variables of torchrun that do not fit together: leftovers."""
    there = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    numbers = {name: there.get(name, "1" if "WORLD" in name else "0") for name in TORCHRUN[:4]}
    wrong = [name for name, text in numbers.items() if not text.isdecimal()]
    if wrong:
        return leftovers(there, f"{wrong[0]} is no number")
    rank, world, local_rank, local_world = map(int, numbers.values())
    several = rank or local_rank or world > 1 or local_world > 1
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
               if several and name not in there]
    if missing:
        leftovers(there, f"{', '.join(missing)} missing")
    if rank >= world or "LOCAL_WORLD_SIZE" in there and local_rank >= local_world:
        leftovers(there, "ranks go from 0 to the number of processes - 1")


def leftovers(there, problem, error=None):
    given = " ".join(f"{name}={value}" for name, value in there.items())
    raise UsageError(f"{given} in the environment: {problem}; for one process type "
                     f"`unset {' '.join(there)}`, for several use torchrun") from error


def cores():
    """How many cores of the machine each process of a run has for itself, 1 to 16."""
    try:
        there = len(os.sched_getaffinity(0))               # not those that a queue has kept back
    except AttributeError:                                 # macOS
        there = os.cpu_count() or 1
    shared = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(16, max(1, there // max(1, int(shared) if shared.isdecimal() else 1)))


def start_processes(device):
    """Join the other processes of a torchrun, if there are any -> rank, number of processes.

    Raises UsageError where they do not come."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and device.type == "mps":
        raise UsageError("--device mps: works in one process only; start train.py without torchrun")
    if world > 1:
        gpu = device if device.type == "cuda" else None
        try:
            store, *_ = next(distributed.rendezvous("env://", timeout=MEETING))
        except distributed.DistError as error:
            there = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
            leftovers(there, f"the {world} processes did not meet ({type(error).__name__})", error)
        store.set_timeout(LONGEST_WAIT)
        distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank,
                                       world_size=world, timeout=LONGEST_WAIT, device_id=gpu)
    return rank, world


def best_precision(device):
    """What --precision auto stands for: what the device multiplies fastest in.

    bf16 on GPUs from Ampere on, fp16 on older ones (T4, V100), which lack it. On CPUs it is
    measured: with AVX512-BF16 or AMX bf16 is two to three times as fast as fp32, without them many
    times slower. All processes of a run choose alike."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        faster = over_ranks(torch.tensor(float(faster_in_bf16())))
        return "bf16" if faster == world_size() else "fp32"
    return "fp32"


def faster_in_bf16():
    """Whether this CPU multiplies matrices clearly faster in bf16 than in fp32: 20 ms of each.

    The fastest product counts, so that other work on the machine decides nothing."""
    least = []
    for dtype in (torch.float32, torch.bfloat16):
        x, times = torch.ones(384, 384, dtype=dtype), []
        x @ x                                              # the first one also sets things up
        while sum(times) < 0.02:
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        least.append(min(times))
    return least[0] > 1.3 * least[1]


def choose_precision(name, device):
    """One of PRECISIONS, or auto -> dtype of the weights; dtype of autocast, None without it.

    On a GPU products of fp32 numbers are computed in TF32 (10 bits of the 23 behind the point). Of
    cosines divided by a temperature of 0.0125 that is 0.01 nats; bf16 would be 0.09."""
    if name == "fp64" and device.type == "mps":
        raise UsageError("--precision fp64: not to be had on mps; use --device cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return PRECISIONS[best_precision(device) if name == "auto" else name]


@contextmanager
def memory_errors_in_one_line(device, flag, remedy):
    """Inside, a device whose memory is too small is a UsageError. flag: with its value."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise UsageError(f"{flag}: the memory of {device} is too small; {remedy}") from error


def peak_memory(device):
    """{"peak_memory_gb": the most that was in use on this GPU since the start}; {} on others."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)}
