"""Train a masked autoencoder with pseudo labels and two teachers, on a laptop or on several GPUs.

    python train.py                                       # `shapes`, on a CPU: some minutes
    python train.py --recipe mae                          # or another of support/settings.py
    python train.py --data imagefolder --data-root DIR    # photographs of your own
    torchrun --nproc-per-node 8 train.py --data imagefolder --data-root DIR --model base ...

Read `training_step` first. It is the method; what it calls stands in mae.py, pseudo_labels.py and
teachers.py. Labels, in this file, are pseudo labels.

Letters:  B views in a micro-batch (what a process computes at once): all first views of the images,
          then all second ones. N patches, K clusters, D width of the encoder, P numbers that are
          predicted of a patch.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import pseudo_labels
from data import Batches
from mae import masked_mse, pixel_target
from support import checkpoint, datasets, devices, life, report, settings, weights
from support.command_line import UsageError, run_main
from support.ranks import world_size
from teachers import Teachers, make_teachers, momentum, standardise

# ------------------------------------------------------------------------------------- the step

def training_step(student, teachers, views, config):
    """One micro-batch -> loss, terms, labels, targets. Backward, optimiser and EMA are the loop's.

    student    the networks that learn; may be wrapped (DistributedDataParallel) or compiled
    teachers   .labelling, .reconstruction: None if absent; one object in both roles is one teacher
    views      .student, .teacher (B C H W): the same crops and flips, colours drawn apart (not
               with --teacher-view same); .noise (B N): chooses the masks

    loss: a number with gradient; terms: its parts by name; labels: pseudo labels {"image": B K,
    "patch": B N K}; targets: {"rec": B N P, "consistency": B N P}; each as far as it is used."""
    labels, targets = {}, {}
    with torch.no_grad():
        # 1  The labelling teacher sees whole views, nothing masked, and makes pseudo labels.
        if teachers.labelling is not None:
            tokens = teachers.labelling.encode(views.teacher)                        # B 1+N D
            labels = pseudo_labels.make_labels(teachers.labelling, tokens, config)
        if "image" in labels:                              # view 1 predicts the label of view 2
            labels["image"] = pseudo_labels.swap_views(labels["image"], config.views)

        # 2  What the decoder predicts: the reconstruction teacher's tokens; or the pixels of the
        #    student's own view, as their colours are those it can see.
        if config.target == "tokens":
            if teachers.reconstruction is not teachers.labelling:      # else they are there already
                tokens = teachers.reconstruction.encode(views.teacher)               # B 1+N D
            targets["rec"] = standardise(tokens[:, 1:], config.standardise)     # B N P, P = D
        elif config.target == "pixels":
            targets["rec"] = pixel_target(
                views.student, config.patch_size, config.norm_pix_loss)              # B N P
        if config.consistency_weight:                      # RC-MAE: the same view, the same masks
            targets["consistency"] = teachers.reconstruction.predict_pixels(
                views.student, config.mask_ratio, views.noise)                       # B N P

    # 3  The student sees the visible patches.
    predicted = student(views.student, config.mask_ratio, views.noise)

    # 4  What it predicted, against what it should have predicted.
    terms = losses(predicted, labels, targets, config)
    weight = {"rec": config.rec_weight, "consistency": config.consistency_weight,
              "image": config.image_weight, "image_me_max": config.image_weight,
              "koleo": config.koleo_weight,
              "patch": config.patch_weight, "patch_me_max": config.patch_weight}
    loss = sum(weight[name] * term for name, term in terms.items())
    return loss, terms, labels, targets


def losses(predicted, labels, targets, config):
    """What the student predicted, and what it should have predicted -> terms {name: number}.

    In full precision also where the networks compute in bf16."""
    mask, temperature, terms = predicted["mask"], config.student_temperature, {}
    with pseudo_labels.full_precision(mask):
        if "rec" in targets:
            terms["rec"] = masked_mse(predicted["pred"], targets["rec"], mask)
        if "consistency" in targets:
            terms["consistency"] = masked_mse(predicted["pred"], targets["consistency"], mask)
        if "image" in labels:
            terms["image"] = pseudo_labels.image_label_loss(
                predicted["image"], labels["image"], temperature)
        if "image" in labels and config.koleo_weight:
            images = len(labels["image"]) // config.views
            terms["koleo"] = pseudo_labels.koleo(predicted["unit"], images)
        if "patch" in labels:
            terms["patch"] = pseudo_labels.patch_label_loss(
                predicted["patch"], labels["patch"], mask, config.labelled_patches, temperature)
        if config.balancing == "me-max":           # over all patches, whichever are labelled
            for name in labels:
                terms[f"{name}_me_max"] = pseudo_labels.me_max(predicted[name], temperature)
    return terms


# --------------------------------------------------------------------- networks and optimiser

def build(config, channels):
    """A new student, whose weights depend on the seed alone."""
    torch.manual_seed(config.seed)
    return checkpoint.new_student(settings.architecture(config, channels), config.recipe)


def parameter_groups(network, weight_decay):
    """Weight decay on matrices only. The scale of a bias, a norm or a token means something. That
    of a prototype does not, but if it decayed, each step of the optimiser would turn it further."""
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
    config: settings.Config
    images: datasets.Images
    train_ids: torch.Tensor                                # of the images to train on
    val_ids: torch.Tensor                                  # of those held out
    mean: list                                             # of each channel, in units of 0..1
    std: list
    student: pseudo_labels.Student
    teachers: Teachers
    optimizer: torch.optim.Optimizer
    autocast: torch.autocast                               # networks run in it
    scaler: torch.amp.GradScaler                           # of gradients; in fp16 alone
    device: torch.device
    rank: int
    steps_per_epoch: int
    start: int = 0                                         # the first step to do
    meter: dict = None                                     # sums of a log line before the stop
    signs: set = field(default_factory=set)                # of collapse, when it was last logged
    warned: set = field(default_factory=set)               # signs that were warned of
    looked: float = field(default_factory=time.perf_counter)           # when: the last look's end
    look_s: float = 0.0                                    # seconds that it took

    @property
    def total(self):
        return self.config.epochs * self.steps_per_epoch

    @property
    def out(self):
        return Path(self.config.out)

    def say(self, text):
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def main(argv=None, relative=None):
    """relative: a file of extras/relatives, whose settings, student and step take our place."""
    # Settings, device, data.
    config = settings.resolve(argv, relative)
    device = devices.choose_device(config.device)
    rank, world = devices.start_processes(device)
    checkpoint.claim(config.out, rank)
    if config.precision == "auto":
        config.precision = (checkpoint.precision_before(config.out)
                            or devices.best_precision(device))
    dtype, compute = devices.choose_precision(config.precision, device)
    images, train_ids, val_ids = load_training_images(config, rank, world, device)
    mean, std = datasets.mean_std(images)

    with devices.memory_errors_in_one_line(device, f"--batch-size {config.batch_size}", (
            f"raise --accumulate (now {config.accumulate}), which computes a step in more and "
            "smaller micro-batches, or lower --batch-size; --resident-gb 0 keeps image files out "
            "of it")):
        # Student, teachers, optimiser, batches.
        student = build(config, images.channels).to(device, dtype)
        if config.init:
            mean, std = weights.start_from(student, config)
        teachers = make_teachers(student, config)
        optimizer = torch.optim.AdamW(parameter_groups(student, config.weight_decay),
                                      betas=(0.9, 0.95), fused=device.type == "cuda")
        batches = Batches(
            images, train_ids, mean, std, seed=config.seed, batch=config.batch_size,
            patches=student.mae.encoder.num_patches, views=config.views,
            smallest=config.crop, colours=config.colours, teacher_view=config.teacher_view,
            accumulate=config.accumulate, rank=rank, world=world, device=device, dtype=dtype,
            workers=config.workers)

        # A run that was cut off continues; the folder of another run is left alone.
        autocast = torch.autocast(device.type, compute, enabled=compute is not None)
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        run = Run(config, images, train_ids, val_ids, mean, std, student, teachers, optimizer,
                  autocast, scaler, device, rank, batches.steps_per_epoch)
        checkpoint.resume(run)
        report.announce(run, world)

        # The loop.
        if run.start == 0:
            report.evaluate_and_save(run, 0)
        with life.Watch(config.save_minutes, rank) as watch:
            train(run, batches, watch, relative.training_step if relative else training_step)
    if world > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    report.conclude(run)


def train(run, batches, watch, one_step=training_step):
    """The loop over optimiser steps."""
    config, student, teachers, total = run.config, run.student, run.teachers, run.total
    half_lives = {"labelling": config.labelling_half_life,
                  "reconstruction": config.reconstruction_half_life}
    called, one_step = prepare(run, batches, one_step)
    stream = batches.run(run.start, total)
    meter = report.start_meter(run)
    for step in range(run.start, total):
        lr = learning_rate(step, total, config)
        for group in run.optimizer.param_groups:
            group["lr"] = lr

        for micro in range(config.accumulate):
            loss = terms = labels = targets = views = None  # free the memory of those before
            asked = time.perf_counter()
            views = next(stream)
            meter.waited += time.perf_counter() - asked
            # Ranks exchange gradients in `backward`. The last one of a step is enough.
            last = micro == config.accumulate - 1
            with nullcontext() if last or world_size() == 1 else called.no_sync():
                with run.autocast:
                    loss, terms, labels, targets = one_step(called, teachers, views, config)
                run.scaler.scale(loss / config.accumulate).backward()
            meter.add(loss, terms, labels, config.accumulate)

        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip or math.inf)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        momenta = {name: momentum(step, total, half_lives[name]) for name in teachers.named()}
        teachers.follow(student, momenta)                  # once a step, whatever --accumulate

        done = step + 1
        look = done == total or done % (config.eval_every * run.steps_per_epoch) == 0
        if look or done % config.log_every == 0:           # only here the host waits for the device
            record = {"step": done, "epoch": done / run.steps_per_epoch}
            record |= meter.averages(done) | report.describe_targets(targets, config)
            record |= {f"{name}_momentum": m for name, m in momenta.items()}
            record |= {"lr": lr, "grad_norm": norm.item()} | meter.speed(run, done)
            report.log(run, record)
            if look:
                report.evaluate_and_save(run, done)
            meter = report.Meter(done)
        told, saved = watch.told(saved=look), look         # by the clock, or a signal
        if told and not look:
            saved = checkpoint.save(run, done, meter.state())
        watch.end_if_signalled(told, done, run.out, saved)


def prepare(run, batches, one_step=training_step):
    """The student as the step calls it, shared out over processes; and the step, which --compile
    compiles with all that it calls: teachers, Sinkhorn, losses. `batches` is compiled in place.

    What looks at the networks (k-NN, pictures, checkpoints) uses the plain modules."""
    called = run.student
    if world_size() > 1:
        gpu = [run.device.index] if run.device.type == "cuda" else None
        called = DistributedDataParallel(called, device_ids=gpu, gradient_as_bucket_view=True)
    if run.config.compile:                                 # every step has the same shapes
        one_step = torch.compile(one_step, fullgraph=True, dynamic=False)
        batches.augment = torch.compile(batches.augment, fullgraph=True, dynamic=False)
    return called, one_step


def load_training_images(config, rank, world, device):
    """Images, ids to train on, ids held out. Raises UsageError for a batch that cannot be."""
    if config.batch_size % (world * config.accumulate):
        raise UsageError(f"--batch-size {config.batch_size}: must be a multiple of processes x "
                         f"--accumulate, {world} x {config.accumulate}")
    if rank > 0:                           # rank 0 goes first: what it downloads the others find
        distributed.barrier()
    images = datasets.load_images(config.data, config.data_root, "train", config.img_size, None,
                                  config.resident_gb if rank == 0 else 0)
    if rank == 0 and world > 1:
        distributed.barrier()
    if world > 1:                          # rank 0 alone decodes files
        datasets.share(images, config.resident_gb, device)
    train_ids, val_ids = datasets.held_out(images, config.val_fraction)
    if config.batch_size > len(train_ids):
        fewer = max(2, len(train_ids) * config.views // 4)
        clusters = f", with --image-clusters {fewer} or less" if (
            config.image_weight and config.image_clusters > fewer) else ""
        raise UsageError(f"--batch-size {config.batch_size}: there are {len(train_ids)} images to "
                         f"train on ({len(val_ids)} are held out); use {len(train_ids)} or less"
                         + clusters)
    return images, train_ids, val_ids


if __name__ == "__main__":
    run_main(main)
