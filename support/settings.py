"""The settings of a run.

Four rows make a run, and the later one wins: the defaults of `Config`, which are for photographs;
the row of the data set; the row of the recipe; the command line. `resolve` puts them together.
"""

import dataclasses
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

from mae import SIZES, count_visible, pair
from pseudo_labels import BALANCING
from support.command_line import (
    UsageError,
    check_ranges,
    given_flags,
    numbers,
    option,
    path,
    say,
    size,
)
from support.datasets import SETS, holds_images, look
from support.devices import PRECISIONS, cores
from teachers import STANDARDISE, half_life

# Tuned are the row of shapes, on shapes, and batch, clusters and lr of small photographs, on
# CIFAR-10 (JPEG) with a ViT-Tiny. No other row is.
SMALL_PHOTOGRAPHS = dict(epochs=100, batch_size=256, lr=2e-3, image_clusters=128,
                         patch_clusters=512)
DATA_ROWS = {
    "shapes": dict(epochs=12, batch_size=64, mask_ratio=0.5, colours=5.0, image_clusters=32,
                   teacher_temperature=0.0125, eval_every=4),
    "cifar10": SMALL_PHOTOGRAPHS,
    "cifar100": SMALL_PHOTOGRAPHS,
    "stl10": SMALL_PHOTOGRAPHS,
    "imagenette": dict(epochs=200, patch_clusters=512),
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
LEAST_STEPS = 2000                     # of a run on a folder of few images
POSITIVE = (0, math.inf)
COUNT = (1, math.inf)


@dataclass
class Config:
    """Everything that decides a run. Kept in config.json and the checkpoint; each field is a flag.

    Defaults of the method that name no source and are not called "not tuned" were measured, on
    CIFAR-10 (JPEG) or on shapes: see results/tables.md."""
    recipe: str = option("pl-mae", "row of settings, which flags override", choices=list(RECIPES))
    model: str = option("micro", "size of the encoder and its decoder", choices=list(SIZES))
    data: str = option("shapes", "data set", choices=list(SETS))
    data_root: str = option(
        "data", "folder of the data set; what can be downloaded is downloaded to it", path)
    out: str = option(
        None, "folder of the run (default: runs/RECIPE-DATA-MODEL; of an imagefolder its name)",
        path)
    epochs: int = option(
        20, "passes over the training images; 0 writes the untrained network", range=POSITIVE)
    batch_size: int = option(
        128, "images per optimiser step, of all processes and micro-batches together (not tuned)",
        range=COUNT)
    img_size: int = option(
        None, "N or HxW; other images are cropped to the centre and resized (default: the data "
        "set's; of an imagefolder what suits its images and the model)", size)
    patch_size: int = option(
        None, "N or HxW, dividing the image (default: one that suits the data set)", size)
    seed: int = option(0, "of weights, order, crops, colours and masks", range=(0, 2**63 - 1))
    # the views
    views: int = option(
        2, "views (crops) of an image: with 2, each predicts the image pseudo label of the other",
        choices=[1, 2])
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
    rec_weight: float = option(1.0, "weight of the reconstruction (not tuned)", range=POSITIVE)
    norm_pix_loss: bool = option(
        True, "predict pixels standardised within each patch, not plain ones (MAE)")
    standardise: str = option(
        "feature", "of token targets: within a token, or a feature over the batch, or that per "
        "position (not tuned)", choices=list(STANDARDISE))
    consistency_weight: float = option(
        0.0, "weight of RC-MAE's term: predict the pixels that a teacher predicts", range=POSITIVE)
    # the pseudo labels
    image_weight: float = option(
        1.0, "weight of the image pseudo labels (class token); 0 turns them off (not tuned)",
        range=POSITIVE)
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
        "3%", "of the reconstruction teacher, likewise; without pseudo labels, of the only one",
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
    init: str = option(
        None, "a file to start from: official MAE weights, timm's, a checkpoint.pt, an export; "
        "mean and std of the pixels are then those of the file", path)
    num_heads: int = option(None, "heads of the encoder (default: those of --model)")
    pixel_mean: list = option(
        None, "mean of the pixels that the weights of --init are used to, 0.5 or 0.5,0.5,0.5 "
        "(default: what the file says, else ImageNet's)", numbers)
    pixel_std: list = option(None, "their standard deviation, likewise", numbers)
    val_fraction: float = option(
        0.1, "share of the training images of known class kept out, for k-NN meanwhile",
        range=(0, 0.9))
    eval_every: int = option(
        None, "epochs between k-NN, pictures and checkpoints (default: a tenth of the run)",
        range=COUNT)
    log_every: int = option(50, "steps between lines of the log", range=COUNT)
    save_minutes: float = option(
        10.0, "checkpoints also come by the clock, so that a crash costs no more than that; 0: "
        "only every --eval-every", range=POSITIVE)
    # the machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = option(
        "auto", "of the networks; losses are in fp32 at least. auto: bf16 where the device is "
        "faster in it, fp16 on older GPUs, else fp32; a run that continues keeps its own",
        choices=["auto", *PRECISIONS])
    compile: bool = option(
        False, "compile the step and the augmentation, a graph each (torch.compile): starts a "
        "minute later; a step then takes 0.8 of the time on a GPU")
    accumulate: int = option(
        1, "micro-batches a step is computed in, for batches larger than the memory", range=COUNT)
    workers: int = option(
        None, "processes that decode images, where the data set streams from the disk (default: "
        "the cores of the machine, shared out among the processes of the run, 16 at most)",
        range=(0, 256))
    resident_gb: float = option(
        4.0, "a data set up to this size is kept in memory, shrunk to --img-size before it is "
        "cropped; larger ones stream, cropped from the files at full size", range=POSITIVE)


