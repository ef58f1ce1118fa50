"""Works off a plan of runs: trains, judges, and writes a line of results for each.

    python -m results.study PLAN DATA RUNS [--stage NAME ...] [--limit N] [--results FILE]

PLAN is a text file, such as results/plan.txt. A line of it is a run:

    stage   set            seed   name: flags of train.py

DATA holds a folder of each set of images: fashion-mnist as torchvision wants it, photographs as
train/<class>/* and test or val. What follows `@` in the name of a set is no part of the folder's:
`cifar10-jpeg@tiny` is a ViT-Tiny on all training images of `cifar10-jpeg`. RUNS is where the runs
go. A run that has its line in the results is not done again: delete the line to repeat it. A run
that was cut off continues, and one that failed gets a line that says so. Several processes may work
off one plan: each takes the next run that no other has. So that other work is not slowed, start one
for each core, each with one thread: OMP_NUM_THREADS=1 nice -n 19 python -m results.study ...

Runs with the names `pixels` and `untrained` are yardsticks: raw pixels, or the network before
training, on the images of that run. Runs whose name begins with that of a file of extras/relatives
train that: `cae`, `cae-equal-time`.

Runs compute in bf16. On CPUs with AVX512-BF16 this is faster. On others it is many times slower:
there, say --precision fp32. On a GPU use --compile, and six processes or so at a time: they keep it
busy while one of them compiles or looks at pictures.

Search and evidence are kept apart: runs of the stage `search` are judged on validation images
alone, all others on the test split as well. The stage `repeat` is for runs of the evidence that are
done again on another machine: compare them with one another only.

The stages `finetune`, `segment` and `detect` train a run of the evidence further, by the program of
that name in extras/: the run of that set, seed and name, or, with the name `scratch`, the
network of `pl-mae` with random weights. What stands behind a comma is no part of the name. Flags
are those of that program.
"""

