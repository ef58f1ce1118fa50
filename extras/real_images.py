"""All recipes on real images with equal image-views: trains, judges, and prints the README's table.

    python -m extras.real_images DATA RUNS                # all of it: hours on a CPU
    python -m extras.real_images DATA RUNS --sets cifar10-jpeg --runs mae pl-mae
    python -m extras.real_images --table                  # table and picture, nothing is trained

DATA holds a folder of each set: fashion-mnist as torchvision wants it, the others as
train/<class>/* and test or val. Every run sees 800,000 views of 20,000 images in 3,120 steps of 256
views: 20 epochs in two views, or 40 in one. Micro encoder, seed 0, 64 image and 128 patch clusters,
colour changes at MC-SSL's strength, labels at the temperature of SwAV.

Results go to results/real_images.jsonl; what is there already is not done again. --table prints
them and draws docs/real-images.png.
"""

import json
import sys
from pathlib import Path
from statistics import median

import torch.nn.functional as F
from matplotlib.lines import Line2D

import eval
import train
from utils.command_line import Parser, run_main
from utils.files import append_json, read_json_lines
from utils.pictures import plt, save

RESULTS = Path(__file__).parent.parent / "results" / "real_images.jsonl"

# Each set leaves 20,000 images to train on.
SETS = {
    "cifar10-jpeg": [
        "--data", "imagefolder", "--img-size", "32", "--patch-size", "4", "--val-fraction", "0.6"],
    "fashion-mnist": [
        "--data", "fashion-mnist", "--val-fraction", "0.66666"],
    "tiny-imagenet-100": [
        "--data", "imagefolder", "--img-size", "64", "--patch-size", "8", "--val-fraction", "0.6"],
}
TITLES = {
    "cifar10-jpeg": "CIFAR-10 (JPEG)",
    "fashion-mnist": "Fashion-MNIST",
    "tiny-imagenet-100": "Tiny ImageNet (100)",
}

# Some of these flags are defaults. They stand here because those may change: the runs of the table
# should not. What is not named is a default: half-lives, weights, standardised targets.
ONE_VIEW = ["--views", "1", "--batch-size", "256", "--epochs", "40", "--eval-every", "4"]
TWO_VIEWS = ["--views", "2", "--batch-size", "128", "--epochs", "20", "--eval-every", "2",
             "--colours", "1", "--mask-ratio", "0.75", "--teacher-view", "same"]
LABELS = [*TWO_VIEWS, "--image-clusters", "64", "--patch-clusters", "128",
          "--teacher-temperature", "0.05"]
RUNS = {
    "mae": ["--recipe", "mae", *ONE_VIEW],
    "mae, our views": ["--recipe", "mae", *TWO_VIEWS],
    "rc-mae": ["--recipe", "rc-mae", *ONE_VIEW],
    "mim-cluster": ["--recipe", "mim-cluster", *LABELS],
    "image pseudo labels alone": ["--recipe", "image-labels", *LABELS],
    "pl-mae-one-teacher": ["--recipe", "pl-mae-one-teacher", *LABELS],
    "pl-mae": ["--recipe", "pl-mae", *LABELS],
}
YARDSTICKS = ("pixels", "untrained")                       # nothing is trained for these


