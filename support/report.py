"""What is said, logged and drawn: while a run goes, at its end, and of what eval.py finds.

A *record* is a dictionary, one line of metrics.jsonl. `image` and `patch` are the losses of the
image and of the patch pseudo labels; docs/guide.md says what every key means.
"""

import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import generator
from mae import VisionTransformer
from support import checkpoint
from support.datasets import Images, part_of
from support.devices import best_precision, peak_memory
from support.files import append_json, read_json_lines
from support.health import (
    MONITORED,
    agreements,
    assign,
    count_labels,
    health,
    monitor,
    purest_and_least_pure,
    reconstruct,
    signs_of_collapse,
)
from support.pictures import (
    clusters,
    curves,
    draw_components,
    draw_few,
    draw_neighbours,
    draw_rows,
    to_pictures,
)
from support.probes import (
    class_attention,
    features,
    first_components,
    guessing,
    standardised,
    subset,
)
from support.ranks import alone, of_each_rank, over_ranks, world_size
from support.settings import describe, kept_network, samples_and_clusters
from teachers import between_images

# ----------------------------------------------------------------------------------- the log

class Meter:
    """Sums of the numbers of the steps, on the device, and the time, since the last line of the
    log."""

    def __init__(self, step):
        self.step, self.since, self.waited = step, time.perf_counter(), 0.0
        self.sums, self.counts = defaultdict(float), defaultdict(float)

    def add(self, loss, terms, labels, accumulate):
        """Of one of the micro-batches of a step."""
        for name, value in (terms | {"loss": loss}).items():
            self.sums[name] += value.detach() / accumulate
        for name, each in labels.items():
            self.counts[name] += count_labels(each) / accumulate

    def averages(self, done):
        """Means over steps and ranks, as numbers; of pseudo labels ln K and their health."""
        steps = (done - self.step) * world_size()
        record = {name: over_ranks(total).item() / steps for name, total in self.sums.items()}
        for name, total in self.counts.items():
            record[f"{name}_ln_k"] = math.log(len(total) // 2)
            for key, value in health(over_ranks(total) / steps).items():
                record[f"{name}_{key}"] = value
        return record

    def speed(self, run, done):
        """images/s, share of the time spent waiting for data, seconds to go (with those of the
        looks), memory."""
        steps, seconds = done - self.step, time.perf_counter() - self.since
        every = run.config.eval_every * run.steps_per_epoch
        looks = math.ceil(run.total / every) - (done - 1) // every     # to come, one now included
        found = {"images_per_s": round(steps * run.config.batch_size / seconds, 1),
                 "data_wait": round(self.waited / seconds, 4),
                 "eta_s": round((run.total - done) * seconds / steps + looks * run.look_s, 1)}
        return found | peak_memory(run.device)

    def state(self):
        """What a checkpoint between two lines of the log has to keep: sums of each rank."""
        return {"step": self.step, "seconds": time.perf_counter() - self.since,
                "waited": self.waited,
                "sums": {name: of_each_rank(total) for name, total in self.sums.items()},
                "counts": {name: of_each_rank(total) for name, total in self.counts.items()}}


def start_meter(run):
    """A meter for the first line of the log, part of which may have been summed up before a
    stop."""
    meter, kept = Meter(run.start), run.meter
    if kept is None:
        return meter
    meter.step, meter.waited = kept["step"], kept["waited"]
    meter.since -= kept["seconds"]
    for sums, before in ((meter.sums, kept["sums"]), (meter.counts, kept["counts"])):
        for name, each in before.items():                  # ranks ...
            mine = each[run.rank] if len(each) == world_size() else each.mean(0)
            sums[name] = mine.to(run.device)               # by other processes: shared out
    return meter


def describe_targets(targets, config):
    """What a prediction of the token targets would lose that does not look at the image, and how
    much of their variance lies between images."""
    if config.target != "tokens" or "rec" not in targets:  # sdae: not of all patches
        return {}
    constant, share = between_images(targets["rec"])
    found = {"rec_constant": constant.item()}
    if config.standardise != "position":                   # which leaves nothing but differences
        found["rec_between"] = share.item()                # between images
    return found


def log(run, record):
    """Write a record, say it, and warn of what looks wrong twice in a row. Ends the run where its
    numbers are none."""
    step = record["step"]
    # In fp16 gradients may overflow now and then. The scaler then skips the step and lowers its
    # scale. So that is no reason to stop, unless the scale has already fallen to almost nothing.
    overflows = run.scaler.is_enabled() and run.scaler.get_scale() > 1e-4
    if not math.isfinite(record["loss"] + (0 if overflows else record["grad_norm"])):
        run.say(f"train.py: the loss is {record['loss']}, the gradient {record['grad_norm']} at "
                f"step {step}. The last checkpoint is intact; try a lower --lr, with another --out")
        sys.exit(1)
    if run.rank == 0:
        append_json(run.out / "metrics.jsonl", record)
    run.say(line(record))
    signs = signs_of_collapse(record) if step > run.total / 10 else set()
    for sign in signs & run.signs - run.warned:
        run.say(f"   warning: {sign}")
        run.warned.add(sign)
    run.signs = signs


# Losses in the order of the screen: the key of what stands beside one, and how that is called.
BESIDE = {"rec": ("rec_constant", "constant"), "consistency": (None, ""),
          "image": ("image_ln_k", "ln K"), "patch": ("patch_ln_k", "ln K"), "koleo": (None, ""),
          "align": ("align_variance", "variance"),                     # cae
          "contrast": ("contrast_alike", "alike")}                     # mixedae


def line(record):
    """A record of the log as a line for the screen."""
    parts = [f"step {record['step']:6d}  epoch {record['epoch']:6.1f}  loss {record['loss']:.4f}"]
    parts += [beside(record, name, *bound) for name, bound in BESIDE.items() if name in record]
    if "contrast" in record:
        parts.append(f"(apart {record['contrast_apart']:.2f})")
    parts.append(f"{record['images_per_s']:.0f} images/s")
    if "peak_memory_gb" in record:
        parts.append(f"peak {record['peak_memory_gb']:.1f} GB")
    parts.append(f"{record['eta_s']:.0f} s to go")
    return "  ".join(parts)


def beside(record, name, bound, sign):
    """A loss and, if it is there, the bound that it should go below: "image 2.91 (ln K 3.47)"."""
    text = f"{name} {record[name]:.3f}"
    if bound in record:
        text += f" ({sign} {record[bound]:.2f})"
    return text


# ------------------------------------------------------------------------- around the loop

def announce(run, world):
    """What is about to happen, on the screen."""
    config, encoder = run.config, run.student.mae.encoder
    for name, samples, K in samples_and_clusters(config):
        if K > samples / 4:
            run.say(f"warning: --{name}-clusters {K} for {samples} samples of a micro-batch; use "
                    f"{samples // 4} or less, or a larger --batch-size")
    if 0 < run.total < 1000:
        run.say(f"warning: {run.total} optimiser steps in all; little is learned in so few: raise "
                "--epochs")
    run.say(describe(config))
    in_all, in_encoder = (sum(p.numel() for p in module.parameters()) / 1e6
                          for module in (run.student, encoder))
    classes = len(run.images.classes)
    run.say(f"{config.recipe}, {config.model} ({in_encoder:.1f} M parameters in the encoder, "
            f"{in_all:.1f} M in all), {encoder.grid[0]} x {encoder.grid[1]} patches; {run.device}, "
            f"{config.precision}, {world} process(es)")
    best = best_precision(run.device) if run.start else config.precision
    if best != config.precision:
        run.say(f"computes in {config.precision}, as it began; here {best} would be faster")
    run.say(f"{config.data}: {len(run.train_ids)} images to train on, {len(run.val_ids)} held out; "
            + (f"{classes} classes, for evaluation alone" if classes else
               "no classes (subfolders of DIR/train are classes)") + f"; {run.images.kept}")
    how = "continues: " if 0 < run.start < run.total else "finished already: " if run.start else ""
    run.say(f"{how}steps {run.start} to {run.total}, into {run.out}")


def evaluate_and_save(run, step):
    """k-NN, what pseudo labels agree with, checkpoint and pictures, by rank 0 alone; the others
    wait for it at the next step."""
    if run.rank > 0:
        return
    config, encoder, mean, std = run.config, run.student.mae.encoder, run.mean, run.std
    shown_ids = run.val_ids if len(run.val_ids) else run.train_ids
    start = time.perf_counter()
    with alone(), run.autocast:
        # The log.
        by_teacher = kept_network(vars(config)) == "reconstruction-teacher"
        kept = run.teachers.reconstruction.encoder if by_teacher else encoder
        found = monitor(kept, run.images, run.train_ids, run.val_ids, mean, std, run.device)
        teacher = run.teachers.labelling
        if teacher is not None:
            labelled_ids = subset(shown_ids, min(1000, max(200, 8 * config.image_clusters)))
            of_these = (config, run.images, labelled_ids, mean, std, run.device)
            labels = assign(teacher, *of_these)
            found |= agreements(labels, teacher, *of_these)
        append_json(run.out / "metrics.jsonl",
                    {"step": step, "epoch": step / run.steps_per_epoch} | found)

        checkpoint.save(run, step)

        # Pictures: always of the same images, under the same masks.
        curves(read_json_lines(run.out / "metrics.jsonl"), run.out / "curves.png")
        if config.target != "none":
            noise = torch.rand(8, encoder.num_patches, generator=generator(config.seed, "picture"))
            rows = reconstruct(run.student, run.teachers.reconstruction, config, run.images,
                               subset(shown_ids, 200), noise, mean, std, run.device)
            draw_rows(rows, run.out / "reconstructions.png")
        if teacher is not None:
            shown = {name: (each.cluster, each.cosine, purest_and_least_pure(
                name, each.cluster, run.images, labelled_ids, encoder.grid))
                for name, each in labels.items()}
            pictures = to_pictures(standardised(run.images, labelled_ids, mean, std), mean, std)
            clusters(shown, pictures, encoder.grid, run.out / "clusters.png")
    first = run.look_s == 0                                # of this process: the run may continue
    before, run.looked = run.looked, time.perf_counter()
    run.look_s = run.looked - start
    share = run.look_s / (run.looked - before)             # of the time since the last one
    for text in evaluation_lines(found, run):
        run.say(f"{'   ' if step else 'before: '}{text}")
    if step < run.total and share > 0.05 and not first and "looks" not in run.warned:
        run.warned.add("looks")
        run.say(f"   such a look takes {run.look_s:.0f} s, {share:.0%} of the time; to look less "
                f"often raise --eval-every (now {config.eval_every} epochs)")


def evaluation_lines(found, run):
    """What `evaluate_and_save` found, as lines for the screen."""
    lines = []
    if "knn_class" in found:
        scored = subset(run.val_ids, MONITORED)
        lines.append(f"k-NN on {len(scored)} held-out images: class token "
                     f"{found['knn_class']:.1%}, mean token {found['knn_mean']:.1%}; guessing "
                     f"gives {guessing(run.images.y[scored]):.1%}")
    if "image_two_views" in found:
        lines.append(f"two views of an image have one image pseudo label in "
                     f"{found['image_two_views']:.1%}, by chance in "
                     f"{found['image_two_views_chance']:.1%}")
    if "patch_nmi_place" in found:
        lines.append("patch pseudo labels agree (0 not at all, 1 entirely) with the place of the "
                     f"patch by {found['patch_nmi_place']:.2f}, with its colour by "
                     f"{found['patch_nmi_colour']:.2f}; by chance by "
                     f"{found['patch_nmi_place_shuffled']:.2f}, "
                     f"{found['patch_nmi_colour_shuffled']:.2f}")
    return lines


def conclude(run):
    """The last lines on the screen."""
    path = run.out / "checkpoint.pt"
    if run.rank > 0:
        return
    tests = [r for r in read_json_lines(run.out / "metrics.jsonl") if "knn_mean" in r]
    if tests:
        first, last = tests[0], tests[-1]
        run.say("k-NN on held-out images, before and after: class token "
                f"{first['knn_class']:.1%} and {last['knn_class']:.1%}, mean token "
                f"{first['knn_mean']:.1%} and {last['knn_mean']:.1%}")
    looks = [r for r in read_json_lines(run.out / "metrics.jsonl") if "image_two_views" in r]
    if looks and not tests and run.total:
        first, last = (each["image_two_views"] for each in (looks[0], looks[-1]))
        run.say("two views of an image have one image pseudo label, before and after: "
                f"{first:.1%} and {last:.1%}, of images that were trained on")
    alike, chance = (looks[-1][f"image_two_views{end}"] if looks else 1 for end in ("", "_chance"))
    if looks and run.total and alike < 1.5 * chance:
        run.say(f"warning: two views of an image have one image pseudo label in {alike:.1%}, by "
                f"chance in {chance:.1%}: there is nothing in them yet; raise --epochs")
    root = Path(run.config.data_root)
    following = "linear"
    if run.config.data == "imagefolder" and not (part_of(root, "test") or part_of(root, "val")):
        following = "linear --split validation"
    if (run.images.y < 0).all() or len(run.images.classes) < 2:
        kept = kept_network(vars(run.config))              # neighbours, which ask for no class
        pixels = " pixels" * (len(run.images.y) <= 5000)   # else their file is large
        following = f"features --split train --pictures --network {kept} untrained{pixels}"
    run.say(f"done: {path} and its pictures; next: python eval.py {following} --checkpoint {path}")


# ------------------------------------------------------------------------- what eval.py found

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
                   for first, *rest in cells) + caution(records) * (task != "multilabel")


