"""Train a masked autoencoder on images, from one command, on a laptop or on several GPUs.

    python train.py                                                          # `shapes`, on a CPU: about five minutes
    python train.py --data cifar10 --model tiny --epochs 100                 # one GPU
    python train.py --data imagefolder --data-root DIR --model small         # DIR/train/<class>/* or a folder of images
    torchrun --nproc-per-node 8 train.py --data imagefolder --data-root DIR --model base --batch-size 4096

Writes config.json, metrics.jsonl, checkpoint.pt, curves.png and reconstructions.png into --out. The same command on the
same --out continues a run that was cut off, bit for bit on a CPU.
"""

import dataclasses
import json
import math
import os
import sys
import time
from argparse import BooleanOptionalAction
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (Parser, UsageError, append_json, find_device, load_checkpoint, make_folder, read_json_lines, run_main,
                        same_config, save_checkpoint, truncate_log, write_atomically)
from data import SETS, Batches, generator, held_out, load_images, mean_std, read
from eval import monitor
from extras.pictures import curves, reconstructions
from mae import SIZES, MaskedAutoencoder, count_visible, pair

# A recipe is a row of settings; a flag given on the command line goes before it.
RECIPES = {
    "mae": dict(),
}


def option(default, help, type=None, choices=None, range=None):
    return dataclasses.field(default=default, metadata=dict(help=help, type=type, choices=choices, range=range))


def size(text):
    """The type of --img-size and --patch-size: "32", or "48x64" for height and width."""
    numbers = [int(n) for n in text.split("x")]
    if len(numbers) > 2 or min(numbers) < 1:
        raise ValueError
    return numbers[0] if len(numbers) == 1 else numbers


@dataclass
class Config:
    """Everything that decides a run. Kept in config.json and in the checkpoint; each field is a flag."""
    recipe: str = option("mae", "row of settings, which flags override", choices=list(RECIPES))
    model: str = option("micro", "size of the encoder and its decoder", choices=list(SIZES))
    data: str = option("shapes", "data set", choices=list(SETS))
    data_root: str = option("data", "folder of the data set; what can be downloaded is downloaded to it")
    out: str = option(None, "folder of the run (default: runs/RECIPE-DATA-MODEL; of an imagefolder its name)")
    epochs: int = option(60, "passes over the training images; 0 writes the untrained network", range=(0, math.inf))
    batch_size: int = option(64, "images per optimiser step, of all processes and micro-batches together", range=(1, math.inf))
    img_size: int = option(None, "N or HxW; other images are cropped to the centre and resized (default: the data set's)", size)
    patch_size: int = option(None, "N or HxW, dividing the image (default: one that suits the data set)", size)
    lr: float = option(1e-3, "highest learning rate, for whatever batch (MAE at scale: 1.5e-4 x batch / 256)", range=(0, math.inf))
    weight_decay: float = option(0.05, "of weight matrices; not of biases, norms, class and mask token (MAE)", range=(0, math.inf))
    warmup: float = option(0.05, "share of the run in which the learning rate rises linearly from 0; then a cosine to 0", range=(0, 1))
    clip: float = option(3.0, "greatest norm of the gradient; 0 does not clip", range=(0, math.inf))
    mask_ratio: float = option(0.75, "share of the patches that is hidden (MAE)")
    norm_pix_loss: bool = option(True, "predict pixels standardised within each patch, not plain ones (MAE)")
    crop: float = option(0.35, "smallest area of a random crop, as a share of the image; 1 does not crop (MAE: 0.2)", range=(1e-3, 1))
    colours: bool = option(False, "change brightness, contrast, saturation, hue; drop colour (MAE does not)")
    val_fraction: float = option(0.1, "share of the labelled training images kept out of training, for k-NN meanwhile", range=(0, 0.9))
    eval_every: int = option(10, "epochs between k-NN, pictures and checkpoints", range=(1, math.inf))
    log_every: int = option(50, "steps between lines of the log", range=(1, math.inf))
    accumulate: int = option(1, "micro-batches a step is computed in, for batches larger than the memory", range=(1, math.inf))
    seed: int = option(0, "of weights, order, crops, colours and masks", range=(0, 2**63 - 1))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = option("auto", "auto: bf16 autocast on GPUs, else fp32", choices=["auto", "bf16", "fp32", "fp64"])
    compile: str = option("auto", "torch.compile; auto: on GPUs", choices=["auto", "on", "off"])
    workers: int = option(4, "processes that decode images, where the data set streams from the disk", range=(0, math.inf))
    resident_gb: float = option(4.0, "a data set up to this size (decoded) is kept on the device; larger ones stream", range=(0, math.inf))


