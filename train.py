"""Train a masked autoencoder with pseudo labels and two teachers, from one command, on a laptop or on several GPUs.

    python train.py                                                          # `shapes`, on a CPU: some minutes
    python train.py --recipe mae                                             # or rc-mae, mim-cluster, pl-mae-one-teacher
    python train.py --data cifar10 --colours 1 --teacher-temperature 0.05    # photographs; see the README for more
    torchrun --nproc-per-node 8 train.py --data imagefolder --data-root DIR --model base --batch-size 4096 ...

Writes checkpoint.pt, config.json, metrics.jsonl and pictures into --out. The same command continues a run that was cut off.

Letters:  B views in the batch (all first views of the images, then all second ones), k masks of a view, N patches, V visible,
          D width of the encoder, d of the decoder, K clusters.
"""

import dataclasses
import json
import math
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from checkpoint import append_json, continue_from, read_json_lines, save_checkpoint, truncate_log, write_atomically
from data import SETS, Batches, generator, held_out, load_images, mean_std, read
from eval import monitor, subset
from extras.command_line import UsageError, config_from_flags, make_folder, option, run_main, size, start_device
from extras.log import averages, line, signs_of_collapse
from extras.pictures import assign, clusters, curves, reconstruct, reconstructions
from mae import SIZES, count_visible, pair
from pseudo_labels import BALANCING, Student, class_token_loss, count_labels, data_token_loss, koleo, make_labels, me_max
from teachers import STANDARDISE, between_images, ema_update, half_life, make_teacher, momentum, standardise

# A recipe is a row of settings; a flag given on the command line goes before it. `pl-mae` is the defaults of Config.
RECIPES = {
    "mae": dict(target="pixels", class_weight=0.0, data_weight=0.0, views=1, colours=0.0, mask_ratio=0.75),
    "rc-mae": dict(target="pixels", class_weight=0.0, data_weight=0.0, views=1, colours=0.0, mask_ratio=0.75,
                   consistency_weight=1.0, reconstruction_half_life="173:inf"),
    "mim-cluster": dict(target="pixels", teachers=1, labelling_half_life="0.01"),
    "pl-mae-one-teacher": dict(teachers=1, labelling_half_life="0.01"),
    "pl-mae": dict(),
}


