"""The tables of the pages, out of results/study.jsonl, which study.py has written.

    python -m results.tables    # writes them into the pages, draws docs/results-SET.png

A table belongs on a page between two lines, `<!-- KIND ... -->` and `<!-- end -->`:

    all STAGE SET               every run of a stage on a set of images, in three tables. The first
                                has the mean over seeds, and in brackets the least and the greatest.
                                The second has differences from one run, the baseline. The third
                                says what pseudo labels agree with
    summary SET                 the runs of SUMMARY, each with its flags of train.py
    pick SET RUN ...            these runs, likewise
    pair STAGE SET RUN OTHER    two runs, and their difference

Differences are *paired by seed*: where both have as many views of an image, a seed gives them the
same order of images, crops and masks, and most of its luck cancels. The pictures show the runs of
the stages `evidence` and `photographs`, a point for each seed; and of the latter k-NN while they
trained.
"""

import re
import shlex
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python results/tables.py`

from support.command_line import Parser, path, run_main
from support.files import read_json_lines, write_atomically
from support.pictures import plt, save

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "study.jsonl"
PAGES = [ROOT / "docs" / "results.md", ROOT / "docs" / "relatives.md",
         ROOT / "results" / "tables.md", ROOT / "README.md"]
# Names of runs in words.
WORDS = {
    "pixels": "raw pixels",
    "untrained": "untrained encoder",
    "mae": "MAE",
    "mae-plain-pixels": "MAE, pixels not standardised",
    "mae-same-views": "MAE, pixels not standardised, views and masks of pl-mae",
    "mae-equal-time": "MAE, trained as long as pl-mae",
    "rc-mae": "RC-MAE",
    "rc-mae-1%": "RC-MAE (1%)",
    "image-labels": "image pseudo labels alone",
    "mim-cluster": "one teacher, pixels",
    "mim-cluster-0.3%": "one teacher (0.3%), pixels",
    "mim-cluster-plain-pixels": "one teacher, pixels not standardised",
    "pl-mae-one-teacher": "one teacher, tokens",
    "pl-mae-one-teacher-0.3%": "one teacher (0.3%), tokens",
    "pl-mae": "two teachers, tokens: pl-mae",
    "pl-mae-long": "two teachers, tokens: pl-mae, 1.28 million views",
    "place-kept": "pl-mae, patch pseudo labels with place",
    "without-koleo": "pl-mae without KoLeo",
    "teachers-that-stand-still": "pl-mae, teachers that never change",
    "temperature-0.2": "pl-mae, pseudo labels at temperature 0.2",
    "scratch": "random weights",
    "sdae": "SdAE",
    "cae": "CAE",
    "mixedae": "MixedAE",
    "greenmim": "GreenMIM (another network)",
    "mae-mask-0.5": "MAE, 50% hidden",
    "mae-plain-pixels-equal-time": "MAE, pixels not standardised, as long as pl-mae",
    "sdae-equal-time": "SdAE, trained as long as pl-mae",
    "cae-equal-time": "CAE, trained as long as pl-mae",
    "mixedae-equal-time": "MixedAE, trained as long as pl-mae",
    "greenmim-equal-time": "GreenMIM, trained as long as pl-mae",
    "cae-align-0": "CAE without alignment",
    "scratch, no layer decay": "random weights",
    "mae, no layer decay": "MAE",
    "mae-plain-pixels, no layer decay": "MAE, pixels not standardised",
    "mae-plain-pixels-equal-time, no layer decay":
        "MAE, pixels not standardised, as long as pl-mae",
    "mae-equal-time, no layer decay": "MAE, trained as long as pl-mae",
    "pl-mae, no layer decay": "two teachers, tokens: pl-mae",
}
SUMMARY = ("pixels", "untrained", "mae", "mae-plain-pixels", "mae-same-views", "rc-mae",
           "image-labels", "mim-cluster", "mim-cluster-plain-pixels", "pl-mae-one-teacher",
           "pl-mae-one-teacher-0.3%", "pl-mae")
EVIDENCE = ("evidence", "photographs")                     # stages that looked at the test split
BASELINES = ("other-colours", "pl-mae")                    # the first of them that is there
# Heading: task of eval.py, key of its record, key inside that. All are shares.
SCORES = {
    "k-NN class": ("knn", "tokens", "class"),
    "k-NN mean": ("knn", "tokens", "mean"),
    "linear class": ("linear", "tokens", "class"),
    "linear mean": ("linear", "tokens", "mean"),
    "patches, mIoU": ("patches", "miou", None),
    "fine-tuned": ("finetune", "top1", None),
    "segmented, mIoU": ("segment", "miou", None),
    "boxes, AP": ("detect", "box_ap", None),
    "boxes, AP at 0.5": ("detect", "box_ap50", None),
    "masks, AP": ("detect", "mask_ap", None),
    "masks, AP at 0.5": ("detect", "mask_ap50", None),
}

# Heading: key of the diagnosis. NMI, or a share of the images; its value by chance has another key.
AGREEMENTS = {
    "patch: place": "patch_nmi_place",
    "patch: colour": "patch_nmi_colour",
    "patch: class of its pixels": "patch_nmi_mask",
    "patch: class of the image": "patch_nmi",
    "image: class": "image_nmi",
    "image: two views alike": "image_two_views",
}


def score(row, heading):
    """A score of a run in %, None if it was not measured."""
    task, name, inside = SCORES[heading]
    value = row.get(task, {}).get(name)
    if inside is not None and value is not None:
        value = value.get(inside, value.get("pixels"))       # raw pixels have no tokens
    return None if value is None else 100 * value


def with_range(values, sign=""):
    """"44.1 (43.0 to 45.2)": mean, least and greatest; of one value just this."""
    if not values:
        return ""
    text = f"{mean(values):{sign}.1f}"
    if len(values) > 1:
        text += f" ({min(values):{sign}.1f} to {max(values):{sign}.1f})"
    return text


def scores_table(by_name, headings):
    """{name: {seed: row}} -> rows of texts."""
    rows = [["run", "seeds", *headings, "µs a view"]]
    for name, by_seed in by_name.items():
        columns = [[score(row, heading) for row in by_seed.values()] for heading in headings]
        columns = [[value for value in column if value is not None] for column in columns]
        times = [row["microseconds_per_view"] for row in by_seed.values()
                 if "microseconds_per_view" in row]
        time = f"{mean(times):.0f}" if times else ""
        rows.append([name, str(len(by_seed)), *map(with_range, columns), time])
    if not any(row[-1] for row in rows[1:]):               # of runs that were trained further
        rows = [row[:-1] for row in rows]
    return rows


def differences_table(by_name, headings, baseline):
    """{name: {seed: row}} -> rows of texts: each against the baseline, in points of %."""
    base = by_name[baseline]
    rows = [[f"minus `{baseline}`", "seeds", *headings]]
    for name, by_seed in by_name.items():
        seeds = [seed for seed in by_seed if seed in base]
        cells = differences(by_seed, base, seeds, headings)
        if name != baseline and any(cells):
            rows.append([name, str(len(seeds)), *cells])
    return rows


def summary_table(by_name, names=SUMMARY):
    """{name: {seed: row}} -> rows of texts: of the runs of these names, in that order."""
    names = [name for name in names if name in by_name]
    headings = headings_of(by_name[name] for name in names)
    rows = [["", "flags of train.py", "seeds", *headings]]
    for name in names:
        runs = list(by_name[name].values())
        flags = re.sub(r" ?--eval-every \d+", "", runs[0].get("flags", ""))
        if runs[0]["stage"] == "relatives":
            flags = f"of extras.relatives: {name.split('-')[0]} {flags}"
        flags = f"`{flags}`" if name not in ("pixels", "untrained") else "none: nothing is trained"
        rows.append([WORDS[name], flags, str(len(runs)), *ranges(runs, headings)])
    return rows


def pair_table(by_name, name, other):
    """{name: {seed: row}} -> rows of texts: two runs of the seeds that both have, and the first
    minus the second."""
    seeds = [seed for seed in by_name[name] if seed in by_name[other]]
    headings = headings_of([by_name[name], by_name[other]])
    rows = [["", "seeds", *headings]]
    for each in (name, other):
        runs = [by_name[each][seed] for seed in seeds]
        rows.append([WORDS.get(each, each), str(len(seeds)), *ranges(runs, headings)])
    cells = differences(by_name[name], by_name[other], seeds, headings)
    return [*rows, ["difference", "", *cells]]


def differences(runs, others, seeds, headings):
    """{seed: row} minus {seed: row}: of each score the mean over the seeds, with its range."""
    cells = []
    for heading in headings:
        pairs = [(score(runs[seed], heading), score(others[seed], heading)) for seed in seeds]
        cells.append(with_range([a - b for a, b in pairs if None not in (a, b)], "+"))
    return cells


def headings_of(runs):
    """The scores that some row of the runs, each {seed: row}, has."""
    rows = [row for by_seed in runs for row in by_seed.values()]
    return [heading for heading in SCORES
            if any(score(row, heading) is not None for row in rows)]


def ranges(rows, headings):
    """Of each score the mean over rows, with the least and the greatest."""
    found = [[score(row, heading) for row in rows] for heading in headings]
    return [with_range([value for value in values if value is not None]) for values in found]


def labels_table(by_name):
    """{name: {seed: row}} -> rows of texts: agreement of pseudo labels, and in brackets that of
    chance."""
    rows = [["pseudo labels", *AGREEMENTS]]
    for name, by_seed in by_name.items():
        cells = []
        for key in AGREEMENTS.values():
            chance = "image_two_views_chance" if key == "image_two_views" else f"{key}_shuffled"
            found = [row["diagnose"] for row in by_seed.values() if key in row.get("diagnose", {})]
            cells.append(f"{mean(each[key] for each in found):.2f} "
                         f"({mean(each[chance] for each in found):.2f})" if found else "")
        if any(cells):
            rows.append([name, *cells])
    return rows


def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def by_run(rows, stage, data):
    """Rows of results of a stage and set -> {name: {seed: row}}; failed runs are left out."""
    by_name = {}
    for row in rows:
        if (row["stage"], row["data"]) == (stage, data) and "error" not in row:
            by_name.setdefault(row["name"], {})[row["seed"]] = row
    return by_name


def all_tables(by_name):
    """{name: {seed: row}} -> Markdown."""
    headings = headings_of(by_name.values())
    text = markdown(scores_table(by_name, headings))
    baseline = next((name for name in BASELINES if name in by_name), None)
    if baseline and len(by_name) > 1:
        text += "\n\n" + markdown(differences_table(by_name, headings, baseline))
    labels = labels_table(by_name)
    return text if len(labels) == 1 else text + "\n\n" + markdown(labels)


def table(rows, kind, *where):
    """What a page asks for, as Markdown; "" where there are no such results."""
    if kind in ("summary", "pick"):
        data, *names = where
        by_name = {}
        for stage in ("relatives", *EVIDENCE):
            by_name |= by_run(rows, stage, data)
        return markdown(summary_table(by_name, names or SUMMARY)) if by_name else ""
    by_name = by_run(rows, *where[:2])
    if kind == "all":
        return all_tables(by_name) if by_name else ""
    first, other = (by_name.get(name, {}) for name in where[2:])
    return markdown(pair_table(by_name, *where[2:])) if first.keys() & other.keys() else ""


def in_order(names):
    """Each name once, in the order of WORDS; others behind."""
    order = list(WORDS)
    return sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order
                  else len(order))


def picture(rows, path):
    """Runs on one set of images: a panel for each score, a line for each name, a point for each
    seed and a mark at their mean."""
    headings = headings_of([dict(enumerate(rows))])
    names = in_order(row["name"] for row in rows)
    size = (2.2 * len(headings) + 3.4, 0.34 * len(names) + 1)
    figure, axes = plt.subplots(1, len(headings), figsize=size, sharey=True, layout="constrained")
    for axis, heading in zip(axes, headings):
        for line, name in enumerate(names):
            values = [score(row, heading) for row in rows if row["name"] == name]
            values = [value for value in values if value is not None]
            axis.plot(values, [line] * len(values), "o", color="C0", alpha=0.6, markersize=5)
            if values:
                axis.plot(mean(values), line, "|", color="black", markersize=14)
        axis.set_title(f"{heading}, %", fontsize=10)
        axis.set_yticks(range(len(names)), [WORDS.get(name, name) for name in names])
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()                                 # the first name on top
    save(figure, path)


def curves_picture(rows, path):
    """k-NN on validation images over the views seen: a panel for each token, a line for each
    recipe (the mean over its seeds), and a band from the least to the greatest seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, token, title in zip(axes, (0, 1), ("class token", "mean of the patch tokens")):
        for name in in_order(row["name"] for row in rows if "last" in row):
            runs = [row for row in rows if row["name"] == name]
            epochs = list(runs[0]["knn_by_epoch"])
            views = [float(epoch) * runs[0]["views_per_epoch"] / 1e6 for epoch in epochs]
            scores = [[100 * run["knn_by_epoch"][epoch][token] for run in runs]
                      for epoch in epochs]
            [line] = axis.plot(views, [mean(each) for each in scores], "o-", markersize=3,
                               label=WORDS.get(name, name))
            axis.fill_between(views, [min(each) for each in scores],
                              [max(each) for each in scores], alpha=0.2, color=line.get_color())
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("million views")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("k-NN on held-out images, %")
    axes[1].legend()
    save(figure, path)


def fill(page, rows):
    """The text of a page with the tables, made of rows of results, put where they belong."""
    def put(match):
        found = table(rows, *shlex.split(match[1]))        # names with spaces are in quotes
        inside = f"\n{found}\n\n" if found else ""
        return f"<!-- {match[1]} -->\n{inside}<!-- end -->"

    return re.sub(r"<!-- ((?:all|summary|pick|pair) [^>]+) -->\n.*?<!-- end -->", put, page,
                  flags=re.DOTALL)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="?", default=RESULTS, type=path,
                        help="a file of results/study.py")
    parser.add_argument("--pages", nargs="+", default=PAGES, type=path, metavar="FILE",
                        help="where tables go, and beside the first of them pictures (default: "
                        "those of the project)")
    options = parser.parse_args(argv)
    rows = read_json_lines(options.results)
    pages = list(map(Path, options.pages))
    for each in pages:
        page = fill(each.read_text("utf-8"), rows).encode()
        write_atomically(each, lambda file: file.write(page))
    folder = pages[0].parent
    for stage, data in dict.fromkeys((row["stage"], row["data"]) for row in rows):
        shown = [row for row in rows if (row["stage"], row["data"]) == (stage, data)
                 and stage in EVIDENCE and "error" not in row]
        file = data.replace("@", "-")
        if shown:
            picture(shown, folder / f"results-{file}.png")
        if shown and stage == "photographs":
            curves_picture(shown, folder / f"views-{file}.png")


if __name__ == "__main__":
    run_main(main)