def caution(records):
    """What a table says of accuracies that are of few images; "" if they are of 100 or more."""
    n = min(record.get("scored", 100) for record in records.values())
    if n >= 100:
        return ""
    return (f"only {n} images are scored: one is {100 / n:.1f} points, and a score has a standard "
            f"error of up to {50 / n ** 0.5:.0f}\n")


def guessing_of(records):
    """What guessing scores, if it scores the same for all."""
    found = {record.get("guessing") for record in records.values()}
    return found.pop() if len(found) == 1 else None


def in_percent(scores, sign=""):
    if not scores:
        return ""
    text = f"{100 * mean(scores):{sign}.1f}"
    return text + (f" ± {100 * stdev(scores):.1f}" if len(scores) > 1 else "")


def plot_few(task, records, path):
    """Draw the records of lowshot or multilabel, {name: record}, over the number of images."""
    found = {}
    for name, record in records.items():
        scores = scores_of(record)
        found[name] = (list(scores), [record["images"][amount] for amount in scores],
                       [mean(each) for each in scores.values()],
                       [stdev(each) if len(each) > 1 else 0.0 for each in scores.values()])
    ylabel = "accuracy" if task == "lowshot" else "mean average precision"
    draw_few(found, ylabel, guessing_of(records), path)


class Shown(NamedTuple):
    """Some images of a split, and their features."""
    images: Images
    ids: torch.Tensor          # n: which of them
    x: torch.Tensor            # n D, on the CPU


