"""What fine-tuning, segmentation and detection share: where the encoder comes from, a learning rate
for each layer, and a loop that continues after a stop.

Here the whole network learns, from true classes. Pretraining has taught the lower layers more
general things than the upper ones, so they change less: of two neighbouring layers the lower one
learns `layer_decay` times as fast (Clark et al. 2020, Bao et al. 2022).

One process. All random numbers of a step come from (seed, step), so that a stop changes none.

Letters:  B images in a batch, C channels, H W height and width, D width of the encoder.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

from data import epoch_order, generator
from mae import SIZES, VisionTransformer, pair
from support import weights
from support.checkpoint import (
    NAME,
    PREVIOUS,
    claim,
    continue_from,
    is_finite,
    precision_before,
    save_checkpoint,
)
from support.command_line import (
    UsageError,
    check_ranges,
    flag,
    given_flags,
    make_folder,
    numbers,
    option,
    path,
    size,
)
from support.datasets import SETS, held_out, load_images, mean_std, part_of, spread_out
from support.devices import best_precision, choose_precision, memory_errors_in_one_line, peak_memory
from support.files import append_json, read_json_lines, truncate_log, write_atomically
from support.life import Watch, lock
from support.pictures import draw_line, plt, save
from support.settings import COUNT, POSITIVE, describe
from train import learning_rate

# These may change when a run continues.
FREE = {"data_root", "out", "eval_every", "log_every", "save_minutes", "device"}


@dataclass
class Config:
    """Settings of each task; a task may have others. Each field is a flag."""
    checkpoint: str = option(
        None, "what to start from: a checkpoint.pt of train.py, official MAE weights, timm's, an "
        "export", path)
    num_heads: int = option(None, weights.ASSUMED["num_heads"][1])
    pixel_mean: list = option(None, weights.ASSUMED["pixel_mean"][1], numbers)
    pixel_std: list = option(None, weights.ASSUMED["pixel_std"][1], numbers)
    from_scratch: bool = option(
        False, "start from random weights: of the network of --checkpoint, or of --model")
    model: str = option("micro", "size of the network, without --checkpoint", choices=list(SIZES))
    data: str = option(
        None, "data set (default: that of the checkpoint, else shapes)", choices=list(SETS))
    data_root: str = option(
        None, "folder of the data set (default: that of the checkpoint's run, else data)", path)
    img_size: int = option(
        None, "N or HxW (default: that of the checkpoint); codes of places are interpolated", size)
    patch_size: int = option(None, "N or HxW, without --checkpoint", size)
    out: str = option(
        None, "folder of the run (default: runs/TASK-NAME of the checkpoint's run)", path)
    epochs: int = option(20, "passes over the training images", range=COUNT)
    batch_size: int = option(64, "images per step (not tuned)", range=COUNT)
    lr: float = option(1e-3, "highest learning rate, of the last layer (not tuned)", range=POSITIVE)
    layer_decay: float = option(
        0.75, "learning rate of a layer, as a share of that of the next one (MAE: 0.65 to 0.75; "
        "with all labels of shapes 1 is better)",
        range=(1e-3, 1))
    drop_path: float = option(
        0.1, "how often each half of the last block is skipped in training; of earlier ones "
        "less often (MAE)",
        range=(0, 0.9))
    weight_decay: float = option(0.05, "of weight matrices (MAE)", range=POSITIVE)
    warmup: float = option(
        0.05, "share of the run in which the learning rate rises from 0; then a cosine to 0",
        range=(0, 1))
    clip: float = option(3.0, "greatest norm of the gradient; 0 does not clip", range=POSITIVE)
    crop: float = option(
        0.35, "smallest area of a random crop, as a share of the image; 1 does not crop (not "
        "tuned)", range=(1e-3, 1))
    train_images: int = option(
        0, "train on so many images alone, evenly spread; 0: on all", range=POSITIVE)
    val_fraction: float = option(
        0.1, "share of the training images kept out, to look at meanwhile", range=(0, 0.9))
    eval_every: int = option(5, "epochs between looks and checkpoints", range=COUNT)
    log_every: int = option(50, "steps between lines of the log", range=COUNT)
    save_minutes: float = option(
        10.0, "checkpoints also come by the clock, so that a crash costs no more than that; 0: "
        "only every --eval-every", range=POSITIVE)
    seed: int = option(0, "of new weights, order, crops, drop path", range=(0, 2**63 - 1))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = option(
        "auto", "auto: bf16 where the device is faster in it, else fp32; never fp16",
        choices=["auto", "bf16", "fp32"])


# ----------------------------------------------------------------------------------- at the start

def start(Config, task, description, argv):
    """The command line -> config, encoder, mean and std of the pixels it is used to.

    The encoder is on the CPU and learns. Raises UsageError."""
    given = given_flags(Config, argv, description, "Settings of the encoder are those of its "
                        "checkpoint.")
    config = Config(**given)
    check_ranges(config)
    if config.checkpoint is None and not config.from_scratch:
        raise UsageError("--checkpoint: name a file to start from, or start with --from-scratch")
    for name, value in weights.given(config).items():
        if config.checkpoint is None and value is not None:
            raise UsageError(f"{flag(name)}: is of the weights of --checkpoint; leave it out")
    encoder, info = None, {}
    if config.checkpoint:
        encoder, _ = weights.load_encoder(config.checkpoint, img_size=config.img_size,
                                          **weights.given(config))
        info = encoder.info
        for name in ("patch_size", "model"):
            if name in given:
                raise UsageError(f"{flag(name)}: the checkpoint decides it; leave it out")
    run = info.get("config", {})
    config.data = config.data or run.get("data", "shapes")
    same = config.data == run.get("data") and config.data_root in (None, run["data_root"])
    root = Path(config.data_root or "")
    if config.data == "shapes" and "data" not in given and config.data_root and root.is_dir() and (
            any(root.iterdir()) and not (root / "shapes").exists()):
        raise UsageError(f"--data-root {root}: holds no `shapes`, the set that is meant without "
                         "--data; say what it holds with --data")
    if config.data_root is None:
        config.data_root = run["data_root"] if same else "data"
    # Of sets with classes the very images that the run held out too.
    if same and "val_fraction" not in given:
        config.val_fraction = run["val_fraction"]
    if config.out is None:
        name = Path(config.checkpoint).resolve().parent.name if config.checkpoint else config.data
        scratch = "-from-scratch" if config.from_scratch else ""
        config.out = f"runs/{task}-{name}{scratch}"
    claim(config.out)
    config.img_size = list(pair(
        config.img_size or (encoder.img_size if encoder else SETS[config.data].size)))
    if config.from_scratch:
        torch.manual_seed(config.seed)
        encoder = new_encoder(config, encoder)
    encoder.train().requires_grad_(True)
    encoder.pos_embed.requires_grad_(False)                # codes of places are no weights
    return config, encoder, info


def new_encoder(config, like):
    """Random weights: of the geometry of another encoder, or, without one, of --model."""
    if like is not None:
        weights.require_plain(like, "--from-scratch")
        _, patch_size, channels, D, depth, heads, hidden = weights.sizes(like).values()
        return VisionTransformer(config.img_size, patch_size, channels, D, depth, heads, hidden / D)
    patch_size = config.patch_size or SETS[config.data].patch
    width, depth, heads = (SIZES[config.model][key] for key in ("embed_dim", "depth", "num_heads"))
    try:
        return VisionTransformer(config.img_size, patch_size, SETS[config.data].channels, width,
                                 depth, heads)
    except ValueError as error:
        H, W = config.img_size
        raise UsageError(f"--img-size {H}x{W}, --patch-size {patch_size}: {error}; choose a size "
                         "of images that is a multiple of that of patches") from error


def drop_paths(encoder, rate):
    """Skip blocks at random while training (Huang et al. 2016): what a block adds to its input
    becomes 0, for some images. The first block is never skipped, the last one at the rate."""
    depth = len(encoder.blocks)
    for number, block in enumerate(encoder.blocks):
        p = rate * number / max(1, depth - 1)
        for part in (block.attn, block.mlp):
            part.register_forward_hook(
                lambda module, _, added, p=p: stochastic_depth(added, p, "row", module.training))


def parameter_groups(encoder, model, config):
    """Groups for AdamW, each with a `scale` of the learning rate.

    What the model has beside its encoder has 1, the last block layer_decay, the one before
    layer_decay squared, ..., the patch embedding and class token one power more than the first
    block. Weight decay on matrices only."""
    depth = len(encoder.blocks)

    def layer(name):
        """0 the embedding, 1 .. depth the blocks, depth + 1 the last norm."""
        if name.startswith("blocks."):
            return 1 + int(name.split(".")[1])
        return depth + 1 if name.startswith("norm.") else 0

    named = [(name, p, config.layer_decay ** (depth + 1 - layer(name)))
             for name, p in encoder.named_parameters() if name != "pos_embed"]
    inside = {*encoder.parameters()}
    named += [(name, p, 1.0) for name, p in model.named_parameters() if p not in inside]
    groups = {}
    for name, p, scale in named:
        matrix = name.endswith("weight") and p.ndim >= 2   # not class tokens
        key = scale, config.weight_decay if matrix else 0.0
        groups.setdefault(key, []).append(p)
    return [dict(params=params, scale=scale, weight_decay=decay)
            for (scale, decay), params in groups.items()]


# ------------------------------------------------------------------------------------------ images

def split_images(config, encoder, classified=False, test="test", resident_gb=4.0):
    """Images of the training split, ids to train on, ids held out, images of the split `test`.

    classified: only images of known class serve. Raises UsageError where they are too few."""
    no_classes = UsageError(f"--data {config.data}, --data-root {config.data_root}: images have no "
                            "class to learn; put them into train/CLASS/* and test/CLASS/*")
    if classified and config.data == "coco":
        raise no_classes
    root = Path(config.data_root)
    if classified and config.data == "imagefolder" and root.is_dir() and not part_of(root, "train"):
        raise no_classes
    train_images, test_images = (
        load_images(config.data, config.data_root, split, config.img_size, encoder.in_chans,
                    resident_gb)
        for split in ("train", test))
    if classified and len(train_images.classes) < 2:
        raise no_classes
    if classified:
        ids, val_ids = held_out(train_images, config.val_fraction)
        ids = ids[train_images.y[ids] >= 0]
    else:                                                  # masks do not ask for classes
        out = spread_out(len(train_images), config.val_fraction)
        ids, val_ids = (~out).nonzero()[:, 0], out.nonzero()[:, 0]
    if config.train_images:
        if config.train_images > len(ids):
            raise UsageError(f"--train-images {config.train_images}: there are {len(ids)}")
        ids = ids[torch.linspace(0, len(ids) - 1, config.train_images).long()]
    if config.batch_size > len(ids):
        raise UsageError(f"--batch-size {config.batch_size}: there are {len(ids)} images to train "
                         f"on; use {len(ids)} or less")
    return train_images, ids, val_ids, test_images


# -------------------------------------------------------------------------------------------- loop

def augment(config, size):
    """A random crop of an image of `size`, of nearly its shape (as in data.crop_boxes), resized to
    it, and a flip. A mask that comes with the image is cropped and flipped likewise."""
    H, W = size
    ratio = (3 / 4 * W / H, 4 / 3 * W / H) if config.crop < 1 else (W / H, W / H)
    return v2.Compose([v2.RandomResizedCrop(size, scale=(config.crop, 1), ratio=ratio),
                       v2.RandomHorizontalFlip()])


def standardise(mean, std):
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def pixel_statistics(config, images, info):
    """Mean and std of the pixels: those that the weights are used to, or those of the set."""
    if config.from_scratch:
        return mean_std(images)
    return list(info["mean"]), list(info["std"])


def tune(config, encoder, model, images, ids, statistics, loss_of, look, device):
    """Train the model, which holds the encoder -> the step it ends at.

    statistics: mean and std of the pixels. loss_of(ids) -> loss of a batch of images; called with
    torch's random numbers set for the step. look() -> {name: number} on held-out images. Raises
    UsageError for the folder of another run, and where the memory is too small."""
    out, per_epoch = Path(config.out), len(ids) // config.batch_size
    total = config.epochs * per_epoch
    drop_paths(encoder, config.drop_path)
    optimizer = torch.optim.AdamW(parameter_groups(encoder, model, config), betas=(0.9, 0.999))
    mean = mean_std(images)[0]                             # tells these images from others
    if config.precision == "auto":         # kept with the run, as train.py does; fp16 has no scaler
        best = best_precision(device)
        config.precision = precision_before(out) or ("fp32" if best == "fp16" else best)
    begin, losses, seconds = resume(config, model, optimizer, mean, len(images))
    say(describe(config))
    in_all, in_encoder = (sum(p.numel() for p in module.parameters()) / 1e6
                          for module in (model, encoder))
    if total < 200:
        say(f"warning: {total} steps in all; little is learned in so few: raise --epochs")
    say(f"{config.data}: {len(ids)} images to train on; {in_encoder:.1f} M parameters in the "
        f"encoder, {in_all:.1f} M in all; {device}; steps {begin} to {total}, into {out}")

    _, compute = choose_precision(config.precision, device)
    model.train()

    def keep(step):
        """Save, with what the next line of the log is computed from."""
        if not is_finite(model):
            return False
        save_checkpoint(out / NAME, dict(
            tuned=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
            losses=losses, seconds=time.perf_counter() - since,
            config=dataclasses.asdict(config), mean=mean, images=len(images),
            encoder=weights.exported(encoder, *statistics)),                   # for load_encoder
            keep=out / PREVIOUS)
        return True

    losses = [each.to(device) for each in losses]
    order, since = None, time.perf_counter() - seconds
    with Watch(config.save_minutes) as watch:
        for step in range(begin, total):
            epoch, place = divmod(step, per_epoch)
            if order is None or place == 0:
                order = ids[epoch_order(config.seed, epoch, len(ids))]
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(step, total, config)
            torch.manual_seed(generator(config.seed, "step", step).initial_seed())
            with memory_errors(config, device):
                with torch.autocast(device.type, compute, enabled=compute is not None):
                    loss = loss_of(order[place * config.batch_size:(place + 1) * config.batch_size])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())

            done = step + 1
            pause = done == total or done % (config.eval_every * per_epoch) == 0
            if pause or done % config.log_every == 0:
                seconds = time.perf_counter() - since
                record = {"step": done, "epoch": done / per_epoch,
                          "loss": torch.stack(losses).mean().item(),
                          "lr": learning_rate(step, total, config),
                          "images_per_s": round(len(losses) * config.batch_size / seconds, 1)}
                record |= peak_memory(device)
                if not math.isfinite(record["loss"]):
                    say(f"the loss is {record['loss']} at step {done}. The last checkpoint is "
                        "intact; try a lower --lr, with another --out")
                    sys.exit(1)
                if pause:
                    with memory_errors(config, device):
                        record |= look()
                append_json(out / "metrics.jsonl", record)
                say("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
                losses, since = [], time.perf_counter()
                if pause:
                    keep(done)
                    draw_curves(out)
            told, saved = watch.told(saved=pause), pause
            if told and not pause:
                saved = keep(done)
            watch.end_if_signalled(told, done, out, saved)
    return total


def memory_errors(config, device):
    return memory_errors_in_one_line(device, f"--batch-size {config.batch_size}",
                                     "use a smaller one, or a smaller --img-size")


def resume(config, model, optimizer, mean, number):
    """Load the checkpoint of a run that was cut off; make the folder -> its step, and of the steps
    since the last line of its log the losses, and the seconds that they took; 0 [] 0 if there is
    none. mean, number: of the images."""
    out, settings, begin, losses, seconds = Path(config.out), dataclasses.asdict(config), 0, [], 0
    make_folder(out, "--out")
    lock(out)
    saved = continue_from(out / "checkpoint.pt", settings, FREE, mean, number, "tuned")
    if saved:
        begin, losses, seconds = saved["step"], saved.get("losses", []), saved.get("seconds", 0)
        try:
            model.load_state_dict(saved["tuned"])
        except RuntimeError as error:
            raise UsageError(f"--out {out}: holds a run on images with other classes; use another "
                             "--out, or delete that folder") from error
        optimizer.load_state_dict(saved["optimizer"])
    text = json.dumps(settings, indent=2).encode()
    write_atomically(out / "config.json", lambda file: file.write(text))
    truncate_log(out / "metrics.jsonl", begin or -1)
    return begin, losses, seconds


def draw_curves(out):
    """curves.png: the loss, and what was measured on held-out images."""
    records = read_json_lines(out / "metrics.jsonl")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_line(axes[0], records, "loss", label="training loss")
    known = {"step", "epoch", "loss", "lr", "images_per_s", "peak_memory_gb"}
    for name in dict.fromkeys(name for record in records for name in record if name not in known):
        draw_line(axes[1], records, name, unit=0.01, label=f"{name}, %")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    save(figure, out / "curves.png")


def announce_test(images):
    say(f"now the test: {len(images)} images")


def finish(config, task, found):
    """Print the result, and keep it beside the checkpoint: one line of JSON."""
    record = {"task": task, "start": "scratch" if config.from_scratch else config.checkpoint,
              "data": config.data, "seed": config.seed, "epochs": config.epochs, **found}
    text = json.dumps(record) + "\n"
    write_atomically(Path(config.out) / "result.json", lambda file: file.write(text.encode()))
    print(text, end="")


def say(text):
    print(text, file=sys.stderr, flush=True)