import fcntl
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python results/study.py`

import eval
import train
from extras import detect, finetune, segment
from support.checkpoint import RELATIVES
from support.command_line import Parser, UsageError, path, run_main
from support.files import append_json, read_json, read_json_lines

ROOT = Path(__file__).parent.parent
FOLDER = "--data imagefolder --val-fraction 0.6 "                  # leaves 20,000 of 50,000 images
SETS = {
    "shapes": "--data shapes",
    "cifar10-jpeg": FOLDER + "--img-size 32 --patch-size 4",
    "fashion-mnist": "--data fashion-mnist --val-fraction 0.66666",
    "tiny-imagenet-100": FOLDER + "--img-size 64 --patch-size 8",
    "cifar10-jpeg@tiny": "--data imagefolder --img-size 32 --patch-size 4 --model tiny",
}
FURTHER = {"finetune": finetune, "segment": segment, "detect": detect}
YARDSTICKS = ("pixels", "untrained")                   # --network of eval.py that needs no training


class Planned(NamedTuple):
    """A line of a plan."""
    stage: str
    data: str
    seed: int
    name: str
    flags: list


def read_plan(path):
    """The runs of a plan, in order. Empty lines, and what follows a #, say nothing."""
    runs = []
    for number, text in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        text = text.split("#")[0].strip()
        if text:
            where, _, flags = text.partition(":")
            words = where.split(maxsplit=3)
            if len(words) != 4 or words[1] not in SETS or not words[2].isdigit():
                raise UsageError(f"{path}, line {number}: write `stage set seed name: flags`; sets "
                                 f"are {', '.join(SETS)}")
            stage, data, seed, name = words
            runs.append(Planned(stage, data, int(seed), name, flags.split()))
    return runs


def key(row):
    """What tells a run, or its line of results, from the others."""
    return row["stage"], row["data"], row["seed"], row["name"]


# --------------------------------------------------------------------------------- train and judge

def folder_of(run, data_root):
    """The --data-root of a run: `shapes` keeps its images beside the folders of the others."""
    return str(data_root) if run.data == "shapes" else f"{data_root}/{run.data.split('@')[0]}"


def train_and_judge(run, data_root, out, more):
    """Train a run (or continue it) -> what its line of results says of it. more: further flags."""
    start = time.perf_counter()
    name = run.name.split("-")[0]
    relative = import_module(f"extras.relatives.{name}") if name in RELATIVES else None
    train.main([*SETS[run.data].split(), *run.flags, "--data-root", folder_of(run, data_root),
                "--out", str(out), "--seed", str(run.seed), *more], relative)
    row = describe_log(out)
    (out / "eval.jsonl").unlink(missing_ok=True)           # of a judgement that was cut off
    split = "validation" if run.stage == "search" else "test"
    network = ["--network", run.name] if run.name in YARDSTICKS else []
    tasks = ["knn", "linear"] + ["patches"] * (run.data == "shapes")
    eval.main([*tasks, *["diagnose"] * (not network), "--checkpoint", str(out / "checkpoint.pt"),
               "--split", split, *network])
    for record in read_json_lines(out / "eval.jsonl"):
        row[record["task"]] = {name: value for name, value in record.items()
                               if name not in ("task", "checkpoint", "seconds", "data", "data_root",
                                            "step")}
    row["minutes"] = round((time.perf_counter() - start) / 60, 1)          # of this process
    return row


def train_further(run, data_root, out, more):
    """Fine-tune, segment or detect with a run of the evidence -> what its line says of it."""
    start = time.perf_counter()
    name = run.name.split(",")[0]
    scratch = name == "scratch"
    if scratch:
        name = "pl-mae"
    folder = out.parent / f"evidence-{run.data}-{name}-{run.seed}"
    FURTHER[run.stage].main([
        "--checkpoint", str(folder / "checkpoint.pt"), *["--from-scratch"] * scratch,
        "--data-root", folder_of(run, data_root), "--out", str(out), "--seed", str(run.seed),
        *more, *run.flags])
    found = read_json(out / "result.json")
    del found["start"]
    return {run.stage: found, "minutes": round((time.perf_counter() - start) / 60, 1)}


def describe_log(out):
    """Of metrics.jsonl: steps, speed, k-NN by epoch, the last losses."""
    log = read_json_lines(out / "metrics.jsonl")
    steps = [record for record in log if "loss" in record]
    looks = [record for record in log if "knn_mean" in record]
    found = {"knn_by_epoch": {round(r["epoch"], 1): (r["knn_class"], r["knn_mean"]) for r in looks}}
    if steps:
        config = read_json(out / "config.json")
        views = config["views"]
        found["views_per_epoch"] = round(
            config["batch_size"] * views * steps[-1]["step"] / steps[-1]["epoch"])
        found["microseconds_per_view"] = round(
            1e6 / views / median(r["images_per_s"] for r in steps))
        found["last"] = {name: round(value, 4) for name, value in steps[-1].items()}
    return found


def circumstances():
    """What a result depends on beside the settings."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"commit": commit, "processor": processor[0] if processor else "unknown",
            "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
            "threads": torch.get_num_threads()} | gpu


@contextmanager
def taken(path):
    """Whether this process is the first to take the file at path. Let go of when it ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


# ------------------------------------------------------------------------------------- the command

def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", type=path, help="a text file, a run in each line")
    parser.add_argument("data", type=path, help="folder of the data sets")
    parser.add_argument("runs", type=path, help="folder for the runs")
    parser.add_argument("--stage", nargs="+", help="only these (default: all)")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many runs")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16",
                        help="what to compute in (default: bf16)")
    parser.add_argument("--compile", action="store_true", help="train.py's --compile, for GPUs")
    parser.add_argument("--results", default=ROOT / "results" / "study.jsonl", type=path)
    options = parser.parse_args(argv)
    where, runs_done = circumstances(), 0  # now: who knows what the folder holds an hour later
    for run in read_plan(options.plan):
        if options.stage and run.stage not in options.stage:
            continue
        out = Path(options.runs, f"{run.stage}-{run.data}-{run.name}-{run.seed}".replace(" ", "-"))
        out.parent.mkdir(parents=True, exist_ok=True)
        with taken(f"{out}.lock") as free:
            row = dict(run._asdict(), flags=" ".join(run.flags), precision=options.precision)
            if not free or key(row) in map(key, read_json_lines(options.results)):
                continue
            print(f"--- {run.stage}: {run.data}, {run.name}, seed {run.seed}", file=sys.stderr)
            try:
                work = train_further if run.stage in FURTHER else train_and_judge
                compiled = ["--compile"] * (options.compile and work is train_and_judge
                                            and "greenmim" not in run.name)    # which cannot
                row |= work(run, options.data, out, ["--precision", options.precision, *compiled])
            except (Exception, SystemExit) as error:       # the plan goes on; the line says why
                if isinstance(getattr(error, "code", None), int) and error.code > 128:
                    raise                                  # a signal ends the plan too
                traceback.print_exc()
                row["error"] = traceback.format_exc().strip().splitlines()[-1][:200]
            append_json(options.results, row | where)
        runs_done += 1
        if runs_done == options.limit:
            break


if __name__ == "__main__":
    run_main(main)
