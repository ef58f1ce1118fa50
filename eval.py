"""How good is an encoder? Frozen features, computed once, and a simple classifier on top.

    python eval.py knn --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt
    python eval.py knn linear lowshot --checkpoint runs/A/checkpoint.pt runs/B/checkpoint.pt

`knn` asks whether images of a class lie together; `linear` whether a plane separates them. For a
masked autoencoder the second answer is much the better one. `lowshot` is logistic regression with
1, 2, 5, 10 labelled images of each class, and with 1 % and 10 % of all labels; `multilabel` the
same where an image may have several classes. `patches` paints each patch in a class; masks tell
whether it is the right one. `diagnose` looks for collapse, and at what pseudo labels agree with.

`features` writes features into a file of numpy; `export` the encoder for timm and Hugging Face.

The choice of token matters, so both are reported: the class token, and the mean of the patch
tokens. Where one number is given, it is of the token that was better on validation images. These
are the images of the training split that the run held out (of another set, or if it held out none,
a tenth of that split). They also choose what is tuned. --split validation stops there and does not
look at the test split.

Of each task and network a JSON object is printed, and appended to eval.jsonl beside the checkpoint.
A table on stderr compares them. It also shows each difference from the first.

Letters:  n m images, N patches, D width of a token, C classes.
"""

import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import NETWORKS, export, load_encoder, mae_arguments, resize_positions
from data import SETS, held_out, load_images, spread_out
from diagnosis import diagnose
from features import class_attention, features, patch_features, standardised, subset
from mae import MaskedAutoencoder
from utils.command_line import Parser, UsageError, in_its_words, run_main, size
from utils.devices import choose_device, memory_errors_in_one_line
from utils.files import append_json, write_atomically
from utils.masks import classes_in, masks_of, pixels_of_classes
from utils.pictures import draw_components, draw_few, draw_neighbours, draw_rows, to_pictures
from utils.probes import (
    LINEAR_RATES,
    ONE_STRENGTH,
    STRENGTHS,
    accuracy,
    average_precision,
    centred,
    iou,
    knn,
    linear,
    logistic_regression,
    mean_average_precision,
    mean_iou,
    predict,
)

PATCHES = 400_000                          # patches, at most, that `patches` is trained on
FEW = ("1", "2", "5", "10", "1%", "10%")   # labels: so many images of each class, or so many of all


# ------------------------------------------------------------------------- classifiers, and choices

def classify(task, x, y, val, test_x, classes):
    """One token -> its validation accuracy, and predictions for test_x (None for None).

    val: n, True for validation images. What is tuned is tuned with the other rows against these;
    then all rows are used. The test labels are not asked for."""
    fit_x, fit_y, val_x, val_y = x[~val], y[~val], x[val], y[val]
    if task == "knn":
        validation = accuracy(knn(fit_x, fit_y, val_x, classes), val_y)
        return validation, None if test_x is None else knn(x, y, test_x, classes)
    scores = [accuracy(p, val_y) for p in linear(fit_x, fit_y, val_x, classes)]
    best = place_of_highest(scores)
    if test_x is None:
        return scores[best], None
    return scores[best], linear(x, y, test_x, classes, rates=[LINEAR_RATES[best]])[0]


def place_of_highest(scores):
    return max(range(len(scores)), key=scores.__getitem__)


