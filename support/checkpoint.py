"""The file of a run.

`checkpoint.pt` is a dictionary of plain data and tensors. It loads with `weights_only=True`, so no
code in it is ever executed. It holds

    student, arch                  weights, and the arguments of `Student`
    labelling_teacher, reconstruction_teacher       weights, as far as the recipe has them
    optimizer, scaler, step        to continue the run; scaler of the gradients, in fp16 alone
    config, mean, std, images      settings; mean and std of the pixels; how many images there were
    meter                          sums for the next line of the log, where it was saved in between

The one before it is kept as `previous.pt`. Both have checksums: torch.save writes a zip file, which
has a CRC-32 of each tensor in it.

Random states are not in it because there are none: every random number of a run is a function of
(seed, step).
"""

import argparse
import dataclasses
import json
import os
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch

from pseudo_labels import Student
from support.command_line import UsageError, make_folder
from support.files import read_json, truncate_log, write_atomically
from support.life import lock
from support.ranks import world_size
from support.settings import FREE, architecture
from teachers import make_teachers

NAME, PREVIOUS = "checkpoint.pt", "previous.pt"
RELATIVES = ("sdae", "cae", "mixedae", "greenmim")         # each a file in extras/relatives


def new_student(arch, recipe):
    """A `Student` with new weights, of the recipe. arch: `settings.architecture`."""
    if recipe in RELATIVES:
        return import_module(f"extras.relatives.{recipe}").Student(**arch)
    return Student(**arch)


def save_checkpoint(path, content, keep=None):
    write_atomically(path, lambda file: torch.save(content, file), keep)


def save(run, step, meter=None):
    """Write the checkpoint of a run after so many steps, and keep the one before it; by rank 0.
    False if its weights are no numbers: then nothing is written."""
    if not is_finite(run.student):
        return False
    if run.rank == 0:
        config, parts = run.config, parts_of(run)
        save_checkpoint(run.out / NAME, dict(
            {key: part.state_dict() for key, part in parts.items()},
            arch=architecture(config, run.images.channels), step=step, meter=meter,
            config=dataclasses.asdict(config), mean=run.mean, std=run.std, images=len(run.images)),
            keep=run.out / PREVIOUS)
    return True


def is_finite(network):
    """Whether all weights are numbers. Else it is said, and what was saved before is to stay: the
    next line of the log ends such a run, but the clock may strike before."""
    finite = all(p.isfinite().all() for p in network.parameters())
    if not finite:
        print("not saved: some weights are no numbers; the checkpoint from before stays",
              file=sys.stderr)
    return finite


def load_checkpoint(path, flag="--checkpoint"):
    """The dictionary at `path`, tensors on the CPU. Raises UsageError if there is none or it cannot
    be read."""
    if not Path(path).is_file():
        what = "is a folder; name a file in it" if Path(path).is_dir() else "there is no such file"
        raise UsageError(f"{flag} {path}: {what} (checkpoint.pt of a run, encoder.pt of an export)")
    if is_damaged(path):
        before = Path(path).with_name(PREVIOUS)
        other = f"{before}, the one before" if Path(path).name == NAME and before.exists() else (
            "another file")
        raise UsageError(f"{flag} {path}: is damaged (its checksums do not fit, or its end is "
                         f"missing); use {other}")
    try:
        # official MAE training checkpoints carry their argparse.Namespace, which is plain data too
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{flag} {path}: not a checkpoint that can be read safely "
                         f"({type(error).__name__}); use another file") from error