def draw_evaluated(evaluated, n=8, nearest=6):
    """Draw neighbours.png, attention.png and components.png beside the checkpoint.

    Of the files that --pictures names, or of n images: the training images that are nearest by
    cosine, and what their class tokens attend to. Of up to 2,000 images, not of those files: the
    first two principal components of their features."""
    # the class token, or pixels
    token = evaluated.options.token or next(iter(evaluated.features("train")))
    mean_std, own = evaluated.mean_std, evaluated.own
    shown, train = shown_and_searched(evaluated, token)

    def pictures(images, ids):
        return to_pictures(standardised(images, ids, *mean_std), *mean_std)

    chosen = subset(torch.arange(len(shown.ids)), len(shown.ids) if own else n)
    cosine = F.normalize(shown.x[chosen], dim=1) @ F.normalize(train.x, dim=1).T
    if shown is train:                                     # not itself
        cosine[torch.arange(len(chosen)), chosen] = -2
    there = len(train.x) - (shown is train)
    cosine, near = cosine.topk(min(nearest, there))                                     # n nearest
    rows = []
    for i, cosines, others in zip(shown.ids[chosen], cosine.tolist(), train.ids[near]):
        y, paths = shown.images.y[i], train.images.paths
        captions = [caption(shown.images, i), *(caption(train.images, j, y) for j in others)]
        row = [*pictures(shown.images, i[None]), *pictures(train.images, others)]
        rows.append(list(zip(row, captions)))
        if own and paths:
            found = ", ".join(f"{paths[j]} ({each:.2f})" for j, each in zip(others, cosines))
            print(f"{evaluated.name}: nearest to {own.paths[i]} are {found}", file=sys.stderr)
    title = f"{evaluated.name}, {token}" + " token" * (token != "pixels")
    draw_neighbours(rows, title, evaluated.output_path("neighbours", ".png"))

    few = subset(torch.arange(len(shown.ids)), 2000)
    if len(few) > 1 and not own:
        draw_components(*first_components(shown.x[few]), shown.images.y[shown.ids[few]],
                        shown.images.classes, title, evaluated.output_path("components", ".png"))
    if token != "pixels" and not isinstance(evaluated.encoder, VisionTransformer):
        print(f"{evaluated.name}: no attention.png, as it has no class token", file=sys.stderr)
    elif token != "pixels":
        imgs = standardised(shown.images, shown.ids[chosen], *mean_std)
        maps = class_attention(evaluated.encoder, imgs.to(evaluated.device)).cpu()     # n heads N
        rows = {"image": to_pictures(imgs, *mean_std)}
        for head, each in enumerate(maps.unbind(1), 1):
            each = each / each.amax(1, keepdim=True)
            rows[f"head {head}"] = list(each.unflatten(1, evaluated.encoder.grid).numpy())
        draw_rows(rows, evaluated.output_path("attention", ".png"))
    drawn = evaluated.output_path("neighbours", ".png")
    print(f"drawn: {drawn}, and other pictures beside it", file=sys.stderr)


