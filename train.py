"""Train a masked autoencoder with pseudo labels and two teachers, from one command, on a laptop or
on several GPUs.

    python train.py                                       # `shapes`, on a CPU: some minutes
    python train.py --recipe mae                          # or another row of RECIPES
    python train.py --data imagefolder --data-root DIR    # photographs of your own
    torchrun --nproc-per-node 8 train.py --data imagefolder --data-root DIR --model base ...

Writes checkpoint.pt, config.json, metrics.jsonl and pictures into --out. The same command continues
a run that was cut off.

Read `training_step` first. It is the method; what it calls stands in mae.py, pseudo_labels.py and
teachers.py.

A *view* of an image is a random crop of it, perhaps flipped and in changed colours; an image gives
two, or one.
A *micro-batch* is the part of a batch that is computed at once, by one process.

Letters:  B views in the micro-batch (all first views of the images, then all second ones), k masks
          of a view, N patches, D width of the encoder, K clusters, P numbers that are predicted of
          a patch: D of a token, or those of its pixels.
"""

import dataclasses
import json
import math
import sys
import textwrap
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    continue_from,
    kept_network,
    networks_and_optimizer,
    save_checkpoint,
    start_from,
)
from data import SETS, Batches, Images, generator, held_out, load_images, mean_std
from diagnosis import MONITORED, agreements, assign, monitor, reconstruct
from features import standardised, subset
from mae import SIZES, count_visible, masked_mse, pair, pixel_target
from pseudo_labels import (
    BALANCING,
    Student,
    count_labels,
    full_precision,
    health,
    image_label_loss,
    koleo,
    make_labels,
    me_max,
    patch_label_loss,
    swap_views,
)
from teachers import (
    STANDARDISE,
    Teachers,
    between_images,
    half_life,
    make_teachers,
    momentum,
    standardise,
)
from utils.command_line import (
    UsageError,
    check_ranges,
    given_flags,
    make_folder,
    option,
    run_main,
    size,
)
from utils.devices import (
    choose_device,
    choose_precision,
    memory_errors_in_one_line,
    peak_memory,
    start_processes,
)
from utils.files import append_json, read_json_lines, truncate_log, write_atomically
from utils.log import line, signs_of_collapse
from utils.pictures import clusters, curves, draw_rows, to_pictures
from utils.ranks import alone, over_ranks, world_size

# ------------------------------------------------------------------------------------- the step

def training_step(student, teachers, views, config):
    """One micro-batch -> loss, terms, labels, targets. Backward, optimiser and EMA are the loop's.

    student    the networks that learn; may be wrapped (DistributedDataParallel) or compiled
    teachers   .labelling, .reconstruction: None if absent; one object in both roles is one teacher
    views      .student, .teacher (B C H W): the same crops and flips, colours drawn apart (not
               with --teacher-view same); .noise ((k B) N): chooses the masks

    loss: a number with gradient; terms: its parts by name; labels: pseudo labels {"image": B K,
    "patch": B N K}; targets: {"rec": B N P, "consistency": (k B) N P}; each as far as it is
    used."""
    labels, targets = {}, {}
    with torch.no_grad():
        # 1  The labelling teacher sees whole views, nothing masked, and makes pseudo labels.
        if teachers.labelling is not None:
            tokens = teachers.labelling.encode(views.teacher)                        # B 1+N D
            labels = make_labels(teachers.labelling, tokens, config)
        if "image" in labels:                              # view 1 predicts the label of view 2
            labels["image"] = swap_views(labels["image"], config.views)

        # 2  What the decoder predicts: the reconstruction teacher's tokens; or the pixels of the
        #    student's own view, as their colours are those it can see.
        if config.target == "tokens":
            if teachers.reconstruction is not teachers.labelling:
                tokens = teachers.reconstruction.encode(views.teacher)               # B 1+N D
            targets["rec"] = standardise(tokens[:, 1:], config.standardise)     # B N P, P = D
        elif config.target == "pixels":
            targets["rec"] = pixel_target(
                views.student, config.patch_size, config.norm_pix_loss)              # B N P
        if config.consistency_weight:                      # RC-MAE: the same view, the same masks
            targets["consistency"] = teachers.reconstruction(
                views.student, config.mask_ratio, views.noise)                       # (k B) N P

    # 3  The student sees the visible patches.
    predicted = student(views.student, config.mask_ratio, views.noise)

    # 4  What it predicted, against what it should have predicted.
    terms = losses(predicted, labels, targets, config)
    term = defaultdict(float, terms)                       # a term that is not in use is 0
    loss = (config.rec_weight * term["rec"]
            + config.consistency_weight * term["consistency"]
            + config.image_weight * (term["image"] + term["image_me_max"])
            + config.koleo_weight * term["koleo"]
            + config.patch_weight * (term["patch"] + term["patch_me_max"]))
    return loss, terms, labels, targets