def pick_few(y, classes, pool, labels, seed):
    """Which images get to show their labels: places in y.

    y: n, or n classes of 0 and 1; pool: n, True for those that may be picked. labels: "5" images of
    each class, "10%" of all of them (of each class its part, at least one image; where an image has
    several classes, of all images), or "all". With one seed, fewer images are among those of
    more. Where a class has fewer images than asked for, all of them."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    order = order[pool[order]]
    if labels == "all":
        return order
    if y.ndim == 2 and labels.endswith("%"):
        return order[:max(1, round(float(labels[:-1]) / 100 * len(y)))]
    picked = []
    for name in range(classes):
        belongs = (y == name) if y.ndim == 1 else y[:, name] == 1                          # n
        wanted = int(labels.rstrip("%"))
        if labels.endswith("%"):
            wanted = max(1, round(wanted / 100 * belongs.sum().item()))
        picked.append(order[belongs[order]][:wanted])
    return torch.cat(picked).unique()          # an image of several classes may be picked twice


def score(logits, y):
    """Accuracy, or, where an image may have several classes, mean average precision."""
    return accuracy(logits.argmax(1), y) if y.ndim == 1 else mean_average_precision(logits, y)


def classify_few(x, y, classes, picked, val, strengths):
    """Logistic regression on the picked images -> what it scores on validation images, its
    strength, chosen on these, and its weights. x: `centred`; val: n, True for those images."""
    fits, scores, weights = [], [], None
    for strength in strengths:             # each starts from the one before: that saves iterations
        weights = logistic_regression(x[picked], y[picked], classes, strength, weights)
        fits.append(weights)
        scores.append(score(predict(weights, x[val]), y[val]))
    best = place_of_highest(scores)
    return scores[best], strengths[best], fits[best]


def paint(x, counts, val, test_x):
    """Patch tokens n N D, the pixels of each class in them n N C -> the mIoU on validation images,
    and a class for each patch of test_x, or, if that is None, of the validation images: m N.

    A linear layer predicts the shares of the classes in a patch. In the cross-entropy this is the
    same as predicting each pixel, all those of a patch alike. val as in `classify`."""
    def fit(x, counts, test_x, **rates):
        seen = counts.sum(-1) > 0                          # not: patches without a known pixel
        shares = counts[seen] / counts[seen].sum(-1, keepdim=True)
        painted = linear(x[seen], shares, test_x.flatten(0, 1), counts.shape[-1], epochs=10,
                         batch=4096, **rates)
        return painted.unflatten(1, test_x.shape[:2])                                 # rates m N

    on_validation = fit(x[~val], counts[~val], x[val])
    scores = [mean_iou(painted, counts[val]) for painted in on_validation]
    best = place_of_highest(scores)
    if test_x is None:
        return scores[best], on_validation[best]
    return scores[best], fit(x, counts, test_x, rates=[LINEAR_RATES[best]])[0]


# --------------------------------------------------------------- a network, and what evaluates it

class Evaluated:
    """A frozen network, the images it is evaluated on, and its features, computed once.

    load: `load_images`, which may remember what it loaded."""

    def __init__(self, checkpoint, network, options, device, load):
        self.checkpoint, self.options, self.device, self.load = checkpoint, options, device, load
        self.encoder, self.info = load_network(checkpoint, network, options)
        self.encoder.to(device)
        self.data, self.root = choose_data(options, self.info.get("config", {}))
        self.set = self.data, str(self.root), self.kept_out()      # what scores depend on
        self.network = self.info["network"]
        # of the files that are written, so that none takes another one's name
        parts = [Path(checkpoint).stem.removeprefix("checkpoint"), network,
                 options.img_size and "x".join(map(str, self.encoder.img_size))]
        self.suffix = "".join(f"-{part}" for part in parts if part)
        self.tested = options.split == "test"              # is the test split looked at?
        self.name = f"{Path(checkpoint).absolute().parent.name} {network or ''}".strip()
        self.images_from = self.data       # for names of files: whose images these are
        if self.data in ("imagefolder", "coco"):
            self.images_from += f"-{Path(self.root).absolute().name}"
        self.found = {}

    def images(self, split):
        return self.load(self.data, self.root, split, self.encoder.img_size, self.encoder.in_chans)

    def ids(self, split):
        """The images that have labels; all, if none has."""
        labels = self.images(split).labels
        return torch.nonzero((labels >= 0) | (labels < 0).all()).flatten()

    def features(self, split):
        """Of the images at `ids`, on the device: {"class": n D, "mean": n D}, or {"pixels": n P}.
        Of "test" if it is not looked at, None for each."""
        if split == "test" and not self.tested:
            return dict.fromkeys(self.features("train"))
        if split not in self.found:
            encoder = None if self.network == "pixels" else self.encoder
            found = features(encoder, self.images(split), self.ids(split), self.info["mean"],
                             self.info["std"], self.device)
            self.found[split] = {token: x.to(self.device) for token, x in found.items()}
        return self.found[split]

    def kept_out(self):
        """The share of the training split that validates: what the run held out, on its own set."""
        config = self.info.get("config", {})
        own = self.data == config.get("data")
        return (config.get("val_fraction") if own else None) or 0.1

    def validates(self, ids):
        """Of training images, True for those that choose and do not train."""
        _, out = held_out(self.images("train"), self.kept_out())
        val = torch.isin(ids, out)
        if not val.any():                                  # none has a label, or they are few
            val = spread_out(len(ids), max(0.1, self.kept_out()))
        return val

    def output_path(self, stem, suffix):
        """Where a file goes: --out, or the folder of the checkpoint."""
        if self.options.out and suffix != ".png":
            return Path(self.options.out)
        return Path(self.checkpoint).parent / f"{stem}{self.suffix}{suffix}"

    def labels(self):
        """A class for each image -> y n, test_y m (None if not looked at), names of the classes."""
        train = self.images("train")
        if (train.labels < 0).all():
            raise UsageError(f"--data-root {self.root}: training images do not have one class; use "
                             + ("the task multilabel" if "multilabel" in train.targets
                                else "ROOT/train/<class>/*"))
        require_images(self.root, int((train.labels >= 0).sum()), "labelled training images")
        if not self.tested:
            return train.labels[self.ids("train")].to(self.device), None, train.classes
        test = self.images("test")
        self.require_the_same_classes(train, test)
        return *(images.labels[self.ids(split)].to(self.device)
                 for split, images in (("train", train), ("test", test))), train.classes

    def require_the_same_classes(self, train, test):
        if len(train.classes) < 2:
            raise UsageError(f"--data-root {self.root}: has one class, so there is nothing to tell "
                             "apart; add another")
        for ours, theirs, lacks in ((train, test, "test"), (test, train, "training")):
            missing = [name for name in ours.classes if name not in theirs.classes]
            if missing:
                raise UsageError(f"--data-root {self.root}: no {lacks} images of the classes "
                                 f"{', '.join(missing[:5])}; add some, or remove these classes")
        if train.classes != test.classes:
            raise UsageError(f"--data-root {self.root}: training and test classes are not in the "
                             "same order; sort them alike")

    def multilabels(self):
        """Several classes to an image -> y n C of 0 and 1, test_y m C, names of the classes."""
        splits, found = ("train", "test") if self.tested else ("train",), []
        for split in splits:
            images = self.images(split)
            if "multilabel" not in images.targets:
                raise UsageError(f"--data {self.data}: an image has one class here; use lowshot, "
                                 "or a set where it may have several: shapes, coco")
            found.append(images.targets["multilabel"][self.ids(split)].to(self.device))
        require_images(self.root, len(found[0]), "training images")
        if self.tested:
            self.require_the_same_classes(self.images("train"), self.images("test"))
        return found[0], found[1] if self.tested else None, self.images("train").classes


def require_images(root, n, what):
    if n < 10:
        raise UsageError(f"--data-root {root}: {n} {what}; at least 10 are needed, one to validate "
                         "on")


def load_network(checkpoint, network, options):
    """A file and one of --network -> the encoder of the student, of a teacher, or a new one, and
    what the file says of it."""
    named = network if network in NETWORKS else None
    encoder, _ = load_encoder(checkpoint, options.num_heads, named)
    if encoder.in_chans not in (1, 3):
        raise UsageError(f"--checkpoint {checkpoint}: takes {encoder.in_chans} channels; data sets "
                         "here have 1 or 3")
    info = dict(encoder.info)
    if network == "untrained":
        if "arch" not in info:
            raise UsageError("--network untrained: needs a checkpoint of train.py; `train.py "
                             "--epochs 0` writes one")
        torch.manual_seed(info["config"]["seed"])          # what a run without --init began with
        encoder = MaskedAutoencoder(**mae_arguments(info["arch"])).encoder.eval()
    info["network"] = network or info["network"]
    if options.img_size:
        resize_positions(encoder, options.img_size)
    return encoder, info


def choose_data(options, config):
    """--data and --data-root, or what the checkpoint was trained on -> name, root."""
    data = options.data or config.get("data")
    if data is None:
        raise UsageError("--data: this checkpoint does not name a data set; name one")
    if data == config.get("data"):
        return data, options.data_root or config["data_root"]
    if data in ("imagefolder", "coco") and not options.data_root:
        raise UsageError("--data-root: name the folder of the images")
    return data, options.data_root or "data"


# ----------------------------------------------------------------------------------------- tasks
# Each takes a `Evaluated` and gives what its line of results says.

def run_knn(evaluated):
    return run_classifier(evaluated, "knn")


def run_linear(evaluated):
    return run_classifier(evaluated, "linear")


def run_classifier(evaluated, task):
    y, test_y, classes = evaluated.labels()
    x, test_x = evaluated.features("train"), evaluated.features("test")
    val = evaluated.validates(evaluated.ids("train")).to(y.device)
    validation, accuracies = {}, {}
    for token in x:
        validation[token], predictions = classify(task, x[token], y, val, test_x[token],
                                                  len(classes))
        if evaluated.tested:
            accuracies[token] = accuracy(predictions, test_y)
    token = evaluated.options.token or max(validation, key=validation.get)
    accuracies = accuracies or validation
    return {"top1": accuracies[token], "token": token, "tokens": accuracies,
            "validation": validation, "guessing": guessing(test_y if evaluated.tested else y[val]),
            "images": len(y),
            "test_images": len(test_y) if evaluated.tested else 0}


def run_lowshot(evaluated):
    return run_few(evaluated, *evaluated.labels(), FEW, "top1")


def run_multilabel(evaluated):
    y, test_y, classes = evaluated.multilabels()
    val = evaluated.validates(evaluated.ids("train"))
    for scored, which in ((y[val.to(y.device)], "validation"), (test_y, "test")):
        if scored is not None and not scored.any():
            raise UsageError(f"--data-root {evaluated.root}: no {which} image has a class, so "
                             "nothing can be scored; add images that have one")
    return run_few(evaluated, y, test_y, classes, (*FEW, "all"), "map")


def run_few(evaluated, y, test_y, classes, amounts, name):
    """Logistic regression on a few labels: --draws times for each of the amounts, once for "all".

    Features are centred on the mean of all training images, which takes no labels."""
    draws = evaluated.options.draws or 3
    val = evaluated.validates(evaluated.ids("train")).to(y.device)
    warn_of_small_classes(evaluated, y, ~val, classes)
    rows = {}
    for token, x in evaluated.features("train").items():
        test_x = evaluated.features("test")[token]
        if test_x is None:
            [x] = centred(x)
        else:
            x, test_x = centred(x, test_x)
        rows[token] = {labels: [fit_draw(x, y, classes, val, labels, seed, test_x, test_y)
                                for seed in range(1 if labels == "all" else draws)]
                       for labels in amounts}

    def of_each(field):
        return {token: {labels: [getattr(each, field) for each in fits]
                        for labels, fits in by_labels.items()} for token, by_labels in rows.items()}

    scores, validation = of_each("score"), of_each("validation")
    token = evaluated.options.token or max(
        rows, key=lambda token: mean(mean(each) for each in validation[token].values()))
    found = {name: {labels: round(mean(each), 4) for labels, each in scores[token].items()},
             "token": token, "draws": draws,
             "images": {labels: fits[-1].images for labels, fits in rows[token].items()},
             "tokens": scores, "validation": validation, "strengths": of_each("strength"),
             "guessing": guessing(y[val] if test_y is None else test_y),
             "test_images": 0 if test_y is None else len(test_y)}
    if "all" in amounts:
        found["classes"] = rows[token]["all"][0].classes
    return found


class Fit(NamedTuple):
    """Logistic regression on one draw of labels."""
    images: int                # that it was fitted to
    strength: float            # of the penalty
    validation: float          # score
    score: float               # on test images, or, if these are not looked at, the same
    classes: dict | None       # of "all" labels: average precision of each class


def fit_draw(x, y, classes, val, labels, seed, test_x, test_y):
    """The strength of the penalty is chosen on validation images, of which all labels are used.
    With one image of each class it is fixed, so that nothing at all is chosen there."""
    C = len(classes)
    picked = pick_few(y, C, ~val, labels, seed)
    strengths = (ONE_STRENGTH,) if labels == "1" else STRENGTHS
    validation, strength, weights = classify_few(x, y, C, picked, val, strengths)
    scored, scored_y = (x[val], y[val]) if test_x is None else (test_x, test_y)
    if labels == "all" and test_x is not None:             # now those that validated train too
        picked, weights = torch.arange(len(y)), logistic_regression(x, y, C, strength)
    logits, of_class = predict(weights, scored), None
    if labels == "all":
        of_class = {name: None if math.isnan(each) else round(each, 4) for name, each in
                    zip(classes, average_precision(logits, scored_y).tolist(), strict=True)}
    return Fit(len(picked), strength, validation, score(logits, scored_y), of_class)


def guessing(y):
    """What is scored without looking at an image, on images of these classes: accuracy of always
    the commonest class; or mean average precision of scores all alike, which is the share of the
    images that are of a class."""
    shares = y.bincount() / len(y) if y.ndim == 1 else y.double().mean(0)
    return round((shares.max() if y.ndim == 1 else shares[shares > 0].mean()).item(), 4)


def warn_of_small_classes(evaluated, y, pool, classes):
    """Say which classes have fewer images than the ten of a row."""
    there = y[pool].bincount(minlength=len(classes)) if y.ndim == 1 else y[pool].sum(0)
    few = [f"{name} ({n})" for name, n in zip(classes, there.tolist()) if n < 10]
    if few:
        print("fewer than ten images to draw labels from, so columns that ask for more use all: "
              f"{', '.join(few[:5])}{', ...' * (len(few) > 5)}", file=sys.stderr)


def run_patches(evaluated):
    encoder, info, root = evaluated.encoder, evaluated.info, evaluated.root
    void = 255 if evaluated.options.void is None else evaluated.options.void
    N, grid = encoder.num_patches, encoder.grid
    network = None if evaluated.network == "pixels" else encoder
    images, ids, masks, x, counts = {}, {}, {}, {}, {}
    for split in ("train", "test") if evaluated.tested else ("train",):
        images[split] = evaluated.images(split)
        number = len(images[split])
        room = max(10, PATCHES // N) if split == "train" else number
        ids[split] = subset(torch.arange(number), room)
        masks[split] = masks_of(images[split], ids[split])
    require_images(root, len(ids["train"]), "training images")
    classes = max(classes_in(each, void) for each in masks.values())
    if classes < 2:
        raise UsageError(f"--void {void}: beside it the masks hold no number but 0; number the "
                         "classes from 0, and name with --void the number of pixels without one")
    for split in images:
        x[split] = patch_features(network, images[split], ids[split], encoder.patch_size,
                                  info["mean"], info["std"], evaluated.device)
        counts[split] = pixels_of_classes(masks[split], encoder.img_size, grid, classes, void)

    val = evaluated.validates(ids["train"])
    device = evaluated.device
    validation, painted = paint(x["train"].to(device), counts["train"].to(device), val,
                                x.get("test"))
    scored = counts["test"] if evaluated.tested else counts["train"][val]                    # m N C
    by_place = counts["train"][~val].sum(0).argmax(-1).expand(scored.shape[:2])
    names = ["ground", *images["train"].classes] if evaluated.data == "shapes" else range(classes)
    by_class = {str(name): None if math.isnan(each) else round(each, 4)
                for name, each in zip(names, iou(painted, scored).tolist())}
    print(f"painting each patch alike gives at most an mIoU of about "
          f"{mean_iou(scored.argmax(-1), scored):.1%}; knowing only its place, "
          f"{mean_iou(by_place, scored):.1%}", file=sys.stderr)
    return {"miou": mean_iou(painted, scored), "iou": by_class,
            "miou_place": mean_iou(by_place, scored),
            "miou_majority": mean_iou(scored.argmax(-1), scored), "validation": validation,
            "images": len(val), "test_images": len(x.get("test", []))}


def run_diagnose(evaluated):
    images = evaluated.images("train")
    _, ids = held_out(images, evaluated.kept_out())
    if len(ids) == 0:                                      # no image has a label
        ids = torch.arange(len(images))
    ids = subset(ids, 2000)
    found = diagnose(evaluated.checkpoint, evaluated.network, images, ids, evaluated.info["mean"],
                     evaluated.info["std"], evaluated.device)
    return {"images": len(ids)} | found


def run_features(evaluated):
    """Write the features of a split into a file of numpy: --split train, validation or test."""
    split = evaluated.options.split
    images = evaluated.images("test" if split == "test" else "train")
    ids, mean_std = torch.arange(len(images)), (evaluated.info["mean"], evaluated.info["std"])
    if split == "validation":
        require_images(evaluated.root, len(ids), "training images")
        ids = ids[evaluated.validates(ids)]
    if split != "validation" and len(evaluated.ids(split)) == len(ids):
        found = {token: x.cpu() for token, x in evaluated.features(split).items()}
    else:
        found = features(evaluated.encoder, images, ids, *mean_std, evaluated.device)
    arrays = {"class_token": found["class"], "mean_token": found["mean"],
              "labels": images.labels[ids], "classes": images.classes}
    if "multilabel" in images.targets:
        arrays["multilabel"] = images.targets["multilabel"][ids]
    if split == "train":                                   # which of these are "validation"
        arrays["held_out"] = evaluated.validates(ids)
    if images.paths is not None:
        arrays["paths"] = [str(images.paths[i]) for i in ids]
    if evaluated.options.patches:
        arrays["patch_tokens"] = patch_features(evaluated.encoder, images, ids, None, *mean_std,
                                                evaluated.device)
    out = evaluated.output_path(f"features-{evaluated.images_from}-{split}", ".npz")
    write_atomically(out, lambda file: np.savez(file, **arrays))
    shapes = {name: list(np.shape(each)) for name, each in arrays.items()}
    return {"file": str(out), "arrays": shapes}


def run_export(evaluated):
    """Write the encoder for other libraries; print the lines that load it."""
    out = evaluated.output_path("export", "")
    print("\n".join(export(evaluated.encoder, evaluated.info, out)), file=sys.stderr)
    return {"folder": str(out)}


# ------------------------------------------------------------------------------------ the command

TASKS = {"knn": run_knn, "linear": run_linear, "lowshot": run_lowshot,
         "multilabel": run_multilabel, "patches": run_patches, "diagnose": run_diagnose,
         "features": run_features, "export": run_export}
USED_BY = {                                # flags that only some tasks use
    "token": {"knn", "linear", "lowshot", "multilabel"},
    "void": {"patches"},
    "draws": {"lowshot", "multilabel"},
    "plot": {"lowshot", "multilabel"},
    "patches": {"features"},
    "out": {"features", "export"},
}


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("task", nargs="+", choices=TASKS, metavar="TASK",
                        help=f"one or several of {', '.join(TASKS)}")
    parser.add_argument("--checkpoint", required=True, nargs="+", metavar="FILE",
                        help="of train.py, of the official MAE code or timm; several are compared "
                        "with the first")
    parser.add_argument("--network", nargs="+", choices=[*NETWORKS, "untrained", "pixels"],
                        help="one or several; untrained: the same encoder with random weights; "
                        "pixels: no encoder; both of the first checkpoint alone (default: student; "
                        "of rc-mae its teacher)")
    parser.add_argument("--token", choices=["class", "mean"],
                        help="default: the better one on validation images")
    parser.add_argument("--split", choices=["test", "validation", "train"], default="test",
                        help="validation: do not look at the test split; train: of features alone "
                        "(default: test)")
    parser.add_argument("--draws", type=int, metavar="N",
                        help="of lowshot and multilabel: how often labels are drawn (default: 3)")
    parser.add_argument("--plot", metavar="FILE",
                        help="of lowshot or multilabel: draw scores over the number of labels")
    parser.add_argument("--pictures", action="store_true",
                        help="draw nearest neighbours, attention and principal components beside "
                        "the checkpoint")
    parser.add_argument("--patches", action="store_true", default=None,
                        help="of features: with the tokens of the patches")
    parser.add_argument("--out", metavar="PATH",
                        help="of features: the file; of export: the folder (default: beside the "
                        "checkpoint)")
    parser.add_argument("--void", type=int, metavar="N",
                        help="of patches: pixels of a mask with this number have no class "
                        "(default: 255)")
    parser.add_argument("--data", choices=SETS, help="default: what the checkpoint was trained on")
    parser.add_argument("--data-root", metavar="DIR", help="default: that of the training run; for "
                        "another set than its own: data")
    parser.add_argument("--img-size", type=in_its_words(size), metavar="N or HxW",
                        help="another size than the encoder was trained on: its codes of places "
                        "are interpolated")
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    parser.add_argument("--num-heads", type=int,
                        help="for others' weights whose heads are not 64 wide")
    options = parser.parse_args(argv)
    check(options)
    return options


def check(options):
    """Raises UsageError for flags that do not go together."""
    tasks, networks = set(options.task), options.network or []
    for name, users in USED_BY.items():
        if getattr(options, name) is not None and not users & tasks:
            raise UsageError(f"--{name}: not used by {', '.join(options.task)}; leave it out")
    if "pixels" in networks and options.token:
        raise UsageError(f"--token {options.token}: raw pixels have no tokens; leave it out")
    for name in ("untrained", "pixels"):
        if name in networks and "diagnose" in tasks:
            raise UsageError(f"--network {name}: has no pseudo labels and no teachers; name "
                             f"{', '.join(NETWORKS)}")
    if "pixels" in networks and tasks & {"features", "export"}:
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
    if options.plot and {"lowshot", "multilabel"} <= tasks:
        raise UsageError("--plot: draws one of lowshot and multilabel; call them one by one")
    for name in ("out", "plot"):                           # said now, not after the work
        path = getattr(options, name)
        if path and (not Path(path).absolute().parent.is_dir()
                     or Path(path).is_dir() and (name == "plot" or "features" in tasks)):
            raise UsageError(f"--{name} {path}: cannot be written; name a new one in a folder that "
                             "is there")
    if options.plot and not options.plot.endswith(".png"):
        raise UsageError(f"--plot {options.plot}: a PNG file is written; let its name end in .png")
    if options.out and (tasks >= {"features", "export"}
                        or len(options.checkpoint) * max(1, len(networks)) > 1):
        raise UsageError("--out: names the output of one task and one network; leave it out, and "
                         "files go beside the checkpoint")


def main(argv=None):
    options = parse(argv)
    device = choose_device(options.device)
    load = functools.cache(load_images)
    networks = options.network or [None]
    pairs = [(checkpoint, network) for checkpoint in options.checkpoint for network in networks
             if network not in ("untrained", "pixels") or checkpoint == options.checkpoint[0]]
    # all are loaded first: one that cannot be is said at once
    evaluated = [Evaluated(*pair, options, device, load) for pair in pairs]
    if len({each.name for each in evaluated}) < len(evaluated):  # several files of one folder
        for each, (checkpoint, network) in zip(evaluated, pairs):
            each.name = f"{checkpoint} {network or ''}".strip()
    if len({each.set for each in evaluated}) > 1:          # each on the set it was trained on
        for each in evaluated:
            each.name += f" on {each.data} {each.root}"
    records = {task: {} for task in options.task}
    for each in evaluated:
        for task in options.task:
            start = time.perf_counter()
            if len(evaluated) * len(options.task) > 1:
                print(f"{each.name}: {task} ...", file=sys.stderr)
            record = {"task": task, "network": each.network, "data": each.data,
                      "data_root": str(each.root), "step": each.info.get("step")}
            if task not in ("diagnose", "export"):
                record["split"] = options.split
            if options.img_size:
                record["img_size"] = options.img_size
            with memory_errors_in_one_line(device, f"--device {options.device}",
                                           "use another one, or a smaller --img-size"):
                record |= TASKS[task](each)
            record |= {"checkpoint": each.checkpoint,
                       "seconds": round(time.perf_counter() - start, 1)}
            append_json(Path(each.checkpoint).parent / "eval.jsonl", record)
            print(json.dumps(record), flush=True)
            records[task][each.name] = record
        if options.pictures:
            draw_pictures(each)
        each.found.clear()                                 # features of the next take their place
    alike = {each.name for each in evaluated if each.set == evaluated[0].set}
    for task, by_name in records.items():
        print(table(task, by_name, alike), end="", file=sys.stderr)
        if options.plot and task in ("lowshot", "multilabel"):
            draw_few({name: amounts_and_scores(record) for name, record in by_name.items()},
                     "accuracy" if task == "lowshot" else "mean average precision",
                     guessing_of(by_name), options.plot)


# ---------------------------------------------------------------------------------------- reports

def scores_of(record):
    """What a table shows of a record: {heading: scores, one for each draw}; {} if nothing."""
    if record["task"] in ("knn", "linear"):
        return {token: [score] for token, score in record["tokens"].items()}
    if record["task"] == "patches":
        return {"mIoU": [record["miou"]]}
    if record["task"] in ("lowshot", "multilabel"):
        return record["tokens"][record["token"]]
    return {}


def table(task, records, alike):
    """Records by name, side by side in %, and the differences from the first; draws as mean and
    deviation.

    Differences are of networks that got the same images, those in `alike`, and of the same
    draws."""
    rows, first = [], None
    for name, record in records.items():
        found, title = scores_of(record), name
        if task in ("lowshot", "multilabel") and record["token"] != "pixels":
            title += f", {record['token']}"
        rows.append((title, found, ""))
        if first is None:
            first = found
        elif name in alike and found.keys() & first.keys():
            rows.append(("  minus the first", {
                heading: [a - b for a, b in zip(found[heading], first[heading], strict=True)]
                for heading in found if heading in first}, "+"))
    headings = list(dict.fromkeys(heading for _, found, _ in rows for heading in found))
    if not headings:
        return ""
    if guessing_of(records) is not None:
        rows.append(("guessing", dict.fromkeys(headings, [guessing_of(records)]), ""))
    cells = [[f"{task}, {next(iter(records.values()))['split']}, %", *headings]]
    for name, found, sign in rows:
        cells.append([name, *(in_percent(found.get(heading), sign) for heading in headings)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "".join("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) + "\n"
                   for first, *rest in cells)


def guessing_of(records):
    """What guessing scores, if it scores the same for all."""
    found = {record.get("guessing") for record in records.values()}
    return found.pop() if len(found) == 1 else None


def in_percent(scores, sign=""):
    if not scores:
        return ""
    text = f"{100 * mean(scores):{sign}.1f}"
    return text + (f" ± {100 * stdev(scores):.1f}" if len(scores) > 1 else "")


def amounts_and_scores(record):
    """For a picture: labels, how many images that is, mean of the scores, their deviation."""
    found = scores_of(record)
    return (list(found), [record["images"][labels] for labels in found],
            [mean(scores) for scores in found.values()],
            [stdev(scores) if len(scores) > 1 else 0.0 for scores in found.values()])


# --------------------------------------------------------------------------------------- pictures

def first_components(x):
    """Features n D, n and D at least 2 -> their first two principal components n 2, and the share
    of the variance that each holds."""
    scores, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return scores[:, :2] * s[:2], (s[:2].square() / s.square().sum()).tolist()


def draw_pictures(evaluated, n=8, nearest=6):
    """Draw neighbours.png, attention.png and components.png beside the checkpoint.

    Of n images of the test split, or of those that validate: the training images that are nearest
    by cosine, and what their class tokens attend to. Of up to 2,000: the first two principal
    components of their features."""
    x, ids, train = evaluated.features("train"), evaluated.ids("train"), evaluated.images("train")
    token = evaluated.options.token or next(iter(x))          # the class token, or pixels
    x = x[token].cpu()
    if evaluated.tested:
        images, shown = evaluated.images("test"), evaluated.ids("test")
        shown_x = evaluated.features("test")[token].cpu()
    else:
        images, val = train, evaluated.validates(ids)
        shown, shown_x, ids, x = ids[val], x[val], ids[~val], x[~val]
    mean_std = evaluated.info["mean"], evaluated.info["std"]

    def pictures(images, ids):
        return to_pictures(standardised(images, ids, *mean_std), *mean_std)

    chosen = subset(torch.arange(len(shown)), n)
    cosine = F.normalize(shown_x[chosen], dim=1) @ F.normalize(x, dim=1).T
    near = ids[cosine.topk(min(nearest, len(x))).indices]                               # n nearest
    own = images.labels[shown[chosen]]
    rows = [([picture, *pictures(train, each)], [label, *train.labels[each].tolist()])
            for picture, label, each in zip(pictures(images, shown[chosen]), own.tolist(), near)]
    title = f"{evaluated.name}, {token}" + " token" * (token != "pixels")
    draw_neighbours(rows, train.classes, title, evaluated.output_path("neighbours", ".png"))

    few = subset(torch.arange(len(shown)), 2000)
    if len(few) > 1:
        draw_components(*first_components(shown_x[few]), images.labels[shown[few]], images.classes,
                        title, evaluated.output_path("components", ".png"))
    if token != "pixels":
        imgs = standardised(images, shown[chosen], *mean_std)
        maps = class_attention(evaluated.encoder, imgs.to(evaluated.device)).cpu()     # n heads N
        rows = {"image": to_pictures(imgs, *mean_std)}
        for head, each in enumerate(maps.unbind(1), 1):
            each = each / each.amax(1, keepdim=True)
            rows[f"head {head}"] = list(each.unflatten(1, evaluated.encoder.grid).numpy())
        draw_rows(rows, evaluated.output_path("attention", ".png"))


if __name__ == "__main__":
    run_main(main)
