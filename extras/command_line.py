"""What every command shares: errors of one line, devices, and a command line made from a dataclass."""

import argparse
import dataclasses
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed


class UsageError(ValueError):
    """Something the user can mend: its text is one line that names the flag and the remedy. Commands end with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and flags are not abbreviated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        sys.exit(fail(f"{message} ({self.prog} --help lists what there is)"))


def fail(message):
    """Print the one line (of several processes only the first does); return the exit code of a usage error.

    A DataLoader worker hands its error on as a traceback, whose last line says what it is."""
    line = str(message).strip().splitlines()[-1].removeprefix(f"{UsageError.__module__}.UsageError: ")
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    return 2


def run_main(main):
    """Run a command: a UsageError is one line on stderr and exit code 2, anything else a traceback, as it is a bug."""
    try:
        main()
    except UsageError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        print("\ninterrupted; a training run continues from its last checkpoint with the same command", file=sys.stderr)
        sys.exit(130)


def find_device(name):
    """--device -> torch.device; "auto" is the first of cuda, mps, cpu that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: not to be had here; --device cpu always is") from error
    return torch.device(name)


def make_folder(path, flag):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be made a folder ({error.strerror})") from error


def option(default, help, type=None, choices=None, range=None):
    return dataclasses.field(default=default, metadata=dict(help=help, type=type, choices=choices, range=range))


def size(text):
    """The type of --img-size and --patch-size: "32", or "48x64" for height and width."""
    numbers = [int(n) if n.isdecimal() else 0 for n in text.split("x")]
    if len(numbers) > 2 or min(numbers) < 1:
        raise argparse.ArgumentTypeError("N or HxW, as in 64 or 48x64")
    return numbers[0] if len(numbers) == 1 else numbers


def config_from_flags(Config, recipes, argv, description):
    """Flags -> Config: its defaults, over them the row `recipes[--recipe]`, over that what was given. Ranges are checked."""
    parser = Parser(description=description, epilog="Several GPUs: torchrun --nproc-per-node N train.py ...")
    for f in dataclasses.fields(Config):
        note = "" if f.default is None else f" (default: {f.default})"
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(type=f.metadata["type"] or f.type, choices=f.metadata["choices"], metavar=None if f.metadata["choices"] else "X")
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=f.metadata["help"] + note, **kind)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    config = Config(**{**recipes[given.get("recipe", Config.recipe)], **given})
    for f in dataclasses.fields(Config):
        value, (low, high) = getattr(config, f.name), f.metadata["range"] or (None, None)
        if low is not None and (math.isinf(value) or not low <= value <= high):
            raise UsageError(f"--{f.name.replace('_', '-')} {value}: must be "
                             + (f"{low} or more" if high == math.inf else f"from {low} to {high}"))
    return config


def start_device(config):
    """rank, world size, device, dtype of the weights, whether to use bf16. Starts the process group under torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(config.device)
    if device.type == "cuda" and world > 1:
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "mps" and config.precision == "fp64":
        raise UsageError("--precision fp64: not to be had on mps; use --device cpu")
    if config.batch_size % (world * config.accumulate):
        raise UsageError(f"--batch-size {config.batch_size}: must be a multiple of processes x --accumulate, "
                         f"{world} x {config.accumulate}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))  # downloads
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    gains = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return rank, world, device, dtype, config.precision == "bf16" or (config.precision == "auto" and gains)
