"""Train the models of the notebooks, or take them from `runs/` if they are there, and keep what the
notebooks need.

    python notebooks/make_checkpoints.py         # half an hour on two cores

Writes into the folder of this file, weights in half precision:

    mae.pt, pl-mae.pt           runs at their end, for `load_run`. The learning rate ends at 0, so
                                teachers have caught up with the student by then (the script prints
                                how far they are from it). The student stands in for all of them,
                                which keeps the files small
    pl-mae-half-way.pt          the labelling teacher alone, after half of the steps
    pl-mae-same-colours.pt      the labelling teacher alone, at the end of a run whose teachers see
                                the student's colours
    history.jsonl               after each epoch: what the log holds, and how near the teachers are
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from support import checkpoint, settings  # noqa: E402
from support.checkpoint import load_checkpoint, load_run, save_checkpoint  # noqa: E402
from support.datasets import held_out, load_images  # noqa: E402
from support.files import append_json, read_json_lines  # noqa: E402
from support.health import centred_cosine  # noqa: E402
from support.probes import features, subset  # noqa: E402

HERE = ROOT / "notebooks"
RUNS = {                                   # as many views of the images each
    "mae": ["--recipe", "mae", "--epochs", "24", "--eval-every", "8"],
    "pl-mae": ["--recipe", "pl-mae", "--epochs", "12", "--eval-every", "1"],
    "same-colours": ["--recipe", "pl-mae", "--epochs", "12", "--eval-every", "1",
                     "--teacher-view", "same"],
}
TEACHERS = ("labelling_teacher", "reconstruction_teacher")


def main():
    checkpoint.save_checkpoint = save_and_keep             # which saves
    for name, flags in RUNS.items():                       # a finished run is left as it is
        train.main([*flags, "--save-minutes", "0", "--data-root", str(ROOT / "data"),
                    "--out", str(folder(name))])
    for name in ("mae", "pl-mae"):
        whole(name)
    labelling(kept("pl-mae")[6], "pl-mae-half-way", RUNS["pl-mae"])
    labelling(kept("same-colours")[12], "pl-mae-same-colours", RUNS["same-colours"])
    history()


def folder(name):
    return ROOT / "runs" / f"notebook-{name}"


def save_and_keep(path, content, keep=None):
    """`save_checkpoint`, and a copy that the next one does not replace."""
    save_checkpoint(path, content, keep)
    shutil.copy(path, path.with_name(f"checkpoint-{content['step']:05}.pt"))


def kept(name):
    """The copies of a run, in order of their steps."""
    return sorted(folder(name).glob("checkpoint-*.pt"))


def half(state):
    return {name: value.half() for name, value in state.items()}


def plain(file, flags):
    """What a file needs but for weights: folders of this machine do not matter."""
    resolved = vars(settings.resolve(flags))
    config = file["config"] | {name: resolved[name] for name in ("out", "data_root")}
    return {name: file[name] for name in ("arch", "step", "mean", "std", "images")} | {
        "config": config}


def whole(name):
    """The end of a run, for `load_run`: the student, also in the places of the teachers."""
    file = load_checkpoint(folder(name) / "checkpoint.pt")
    student = half(file["student"])
    content = plain(file, RUNS[name]) | {"student": student}
    for role in TEACHERS:
        if role in file:
            # a teacher has "encoder.x" of the student's "mae.encoder.x", and heads of equal names
            theirs = {key: key if key in student else f"mae.{key}" for key in file[role]}
            content[role] = {key: student.get(other, file[role][key])
                             for key, other in theirs.items()}
            away = max((file[role][key] - file["student"][other]).abs().max().item()
                       for key, other in theirs.items() if other in student)
            print(f"{name}: no weight of the {role} is further than {away:.1e} from the student's")
    save_checkpoint(HERE / f"{name}.pt", content)


def labelling(path, name, flags):
    """The labelling teacher alone."""
    file = load_checkpoint(path)
    content = plain(file, flags) | {"labelling_teacher": half(file["labelling_teacher"])}
    save_checkpoint(HERE / f"{name}.pt", content)


def history():
    """After each epoch of two runs: what their logs hold, and the cosine of each teacher's features
    with the student's, over 500 held-out scenes."""
    (HERE / "history.jsonl").unlink(missing_ok=True)
    images = load_images("shapes", ROOT / "data", "train")
    ids = subset(held_out(images, 0.1)[1], 500)
    for name in ("pl-mae", "same-colours"):
        log = read_json_lines(folder(name) / "metrics.jsonl")
        for path in kept(name):
            student, teachers, config = load_run(path)
            step = int(path.stem.split("-")[1])
            line = {"run": name, "step": step}
            for record in log:
                if record["step"] == step:
                    line |= record
            encoders = {"student": student.mae.encoder}
            encoders |= {key: teacher.encoder for key, teacher in teachers.named().items()}
            found = {key: features(encoder, images, ids, config.mean, config.std, "cpu")
                     for key, encoder in encoders.items()}
            for key in teachers.named():
                for token in ("class", "mean"):
                    line[f"{key}_{token}_cosine"] = centred_cosine(
                        found["student"][token], found[key][token])
            append_json(HERE / "history.jsonl", line)


if __name__ == "__main__":
    main()
