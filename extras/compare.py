"""Compare finished runs of train.py: their curves in one picture, their differences in a table.

    python -m extras.compare RUN RUN ...                  # folders that train.py has written
    python -m extras.compare runs/mae-? runs/pl-mae-? --out mae-or-pl-mae.png

Runs that differ in nothing but their seed are one *setting*. The first run's setting is what the
others are compared with. It is named by its recipe; the others by what would have to change in its
command to get theirs.

How to read the table. "k-NN" is that of the log at the end of training, on held-out images. "test"
and "validation" are what eval.py has said of the last checkpoint, on that split; they are there if
all runs have them. The first row is the mean over all seeds of the first setting, in %.
Every other setting is compared with it seed by seed, on the seeds that both have. A seed gives both
runs, as far as their settings allow, the same weights to begin with, order of images, crops and
masks. The table has the mean, the least and the greatest of these differences, in points of %, and
in how many seeds the run was above that of the first setting. If the settings were equally good,
3 of 3 would still happen one time in eight: few seeds show little.

How to read the picture. A line is a run. k-NN says which run is better. The losses do not: pseudo
labels and tokens come from teachers, which are others in every run.
"""

import math
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python extras/compare.py`

from support import settings
from support.command_line import Parser, UsageError, make_folder, path, run_main
from support.files import read_json, read_json_lines
from support.pictures import plt, save
from support.settings import kept_network

# Title of a panel: key in the log, its unit, and what the decoder has to predict (None: anything).
PANELS = {
    "k-NN of the class token, held out, %": ("knn_class", 0.01, None),
    "k-NN of the mean token, held out, %": ("knn_mean", 0.01, None),
    "loss: reconstruction of tokens": ("rec", 1, "tokens"),
    "loss: reconstruction of pixels": ("rec", 1, "pixels"),
    "loss: image pseudo labels": ("image", 1, None),
    "loss: patch pseudo labels": ("patch", 1, None),
}
NEEDED = ("recipe", "data", "img_size", "val_fraction", "mean", "seed", "epochs", "batch_size",
          "views", "target", "consistency_weight")         # of the settings of a run
LINES = ["-", "--", ":", "-.", (0, (8, 2, 1, 2, 1, 2)), (0, (1, 4))]   # for black and white


class Run(NamedTuple):
    """What the folder of a run holds."""
    folder: Path
    config: dict
    log: list                              # the records of metrics.jsonl
    scores: dict                           # {name of a yardstick: share}


# ------------------------------------------------------------------------------------------- read

def read_run(folder):
    """Raises UsageError for a folder that holds no finished run with k-NN."""
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder}: is no run; name a folder that train.py has written (--out)")
    config = read_json(folder / "config.json")
    missing = [name for name in NEEDED if name not in config]
    if missing:
        raise UsageError(f"{folder}: its config.json has no {missing[0]}; name a run of this "
                         "program")
    log = read_json_lines(folder / "metrics.jsonl")
    tests = [record for record in log if "knn_mean" in record]
    if not tests:
        raise UsageError(f"{folder}: has no k-NN in its log; train with images of known class, in "
                         "train/<class>/*, and --val-fraction above 0")
    last = tests[-1]
    if last["epoch"] < config["epochs"]:
        raise UsageError(f"{folder}: its last k-NN is of epoch {last['epoch']:g} of "
                         f"{config['epochs']}; let it finish, or continue it by its command")
    judged = [record for record in read_json_lines(folder / "eval.jsonl")
              if record["network"] == kept_network(config)
              and record["data"] == config["data"] and record["step"] == last["step"]
              and "img_size" not in record]                # at the size of the run
    return Run(folder, config, log, scores(last, judged))


def scores(last, judged):
    """The last k-NN of the log, and records of eval.py -> {name of a yardstick: share}.

    Of two records of the same yardstick the later counts."""
    found = {"k-NN class": last["knn_class"], "k-NN mean": last["knn_mean"]}
    for record in judged:
        split = record.get("split", "test")
        if record["task"] in ("knn", "linear"):
            task = {"knn": "k-NN", "linear": "linear"}[record["task"]]
            for token, accuracy in record["tokens"].items():
                found[f"{split} {task} {token}"] = accuracy
        elif record["task"] == "patches" and "miou" in record:
            found[f"{split} patches mIoU"] = record["miou"]
    return found


def check_images(runs):
    """Raises UsageError if the runs are not all of the same images."""
    first = runs[0]
    for run in runs:
        if describe_images(run.config) != describe_images(first.config):
            raise UsageError(f"{run.folder}: {describe_images(run.config)}, but {first.folder}: "
                             f"{describe_images(first.config)}; compare runs on the same images")


def describe_images(config):
    """Their mean colour tells apart two folders of images, whose data set has the same name."""
    colour = " ".join(f"{channel:.3f}" for channel in config["mean"])
    return (f"{config['data']} of {config['img_size']} pixels, mean colour {colour}, a share of "
            f"{config['val_fraction']} held out")


# ------------------------------------------------------------------------------ settings and pairs

def group(runs):
    """Runs -> {name of a setting: {seed: run}}, in the order in which settings first appear."""
    settings = {}
    for run in runs:
        by_seed = settings.setdefault(name_setting(run.config, runs[0].config), {})
        seed = run.config["seed"]
        if seed in by_seed:
            raise UsageError(f"{run.folder}: has the settings and the seed ({seed}) of "
                             f"{by_seed[seed].folder}; name one of the two")
        by_seed[seed] = run
    return settings


def name_setting(config, first):
    """The recipe if a run has the first one's settings, else what differs: "recipe=mae, epochs=40".

    What a recipe brings with it is not named. Flags of the first run are taken to stay where the
    recipe changes. So two settings never have the same name."""
    flags = {key: value for key, value in first.items() if usual(first).get(key) != value}
    expected = usual(config) | flags | {"recipe": first["recipe"]}
    differing = [f"{key}={config.get(key)}" for key in usual(config)
                 if key not in settings.FREE | {"seed"} and config.get(key) != expected[key]]
    return ", ".join(differing) or first["recipe"]


def usual(config):
    """The settings that a run of this recipe on this data set has without any flag."""
    row = settings.DATA_ROWS.get(config["data"], {}) | settings.RECIPES.get(config["recipe"], {})
    return vars(settings.Config(**row))


def shared_seeds(settings, name):
    """The seeds that a setting has in common with the first. Raises UsageError if there is none."""
    first = next(iter(settings))
    shared = sorted(settings[first].keys() & settings[name].keys())
    if not shared:
        here, there = (", ".join(map(str, sorted(settings[each]))) for each in (name, first))
        raise UsageError(f"{name}: has no seed in common with {first}: {here} here, {there} there; "
                         "train one of them with a --seed of the other")
    return shared


# ------------------------------------------------------------------------------------------ table

def table(settings):
    """{name: {seed: run}} -> the rows of the table, lists of texts; the first is the heading."""
    first, *others = settings
    base = settings[first]
    everyone = [run for by_seed in settings.values() for run in by_seed.values()]
    yardsticks = [yardstick for yardstick in everyone[0].scores
                  if all(yardstick in run.scores for run in everyone)]
    means = [100 * mean(run.scores[yardstick] for run in base.values()) for yardstick in yardsticks]
    rows = [["setting", "seeds", "", *yardsticks],
            [first, str(len(base)), "mean", *[f"{value:.1f}" for value in means]]]
    for name in others:
        seeds = shared_seeds(settings, name)
        columns = [[100 * (settings[name][seed].scores[yardstick] - base[seed].scores[yardstick])
                    for seed in seeds] for yardstick in yardsticks]
        rows += [
            [name, str(len(seeds)), "mean difference", *[f"{mean(each):+.1f}" for each in columns]],
            ["", "", "least", *[f"{min(each):+.1f}" for each in columns]],
            ["", "", "greatest", *[f"{max(each):+.1f}" for each in columns]],
            ["", "", "above in",
             *[f"{sum(d > 0 for d in each)} of {len(seeds)}" for each in columns]],
        ]
    return rows


def markdown(rows):
    """Rows of texts -> a Markdown table that can be read as it is; numbers, from the fourth column
    on, stand to the right."""
    widths = [max(len(text) for text in column) for column in zip(*rows)]
    rule = ["-" * width for width in widths[:3]] + ["-" * (width - 1) + ":" for width in widths[3:]]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        names = [text.ljust(width) for text, width in zip(row[:3], widths[:3])]
        numbers = [text.rjust(width) for text, width in zip(row[3:], widths[3:])]
        lines.append("| " + " | ".join(names + numbers) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- picture

def curve(run, key, unit, target):
    """Views seen, in thousands, and the values in the log; both empty if there are none."""
    if target not in (None, run.config["target"]):
        return [], []
    records = [record for record in run.log if key in record]
    views = run.config["batch_size"] * run.config["views"]                             # of a step
    return ([record["step"] * views / 1000 for record in records],
            [record[key] / unit for record in records])


def picture(settings, path):
    """A panel for each number that some run has; a colour and a kind of line for each setting."""
    runs = [run for by_seed in settings.values() for run in by_seed.values()]
    panels = [title for title, what in PANELS.items() if any(curve(run, *what)[0] for run in runs)]
    columns = 2 if len(panels) == 4 else 3
    rows = math.ceil(len(panels) / columns)
    size = (5 * columns, 4 * rows + 0.25 * len(settings))                # each has a line of legend
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    styles = [dict(color=f"C{number}", linestyle=LINES[number % len(LINES)])
              for number in range(len(settings))]
    for axis, title in zip(axes.flat, panels):
        for by_seed, style in zip(settings.values(), styles):
            for run in by_seed.values():
                views, values = curve(run, *PANELS[title])
                axis.plot(views, values, marker="." if len(views) < 20 else None, **style)
        axis.set(title=title, xlabel="thousand views seen")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes.flat[1].sharey(axes.flat[0])                      # k-NN of both tokens on one scale
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    handles = [Line2D([], [], label=name, **style) for name, style in zip(settings, styles)]
    figure.legend(handles=handles, loc="outside lower center", handlelength=4)
    save(figure, path)


# ------------------------------------------------------------------------------------ the command

def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folders of runs of "
                        "train.py; the first is of the setting that the others are compared with")
    parser.add_argument("--out", default="compare.png", type=path, metavar="FILE",
                        help="the picture (default: compare.png)")
    options = parser.parse_args(argv)
    if len(options.runs) < 2:
        raise UsageError(f"{options.runs[0]}: is only one run; name another to compare it with")
    runs = [read_run(folder) for folder in options.runs]
    check_images(runs)
    settings = group(runs)
    print(markdown(table(settings)))
    seen = {name: run.log[-1]["step"] * run.config["batch_size"] * run.config["views"]
            for name, by_seed in settings.items() for run in by_seed.values()}
    if len(set(seen.values())) > 1:
        one_or_two = len({run.config["views"] for run in runs}) > 1
        print("not as many views of images: "
              + "; ".join(f"{name}: {views:,}" for name, views in seen.items())
              + " (a run of one view needs twice the --epochs)" * one_or_two, file=sys.stderr)
    make_folder(Path(options.out).parent, "--out")
    picture(settings, options.out)


if __name__ == "__main__":
    run_main(main)
