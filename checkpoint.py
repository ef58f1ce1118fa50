"""The files of a run: one checkpoint from which it continues, its config, its log.

`checkpoint.pt` is a dictionary of plain data and tensors, so that it loads with `weights_only=True` (no code in it is
ever executed): `model` (the student's state_dict), `arch` (arguments of Student), `labelling_teacher` and `reconstruction_teacher`
as far as the recipe has them, `centres`, `optimizer`, `step`, `config`, `mean`, `std`, `images` (how many). Random states are not
in it because there are none: every random number of a run is a function of (seed, step).
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from extras.command_line import UsageError


def write_atomically(path, write):
    """Let `write(file)` fill a temporary file in the same folder, flush it to the disk, then rename it to `path`.

    Whoever opens `path` finds the old content or the new, never half of it, whenever the power goes."""
    path = Path(path)
    file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)         # temporary files are private; results need not be
        os.replace(file.name, path)
    except BaseException:
        os.unlink(file.name)
        raise


def save_checkpoint(path, content):
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path):
    """The dictionary at `path`, tensors on the CPU. Raises UsageError if there is none or it cannot be read."""
    if not Path(path).is_file():
        raise UsageError(f"checkpoint {path}: there is no such file (it is the file checkpoint.pt in the folder of a run)")
    try:
        # official MAE training checkpoints carry their argparse.Namespace, which is plain data too
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"checkpoint {path}: not a checkpoint that can be read safely ({type(error).__name__})") from error


def continue_from(path, config, free, mean, images):
    """The checkpoint of a run to continue, None if there is none. A run with other settings or images is refused with the
    settings that differ; those in `free` (device, workers, ...) may."""
    if not Path(path).exists():
        return None
    saved, out = load_checkpoint(path), f"--out {config['out']}"
    if "config" not in saved or "optimizer" not in saved:
        raise UsageError(f"{out}: its checkpoint.pt is not of train.py; use another --out")
    old = saved["config"]
    differ = [k for k in sorted(old.keys() | config.keys()) if k not in free and old.get(k) != config.get(k)]
    if differ:
        raise UsageError(f"{out}: holds a run with other settings: {{}}; use another --out, or delete that folder".format(
            ", ".join(f"{k} was {old.get(k)!r}, now {config.get(k)!r}" for k in differ)))
    if (saved["mean"], saved["images"]) != (mean, images):
        raise UsageError(f"{out}: holds a run on other images; use another --out, or delete that folder")
    return saved


def append_json(path, record):
    """One JSON object as one line at the end of a file."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_json_lines(path):
    """All objects of such a file, [] if there is none. A last line cut short by a power cut has no newline: left out."""
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_log(path, step):
    """Drop what was logged after `step`: a run that was cut off repeats those steps and logs them again."""
    kept = "".join(json.dumps(r) + "\n" for r in read_json_lines(path) if r["step"] <= step)
    write_atomically(path, lambda file: file.write(kept.encode()))