def losses(predicted, labels, targets, config):
    """What the student predicted, and what it should have predicted -> terms {name: number}.

    In full precision also where the networks compute in bf16."""
    mask, temperature, terms = predicted["mask"], config.student_temperature, {}
    with full_precision(mask):
        if "rec" in targets:
            terms["rec"] = masked_mse(predicted["pred"], per_mask(targets["rec"], config), mask)
        if "consistency" in targets:
            terms["consistency"] = masked_mse(predicted["pred"], targets["consistency"], mask)
        if "image" in labels:
            terms["image"] = image_label_loss(
                predicted["image"], per_mask(labels["image"], config), temperature)
        if "image" in labels and config.koleo_weight:
            terms["koleo"] = koleo(predicted["unit"], len(labels["image"]) // config.views)
        if "patch" in labels:
            terms["patch"] = patch_label_loss(
                predicted["patch"], per_mask(labels["patch"], config), mask,
                config.labelled_patches, temperature)
        if config.balancing == "me-max":           # over all patches, whichever are labelled
            for name in labels:
                terms[f"{name}_me_max"] = me_max(predicted[name], temperature)
    return terms


def per_mask(x, config):
    """B ... -> (k B) ...: all masks of a view have the same target."""
    return x.repeat(config.masks, *[1] * (x.ndim - 1)) if config.masks > 1 else x


# ------------------------------------------------------------------------------------ the settings
#
# Four rows make a run, the later one wins: the defaults of Config, which are for photographs; the
# row of the data set; the row of the recipe; the command line. `resolve` puts them together.

DATA_ROWS = {
    "shapes": dict(epochs=12, batch_size=64, mask_ratio=0.5, colours=5.0, image_clusters=32,
                   teacher_temperature=0.0125),
}
RECIPES = {
    "mae": dict(target="pixels", image_weight=0.0, patch_weight=0.0, views=1, colours=0.0,
                mask_ratio=0.75),
    "rc-mae": dict(target="pixels", image_weight=0.0, patch_weight=0.0, views=1, colours=0.0,
                   mask_ratio=0.75, consistency_weight=1.0, reconstruction_half_life="173:inf"),
    "mim-cluster": dict(target="pixels", teachers=1, labelling_half_life="1%"),
    "image-labels": dict(target="none", patch_weight=0.0),
    "pl-mae-one-teacher": dict(teachers=1, labelling_half_life="1%"),
    "pl-mae": dict(),
}
POSITIVE = (0, math.inf)
COUNT = (1, math.inf)


@dataclass
class Config:
    """Everything that decides a run. Kept in config.json and the checkpoint; each field is a flag.

    Defaults of the method that name no source and are not called "not tuned" were measured, on
    CIFAR-10 (JPEG) or on shapes: see docs/results.md."""
    recipe: str = option("pl-mae", "row of settings, which flags override", choices=list(RECIPES))
    model: str = option("micro", "size of the encoder and its decoder", choices=list(SIZES))
    data: str = option("shapes", "data set", choices=list(SETS))
    data_root: str = option(
        "data", "folder of the data set; what can be downloaded is downloaded to it")
    out: str = option(
        None, "folder of the run (default: runs/RECIPE-DATA-MODEL; of an imagefolder its name)")
    epochs: int = option(
        20, "passes over the training images; 0 writes the untrained network", range=POSITIVE)
    batch_size: int = option(
        128, "images per optimiser step, of all processes and micro-batches together (not tuned)",
        range=COUNT)
    img_size: int = option(
        None, "N or HxW; other images are cropped to the centre and resized (default: the data "
        "set's)", size)
    patch_size: int = option(
        None, "N or HxW, dividing the image (default: one that suits the data set)", size)
    init: str = option(
        None, "a file to start from: official MAE weights, timm's, a checkpoint.pt, an export; "
        "mean and std of the pixels are then those of the file")
    # the views
    views: int = option(
        2, "views (crops) of an image: with 2, each predicts the image pseudo label of the other",
        choices=[1, 2])
    masks: int = option(
        1, "masks of a view: more students for one pass of the teachers (data2vec 2.0)",
        range=(1, 64))
    mask_ratio: float = option(0.75, "share of the patches that is masked (MAE)")
    crop: float = option(
        0.35, "smallest area of a random crop, as a share of the image; 1 does not crop (not "
        "tuned; MAE: 0.2)", range=(1e-3, 1))
    colours: float = option(
        1.0, "changes of brightness, contrast, saturation, hue: 0 none (MAE), 1 as in MC-SSL, 5 "
        "any hue", range=(0, 5))
    teacher_view: str = option(
        "other-colours", "what teachers see: the same crop in other colours, or the student's view",
        choices=["other-colours", "same"])
    # the reconstruction
    target: str = option(
        "tokens", "what the decoder predicts: the reconstruction teacher's tokens, pixels, or "
        "none: no decoder", choices=["tokens", "pixels", "none"])
    rec_weight: float = option(1.0, "weight of the reconstruction", range=POSITIVE)
    norm_pix_loss: bool = option(
        True, "predict pixels standardised within each patch, not plain ones (MAE)")
    standardise: str = option(
        "feature", "of token targets: within a token, or a feature over the batch, or that per "
        "position (not tuned)", choices=list(STANDARDISE))
    consistency_weight: float = option(
        0.0, "weight of RC-MAE's term: predict the pixels that a teacher predicts", range=POSITIVE)
    # the pseudo labels
    image_weight: float = option(
        1.0, "weight of the image pseudo labels (class token); 0 turns them off", range=POSITIVE)
    image_clusters: int = option(
        64, "clusters (prototypes) of image pseudo labels (not tuned)", range=(2, math.inf))
    koleo_weight: float = option(
        0.5, "weight of KoLeo beside the image pseudo labels: keeps class tokens of different "
        "images apart (not tuned)", range=POSITIVE)
    patch_weight: float = option(
        1.0, "weight of the patch pseudo labels; 0 turns them off", range=POSITIVE)
    patch_clusters: int = option(
        128, "clusters (prototypes) of patch pseudo labels (not tuned)", range=(2, math.inf))
    labelled_patches: str = option(
        "both", "which patches predict their pseudo label", choices=["visible", "masked", "both"])
    remove_place: bool = option(
        True, "take from the scores of patches their mean at each place, so that patch pseudo "
        "labels say less of where a patch is")
    balancing: str = option(
        "sinkhorn", "what keeps pseudo labels from gathering in one cluster",
        choices=list(BALANCING))
    student_temperature: float = option(
        0.1, "of the student's predictions (MC-SSL, iBOT)", range=(1e-3, math.inf))
    teacher_temperature: float = option(
        0.05, "of the pseudo labels; lower is more certain (SwAV; MSN: 0.025)",
        range=(1e-3, math.inf))
    # the teachers
    teachers: int = option(
        2, "2: one for pseudo labels, one for token targets; 1: the labelling teacher does both",
        choices=[1, 2])
    labelling_half_life: str = option(
        "0.3%", "of the labelling teacher: 1% of the run, or 30 steps; A:B changes from A to B",
        half_life)
    reconstruction_half_life: str = option(
        "3%", "of the reconstruction teacher, likewise; without labels, of the only teacher",
        half_life)
    # the optimiser
    lr: float = option(
        1e-3, "highest learning rate, for whatever batch (not tuned; MAE at scale: 1.5e-4 x batch "
        "/ 256)", range=POSITIVE)
    weight_decay: float = option(
        0.05, "of weight matrices; not of biases, norms, tokens, prototypes (MAE)", range=POSITIVE)
    warmup: float = option(
        0.05, "share of the run in which the learning rate rises from 0; then a cosine to 0 (not "
        "tuned)", range=(0, 1))
    clip: float = option(
        3.0, "greatest norm of the gradient; 0 does not clip (not tuned)", range=POSITIVE)
    # the run
    val_fraction: float = option(
        0.1, "share of the labelled training images kept out of training, for k-NN meanwhile",
        range=(0, 0.9))
    eval_every: int = option(4, "epochs between k-NN, pictures and checkpoints", range=COUNT)
    log_every: int = option(50, "steps between lines of the log", range=COUNT)
    accumulate: int = option(
        1, "micro-batches a step is computed in, for batches larger than the memory", range=COUNT)
    seed: int = option(0, "of weights, order, crops, colours and masks", range=(0, 2**63 - 1))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = option(
        "auto", "auto: bf16 autocast on GPUs, else fp32", choices=["auto", "bf16", "fp32", "fp64"])
    compile: bool = option(
        False, "compile the step and the augmentation, a graph each (torch.compile): starts a "
        "minute later, then needs about half the time on a GPU and nothing less on a CPU")
    workers: int = option(
        4, "processes that decode images, where the data set streams from the disk", range=POSITIVE)
    resident_gb: float = option(
        4.0, "a data set up to this size is kept in memory, shrunk to --img-size before it is "
        "cropped; larger ones stream, cropped from the files at full size", range=POSITIVE)


# These may change when a run continues.
FREE = {"data_root", "out", "eval_every", "log_every", "device", "workers", "compile"}


def resolve(argv=None):
    """The command line -> Config with nothing left open but "auto". Raises UsageError."""
    given = given_flags(Config, argv, __doc__.split("\n\n")[0],
                        "Defaults are for photographs; a data set or a recipe may have others, "
                        "which are printed when a run starts. Several GPUs: torchrun "
                        "--nproc-per-node N train.py ...")
    data = given.get("data", Config.data)
    recipe = given.get("recipe", Config.recipe)
    config = Config(**(DATA_ROWS.get(data, {}) | RECIPES[recipe] | given))
    config.img_size = config.img_size or SETS[data].size
    config.patch_size = config.patch_size or SETS[data].patch
    if config.out is None:
        source = Path(config.data_root).resolve().name if data == "imagefolder" else data
        config.out = f"runs/{recipe}-{source}-{config.model}"
    check(config)
    if config.teachers == 1 and config.target == "tokens" and "reconstruction_half_life" in given:
        raise UsageError("--reconstruction-half-life: one teacher goes at the pace of its labels; "
                         "use --labelling-half-life")
    return config


def check(config):
    """Raises UsageError for settings that can never be."""
    check_ranges(config)
    (H, W), (ph, pw) = pair(config.img_size), pair(config.patch_size)
    fits = [str(n) for n in range(1, min(H, W) + 1)
            if H % n == 0 and W % n == 0 and (n, n) != (H, W)]
    if H % ph or W % pw:
        raise UsageError(f"--patch-size {config.patch_size} does not divide --img-size "
                         f"{config.img_size}; these do: {', '.join(fits)}")
    if (ph, pw) == (H, W):
        raise UsageError(f"--patch-size {config.patch_size}: the whole image is one patch, so none "
                         f"can be masked; use one of {', '.join(fits)}")
    N = (H // ph) * (W // pw)
    if not 0 < config.mask_ratio < 1 or not 0 < count_visible(N, config.mask_ratio) < N:
        raise UsageError(f"--mask-ratio {config.mask_ratio}: choose it between 0 and 1 so that of "
                         f"{N} patches one is visible and one masked")
    numbers = SETS[config.data].channels * ph * pw         # in a patch
    if config.target == "pixels" and config.norm_pix_loss and numbers == 1:
        raise UsageError("--patch-size 1: a patch of one number cannot be standardised; use "
                         "--no-norm-pix-loss")
    if config.target == "none" and config.patch_weight:
        raise UsageError("--target none: leaves out the decoder, which predicts the pseudo labels "
                         "of masked patches; use --patch-weight 0 with it")
    rec_weight = 0 if config.target == "none" else config.rec_weight
    if not (rec_weight or config.image_weight or config.patch_weight or config.consistency_weight):
        raise UsageError("--rec-weight, --image-weight, --patch-weight: all are 0, so there is "
                         "nothing to learn; raise one")
    if config.consistency_weight and config.target != "pixels":
        raise UsageError("--consistency-weight: compares predicted pixels; use --target pixels")
    views = config.batch_size // config.accumulate * config.views
    if config.patch_weight and config.remove_place and views == 1:
        raise UsageError("--remove-place: one view in a micro-batch is its own mean, which leaves "
                         "nothing; use a larger --batch-size, or --no-remove-place")
    for name, samples, K in samples_and_clusters(config):
        if K > samples > 0:
            raise UsageError(
                f"--{name}-clusters {K}: more than the {samples} samples of a micro-batch that are "
                f"shared out among them; use {max(2, samples // 4)} or less, or a larger "
                "--batch-size")


def samples_and_clusters(config):
    """("image" or "patch", samples of one balancing call, clusters) of the pseudo labels in use."""
    (H, W), (ph, pw) = pair(config.img_size), pair(config.patch_size)
    views = config.batch_size // config.accumulate * config.views
    rows = []
    if config.image_weight:
        rows.append(("image", views, config.image_clusters))
    if config.patch_weight:
        rows.append(("patch", views * (H // ph) * (W // pw), config.patch_clusters))
    return rows


def describe(config):
    """All settings, as lines of at most 100 columns."""
    values = [f"{name}={value}" for name, value in dataclasses.asdict(config).items()]
    return textwrap.fill("  ".join(values), 100, initial_indent="  ", subsequent_indent="  ",
                         break_long_words=False, break_on_hyphens=False)


# --------------------------------------------------------------------- networks and optimiser

def architecture(config, channels):
    """The arguments of `Student`: plain numbers, kept in the checkpoint."""
    target_dim = {"pixels": None, "tokens": SIZES[config.model]["embed_dim"], "none": 0}
    return dict(SIZES[config.model], img_size=config.img_size, patch_size=config.patch_size,
                in_chans=channels, mlp_ratio=4.0, norm_pix_loss=config.norm_pix_loss,
                target_dim=target_dim[config.target],
                image_clusters=config.image_clusters if config.image_weight else 0,
                patch_clusters=config.patch_clusters if config.patch_weight else 0)


def build(config, channels):
    """A new student, whose weights depend on the seed alone."""
    torch.manual_seed(config.seed)
    return Student(**architecture(config, channels))


def parameter_groups(network, weight_decay):
    """Weight decay on matrices only: the scale of a bias, a norm, a token or a prototype means
    something."""
    matrices, others = [], []
    for name, p in network.named_parameters():
        if p.requires_grad:
            (matrices if name.endswith(".weight") and p.ndim >= 2 else others).append(p)
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]


def learning_rate(step, total, config):
    """Linear warm-up from 0, then a cosine to 0, by the optimiser step."""
    warm = config.warmup * total
    if step < warm:
        return config.lr * step / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


# ---------------------------------------------------------------------------------------- the run

@dataclass
class Run:
    """What a run consists of, and how far it is."""
    config: Config
    images: Images
    train_ids: torch.Tensor                                # of the images to train on
    val_ids: torch.Tensor                                  # of those held out
    mean: list                                             # of each channel, in units of 0..1
    std: list
    student: Student
    teachers: Teachers
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int
    steps_per_epoch: int
    start: int = 0                                         # the first step to do

    @property
    def total(self):
        return self.config.epochs * self.steps_per_epoch

    @property
    def out(self):
        return Path(self.config.out)

    def say(self, text):
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def main(argv=None):
    # Settings, device, data.
    config = resolve(argv)
    device = choose_device(config.device)
    dtype, bf16 = choose_precision(config.precision, device)
    rank, world = start_processes(device)
    images, train_ids, val_ids = load_training_images(config, rank, world)
    mean, std = mean_std(images)

    with memory_errors_in_one_line(device, f"--batch-size {config.batch_size}", (
            f"raise --accumulate (now {config.accumulate}), which computes a step in more and "
            "smaller micro-batches, or lower --batch-size; --resident-gb 0 keeps image files out "
            "of it")):
        # Student, teachers, optimiser, batches.
        student = build(config, images.channels).to(device, dtype)
        if config.init:
            mean, std = start_from(student, config.init, config.target)
        teachers = make_teachers(student, config)
        optimizer = torch.optim.AdamW(parameter_groups(student, config.weight_decay),
                                      betas=(0.9, 0.95), fused=device.type == "cuda")
        batches = Batches(
            images, train_ids, mean, std, seed=config.seed, batch=config.batch_size,
            patches=student.mae.encoder.num_patches, views=config.views, masks=config.masks,
            smallest=config.crop, colours=config.colours, teacher_view=config.teacher_view,
            accumulate=config.accumulate, rank=rank, world=world, device=device, dtype=dtype,
            workers=config.workers)

        # A run that was cut off continues; the folder of another run is left alone.
        run = Run(config, images, train_ids, val_ids, mean, std, student, teachers, optimizer,
                  device, rank, batches.steps_per_epoch)
        resume(run)
        announce(run, world, "bf16" if bf16 else str(dtype).removeprefix("torch."))

        # The loop.
        if run.start == 0:
            evaluate_and_save(run, 0)
        train(run, batches, torch.autocast(device.type, torch.bfloat16, enabled=bf16))
    if world > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    report(run)


def train(run, batches, autocast):
    """The loop over optimiser steps."""
    config, student, teachers, total = run.config, run.student, run.teachers, run.total
    half_lives = {"labelling": config.labelling_half_life,
                  "reconstruction": config.reconstruction_half_life}
    called, one_step = prepare(run, batches)
    stream = batches.run(run.start, total)
    meter, signs_before, warned = Meter(run.start), set(), set()
    for step in range(run.start, total):
        lr = learning_rate(step, total, config)
        for group in run.optimizer.param_groups:
            group["lr"] = lr

        for micro in range(config.accumulate):
            loss = terms = labels = targets = views = None # free the memory of those before
            asked = time.perf_counter()
            views = next(stream)
            meter.waited += time.perf_counter() - asked
            last = micro == config.accumulate - 1          # ranks exchange gradients once a step
            with nullcontext() if last or world_size() == 1 else called.no_sync():
                with autocast:
                    loss, terms, labels, targets = one_step(called, teachers, views, config)
                (loss / config.accumulate).backward()
            meter.add(loss, terms, labels, config.accumulate)

        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip or math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad()
        momenta = {name: momentum(step, total, half_lives[name]) for name in teachers.named()}
        teachers.follow(student, momenta)                  # once a step, whatever --accumulate

        done = step + 1
        look = done == total or done % (config.eval_every * run.steps_per_epoch) == 0
        if look or done % config.log_every == 0:           # only here the host waits for the device
            record = {"step": done, "epoch": done / run.steps_per_epoch}
            record |= meter.averages(done) | describe_targets(targets, config)
            record |= {f"{name}_momentum": m for name, m in momenta.items()}
            record |= {"lr": lr, "grad_norm": norm.item()} | meter.speed(run, done)
            if not math.isfinite(record["loss"] + record["grad_norm"]):
                run.say(f"train.py: the loss is {record['loss']}, the gradient "
                        f"{record['grad_norm']} at step {done}. The last checkpoint is intact; "
                        "try a lower --lr, with another --out")
                sys.exit(1)
            if run.rank == 0:
                append_json(run.out / "metrics.jsonl", record)
            run.say(line(record))
            signs = signs_of_collapse(record) if done > total / 10 else set()
            for sign in signs & signs_before - warned:     # twice in a row
                run.say(f"   warning: {sign}")
                warned.add(sign)
            signs_before = signs
            if look:
                evaluate_and_save(run, done)
            meter = Meter(done)


def prepare(run, batches):
    """The student as the step calls it, shared out over processes; and the step, which --compile
    compiles with all that it calls: teachers, Sinkhorn, losses. `batches` is compiled in place.

    What looks at the networks (k-NN, pictures, checkpoints) uses the plain modules."""
    called, one_step = run.student, training_step
    if world_size() > 1:
        gpu = [run.device.index] if run.device.type == "cuda" else None
        called = DistributedDataParallel(called, device_ids=gpu)
    if run.config.compile:                                 # every step has the same shapes
        one_step = torch.compile(training_step, fullgraph=True, dynamic=False)
        batches.augment = torch.compile(batches.augment, fullgraph=True, dynamic=False)
    return called, one_step


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
        """images/s, share of the time spent waiting for data, seconds to go, memory."""
        steps, seconds = done - self.step, time.perf_counter() - self.since
        found = {"images_per_s": round(steps * run.config.batch_size / seconds, 1),
                 "data_wait": round(self.waited / seconds, 4),
                 "eta_s": round((run.total - done) * seconds / steps, 1)}
        return found | peak_memory(run.device)


def describe_targets(targets, config):
    """What a prediction of the token targets would lose that does not look at the image, and how
    much of their variance lies between images."""
    if config.target != "tokens":
        return {}
    constant, share = between_images(targets["rec"])
    found = {"rec_constant": constant.item()}
    if config.standardise != "position":                   # which leaves nothing but differences
        found["rec_between"] = share.item()                # between images
    return found


# ------------------------------------------------------------------------- around the loop

def load_training_images(config, rank, world):
    """Images, ids to train on, ids held out. Raises UsageError for a batch that cannot be."""
    if config.batch_size % (world * config.accumulate):
        raise UsageError(f"--batch-size {config.batch_size}: must be a multiple of processes x "
                         f"--accumulate, {world} x {config.accumulate}")
    if rank > 0:                           # rank 0 goes first: what it downloads the others find
        distributed.barrier()
    images = load_images(config.data, config.data_root, "train", config.img_size, None,
                         config.resident_gb)
    if rank == 0 and world > 1:
        distributed.barrier()
    train_ids, val_ids = held_out(images, config.val_fraction)
    if config.batch_size > len(train_ids):
        fewer = max(2, len(train_ids) * config.views // 4)
        clusters = f", with --image-clusters {fewer} or less" if (
            config.image_weight and config.image_clusters > fewer) else ""
        raise UsageError(f"--batch-size {config.batch_size}: there are {len(train_ids)} images to "
                         f"train on ({len(val_ids)} are held out); use {len(train_ids)} or less"
                         + clusters)
    return images, train_ids, val_ids


def resume(run):
    """Load the checkpoint of a run that was cut off, and set `run.start`; make the folder."""
    path, settings = run.out / "checkpoint.pt", dataclasses.asdict(run.config)
    saved = continue_from(path, settings, FREE, run.mean, len(run.images))
    if saved:
        run.start = saved["step"]
        for group in saved["optimizer"]["param_groups"]:   # the device may be another one now
            group["fused"] = run.device.type == "cuda"
        for key, part in networks_and_optimizer(run.student, run.teachers, run.optimizer).items():
            part.load_state_dict(saved[key])
    if run.rank == 0:
        make_folder(run.out, "--out")
        content = dict(settings, mean=run.mean, std=run.std, channels=run.images.channels)
        write_atomically(run.out / "config.json",
                         lambda file: file.write(json.dumps(content, indent=2).encode()))
        truncate_log(run.out / "metrics.jsonl", run.start or -1)


def announce(run, world, precision):
    """What is about to happen, on the screen."""
    config, encoder = run.config, run.student.mae.encoder
    for name, samples, K in samples_and_clusters(config):
        if K > samples / 4:
            run.say(f"warning: --{name}-clusters {K} for {samples} samples of a micro-batch; use "
                    f"{samples // 4} or less, or a larger --batch-size")
    if 0 < run.total < 200:
        run.say(f"warning: {run.total} optimiser steps in all; little is learned in so few: raise "
                "--epochs")
    run.say(describe(config))
    in_all, in_encoder = (sum(p.numel() for p in module.parameters()) / 1e6
                          for module in (run.student, encoder))
    classes = len(run.images.classes)
    run.say(f"{config.recipe}, {config.model} ({in_encoder:.1f} M parameters in the encoder, "
            f"{in_all:.1f} M in all), {encoder.grid[0]} x {encoder.grid[1]} patches; {run.device}, "
            f"{precision}, {world} process(es)")
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
    with alone():
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

        # The checkpoint.
        parts = networks_and_optimizer(run.student, run.teachers, run.optimizer)
        save_checkpoint(run.out / "checkpoint.pt", dict(
            {key: part.state_dict() for key, part in parts.items()},
            arch=architecture(config, run.images.channels), step=step,
            config=dataclasses.asdict(config), mean=mean, std=std, images=len(run.images)))

        # Pictures: always of the same images, under the same masks.
        curves(read_json_lines(run.out / "metrics.jsonl"), run.out / "curves.png")
        if config.target != "none":
            noise = torch.rand(8, encoder.num_patches, generator=generator(config.seed, "picture"))
            rows = reconstruct(run.student, run.teachers.reconstruction, config, run.images,
                               subset(shown_ids, 200), noise, mean, std, run.device)
            draw_rows(rows, run.out / "reconstructions.png")
        if teacher is not None:
            shown = {name: (each.cluster, each.cosine) for name, each in labels.items()}
            pictures = to_pictures(standardised(run.images, labelled_ids, mean, std), mean, std)
            clusters(shown, pictures, encoder.grid, run.out / "clusters.png")
    if step:
        for text in evaluation_lines(found, run):
            run.say(f"   {text}")


def evaluation_lines(found, run):
    """What `evaluate_and_save` found, as lines for the screen."""
    lines = []
    if "knn_class" in found:
        lines.append(f"k-NN on {min(MONITORED, len(run.val_ids))} held-out images: class token "
                     f"{found['knn_class']:.1%}, mean token {found['knn_mean']:.1%}; guessing "
                     f"gives {1 / len(run.images.classes):.1%}")
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


def report(run):
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
    root = Path(run.config.data_root)
    can_test = run.images.classes and (
        run.config.data != "imagefolder" or (root / "test").is_dir() or (root / "val").is_dir())
    following = f"; next: python eval.py linear --checkpoint {path}" if can_test else ""
    run.say(f"done: {path} and its pictures{following}")


if __name__ == "__main__":
    run_main(main)