# Headings of --help, each before the field that it starts with.
GROUPS = {"recipe": "what people set first", "views": "the views",
          "target": "the reconstruction", "image_weight": "the pseudo labels",
          "teachers": "the teachers", "lr": "the optimiser", "init": "the run",
          "device": "the machine"}

# These may change when a run continues.
FREE = {"data_root", "out", "eval_every", "log_every", "save_minutes", "device", "workers",
        "compile"}


def resolve(argv=None, relative=None):
    """The command line -> Config with nothing left open but "auto". Raises UsageError.

    relative: a file of extras/relatives; it has a row of settings, further flags, and a check."""
    kind, recipes, about = Config, RECIPES, (
        "Train a masked autoencoder with pseudo labels and two teachers, on a laptop or on several "
        "GPUs.")
    if relative:
        kind, about = relative.Config, relative.__doc__.split("\n\n")[0]
        recipes = {kind.recipe: relative.SETTINGS}
    own = [field.name for field in dataclasses.fields(kind)][len(dataclasses.fields(Config)):]
    given = given_flags(kind, argv, about,
                        "Defaults are for photographs; a data set or a recipe may have others, "
                        "which are printed when a run starts. Several GPUs: torchrun "
                        "--nproc-per-node N train.py ...",
                        GROUPS | {name: f"of {kind.recipe}" for name in own[:1]})
    data = given.get("data", Config.data)
    recipe = given.get("recipe", kind.recipe)
    row = DATA_ROWS.get(data, {})
    if data == "imagefolder":
        row = row_of_folder(recipes[recipe] | given, kind)
    config = kind(**(row | recipes[recipe] | given))
    config.img_size = config.img_size or SETS[data].size
    config.patch_size = config.patch_size or SETS[data].patch
    config.eval_every = config.eval_every or max(1, -(-config.epochs // 10))       # rounded up
    config.workers = cores() if config.workers is None else config.workers
    if config.out is None:
        source = Path(config.data_root).resolve().name if data == "imagefolder" else data
        config.out = f"runs/{recipe}-{source}-{config.model}"
    check(config)
    if relative:
        relative.check(config)
    root = Path(config.data_root).resolve()
    if data == "imagefolder" and Path(config.out).resolve() in (root, root / "train"):
        raise UsageError(f"--out {config.out}: is the folder of the images; use another one")
    if "data_root" in given and "data" not in given and holds_images(root):
        say(f"--data-root {config.data_root} holds images, but the data set is {data}; for images "
            "of your own add --data imagefolder")
    labelled = config.image_weight or config.patch_weight
    if (config.teachers == 1 and config.target == "tokens" and labelled
            and "reconstruction_half_life" in given):
        raise UsageError("--reconstruction-half-life: one teacher goes at the pace of its labels; "
                         "use --labelling-half-life")
    return config


def row_of_folder(given, kind=Config):
    """The row of a folder of photographs, by a look at it; {} if there are none.

    Few images want a small batch and many epochs; a small network, small images. given: the row of
    the recipe and the flags, which what they leave open has to suit. kind: of the Config."""
    check_ranges(kind(**given))            # before anything is divided by them
    images, side = look(given.get("data_root", Config.data_root),
                        given.get("val_fraction", Config.val_fraction))
    if not images:
        return {}
    if images < 8:
        raise UsageError(f"--data-root {given.get('data_root', Config.data_root)}: {images} images "
                         "to train on are too few; name a folder with hundreds, or at least 8")
    size, patch = size_and_patch(side, given.get("model", Config.model))
    if "img_size" in given:
        size = given["img_size"]
        patch = size_and_patch(min(pair(size)))[1]
    batch = given.get("batch_size", min(Config.batch_size, power_of_two(images / 3)))
    samples = batch // given.get("accumulate", 1) * given.get("views", Config.views)
    steps = max(1, images // batch)                        # of an epoch
    row = dict(img_size=size, patch_size=patch, batch_size=batch,
               epochs=max(Config.epochs, math.ceil(LEAST_STEPS / steps)),
               image_clusters=max(2, min(Config.image_clusters, samples // 4)))
    # At 0.05 pseudo labels of few clusters stay uniform: so of 8, results/few_photographs.jsonl.
    if given.get("image_clusters", row["image_clusters"]) <= 32:
        row["teacher_temperature"] = DATA_ROWS["shapes"]["teacher_temperature"]
    return row


def size_and_patch(side, model=None):
    """Of images whose shorter side is `side`: the side to use, no larger, with no more patches than
    suit the model, and that of its patches."""
    most = {"micro": 64, "tiny": 96}.get(model, math.inf)
    for there, patch in ((224, 16), (96, 8), (64, 8)):
        if there <= min(side, most):
            return there, patch
    return 32, 4


def power_of_two(x):
    """The greatest power of two up to x, at least 1."""
    return 2 ** int(math.log2(max(1, x)))


def check(config):
    """Raises UsageError for settings that can never be."""
    check_ranges(config)
    (H, W), (ph, pw) = pair(config.img_size), pair(config.patch_size)
    if H == W == 1:
        raise UsageError(f"--img-size {config.img_size}: one pixel is one patch, so none can be "
                         "masked; use a larger one")
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
    in_a_patch = SETS[config.data].channels * ph * pw      # numbers
    if config.target == "pixels" and config.norm_pix_loss and in_a_patch == 1:
        raise UsageError("--patch-size 1: a patch of one number cannot be standardised; use "
                         "--no-norm-pix-loss")
    D = SIZES[config.model]["embed_dim"]
    if config.num_heads is not None and (config.num_heads < 1 or D % config.num_heads):
        raise UsageError(f"--num-heads {config.num_heads}: must divide the width of {D}")
    if not config.init and (config.pixel_mean or config.pixel_std):
        raise UsageError("--pixel-mean, --pixel-std: are of the weights of --init; leave them out, "
                         "and those of the images are taken")
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


# ------------------------------------------------------------- what follows from the settings

def architecture(config, channels):
    """The arguments of `Student`: plain numbers, kept in the checkpoint. Relatives (`of_student`)
    have further ones.

    config: also that of an earlier checkpoint, which says nothing of heads."""
    target_dim = {"pixels": None, "tokens": SIZES[config.model]["embed_dim"], "none": 0}
    given = getattr(config, "num_heads", None)
    heads = {"num_heads": given or SIZES[config.model]["num_heads"]}
    return dict(SIZES[config.model] | heads, img_size=config.img_size, patch_size=config.patch_size,
                in_chans=channels, mlp_ratio=4.0, norm_pix_loss=config.norm_pix_loss,
                target_dim=target_dim[config.target],
                image_clusters=config.image_clusters if config.image_weight else 0,
                patch_clusters=config.patch_clusters if config.patch_weight else 0,
                **{name: getattr(config, name) for name in getattr(config, "of_student", ())})


def kept_network(config):
    """The name of the network that a run is for, and is judged by. RC-MAE keeps its teacher.

    config: settings as a dictionary."""
    return "reconstruction-teacher" if config["consistency_weight"] else "student"