FREE = {"data_root", "out", "eval_every", "log_every", "device", "workers", "compile"}   # may change when a run continues


# ---------------------------------------------------------------------------------------------------------- the settings

def parse(argv=None):
    """The command line -> Config with nothing left open but "auto". Raises UsageError for what can never be."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="Several GPUs: torchrun --nproc-per-node N train.py ...")
    for f in dataclasses.fields(Config):
        note = "" if f.default is None else f" (default: {f.default})"
        kind = dict(action=BooleanOptionalAction) if f.type is bool else \
            dict(type=f.metadata["type"] or f.type, choices=f.metadata["choices"], metavar=None if f.metadata["choices"] else "X")
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=f.metadata["help"] + note, **kind)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    config = Config(**{**RECIPES[given.get("recipe", Config.recipe)], **given})
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
        raise UsageError(f"--mask-ratio {config.mask_ratio}: of {N} patches (--img-size {config.img_size}, --patch-size "
                         f"{config.patch_size}) at least one must stay and one be hidden; smaller patches are more")
    for f in dataclasses.fields(Config):
        value, (low, high) = getattr(config, f.name), f.metadata["range"] or (None, None)
        if low is not None and (math.isinf(value) or not low <= value <= high):
            raise UsageError(f"--{f.name.replace('_', '-')} {value}: must be "
                             + (f"{low} or more" if high == math.inf else f"from {low} to {high}"))
    return config


def start_device(config):
    """rank, world size, device, dtype of the weights, whether to use bf16. Starts the process group under torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(config.device)
    if device.type == "cuda" and world > 1:
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "mps" and config.precision == "fp64":
        raise UsageError("--precision fp64: not to be had on mps; use --device cpu")
    if config.batch_size % (world * config.accumulate):
        raise UsageError(f"--batch-size {config.batch_size}: must be a multiple of processes x --accumulate, "
                         f"{world} x {config.accumulate}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))  # downloads
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    gains = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return rank, world, device, dtype, config.precision == "bf16" or (config.precision == "auto" and gains)


# -------------------------------------------------------------------------------------------------------------- schedules

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
    return [dict(params=[p for n, p in named if decays(n, p)], weight_decay=weight_decay),
            dict(params=[p for n, p in named if not decays(n, p)], weight_decay=0.0)]


# --------------------------------------------------------------------------------------------------------------- the run

def main(argv=None):
    config = parse(argv)
    rank, world, device, dtype, bf16 = start_device(config)
    out, log = Path(config.out), Path(config.out) / "metrics.jsonl"
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if rank == 0 else lambda text: None

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
    if config.norm_pix_loss and images.channels * math.prod(pair(config.patch_size)) == 1:
        raise UsageError("--patch-size 1: a patch of one number cannot be standardised; use --no-norm-pix-loss")
    mean, std = mean_std(images)

    # Model and optimiser.
    arch = dict(img_size=config.img_size, patch_size=config.patch_size, in_chans=images.channels, mlp_ratio=4.0,
                norm_pix_loss=config.norm_pix_loss, **SIZES[config.model])
    torch.manual_seed(config.seed)
    model = MaskedAutoencoder(**arch).to(device, dtype)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), betas=(0.9, 0.95),
                                  fused=device.type == "cuda")
    batches = Batches(images, train_ids, mean, std, config.seed, config.batch_size, model.num_patches, smallest=config.crop,
                      colours=config.colours, accumulate=config.accumulate, rank=rank, world=world, device=device,
                      dtype=dtype, workers=config.workers)
    steps_per_epoch = batches.steps_per_epoch
    total, eval_steps = config.epochs * steps_per_epoch, config.eval_every * steps_per_epoch

    # A run that was cut off continues; another run's folder is left alone.
    start = 0
    if (out / "checkpoint.pt").exists():
        saved = load_checkpoint(out / "checkpoint.pt")
        if "config" not in saved or "optimizer" not in saved:
            raise UsageError(f"--out {out}: its checkpoint.pt is not of train.py; use another --out")
        same_config(saved["config"], dataclasses.asdict(config), FREE)
        if (saved["mean"], saved["images"]) != (mean, len(images)):
            raise UsageError(f"--out {out}: holds a run on other images; use another --out, or delete that folder")
        start = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    student = model
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        model.compile()
    if world > 1:
        student = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    # What is looked at from time to time: always the same images under the same masks.
    shown = val_ids if len(val_ids) else train_ids
    shown = shown[torch.linspace(0, len(shown) - 1, min(8, len(shown))).long()]
    fixed = (read(images, shown).to(device, dtype) / 255 - batches.mean) / batches.std                  # 8 C H W
    fixed_noise = torch.rand(len(shown), model.num_patches, generator=generator(config.seed, "picture")).to(device)

    def look(step):
        """k-NN, pictures, checkpoint: on rank 0, while the others wait for its next gradient."""
        model.eval()
        record = dict(step=step, epoch=step / steps_per_epoch, **monitor(model, images, train_ids, val_ids, mean, std, device))
        model.train()
        append_json(log, record)
        save_checkpoint(out / "checkpoint.pt", dict(
            model=model.state_dict(), arch=arch, optimizer=optimizer.state_dict(), step=step,
            config=dataclasses.asdict(config), mean=mean, std=std, images=len(images)))
        curves(log, out / "curves.png")
        reconstructions(model, fixed, fixed_noise, config.mask_ratio, mean, std, out / "reconstructions.png")
        return record

    if rank == 0:
        make_folder(out, "--out")
        write_atomically(out / "config.json", lambda file: file.write(json.dumps(
            dict(dataclasses.asdict(config), mean=mean, std=std, channels=images.channels), indent=2).encode()))
        truncate_log(log, start or -1)
        if start == 0:
            look(0)
    known = f"{len(images.classes)} classes" if images.classes else "no labels, so no k-NN"
    say(f"{config.recipe}, {config.model} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters), "
        f"{model.grid[0]} x {model.grid[1]} patches; {config.data}: {len(train_ids)} images to train on, {len(val_ids)} held out, "
        f"{known}; {device}, {world} process(es)")
    say(f"{'continues: ' if 0 < start < total else 'finished already: ' if start else ''}steps {start} to {total}, into {out}")

    # The loop.
    stream = batches.run(start, total)
    loss_sum, waited, since, logged = torch.zeros((), device=device, dtype=dtype), 0.0, time.perf_counter(), start
    for step in range(start, total):
        lr = learning_rate(step, total, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        for micro in range(config.accumulate):
            asked = time.perf_counter()
            imgs, noise = next(stream)                                                                  # b C H W, b N
            waited += time.perf_counter() - asked
            last = micro == config.accumulate - 1
            with nullcontext() if last or world == 1 else student.no_sync():     # ranks exchange gradients once a step
                with autocast:
                    loss, _, _ = student(imgs, config.mask_ratio, noise)
                (loss / config.accumulate).backward()
            loss_sum += loss.detach() / config.accumulate

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        look_now = done == total or done % eval_steps == 0
        if look_now or done % config.log_every == 0:       # only here does the host wait for the device
            if world > 1:
                distributed.all_reduce(loss_sum)
            value, steps = loss_sum.item() / world / (done - logged), done - logged
            seconds = time.perf_counter() - since
            if not math.isfinite(value + norm.item()):
                sys.exit(f"train.py: the loss is {value}, the gradient {norm.item()} at step {done}. The last checkpoint is "
                         "intact; try a lower --lr, with another --out")
            if rank == 0:
                record = dict(step=done, epoch=done / steps_per_epoch, loss=value, lr=lr, grad_norm=norm.item(),
                              images_per_s=round(steps * config.batch_size / seconds, 1),
                              data_wait=round(waited / seconds, 4), eta_s=round((total - done) * seconds / steps, 1))
                append_json(log, record)
                say("step {step:6d}  epoch {epoch:6.1f}  loss {loss:.4f}  lr {lr:.1e}  gradient {grad_norm:.2f}  "
                    "{images_per_s:.0f} images/s  data {data_wait:.0%}  {eta_s:.0f} s to go".format(**record))
                if look_now:
                    found = look(done)
                    if "knn_mean" in found:
                        say(f"   k-NN on held-out images: class token {found['knn_class']:.1%}, mean token {found['knn_mean']:.1%}")
            loss_sum.zero_()
            waited, since, logged = 0.0, time.perf_counter(), done

    if world > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    tests = [r for r in read_json_lines(log) if "knn_mean" in r] if rank == 0 else []
    if tests:
        say("k-NN on held-out images, before and after: " + ", ".join(
            f"{token} token {tests[0]['knn_' + token]:.1%} and {tests[-1]['knn_' + token]:.1%}" for token in ("class", "mean")))
    say(f"done: {out}/checkpoint.pt, curves.png, reconstructions.png"
        + (f"; next: python eval.py linear --checkpoint {out}/checkpoint.pt" if images.classes else ""))


if __name__ == "__main__":
    run_main(main)