def attention(q, k, v):
    """F.scaled_dot_product_attention written out.

    On a CPU in bf16 it is two to ten times as fast as torch's own at 17 to 65 tokens."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


# --------------------------------------------------------------------------------- train and judge

def folder(runs, data, name):
    """The folder of a run, below that of all runs."""
    return Path(runs) / f"{data}-{name}".replace(",", "").replace(" ", "-")


def plain(record):
    """A record of eval.jsonl without what says nothing elsewhere."""
    return {k: v for k, v in record.items() if k not in ("task", "checkpoint", "seconds")}


def judge(data, name, out):
    """The row of a finished run: test accuracy, diagnosis, time."""
    for task in ("knn", "linear", "diagnose"):
        eval.main([task, "--checkpoint", str(out / "checkpoint.pt")])
    log = read_json_lines(out / "metrics.jsonl")
    losses = [r for r in log if "loss" in r]
    tests = [r for r in log if "knn_mean" in r]
    views = json.loads((out / "config.json").read_text())["views"]
    images_per_s = median(r["images_per_s"] for r in losses)

    row = dict(data=data, run=name)
    row["microseconds_per_view"] = round(1e6 / views / images_per_s)
    row["knn_by_epoch"] = {
        round(r["epoch"]): (round(r["knn_class"], 4), round(r["knn_mean"], 4)) for r in tests}
    row["last"] = {key: round(value, 4) for key, value in losses[-1].items()}
    for record in read_json_lines(out / "eval.jsonl"):
        if record["network"] not in YARDSTICKS:
            row[record["task"]] = plain(record)
    return row


def judge_yardstick(data, name, mae):
    """The row of raw pixels or of an untrained encoder. mae: folder of a run on these images."""
    for task in ("knn", "linear"):
        eval.main([task, "--network", name, "--checkpoint", str(mae / "checkpoint.pt")])
    row = dict(data=data, run=name)
    for record in read_json_lines(mae / "eval.jsonl"):
        if record["network"] == name:
            row[record["task"]] = plain(record)
    return row


def train_and_judge(data, name, options):
    """One row of the table."""
    if name in YARDSTICKS:
        return judge_yardstick(data, name, folder(options.out, data, "mae"))
    out = folder(options.out, data, name)
    where = ["--data-root", f"{options.data}/{data}", "--out", str(out)]
    train.main([*SETS[data], *RUNS[name], *where, "--precision", "bf16"])
    return judge(data, name, out)


# ------------------------------------------------------------------------------------------- show

def percent(record):
    """Accuracies of both tokens, or of the pixels: "45.8 / 48.1"."""
    return " / ".join(f"{100 * accuracy:.1f}" for accuracy in record["tokens"].values())


def table():
    """Print all results as a table of the README."""
    sets = list(SETS)
    runs = [*YARDSTICKS, *RUNS]
    rows = read_json_lines(RESULTS)
    rows.sort(key=lambda row: (sets.index(row["data"]), runs.index(row["run"])))
    print("| images | run | k-NN (class / mean token) | linear | µs a view |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [
            TITLES.get(row["data"], row["data"]),
            row["run"],
            percent(row["knn"]),
            percent(row["linear"]),
            str(row.get("microseconds_per_view", "")),
        ]
        print("| " + " | ".join(cells) + " |")


def picture(path):
    """k-NN on held-out images while training, of the token that is better at the end."""
    rows = [r for r in read_json_lines(RESULTS) if r["run"] in RUNS]
    rows.sort(key=lambda row: list(RUNS).index(row["run"]))
    sets = [name for name in SETS if any(r["data"] == name for r in rows)]
    size = (5 * len(sets), 4.6)
    figure, axes = plt.subplots(1, len(sets), figsize=size, layout="constrained", squeeze=False)
    colours = {name: f"C{number}" for number, name in enumerate(RUNS)}
    for axis, data in zip(axes[0], sets):
        axis.set_title(TITLES.get(data, data))
        axis.set_xlabel("thousand image-views")
        axis.set_ylabel("k-NN, %; dashed: mean token, else class token")
        for row in rows:
            if row["data"] == data:
                draw(axis, row, colours[row["run"]])
    shown = [name for name in RUNS if any(r["run"] == name for r in rows)]
    handles = [Line2D([], [], color=colours[name], label=name) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    save(figure, path)


def draw(axis, row, colour):
    """One run: k-NN over the views that it has seen, 800 thousand at its end."""
    epochs = [int(epoch) for epoch in row["knn_by_epoch"]]
    tokens = zip(*row["knn_by_epoch"].values())                          # of the class, of the mean
    styles = zip(tokens, ("-", "--"))
    accuracies, style = max(styles, key=lambda pair: pair[0][-1])
    views = [epoch / epochs[-1] * 800 for epoch in epochs]
    axis.plot(views, [100 * a for a in accuracies], color=colour, linestyle=style)


# ------------------------------------------------------------------------------------- the command

def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", help="folder of the data sets")
    parser.add_argument("out", nargs="?", help="folder for the runs")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--runs", nargs="+", choices=[*YARDSTICKS, *RUNS],
                        default=[*RUNS, *YARDSTICKS])
    parser.add_argument("--table", action="store_true", help="show what is there, train nothing")
    options = parser.parse_args(argv)
    if options.table:
        table()
        picture(RESULTS.parent.parent / "docs" / "real-images.png")
        return
    if not options.out:
        parser.error("DATA and RUNS: a folder of the data sets and one for the runs; or --table")
    RESULTS.parent.mkdir(exist_ok=True)
    F.scaled_dot_product_attention = attention
    for data in options.sets:
        for name in options.runs:
            done = [(row["data"], row["run"]) for row in read_json_lines(RESULTS)]
            if (data, name) not in done:
                print(f"--- {data}: {name}", file=sys.stderr)
                append_json(RESULTS, train_and_judge(data, name, options))
    table()


if __name__ == "__main__":
    run_main(main)
