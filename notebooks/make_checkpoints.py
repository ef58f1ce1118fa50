"""Train the models of the notebooks, or take them from `runs/` if they are there, and keep what the
notebooks need.

    python notebooks/make_checkpoints.py         # two hours on two cores

Writes into the folder of this file, weights in half precision:

    mae.pt, pl-mae.pt           runs at their end, for `load_run`. The learning rate ends at 0, so
    your-images.pt              teachers have caught up with the student by then (the script prints
                                how far they are from it). The student stands in for all of them,
                                which keeps the files small. The last one is of the pictures that
                                `draw_pictures` draws, in a folder
    rc-mae.pt, sdae.pt, ...     likewise: other ways to change an MAE, for notebook 7. They are runs
                                of results/study.jsonl. Teachers of these two are slow, and still
                                differ from the student at the end: the notebook says so of SdAE
    pl-mae-same-colours.pt      the labelling teacher alone, at the end of a run whose teachers see
                                the student's colours
    history-b.jsonl             what the log of a run holds, a line after each epoch: of `pl-mae`
    history-same-colours.jsonl  (with how near its teachers are to the student), of the run with
    history-a.jsonl             equal colours, of one whose pseudo labels are not balanced. Their
                                names are not to give away which run is sick
"""

import shutil
import sys
from importlib import import_module
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from support import checkpoint  # noqa: E402
from support.checkpoint import RELATIVES, load_checkpoint, load_run, save_checkpoint  # noqa: E402
from support.datasets import held_out, load_images  # noqa: E402
from support.files import append_json, read_json_lines  # noqa: E402
from support.health import centred_cosine  # noqa: E402
from support.probes import features, subset  # noqa: E402
from support.shapes import scene  # noqa: E402

HERE = ROOT / "notebooks"
PICTURES = 360                             # of the folder that stands in for photographs
RUNS = {
    "mae": ["--recipe", "mae", "--epochs", "24", "--eval-every", "8"],     # as many views as 12
    "pl-mae": ["--epochs", "12", "--eval-every", "1"],
    "same-colours": ["--epochs", "12", "--eval-every", "1", "--teacher-view", "same"],
    "sick": ["--epochs", "12", "--eval-every", "1", "--balancing", "none"],
    "your-images": ["--data", "imagefolder", "--mask-ratio", "0.5", "--colours", "5",
                    "--epochs", "200"],
}
OF_STUDY = ["--epochs", "24", "--eval-every", "8", "--seed", "11"]
RUNS["rc-mae"] = ["--recipe", "rc-mae", *OF_STUDY]
RUNS |= {name: OF_STUDY for name in RELATIVES}
HISTORIES = {"b": "pl-mae", "same-colours": "same-colours", "a": "sick"}
TEACHERS = ("labelling_teacher", "reconstruction_teacher")


def main():
    checkpoint.save_checkpoint = save_and_keep             # which saves
    draw_pictures(images_of("your-images"))
    for name, flags in RUNS.items():                       # a finished run is left as it is
        train.main([*flags, "--save-minutes", "0", "--data-root", str(images_of(name)),
                    "--out", str(folder(name))], relative_of(name))
    for name in ("mae", "pl-mae", "your-images", "rc-mae", *RELATIVES):
        whole(name)
    labelling("same-colours", "pl-mae-same-colours")
    for name, run in HISTORIES.items():
        history(name, run)


def folder(name):
    return ROOT / "runs" / f"notebook-{name}"


def relative_of(name):
    """The file of extras/relatives that a run is of, None if it is of train.py."""
    return import_module(f"extras.relatives.{name}") if name in RELATIVES else None


def images_of(name):
    """The folder of the images of a run."""
    return ROOT / "data" / ("pictures" if name == "your-images" else "")


def draw_pictures(folder, number=PICTURES):
    """Image files without classes: scenes of `shapes` that no other model here has seen."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        pixels = scene(2_000_000 + i)[0].transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg", quality=95)


def save_and_keep(path, content, keep=None):
    """`save_checkpoint`, and a copy that the next one does not replace."""
    save_checkpoint(path, content, keep)
    shutil.copy(path, path.with_name(f"checkpoint-{content['step']:05}.pt"))


def half(state):
    return {name: value.half() for name, value in state.items()}


def plain(file, name):
    """What a file needs but for weights: folders and precision of this machine do not matter."""
    config = file["config"] | {"out": f"runs/{name}", "data_root": "data", "precision": "auto"}
    return {name: file[name] for name in ("arch", "step", "mean", "std", "images")} | {
        "config": config}


def whole(name):
    """The end of a run, for `load_run`: the student, also in the places of the teachers."""
    file = load_checkpoint(folder(name) / "checkpoint.pt")
    student = half(file["student"])
    content = plain(file, name) | {"student": student}
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


def labelling(run, name):
    """The labelling teacher of the end of a run alone."""
    file = load_checkpoint(folder(run) / "checkpoint.pt")
    content = plain(file, run) | {"labelling_teacher": half(file["labelling_teacher"])}
    save_checkpoint(HERE / f"{name}.pt", content)


def history(name, run):
    """What the log of a run holds, a line after each epoch. Of `pl-mae` also the cosine of each
    teacher's features with the student's, over 500 held-out scenes."""
    path = HERE / f"history-{name}.jsonl"
    path.unlink(missing_ok=True)
    looks = {}                                             # by step
    for record in read_json_lines(folder(run) / "metrics.jsonl"):
        looks.setdefault(record["step"], {}).update(record)
    for step, line in looks.items():
        if "knn_class" in line:                            # with an evaluation
            append_json(path, line | (cosines(run, step) if run == "pl-mae" else {}))


def cosines(run, step):
    """How near the teachers of a step were to the student."""
    images = load_images("shapes", images_of(run), "train")
    ids = subset(held_out(images, 0.1)[1], 500)
    student, teachers, config = load_run(folder(run) / f"checkpoint-{step:05}.pt")
    encoders = {"student": student.mae.encoder}
    encoders |= {key: teacher.encoder for key, teacher in teachers.named().items()}
    found = {key: features(encoder, images, ids, config.mean, config.std, "cpu")
             for key, encoder in encoders.items()}
    return {f"{key}_{token}_cosine": centred_cosine(found["student"][token], found[key][token])
            for key in teachers.named() for token in ("class", "mean")}


if __name__ == "__main__":
    main()