@dataclass
class Config:
    """Everything that decides a run. Kept in config.json and in the checkpoint; each field is a flag."""
    recipe: str = option("pl-mae", "row of settings, which flags override", choices=list(RECIPES))
    model: str = option("micro", "size of the encoder and its decoder", choices=list(SIZES))
    data: str = option("shapes", "data set", choices=list(SETS))
    data_root: str = option("data", "folder of the data set; what can be downloaded is downloaded to it")
    out: str = option(None, "folder of the run (default: runs/RECIPE-DATA-MODEL; of an imagefolder its name)")
    epochs: int = option(12, "passes over the training images; 0 writes the untrained network", range=(0, math.inf))
    batch_size: int = option(64, "images per optimiser step, of all processes and micro-batches together", range=(1, math.inf))
    img_size: int = option(None, "N or HxW; other images are cropped to the centre and resized (default: the data set's)", size)
    patch_size: int = option(None, "N or HxW, dividing the image (default: one that suits the data set)", size)
    # the views
    views: int = option(2, "views (crops) of an image: with 2, the class token predicts the label of the other one", choices=[1, 2])
    masks: int = option(1, "masks of a view: more students for one pass of the teachers (data2vec 2.0)", range=(1, 64))
    mask_ratio: float = option(0.5, "share of the patches that is hidden (MAE 0.75)")
    crop: float = option(0.35, "smallest area of a random crop, as a share of the image; 1 does not crop (MAE: 0.2)", range=(1e-3, 1))
    colours: float = option(5.0, "changes of brightness, contrast, saturation, hue: 0 none (MAE), 1 MC-SSL's, 5 any hue", range=(0, 5))
    # the reconstruction
    rec_weight: float = option(1.0, "weight of the reconstruction; 0 turns it off", range=(0, math.inf))
    target: str = option("tokens", "what the decoder predicts: pixels, or the reconstruction teacher's tokens", choices=["pixels", "tokens"])
    norm_pix_loss: bool = option(True, "predict pixels standardised within each patch, not plain ones (MAE)")
    standardise: str = option("feature", "of token targets: within a token, or a feature over the batch, or that per position",
                              choices=list(STANDARDISE))
    consistency_weight: float = option(0.0, "weight of RC-MAE's term: predict the pixels that a teacher predicts", range=(0, math.inf))
    # the pseudo labels
    class_weight: float = option(1.0, "weight of the class token's labels; 0 turns them off", range=(0, math.inf))
    class_clusters: int = option(32, "number of clusters (prototypes) of class tokens", range=(2, math.inf))
    koleo_weight: float = option(0.5, "weight of KoLeo beside the class labels: keeps class tokens of different images apart", range=(0, math.inf))
    data_weight: float = option(0.1, "weight of the data (patch) tokens' labels; 0 turns them off", range=(0, math.inf))
    data_clusters: int = option(128, "number of clusters (prototypes) of data tokens", range=(2, math.inf))
    data_labels: str = option("both", "which patches predict their labels", choices=["visible", "masked", "both"])
    balancing: str = option("sinkhorn", "what keeps the labels from gathering in one cluster", choices=list(BALANCING))
    student_temperature: float = option(0.1, "of the student's predictions (MC-SSL, iBOT)", range=(1e-3, math.inf))
    teacher_temperature: float = option(0.0125, "of the labels; lower is more certain (SwAV 0.05, MSN 0.025)", range=(1e-3, math.inf))
    # the teachers
    teachers: int = option(2, "2: one for labels, one for token targets; 1: the labelling teacher does both", choices=[1, 2])
    labelling_half_life: str = option("0.003", "of the labelling teacher: below 1 a share of the run, else steps; A:B changes", half_life)
    reconstruction_half_life: str = option("0.03", "of the reconstruction teacher, likewise; without labels, of the only teacher", half_life)
    # the optimiser
    lr: float = option(1e-3, "highest learning rate, for whatever batch (MAE at scale: 1.5e-4 x batch / 256)", range=(0, math.inf))
    weight_decay: float = option(0.05, "of weight matrices; not of biases, norms, tokens, prototypes (MAE)", range=(0, math.inf))
    warmup: float = option(0.05, "share of the run in which the learning rate rises linearly from 0; then a cosine to 0", range=(0, 1))
    clip: float = option(3.0, "greatest norm of the gradient; 0 does not clip", range=(0, math.inf))
    # the run
    val_fraction: float = option(0.1, "share of the labelled training images kept out of training, for k-NN meanwhile", range=(0, 0.9))
    eval_every: int = option(4, "epochs between k-NN, pictures and checkpoints", range=(1, math.inf))
    log_every: int = option(50, "steps between lines of the log", range=(1, math.inf))
    accumulate: int = option(1, "micro-batches a step is computed in, for batches larger than the memory", range=(1, math.inf))
    seed: int = option(0, "of weights, order, crops, colours and masks", range=(0, 2**63 - 1))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = option("auto", "auto: bf16 autocast on GPUs, else fp32", choices=["auto", "bf16", "fp32", "fp64"])
    compile: str = option("auto", "torch.compile; auto: on GPUs", choices=["auto", "on", "off"])
    workers: int = option(4, "processes that decode images, where the data set streams from the disk", range=(0, math.inf))
    resident_gb: float = option(4.0, "a data set up to this size (decoded) is kept on the device; larger ones stream", range=(0, math.inf))


FREE = {"data_root", "out", "eval_every", "log_every", "device", "workers", "compile"}   # may change when a run continues


# --------------------------------------------------------------------------------------------------------------- one step

