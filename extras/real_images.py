"""All recipes on real images with equal image-views: trains, judges, and prints the README's table.

    python -m extras.real_images DATA RUNS                                     # all of it: hours on a CPU
    python -m extras.real_images DATA RUNS --sets cifar10-jpeg --runs mae pl-mae
    python -m extras.real_images --table                                       # of results/real_images.jsonl alone, and docs/real-images.png

DATA holds a folder of each set (fashion-mnist as torchvision wants it, the others as train/<class>/* and test or val). Every run sees
800,000 views of 20,000 images in 3,120 steps of 256: 20 epochs in two views, or 40 in one. Micro encoder, seed 0, 64 class and 128
data clusters, colour changes at MC-SSL's strength, labels at the temperature of SwAV. What is done already is not done again.
"""

import json
import sys
from pathlib import Path
from statistics import median

import torch.nn.functional as F

import eval
import train
from checkpoint import append_json, read_json_lines
from extras.command_line import Parser, run_main
from extras.pictures import plt, save

RESULTS = Path(__file__).parent.parent / "results" / "real_images.jsonl"
SETS = {                                                   # each leaves 20,000 images to train on
    "cifar10-jpeg": ["--data", "imagefolder", "--img-size", "32", "--patch-size", "4", "--val-fraction", "0.6"],
    "fashion-mnist": ["--data", "fashion-mnist", "--val-fraction", "0.66666"],
    "tiny-imagenet-100": ["--data", "imagefolder", "--img-size", "64", "--patch-size", "8", "--val-fraction", "0.6"],
}
TITLES = {"cifar10-jpeg": "CIFAR-10 (JPEG)", "fashion-mnist": "Fashion-MNIST", "tiny-imagenet-100": "Tiny ImageNet (100)"}
ONE_VIEW = ["--batch-size", "256", "--epochs", "40", "--eval-every", "4"]
TWO_VIEWS = ["--views", "2", "--batch-size", "128", "--epochs", "20", "--eval-every", "2", "--colours", "1", "--mask-ratio", "0.75"]
LABELS = [*TWO_VIEWS, "--class-clusters", "64", "--data-clusters", "128", "--teacher-temperature", "0.05"]
RUNS = {
    "mae": ["--recipe", "mae", *ONE_VIEW],
    "mae, our views": ["--recipe", "mae", *TWO_VIEWS],
    "rc-mae": ["--recipe", "rc-mae", *ONE_VIEW],
    "mim-cluster": ["--recipe", "mim-cluster", *LABELS],
    "class labels alone": ["--rec-weight", "0", "--data-weight", "0", *LABELS],
    "pl-mae-one-teacher": ["--recipe", "pl-mae-one-teacher", *LABELS],
    "pl-mae": LABELS,
}


def attention(q, k, v):
    """F.scaled_dot_product_attention written out: on a CPU in bf16 two to ten times as fast as torch's own at 17 to 65 tokens."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain(record):
    """A record of eval.jsonl without what says nothing elsewhere."""
    return {k: v for k, v in record.items() if k not in ("task", "checkpoint", "seconds")}


def judge(data, name, out):
    """The row of a finished run: test accuracy, diagnosis, time."""
    for task in ("knn", "linear", "diagnose"):
        eval.main([task, "--checkpoint", str(out / "checkpoint.pt")])
    log = read_json_lines(out / "metrics.jsonl")
    found = {r["task"]: r for r in read_json_lines(out / "eval.jsonl")}
    views = json.loads((out / "config.json").read_text())["views"]
    row = dict(data=data, run=name, microseconds_per_view=round(1e6 / views / median(r["images_per_s"] for r in log if "loss" in r)),
               knn_by_epoch={round(r["epoch"]): (round(r["knn_class"], 4), round(r["knn_mean"], 4)) for r in log if "knn_mean" in r},
               last={k: round(v, 4) for k, v in [r for r in log if "loss" in r][-1].items()})
    return row | {task: plain(r) for task, r in found.items()}


def table():
    percent = lambda row, task: " / ".join(f"{100 * accuracy:.1f}" for accuracy in row[task]["tokens"].values())
    print("| images | run | k-NN (class / mean token) | linear | µs a view |\n| --- | --- | --- | --- | --- |")
    for row in sorted(read_json_lines(RESULTS), key=lambda r: (list(SETS).index(r["data"]), [*YARDSTICKS, *RUNS].index(r["run"]))):
        print(f"| {TITLES.get(row['data'], row['data'])} | {row['run']} | {percent(row, 'knn')} | {percent(row, 'linear')} | {row.get('microseconds_per_view', '')} |")


def picture(path):
    """k-NN on held-out images while training, of the token that is better at the end."""
    rows = [r for r in read_json_lines(RESULTS) if r["run"] in RUNS]
    sets = [name for name in SETS if any(r["data"] == name for r in rows)]
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 4.6), layout="constrained", squeeze=False)
    for axis, data in zip(axes[0], sets):
        for i, row in enumerate(sorted((r for r in rows if r["data"] == data), key=lambda r: list(RUNS).index(r["run"]))):
            epochs, tokens = [int(e) for e in row["knn_by_epoch"]], list(zip(*row["knn_by_epoch"].values()))
            best = max((0, 1), key=lambda t: tokens[t][-1])
            axis.plot([e / epochs[-1] * 800 for e in epochs], [100 * k for k in tokens[best]], color=f"C{list(RUNS).index(row['run'])}",
                      linestyle=("-", "--")[best], label=row["run"])
        axis.set(title=TITLES.get(data, data), xlabel="thousand image-views", ylabel="k-NN, %; dashed: mean token, else class token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


YARDSTICKS = ("pixels", "untrained")


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--runs", nargs="+", choices=[*YARDSTICKS, *RUNS], default=[*RUNS, *YARDSTICKS])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(argv)
    if not options.table and not options.out:
        parser.error("DATA and RUNS: name the folder of the data sets and one for the runs, or --table")
    RESULTS.parent.mkdir(exist_ok=True)
    F.scaled_dot_product_attention = attention
    for data in () if options.table else options.sets:
        for name in options.runs:
            out = Path(options.out) / f"{data}-{name}".replace(", ", "-").replace(" ", "-")
            if any((r["data"], r["run"]) == (data, name) for r in read_json_lines(RESULTS)):
                continue
            print(f"--- {data}: {name}", file=sys.stderr)
            if name in YARDSTICKS:
                mae = Path(options.out) / f"{data}-mae"
                for task in ("knn", "linear"):
                    eval.main([task, "--network", name, "--checkpoint", str(mae / "checkpoint.pt")])
                found = {r["task"]: r for r in read_json_lines(mae / "eval.jsonl") if r["network"] == name}
                append_json(RESULTS, dict(data=data, run=name, knn=plain(found["knn"]), linear=plain(found["linear"])))
                continue
            train.main([*SETS[data], *RUNS[name], "--data-root", f"{options.data}/{data}", "--out", str(out), "--precision", "bf16"])
            append_json(RESULTS, judge(data, name, out))
    table()
    if options.table:
        picture(RESULTS.parent.parent / "docs" / "real-images.png")


if __name__ == "__main__":
    run_main(main)
