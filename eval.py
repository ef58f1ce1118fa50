"""How good is an encoder? Frozen features, computed once, and a simple classifier on top.

    python eval.py knn --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt
    python eval.py knn linear lowshot --checkpoint runs/A/checkpoint.pt runs/B/checkpoint.pt

`knn` asks whether images of a class lie together; `linear` whether a plane separates them.
`lowshot` is logistic regression with 1, 2, 5, 10 images of each class, and with 1 % and 10 % of
all; `multilabel` the same where an image may have several. `patches` paints each patch in a class;
masks tell whether it is the right one. `diagnose` looks for collapse, and at what pseudo labels
agree with. `features` writes features into a file of numpy; `export` the encoder for timm and
Hugging Face.

The choice of token matters, so both are reported: the class token, and the mean of the patch
tokens. Where one number is given, it is of the token that was better on validation images. These
are the images of the training split that the run held out (of another set, or if it held out none,
a tenth of that split). They also choose what is tuned. --split validation stops there.

Of each task and network a JSON object is printed, and appended to eval.jsonl beside the checkpoint.
A table on stderr compares them. It also shows each difference from the first.

Letters:  n m images, N patches, D width of a token, C classes; x features, y classes of images.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from support import datasets, probes, report, weights
from support.command_line import Parser, UsageError, flag, in_its_words, path, run_main, size
from support.devices import choose_device, memory_errors_in_one_line
from support.files import append_json, write_atomically
from support.health import diagnose
from support.masks import check_pairs, classes_in, masks_of, pixels_of_classes

PATCHES = 400_000                          # patches, at most, that `patches` is trained on


# --------------------------------------------------------------- a network, and what evaluates it

class Evaluated:
    """A frozen network, the images it is evaluated on, and its features, computed once.

    load: `datasets.load_images`, which may remember what it loaded."""

    def __init__(self, checkpoint, network, options, device, load):
        self.checkpoint, self.options, self.device, self.load = checkpoint, options, device, load
        self.encoder, self.info = weights.load_network(
            checkpoint, network, options.img_size, **weights.given(options))
        self.encoder.to(device)
        self.config = self.info.get("config", {})
        self.data, self.root = datasets.choose(options.data, options.data_root, self.config)
        self.set = self.data, str(self.root), self.kept_out()      # what scores depend on
        self.network, self.mean_std = self.info["network"], (self.info["mean"], self.info["std"])
        self.extractor = None if self.network == "pixels" else self.encoder
        self.tested = options.split == "test"              # is the test split looked at?
        self.name = f"{Path(checkpoint).absolute().parent.name} {network or ''}".strip()
        # of the files that are written, so that none takes another one's name
        parts = [Path(checkpoint).stem.removeprefix("checkpoint"), network,
                 options.img_size and "x".join(map(str, self.encoder.img_size))]
        self.suffix = "".join(f"-{part}" for part in parts if part)
        self.own = options.pictures and datasets.single_files(
            options.pictures, self.encoder.img_size, self.encoder.in_chans, "--pictures")
        self.found = {}

    def images(self, split):
        return self.load(self.data, self.root, split, self.encoder.img_size, self.encoder.in_chans)

    def ids(self, split):
        """The images whose class is known; all, if none is."""
        y = self.images(split).y
        return torch.nonzero((y >= 0) | (y < 0).all()).flatten()

    def features(self, split):
        """Of the images at `ids`, on the device: {"class": n D, "mean": n D}, or {"pixels": n P}.
        Of "test" if it is not looked at, None for each."""
        if split == "test" and not self.tested:
            return dict.fromkeys(self.features("train"))
        if split not in self.found:
            self.found[split] = probes.features(
                self.extractor, self.images(split), self.ids(split), *self.mean_std, self.device)
        return self.found[split]

    def kept_out(self):
        """The share of the training split that validates: what the run held out, on its own set."""
        return self.data == self.config.get("data") and self.config.get("val_fraction") or 0.1

    def validates(self, ids):
        """Of training images, True for those that choose and do not train."""
        _, out = datasets.held_out(self.images("train"), self.kept_out())
        val = torch.isin(ids, out)
        if not val.any():                                  # no class is known, or they are few
            val = datasets.spread_out(len(ids), max(0.1, self.kept_out()))
        return val

    def output_path(self, stem, suffix):
        """Where a file goes: --out, or the folder of the checkpoint."""
        if self.options.out and suffix != ".png":
            return Path(self.options.out)
        return Path(self.checkpoint).parent / f"{stem}{self.suffix}{suffix}"

    def classes(self):
        """A class for each image -> y n, test_y m (None if not looked at), names of the classes."""
        train = self.images("train")
        if (train.y < 0).all():
            use = "the task multilabel" if "multilabel" in train.targets else "ROOT/train/<class>/*"
            raise UsageError(f"--data-root {self.root}: training images do not have one class; use "
                             f"{use}, or what asks for none: diagnose, export, features --split "
                             "train --pictures")
        return self.of_both(lambda images: images.y, "training images of known class")

    def multilabel(self):
        """Several classes to an image -> y n C of 0 and 1, test_y m C, names of the classes."""
        if "multilabel" not in self.images("train").targets:
            raise UsageError(f"--data {self.data}: an image has one class here; use lowshot, or a "
                             "set where it may have several: shapes, coco")
        y, test_y, classes = self.of_both(
            lambda images: images.targets["multilabel"], "training images")
        val = self.validates(self.ids("train")).to(y.device)
        for scored, which in ((y[val], "validation"), (test_y, "test")):
            if scored is not None and not scored.any():
                raise UsageError(f"--data-root {self.root}: no {which} image has a class, so "
                                 "nothing can be scored; add images that have one")
        return y, test_y, classes

    def of_both(self, classes_of, what):
        train = self.images("train")
        y = classes_of(train)[self.ids("train")].to(self.device)
        datasets.require_images(self.root, len(y), what)
        datasets.require_classes(self.root, train)
        if not self.tested:
            return y, None, train.classes
        test = self.images("test")
        datasets.require_the_same_classes(self.root, train, test)
        return y, classes_of(test)[self.ids("test")].to(self.device), train.classes


# ----------------------------------------------------------------------------------------- tasks
# Each takes an `Evaluated` and gives what its line of results says.

def run_classifier(evaluated, task):
    y, test_y, classes = evaluated.classes()
    x, test_x = evaluated.features("train"), evaluated.features("test")
    val = evaluated.validates(evaluated.ids("train")).to(y.device)
    validation, tested = {}, {}
    for token in x:
        validation[token], predictions = probes.classify(
            task, x[token], y, val, test_x[token], len(classes))
        if evaluated.tested:
            tested[token] = probes.accuracy(predictions, test_y)
    token = evaluated.options.token or max(validation, key=validation.get)
    scores, scored_y = (tested, test_y) if evaluated.tested else (validation, y[val])
    return {"top1": scores[token], "token": token, "tokens": scores, "validation": validation,
            "guessing": probes.guessing(scored_y), "images": len(y), "scored": len(scored_y),
            "test_images": len(scored_y) if evaluated.tested else 0}


def run_lowshot(evaluated):
    return run_few(evaluated, *evaluated.classes(), probes.AMOUNTS, "top1")


def run_multilabel(evaluated):
    return run_few(evaluated, *evaluated.multilabel(), (*probes.AMOUNTS, "all"), "map")


def run_few(evaluated, y, test_y, classes, amounts, name):
    """Logistic regression on a few images, whose results go by `name`."""
    draws = evaluated.options.draws or 3
    val = evaluated.validates(evaluated.ids("train")).to(y.device)
    probes.warn_of_small_classes(y, ~val, classes)
    x, test_x = evaluated.features("train"), evaluated.features("test")
    rows = {token: probes.fit_draws(x[token], y, classes, val, amounts, draws, test_x[token],
                                    test_y) for token in x}
    scores, validation = probes.of_each(rows, "score"), probes.of_each(rows, "validation")
    token = evaluated.options.token or max(
        rows, key=lambda token: mean(mean(each) for each in validation[token].values()))
    scored_y = y[val] if test_y is None else test_y
    found = {name: {amount: round(mean(each), 4) for amount, each in scores[token].items()},
             "token": token, "draws": draws, "scored": len(scored_y),
             "images": {amount: fits[-1].images for amount, fits in rows[token].items()},
             "tokens": scores, "validation": validation,
             "strengths": probes.of_each(rows, "strength"), "guessing": probes.guessing(scored_y),
             "test_images": 0 if test_y is None else len(test_y)}
    if "all" in amounts:
        found["classes"] = rows[token]["all"][0].classes
    return found


def run_patches(evaluated):
    encoder, device = evaluated.encoder, evaluated.device
    void = 255 if evaluated.options.void is None else evaluated.options.void
    splits = ("train", "test") if evaluated.tested else ("train",)
    images = {split: evaluated.images(split) for split in splits}
    ids = {split: torch.arange(len(images[split])) for split in splits}
    ids["train"] = probes.subset(ids["train"], max(10, PATCHES // encoder.num_patches))
    for split in splits:
        check_pairs(images[split])
    masks = {split: masks_of(images[split], ids[split]) for split in splits}
    datasets.require_images(evaluated.root, len(ids["train"]), "training images")
    C = max(classes_in(each, void) for each in masks.values())
    if C < 2:
        raise UsageError(f"--void {void}: beside it the masks hold no number but 0; number the "
                         "classes from 0, and name with --void the number of pixels without one")
    x, counts = {}, {}                                     # n N D, n N C
    for split in splits:
        x[split] = probes.patch_features(evaluated.extractor, images[split], ids[split],
                                         encoder.patch_size, *evaluated.mean_std, device)
        counts[split] = pixels_of_classes(masks[split], encoder.img_size, encoder.grid, C, void)

    val = evaluated.validates(ids["train"])
    validation, painted = probes.paint(x["train"].to(device), counts["train"].to(device), val,
                                       x.get("test"))
    scored = counts["test"] if evaluated.tested else counts["train"][val]                    # m N C
    by_place = counts["train"][~val].sum(0).argmax(-1).expand(scored.shape[:2])
    names = ["ground", *images["train"].classes] if evaluated.data == "shapes" else range(C)
    miou = {"miou": probes.mean_iou(painted, scored),
            "miou_place": probes.mean_iou(by_place, scored),
            "miou_majority": probes.mean_iou(scored.argmax(-1), scored)}
    print(f"painting each patch alike gives at most an mIoU of about {miou['miou_majority']:.1%}; "
          f"knowing only its place, {miou['miou_place']:.1%}", file=sys.stderr)
    return miou | {"iou": probes.by_name(names, probes.iou(painted, scored)),
                   "validation": validation, "images": len(val),
                   "test_images": len(x.get("test", []))}


def run_diagnose(evaluated):
    images = evaluated.images("train")
    _, ids = datasets.held_out(images, evaluated.kept_out())
    ids = ids if len(ids) else torch.arange(len(images))   # all, if no class is known
    ids = probes.subset(ids, 2000)
    return {"images": len(ids)} | diagnose(evaluated.checkpoint, evaluated.network, images, ids,
                                           *evaluated.mean_std, evaluated.device)


def run_features(evaluated):
    """Write the features of a split into a file of numpy: --split train, validation or test."""
    split, extractor = evaluated.options.split, evaluated.extractor
    images = evaluated.images("test" if split == "test" else "train")
    ids = torch.arange(len(images))
    if split == "validation":
        datasets.require_images(evaluated.root, len(ids), "training images")
        ids = ids[evaluated.validates(ids)]
    where = *evaluated.mean_std, evaluated.device
    x = probes.features(extractor, images, ids, *where)
    arrays = {name if name == "pixels" else f"{name}_token": x[name].cpu() for name in x}
    arrays |= {"y": images.y[ids], "classes": images.classes}
    if "multilabel" in images.targets:
        arrays["multilabel"] = images.targets["multilabel"][ids]
    if split == "train":                                   # which of these are "validation"
        arrays["held_out"] = evaluated.validates(ids)
    if images.paths is not None:
        arrays["paths"] = [str(images.paths[i]) for i in ids]
    if evaluated.options.patches:
        size = evaluated.encoder.patch_size
        arrays["patch_tokens"] = probes.patch_features(extractor, images, ids, size, *where)
    images_of = evaluated.data                             # whose images these are
    if images_of in ("imagefolder", "coco"):
        images_of += f"-{Path(evaluated.root).absolute().name}"
    out = evaluated.output_path(f"features-{images_of}-{split}", ".npz")
    write_atomically(out, lambda file: np.savez(file, **arrays))
    shapes = {name: list(np.shape(each)) for name, each in arrays.items()}
    return {"file": str(out), "arrays": shapes}


def run_export(evaluated):
    """Write the encoder for other libraries; print the lines that load it."""
    out = evaluated.output_path("export", "")
    lines = weights.export(evaluated.encoder, evaluated.info, out)
    print("\n".join(lines), file=sys.stderr)
    return {"folder": str(out)}


# ------------------------------------------------------------------------------------ the command

TASKS = {"knn": functools.partial(run_classifier, task="knn"),
         "linear": functools.partial(run_classifier, task="linear"), "lowshot": run_lowshot,
         "multilabel": run_multilabel, "patches": run_patches, "diagnose": run_diagnose,
         "features": run_features, "export": run_export}
FEW = {"lowshot", "multilabel"}
USED_BY = {                                # flags that only some tasks use
    "token": {"knn", "linear"} | FEW, "draws": FEW, "plot": FEW, "void": {"patches"},
    "patches": {"features"}, "out": {"features", "export"}}


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("task", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    add("--checkpoint", required=True, nargs="+", type=path, metavar="FILE",
        help="of train.py, the official MAE code or timm; several are compared with the first")
    add("--network", nargs="+", choices=[*weights.NETWORKS, "untrained", "pixels"],
        help="one or several; untrained: the same encoder with random weights; pixels: no encoder; "
        "both of the first checkpoint alone (default: student; of rc-mae its teacher)")
    add("--token", choices=["class", "mean"], help="default: the better one on validation images")
    add("--split", choices=["test", "validation", "train"], default="test", help="validation: do "
        "not look at the test split; train: of features alone (default: test)")
    add("--draws", type=int, metavar="N",
        help="of lowshot and multilabel: how often images are drawn (default: 3)")
    add("--plot", type=path, metavar="FILE",
        help="of lowshot or multilabel: draw scores over amounts")
    add("--pictures", nargs="*", type=path, metavar="FILE", help="draw nearest neighbours, "
        "attention and principal components beside the checkpoint; FILE: what is nearest to it")
    add("--patches", action="store_true", default=None, help="of features: patch tokens too")
    add("--out", type=path, metavar="PATH", help="of features: the file; of export: the folder "
        "(default: beside the checkpoint)")
    add("--void", type=int, metavar="N",
        help="of patches: pixels of a mask with this number have no class (default: 255)")
    add("--data", choices=datasets.SETS, help="default: what the checkpoint was trained on")
    add("--data-root", type=path, metavar="DIR",
        help="default: that of its run; of another set: data")
    add("--img-size", type=in_its_words(size), metavar="N or HxW", help="another size than the "
        "encoder was trained on: its codes of places are interpolated")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    for name, (kind, text) in weights.ASSUMED.items():
        add(flag(name), type=in_its_words(kind), metavar="X", help=text)
    return parser.parse_args(argv)


def check(options):
    """Raises UsageError for flags that do not go together."""
    tasks, networks = set(options.task), options.network or []
    drawn = {"token"} if options.pictures is not None else set()       # pictures are of a token
    for name, users in USED_BY.items():
        if getattr(options, name) is not None and name not in drawn and not users & tasks:
            raise UsageError(f"--{name}: not used by {', '.join(options.task)}; leave it out")
    if "pixels" in networks and options.token:
        raise UsageError(f"--token {options.token}: raw pixels have no tokens; leave it out")
    for name in ("untrained", "pixels"):
        if name in networks and "diagnose" in tasks:
            raise UsageError(f"--network {name}: has no pseudo labels and no teachers; name "
                             f"{', '.join(weights.NETWORKS)}")
    if "pixels" in networks and "export" in tasks:
        raise UsageError("--network pixels: there is no encoder to write; name another")
    if options.img_size and "diagnose" in tasks:
        raise UsageError("--img-size: diagnose looks at a run at its own size; leave it out")
    if options.void is not None and not 0 <= options.void <= 255:
        raise UsageError(f"--void {options.void}: pixels of masks are 0 to 255")
    if options.draws is not None and options.draws < 1:
        raise UsageError(f"--draws {options.draws}: must be 1 or more")
    for checkpoint in options.checkpoint:
        folder = Path(checkpoint).absolute().parent
        if folder.is_dir() and not os.access(folder, os.W_OK):
            raise UsageError(f"--checkpoint {checkpoint}: results go into its folder, which cannot "
                             "be written to; copy the file elsewhere")
    if options.split == "train" and tasks != {"features"}:
        raise UsageError("--split train: only the task features takes it; use test or validation")
    if options.plot and tasks >= FEW:
        raise UsageError("--plot: draws one of lowshot and multilabel; call them one by one")
    for name in ("out", "plot"):                           # said now, not after the work
        file = getattr(options, name)
        if file and (not Path(file).absolute().parent.is_dir()
                     or Path(file).is_dir() and (name == "plot" or "features" in tasks)):
            raise UsageError(f"--{name} {file}: cannot be written; name a new one in a folder that "
                             "is there")
    if options.plot and not options.plot.endswith(".png"):
        raise UsageError(f"--plot {options.plot}: a PNG file is written; let its name end in .png")
    if options.out and (tasks >= {"features", "export"}
                        or len(options.checkpoint) * max(1, len(networks)) > 1):
        raise UsageError("--out: names the output of one task and one network; leave it out, and "
                         "files go beside the checkpoint")


def main(argv=None):
    options = parse(argv)
    check(options)
    device = choose_device(options.device)
    load = functools.cache(datasets.load_images)
    networks = options.network or [None]
    pairs = [(checkpoint, network) for checkpoint in options.checkpoint for network in networks
             if network not in ("untrained", "pixels") or checkpoint == options.checkpoint[0]]
    # all are loaded first: one that cannot be is said at once
    evaluated = [Evaluated(*each, options, device, load) for each in pairs]
    if len({each.name for each in evaluated}) < len(evaluated):  # several files of one folder
        for each, (checkpoint, network) in zip(evaluated, pairs):
            each.name = f"{checkpoint} {network or ''}".strip()
    if len({each.set for each in evaluated}) > 1:          # each on the set it was trained on
        for each in evaluated:
            each.name += f" on {each.data} {each.root}"
    records = {task: {} for task in options.task}
    for each in evaluated:
        for task in options.task:
            if len(evaluated) * len(options.task) > 1:
                print(f"{each.name}: {task} ...", file=sys.stderr)
            records[task][each.name] = run(task, each)
        if options.pictures is not None:
            report.draw_evaluated(each)
        each.found.clear()                                 # features of the next take their place
    alike = {each.name for each in evaluated if each.set == evaluated[0].set}
    for task, by_name in records.items():
        print(report.table(task, by_name, alike), end="", file=sys.stderr)
        if options.plot and task in FEW:
            report.plot_few(task, by_name, options.plot)


def run(task, evaluated):
    """Run a task, print and keep its line of results -> that record."""
    start, options = time.perf_counter(), evaluated.options
    record = {"task": task, "network": evaluated.network, "data": evaluated.data,
              "data_root": str(evaluated.root), "step": evaluated.info.get("step")}
    if task not in ("diagnose", "export"):
        record["split"] = options.split
    if options.img_size:
        record["img_size"] = options.img_size
    with memory_errors_in_one_line(evaluated.device, f"--device {options.device}",
                                   "use another one, or a smaller --img-size"):
        record |= TASKS[task](evaluated)
    record |= {"checkpoint": evaluated.checkpoint, "seconds": round(time.perf_counter() - start, 1)}
    append_json(Path(evaluated.checkpoint).parent / "eval.jsonl", record)
    print(json.dumps(record), flush=True)
    return record


if __name__ == "__main__":
    run_main(main)