def is_damaged(path):
    """Whether a bit of a zip file is wrong, or a part of it missing. torch itself does not look at
    the checksums. Files in torch's older format have none."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                return False
        with zipfile.ZipFile(path) as file:
            # torch reads nothing, and says nothing, where a flipped bit makes a tensor a folder
            return file.testzip() is not None or any(
                each.external_attr & 0x10 for each in file.infolist())
    except Exception:      # zipfile raises whatever a wrong number leads it to
        return True


def claim(out, rank=0):
    """Make sure of the folder `out` before a run goes on in it, if it is there: lock it, clear what
    a kill left half written, and put the checkpoint before the newest in the place of a damaged
    one. Rank 0 does it, the others wait. Raises UsageError."""
    out = Path(out)
    if rank == 0 and out.is_dir():
        lock(out)
        for name in (NAME, "metrics.jsonl", "config.json"):
            for half in out.glob(f".{name}.*"):
                half.unlink()
        newest, previous = out / NAME, out / PREVIOUS
        if previous.exists() and not is_whole(newest):
            if not is_whole(previous):
                raise UsageError(f"--out {out}: {NAME} and {PREVIOUS} are both damaged; delete "
                                 "that folder to start anew, or use another --out")
            what = "is damaged" if newest.exists() else "is missing"
            step = load_checkpoint(previous)["step"]
            os.replace(previous, newest)
            print(f"{newest} {what}: goes on from the one before it, of step {step}",
                  file=sys.stderr)
    if world_size() > 1:
        torch.distributed.barrier()


def is_whole(path):
    """Whether a checkpoint is there and can be loaded."""
    try:
        return "step" in load_checkpoint(path)
    except UsageError:
        return False


def is_of_train(file):
    """Whether a loaded file is a checkpoint of this train.py."""
    return isinstance(file, dict) and {"student", "arch", "config"} <= file.keys()


def parts_of(run):
    """What a checkpoint stores the state of, by key."""
    parts = {"student": run.student, "optimizer": run.optimizer}
    if run.scaler.is_enabled():
        parts["scaler"] = run.scaler
    for name, teacher in run.teachers.named().items():
        parts[f"{name}_teacher"] = teacher
    return parts


def precision_before(out):
    """The precision of the run in the folder `out`, None if it holds none."""
    there = all((Path(out) / name).exists() for name in ("config.json", NAME))
    return read_json(Path(out) / "config.json").get("precision") if there else None


def continue_from(path, config, free, mean, images, key="student"):
    """The checkpoint of a run to continue, None if there is none.

    A run with other settings or other images is refused with what differs; the settings in `free`
    (device, workers, ...) may. mean: of the pixels, computed from whole numbers, so that it does
    not depend on the number of threads; images: how many there are; key: where the file of such a
    run has its weights."""
    if not Path(path).exists():
        return None
    saved, out = load_checkpoint(path, "--out"), f"--out {config['out']}"
    if not isinstance(saved, dict) or not {key, "config", "mean", "images"} <= saved.keys():
        raise UsageError(f"{out}: its checkpoint.pt is not of this program; use another --out")
    remedy = "use another --out"
    if key == "student":                                   # train.py has --init
        remedy += f" (there --init {path} would start from its weights)"
    old = saved["config"]
    differ = [f"{name} was {old.get(name)!r}, now {config.get(name)!r}"
              for name in sorted(old.keys() | config.keys())
              if name not in free and old.get(name) != config.get(name)]
    if differ:
        raise UsageError(f"{out}: holds a run with other settings: {', '.join(differ)}; {remedy}")
    if (saved["mean"], saved["images"]) != (mean, images):
        raise UsageError(f"{out}: holds a run on other images; {remedy}")
    return saved


def load_run(path):
    """A checkpoint of train.py -> student, teachers, config.

    student: a `Student`; teachers: `Teachers`, None where the run had none; config: its settings,
    with mean and std. Networks are in eval mode, on the CPU, without gradient."""
    file = load_checkpoint(path)
    if not is_of_train(file):
        raise UsageError(f"--checkpoint {path}: is not of this train.py, so it has no teachers and "
                         "no pseudo labels; use knn or linear")
    config = SimpleNamespace(**file["config"], mean=file["mean"], std=file["std"])
    student = new_student(file["arch"], config.recipe)
    student.load_state_dict(file["student"])
    student.eval().requires_grad_(False)
    teachers = make_teachers(student, config)
    for name, teacher in teachers.named().items():
        teacher.load_state_dict(file[f"{name}_teacher"])
    return student, teachers, config


def resume(run):
    """Load the checkpoint of a run that was cut off, and set `run.start` and `run.meter`; make the
    folder. Raises UsageError."""
    path, settings = run.out / NAME, dataclasses.asdict(run.config)
    if run.rank == 0:
        make_folder(run.out, "--out")
        lock(run.out)
    saved = continue_from(path, settings, FREE, run.mean, len(run.images))
    if saved:
        run.start, run.meter = saved["step"], saved.get("meter")
        for group in saved["optimizer"]["param_groups"]:   # the device may be another one now
            group["fused"] = run.device.type == "cuda"
        for key, part in parts_of(run).items():
            part.load_state_dict(saved[key])
    if run.rank == 0:
        content = dict(settings, mean=run.mean, std=run.std, channels=run.images.channels)
        write_atomically(run.out / "config.json",
                         lambda file: file.write(json.dumps(content, indent=2).encode()))
        truncate_log(run.out / "metrics.jsonl", run.start or -1)
