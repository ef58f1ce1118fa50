"""The file of a run.

`checkpoint.pt` is a dictionary of plain data and tensors. It loads with `weights_only=True`, so no
code in it is ever executed. It holds

    student, arch                  weights, and the arguments of `Student`
    labelling_teacher, reconstruction_teacher       weights, as far as the recipe has them
    optimizer, scaler, step        to continue the run; scaler of the gradients, in fp16 alone
    config, mean, std, images      settings; mean and std of the pixels; how many images there were

Random states are not in it because there are none: every random number of a run is a function of
(seed, step).
"""

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import torch

from pseudo_labels import Student
from support.command_line import UsageError, make_folder
from support.files import truncate_log, write_atomically
from support.settings import FREE
from teachers import make_teachers


def save_checkpoint(path, content):
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path, flag="--checkpoint"):
    """The dictionary at `path`, tensors on the CPU. Raises UsageError if there is none or it cannot
    be read."""
    if not Path(path).is_file():
        what = "is a folder; name a file in it" if Path(path).is_dir() else "there is no such file"
        raise UsageError(f"{flag} {path}: {what} (checkpoint.pt of a run, encoder.pt of an export)")
    try:
        # official MAE training checkpoints carry their argparse.Namespace, which is plain data too
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{flag} {path}: not a checkpoint that can be read safely "
                         f"({type(error).__name__}); use another file") from error


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
    if not (Path(out) / "checkpoint.pt").exists():
        return None
    return load_checkpoint(Path(out) / "checkpoint.pt", "--out").get("config", {}).get("precision")


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
    old = saved["config"]
    differ = [f"{name} was {old.get(name)!r}, now {config.get(name)!r}"
              for name in sorted(old.keys() | config.keys())
              if name not in free and old.get(name) != config.get(name)]
    if differ:
        raise UsageError(f"{out}: holds a run with other settings: {', '.join(differ)}; use "
                         "another --out, or delete that folder")
    if (saved["mean"], saved["images"]) != (mean, images):
        raise UsageError(f"{out}: holds a run on other images; use another --out, or delete that "
                         "folder")
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
    student = Student(**file["arch"])
    student.load_state_dict(file["student"])
    student.eval().requires_grad_(False)
    teachers = make_teachers(student, config)
    for name, teacher in teachers.named().items():
        teacher.load_state_dict(file[f"{name}_teacher"])
    return student, teachers, config


def resume(run):
    """Load the checkpoint of a run that was cut off, and set `run.start`; make the folder."""
    path, settings = run.out / "checkpoint.pt", dataclasses.asdict(run.config)
    saved = continue_from(path, settings, FREE, run.mean, len(run.images))
    if saved:
        run.start = saved["step"]
        for group in saved["optimizer"]["param_groups"]:   # the device may be another one now
            group["fused"] = run.device.type == "cuda"
        for key, part in parts_of(run).items():
            part.load_state_dict(saved[key])
    if run.rank == 0:
        make_folder(run.out, "--out")
        content = dict(settings, mean=run.mean, std=run.std, channels=run.images.channels)
        write_atomically(run.out / "config.json",
                         lambda file: file.write(json.dumps(content, indent=2).encode()))
        truncate_log(run.out / "metrics.jsonl", run.start or -1)