def shown_and_searched(evaluated, token):
    """The files of --pictures, or the test split, or what validates, or, without classes or where
    nothing validates, all training images; and the training images among which their neighbours
    are: two `Shown`."""
    def of(split):
        return Shown(evaluated.images(split), evaluated.ids(split),
                     evaluated.features(split)[token].cpu())

    train = of("train")
    if evaluated.own:
        ids = torch.arange(len(evaluated.own))
        x = features(evaluated.extractor, evaluated.own, ids, *evaluated.mean_std,
                     evaluated.device)
        return Shown(evaluated.own, ids, x[token].cpu()), train
    if evaluated.tested:
        return of("test"), train
    val = evaluated.validates(train.ids)
    if (train.images.y < 0).all() or not val.any():        # no class is known, or they are few
        return train, train
    return [Shown(train.images, train.ids[part], train.x[part]) for part in (val, ~val)]


def caption(images, i, other=-1):
    """What stands over image i, and in which colour: its class, green if it is the class `other`,
    red if not (-1: unknown). Without a class, the name of its file."""
    y = images.y[i]
    if y < 0:
        name = images.paths[i].name if images.paths else ""
        return (name if len(name) < 15 else f"…{name[-13:]}"), "black"
    colour = "black" if other < 0 else "green" if y == other else "red"
    return images.classes[y][:14], colour
