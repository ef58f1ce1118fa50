"""Which device, how many processes, which precision."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from support.command_line import UsageError


def choose_device(name):
    """--device -> torch.device; "auto" is the first of cuda, mps, cpu that is there.

    A GPU always gets its number (cuda:0, not cuda), as `torch.cuda.set_device` wants one. Under
    torchrun each process of a machine takes the GPU of its own number, LOCAL_RANK. Call this before
    any tensor is made: the device becomes the current one. Raises UsageError."""
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


def start_processes(device):
    """Join the other processes of a torchrun, if there are any -> rank, number of processes."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and device.type == "mps":
        raise UsageError("--device mps: works in one process only; start train.py without torchrun")
    if world > 1:                          # the long timeout: rank 0 may download while others wait
        gpu = device if device.type == "cuda" else None
        distributed.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2),
                                       device_id=gpu)
    return rank, world


def choose_precision(name, device):
    """--precision -> dtype of the weights, and whether the networks compute in bf16 (autocast).

    On a GPU products of fp32 numbers are computed in TF32 (10 bits of the 23 behind the point). Of
    cosines divided by a temperature of 0.0125 that is 0.01 nats; bf16 would be 0.09."""
    if name == "fp64" and device.type == "mps":
        raise UsageError("--precision fp64: not to be had on mps; use --device cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    bf16 = name == "bf16" or (name == "auto" and device.type == "cuda"
                              and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.float64 if name == "fp64" else torch.float32, bf16


@contextmanager
def memory_errors_in_one_line(device, flag, remedy):
    """Inside, a device whose memory is too small is a UsageError. flag: with its value."""
    try:
        yield
    except RuntimeError as error:          # the words for it: CUDA's and MPS's, and the CPU's
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise UsageError(f"{flag}: the memory of {device} is too small; {remedy}") from error


def peak_memory(device):
    """{"peak_memory_gb": the most that was in use on this GPU since the start}; {} on others."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)}