def labelling_teacher_step(teacher, imgs, centres, config):
    """Whole views B C H W -> tokens u B 1+N D and labels {"class": B K, "data": B N K}.

    A class token is given the label of the *other* view of its image: what two crops share is their content. A patch is given
    its own, as other crops have no such patch."""
    u = teacher.encode(imgs)
    labels = make_labels(teacher, u, config.balancing, config.teacher_temperature, centres)
    if "class" in labels and config.views == 2:
        labels["class"] = labels["class"].roll(len(imgs) // 2, dims=0)
    return u, labels


def reconstruction_teacher_step(teacher, student, u, imgs, noise, config):
    """Targets {"rec": B N P, "consistency": k B N P} of those that have a weight. teacher None: u, the labelling teacher's
    tokens, serve as well."""
    targets = {}
    if config.rec_weight and config.target == "tokens":
        r = u if teacher is None else teacher.encode(imgs)                                              # B 1+N D
        targets["rec"] = standardise(r[:, 1:], config.standardise)
        targets["rec_constant"], _ = between_images(targets["rec"])
        _, targets["rec_between"] = between_images(r[:, 1:])
    elif config.rec_weight:
        targets["rec"] = student.pixel_target(imgs)
    if config.consistency_weight:                          # RC-MAE's teacher sees what the student sees: the same masks
        targets["consistency"] = teacher(imgs, config.mask_ratio, noise)["pred"]
    return targets


def losses(out, labels, targets, config):
    """What the student put out, and what it should have put out -> each term, and their weighted sum as "loss"."""
    k, t = config.masks, config.student_temperature
    masks = lambda x: x.repeat(k, *[1] * (x.ndim - 1)) if k > 1 else x         # all masks of a view have its target
    terms = {}
    if config.rec_weight:
        terms["rec"] = Student.forward_loss(out["pred"], masks(targets["rec"]), out["mask"])
    if config.consistency_weight:
        terms["consistency"] = Student.forward_loss(out["pred"], targets["consistency"], out["mask"])
    if config.class_weight:
        terms["class"] = class_token_loss(out["class"], masks(labels["class"]), t)
    if config.class_weight and config.koleo_weight:
        terms["koleo"] = koleo(out["unit"], len(labels["class"]) // config.views)
    if config.data_weight:
        terms["data"] = data_token_loss(out["data"], masks(labels["data"]), out["mask"], config.data_labels, t)
    loss = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())
    if config.balancing == "me-max":                       # as heavy as the labels that it keeps apart; over all patches
        for name in labels:
            terms[f"{name}_me_max"] = me_max(out[name], t)
            loss = loss + getattr(config, f"{name}_weight") * terms[f"{name}_me_max"]
    return dict(terms, loss=loss)


# ---------------------------------------------------------------------------------------------------------- the settings

def parse(argv=None):
    """The command line -> Config with nothing left open but "auto". Raises UsageError for what can never be."""
    config = config_from_flags(Config, RECIPES, argv, __doc__.split("\n\n")[0])
    source = Path(config.data_root).resolve().name if config.data == "imagefolder" else config.data
    config.out = config.out or f"runs/{config.recipe}-{source}-{config.model}"
    config.img_size, config.patch_size = config.img_size or SETS[config.data][0], config.patch_size or SETS[config.data][1]

    (H, W), (h, w) = pair(config.img_size), pair(config.patch_size)
    if H % h or W % w:
        fits = [n for n in range(1, min(H, W) + 1) if H % n == 0 and W % n == 0]
        raise UsageError(f"--patch-size {config.patch_size} does not divide --img-size {config.img_size}; "
                         f"these do: {', '.join(map(str, fits))}")
    N = (H // h) * (W // w)
    if not 0 < config.mask_ratio < 1 or not 0 < count_visible(N, config.mask_ratio) < N:
        raise UsageError(f"--mask-ratio {config.mask_ratio}: choose it between 0 and 1 so that of {N} patches one stays and one is hidden")
    if not any((config.rec_weight, config.class_weight, config.data_weight, config.consistency_weight)):
        raise UsageError("--rec-weight, --class-weight, --data-weight: all are 0, so there is nothing to learn; raise one")
    if config.consistency_weight and config.target == "tokens":
        raise UsageError("--consistency-weight: compares predicted pixels; use --target pixels")
    if config.recipe == "pl-mae-one-teacher" and config.reconstruction_half_life != Config.reconstruction_half_life:
        raise UsageError("--reconstruction-half-life: one teacher goes at the pace of its labels; use --labelling-half-life")
    views = config.batch_size // config.accumulate * config.views
    for name, samples in (("class", views), ("data", views * N)):
        K = getattr(config, f"{name}_clusters")
        if getattr(config, f"{name}_weight") and K > samples > 0:
            raise UsageError(f"--{name}-clusters {K}: more than the {samples} samples of a micro-batch that are shared out among "
                             f"them; use {max(2, samples // 4)} or less, or a larger --batch-size")
    return config


def learning_rate(step, total, config):
    """Linear warm-up from 0, then a cosine to 0, by the optimiser step."""
    warm = config.warmup * total
    if step < warm:
        return config.lr * step / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def parameter_groups(model, weight_decay):
    """Weight decay on matrices only: a bias, a norm, a class or mask token has a scale that means something."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = lambda name, p: name.endswith(".weight") and p.ndim >= 2
    return [dict(params=[p for n, p in named if decays(n, p) == yes], weight_decay=weight_decay * yes) for yes in (True, False)]


# --------------------------------------------------------------------------------------------------------------- the run

def main(argv=None):
    config = parse(argv)
    rank, world, device, dtype, bf16 = start_device(config)
    out, log = Path(config.out), Path(config.out) / "metrics.jsonl"
    say = lambda text: print(text, file=sys.stderr, flush=True) if rank == 0 else None

    # Data. Rank 0 goes first: what it downloads or draws, the others find.
    if rank > 0:
        distributed.barrier()
    images = load_images(config.data, config.data_root, "train", config.img_size, None, config.resident_gb)
    if rank == 0 and world > 1:
        distributed.barrier()
    train_ids, val_ids = held_out(images, config.val_fraction)
    if config.batch_size > len(train_ids):
        raise UsageError(f"--batch-size {config.batch_size}: there are {len(train_ids)} images to train on ({len(val_ids)} are "
                         f"held out); use {len(train_ids)} or less")
    if config.target == "pixels" and config.norm_pix_loss and images.channels * math.prod(pair(config.patch_size)) == 1:
        raise UsageError("--patch-size 1: a patch of one number cannot be standardised; use --no-norm-pix-loss")
    mean, std = mean_std(images)

    # Student, teachers, optimiser.
    arch = dict(img_size=config.img_size, patch_size=config.patch_size, in_chans=images.channels, mlp_ratio=4.0,
                norm_pix_loss=config.norm_pix_loss, **SIZES[config.model])
    if config.target == "tokens":
        arch["target_dim"] = arch["embed_dim"]
    labelled = {name: getattr(config, f"{name}_clusters") for name in ("class", "data") if getattr(config, f"{name}_weight")}
    arch |= {f"{name}_clusters": K for name, K in labelled.items()}
    torch.manual_seed(config.seed)
    model = Student(**arch).to(device, dtype)
    teachers, decoder = {}, ("decoder_", "mask_token")
    if labelled:
        teachers["labelling"] = make_teacher(model, without=decoder)
    if not labelled or config.teachers == 2 or config.consistency_weight:      # without a task, as in `mae`, it is only judged
        teachers["reconstruction"] = make_teacher(model, ("class_head", "data_head") + (() if config.consistency_weight else decoder))
    centres = {name: torch.zeros(K, device=device, dtype=dtype) for name, K in labelled.items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), betas=(0.9, 0.95),
                                  fused=device.type == "cuda")
    batches = Batches(images, train_ids, mean, std, config.seed, config.batch_size, model.num_patches, config.views,
                      config.masks, config.crop, config.colours, config.accumulate, rank, world, device, dtype, config.workers)
    steps_per_epoch = batches.steps_per_epoch
    total, eval_steps = config.epochs * steps_per_epoch, config.eval_every * steps_per_epoch

    # A run that was cut off continues; another run's folder is left alone.
    start, parts = 0, dict(model=model, optimizer=optimizer, **{f"{name}_teacher": t for name, t in teachers.items()})
    saved = continue_from(out / "checkpoint.pt", dataclasses.asdict(config), FREE, mean, len(images))
    if saved:
        start = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        for name, centre in centres.items():
            centre.copy_(saved["centres"][name])
    student, decode = model, bool(config.rec_weight or config.data_weight or config.consistency_weight)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        model.compile()
        for teacher in teachers.values():
            teacher.encode = torch.compile(teacher.encode)
    if world > 1:                                          # class labels alone leave the decoder idle
        student = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                          find_unused_parameters=not config.rec_weight)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    judged = teachers["reconstruction"] if config.consistency_weight else model            # RC-MAE keeps its teacher

    # What is looked at from time to time: always the same images under the same masks.
    shown = subset(val_ids if len(val_ids) else train_ids, min(2000, max(200, 8 * labelled.get("class", 0))))
    fixed = ((read(images, shown).to(device, dtype) / 255 - batches.mean) / batches.std)                # n C H W
    fixed_noise = torch.rand(min(8, len(shown)), model.num_patches, generator=generator(config.seed, "picture")).to(device)

    def look(step):
        """k-NN, pictures, checkpoint. All ranks compute the pictures, as balancing and standardising are over all ranks."""
        labels = assign(teachers["labelling"], config, centres, fixed) if labelled else {}
        rows = reconstruct(model, teachers.get("reconstruction", teachers.get("labelling")), config, fixed[:8], fixed_noise,
                           mean, std) if config.rec_weight else {}
        if rank == 0:
            found = monitor(judged, images, train_ids, val_ids, mean, std, device)
            append_json(log, dict(step=step, epoch=step / steps_per_epoch, **found))
            save_checkpoint(out / "checkpoint.pt", dict(
                {name: part.state_dict() for name, part in parts.items()}, centres=centres, arch=arch, step=step,
                config=dataclasses.asdict(config), mean=mean, std=std, images=len(images)))
            curves(log, out / "curves.png")
            if rows:
                reconstructions(rows, out / "reconstructions.png")
            if labels:
                clusters(labels, fixed, model.grid, mean, std, out / "clusters.png")
            if found and step:
                say(f"   k-NN on held-out images: class token {found['knn_class']:.1%}, mean token {found['knn_mean']:.1%}")

    if rank == 0:
        make_folder(out, "--out")
        write_atomically(out / "config.json", lambda file: file.write(json.dumps(
            dict(dataclasses.asdict(config), mean=mean, std=std, channels=images.channels), indent=2).encode()))
        truncate_log(log, start or -1)
    for name, K in labelled.items():
        samples = config.batch_size // config.accumulate * config.views * (model.num_patches if name == "data" else 1)
        if K > samples / 4:
            say(f"warning: --{name}-clusters {K} for {samples} samples of a micro-batch; use {samples // 4} or less, or a larger --batch-size")
    say(f"{config.recipe}, {config.model} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters), "
        f"{model.grid[0]} x {model.grid[1]} patches; {config.data}: {len(train_ids)} images to train on, {len(val_ids)} held out, "
        f"{len(images.classes) or 'no'} classes{'' if images.classes else ' (subfolders of DIR/train are)'}; {device}, {world} process(es)")
    say(f"{'continues: ' if 0 < start < total else 'finished already: ' if start else ''}steps {start} to {total}, into {out}")
    if start == 0:
        look(0)

    # The loop.
    stream = batches.run(start, total)
    sums, waited, since, logged, warned, before = defaultdict(float), 0.0, time.perf_counter(), start, set(), set()
    for step in range(start, total):
        lr = learning_rate(step, total, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        for micro in range(config.accumulate):
            asked = time.perf_counter()
            imgs, noise = next(stream)                                                                  # B C H W, k B N
            waited += time.perf_counter() - asked
            last = micro == config.accumulate - 1
            with nullcontext() if last or world == 1 else student.no_sync():     # ranks exchange gradients once a step
                with autocast:
                    predicted = student(imgs, config.mask_ratio, noise, decode)
                    with torch.no_grad():
                        u, labels = labelling_teacher_step(teachers["labelling"], imgs, centres, config) if labelled else (None, {})
                        targets = reconstruction_teacher_step(teachers.get("reconstruction"), model, u, imgs, noise, config)
                    terms = losses(predicted, labels, targets, config)
                (terms["loss"] / config.accumulate).backward()
            counts = {f"{name}_counts": count_labels(q) for name, q in labels.items()}
            for name, value in (terms | counts | {k: v for k, v in targets.items() if v.ndim == 0}).items():
                sums[name] += value.detach() / config.accumulate

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        momenta = {name: momentum(step, total, getattr(config, f"{name}_half_life")) for name in teachers}
        for name, teacher in teachers.items():             # once per optimiser step, whatever --accumulate
            ema_update(teacher, model, momenta[name])

        done = step + 1
        look_now = done == total or done % eval_steps == 0
        if look_now or done % config.log_every == 0:       # only here does the host wait for the device
            steps, seconds = done - logged, time.perf_counter() - since
            record = dict(step=done, epoch=done / steps_per_epoch, **averages(sums, world * steps))
            record |= dict({f"{name}_momentum": m for name, m in momenta.items()}, lr=lr, grad_norm=norm.item(),
                           images_per_s=round(steps * config.batch_size / seconds, 1), data_wait=round(waited / seconds, 4),
                           eta_s=round((total - done) * seconds / steps, 1))
            if not math.isfinite(record["loss"] + record["grad_norm"]):
                sys.exit(f"train.py: the loss is {record['loss']}, the gradient {record['grad_norm']} at step {done}. The last "
                         "checkpoint is intact; try a lower --lr, with another --out")
            if rank == 0:
                append_json(log, record)
                say(line(record))
                signs = signs_of_collapse(record) if done > total / 10 else set()
                for sign in signs & before - warned:       # twice in a row
                    say(f"   warning: {sign}")
                    warned.add(sign)
                before = signs
            if look_now:
                look(done)
            sums.clear()
            waited, since, logged = 0.0, time.perf_counter(), done

    if world > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    tests = [r for r in read_json_lines(log) if "knn_mean" in r] if rank == 0 else []
    if tests:
        say("k-NN on held-out images, before and after: " + ", ".join(
            f"{token} token {tests[0]['knn_' + token]:.1%} and {tests[-1]['knn_' + token]:.1%}" for token in ("class", "mean")))
    say(f"done: {out}/checkpoint.pt and its pictures"
        + (f"; next: python eval.py linear --checkpoint {out}/checkpoint.pt" if images.classes else ""))


if __name__ == "__main__":
    run_main(main)
