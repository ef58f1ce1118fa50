"""How fast a training step is, what it is made of, and what fits into a memory.

    python -m extras.bench peers       # plain MAE, beside that of Hugging Face, timm and lightly
    python -m extras.bench recipes     # views/s of each recipe, and the parts of a step
    python -m extras.bench limit       # which share of the device's best rate a step reaches
    python -m extras.bench memory      # what a run takes on a GPU, and which card it fits
    python -m extras.bench train       # train.py and a script with Hugging Face's MAE, on files

Behind the part come flags of train.py, such as --model base --img-size 224 --patch-size 16. Each
part prints a table; --out FILE also adds its rows to a file, as lines of JSON. Figures stand in
docs/speed.md. `memory` needs no GPU.

Contenders take turns, A B C A B C, after a warm-up. So a machine that slows down slows all alike.
A figure is the median of the turns. Peers (extras/peers.py) that are not installed are left out.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python extras/bench.py`

import mae
import pseudo_labels
import train as training
from data import Batches, Views
from extras.peers import EPOCHS, PEERS, train_hugging_face
from extras.played import play
from support import devices, settings
from support.command_line import Parser, UsageError, path, run_main, say
from support.datasets import SETS, Images, look
from support.files import append_json, read_json_lines
from teachers import Teachers, make_teachers

ROOT = Path(__file__).parent.parent
CARDS = (4, 6, 8, 12, 16, 24, 32, 40, 48, 80, 141)         # GB of memory that GPUs have


# ------------------------------------------------------------------------- a step, and its time

def resolve(flags):
    """Flags of train.py -> settings whose precision is chosen, device."""
    config = settings.resolve(flags)
    device = devices.choose_device(config.device)
    if config.precision == "auto":
        config.precision = devices.best_precision(device)
    return config, device


def set_up(config, device, images=0):
    """What train.main makes of the settings: train.Run, Batches. The images are noise, kept in
    memory, as many as a batch has or more."""
    dtype, compute = devices.choose_precision(config.precision, device)
    size, channels = mae.pair(config.img_size), SETS[config.data].channels
    n, mean, std = max(images, config.batch_size), [0.5] * channels, [0.25] * channels
    student = training.build(config, channels).to(device, dtype)       # sets the seed
    pixels = torch.randint(256, (n, channels, *size), dtype=torch.uint8)
    noise, ids = Images(torch.zeros(n), [], size, channels, pixels), torch.arange(n)
    optimizer = torch.optim.AdamW(training.parameter_groups(student, config.weight_decay), 1e-4,
                                  betas=(0.9, 0.95), fused=device.type == "cuda")
    batches = Batches(noise, ids, mean, std, 0, config.batch_size, student.mae.encoder.num_patches,
                      views=config.views, smallest=config.crop, colours=config.colours,
                      teacher_view=config.teacher_view, accumulate=config.accumulate,
                      device=device, dtype=dtype)
    autocast = torch.autocast(device.type, compute, enabled=compute is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    return training.Run(config, noise, ids, ids, mean, std, student, make_teachers(student, config),
                        optimizer, autocast, scaler, device, 0, batches.steps_per_epoch), batches


def make_step(run, batches):
    """A function that does one optimiser step: the loop of train.train without its log.

    It takes a function, name of a part -> context, to enter around each part."""
    config = run.config
    called, one_step = training.prepare(run, batches)
    stream = batches.run(0, sys.maxsize)

    def step(part=lambda name: nullcontext()):
        for _ in range(config.accumulate):
            loss = views = others = None                   # free the memory of those before
            with part("data"):
                views = next(stream)
            with run.autocast:
                loss, *others = one_step(called, run.teachers, views, config)
            with part("backward"):
                run.scaler.scale(loss / config.accumulate).backward()
        with part("optimiser"):
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.student.parameters(), config.clip or math.inf)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad()
        with part("moving averages"):
            run.teachers.follow(run.student, dict.fromkeys(run.teachers.named(), 0.99))
    return step


def synchronise(device):
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def race(contenders, rounds, device, least=0.2):
    """{name: function without arguments} -> {name: ms of a call in each round}.

    least: seconds that a turn lasts at least; a fast contender is called several times in it."""
    def ms(function, calls):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronise(device)
        return 1000 * (time.perf_counter() - start) / calls

    calls = {}
    for name, function in contenders.items():
        ms(function, 2)                                    # warm-up
        calls[name] = math.ceil(1000 * least / ms(function, 1))
    turns = [{name: ms(function, calls[name]) for name, function in contenders.items()}
             for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in contenders}


def timed(what, ms, views):
    """A row of: ms of each round, views of a step."""
    return {"what": what, "ms": round(median(ms), 2), "least": round(min(ms), 2),
            "most": round(max(ms), 2), "views_per_s": round(1000 * views / median(ms), 1)}


# ---------------------------------------------------------------------------------------- peers

def peers(options):
    """Forward, backward and AdamW of the same plain MAE by each library: settings, device, rows."""
    config, device = resolve([*options.flags, "--recipe", "mae"])
    side, patch, channels = config.img_size, config.patch_size, SETS[config.data].channels
    if not isinstance(side, int) or not isinstance(patch, int):
        raise UsageError("--img-size, --patch-size: peers take squares; use one number for each")
    dtype, compute = devices.choose_precision(config.precision, device)
    imgs = torch.randn(config.batch_size, channels, side, side, device=device, dtype=dtype)
    noise = torch.rand(config.batch_size, (side // patch) ** 2, device=device, dtype=dtype)

    contenders, facts = {}, {}
    everyone = {"ours": (ours, ("torch",), lambda D: 0)} | PEERS
    for name, (make, packages, surplus) in everyone.items():
        try:
            versions = [f"{each} {importlib.metadata.version(each)}" for each in packages]
            network, loss = make(config, channels)
        except ImportError as error:                       # also PackageNotFoundError
            say(f"left out: {name} ({error}); pip install {' '.join(packages)}")
            continue
        network.apply(mae.init_weights).to(device, dtype)              # so losses are alike
        contenders[name] = step = step_of(network, loss, imgs, noise, compute, config.compile)
        parameters = sum(p.numel() for p in network.parameters())
        facts[name] = {"parameters": parameters, "loss": round(step().item(), 2),
                       "library": ", ".join(versions)}
        more = parameters - facts["ours"]["parameters"]
        if more != surplus(mae.SIZES[config.model]["embed_dim"]):
            raise RuntimeError(f"{name} has {more} parameters more than ours: not the same network")
        if not 0.7 < facts[name]["loss"] / facts["ours"]["loss"] < 1.4:
            raise RuntimeError(f"{name} has another loss: {facts}")
    times = race(contenders, options.rounds, device)
    return config, device, [timed(f"MAE of {name}", ms, config.batch_size) | {"of_ours": round(
        median(a / b for a, b in zip(ms, times["ours"])), 3)} | facts[name]
        for name, ms in times.items()]


def ours(config, channels):
    student, nobody = training.build(config, channels), Teachers(None, None)
    return student, lambda imgs, noise: training.training_step(
        student, nobody, Views(imgs, imgs, noise), config)[0]


def step_of(network, loss, imgs, noise, compute, compiled):
    """A function that does one step and returns its loss."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=imgs.device.type == "cuda")
    loss = torch.compile(loss, dynamic=False) if compiled else loss

    def step():
        with torch.autocast(imgs.device.type, compute, enabled=compute is not None):
            value = loss(imgs, noise)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()
    return step


# -------------------------------------------------------------------------------------- recipes

def recipes(options):
    """A step of each recipe; the parts of one of the recipe that --recipe names."""
    config, device = resolve(options.flags)
    configs = {name: resolve([*options.flags, "--recipe", name])[0] for name in settings.RECIPES}
    contenders = {name: make_step(*set_up(each, device)) for name, each in configs.items()}
    taken = []
    if not config.compile:                                 # a compiled step has no parts to time
        run, batches = set_up(config, device)
        contenders["parts"] = in_parts(run, make_step(run, batches), taken)
    times = race(contenders, options.rounds, device)
    rows = [timed(name, times[name], each.batch_size * each.views)
            for name, each in configs.items()]
    one, whole = median(times["pl-mae-one-teacher"]), median(times[config.recipe])
    two = median(times["pl-mae"])
    shares = {"cost of a second teacher": (two - one, one)}
    if taken:
        parts = {name: median(step[name] for step in taken) for name in taken[0]}
        parts["all else"] = whole - sum(parts.values())
        shares |= {f"{config.recipe}: {name}": (ms, whole) for name, ms in parts.items()}
    return config, device, rows + [
        {"what": name, "ms": round(ms, 2), "percent": round(100 * ms / of, 1)}
        for name, (ms, of) in shares.items()]


def in_parts(run, step, taken):
    """A step that adds {part: ms} to the list `taken`.

    It is the same step: the functions that it calls are timed in their places. On a GPU each part
    waits for its end, so that parts add up to more than a step that does not wait."""
    teachers, ms = run.teachers, {}

    @contextmanager
    def part(name):
        synchronise(run.device)
        start = time.perf_counter()
        yield
        synchronise(run.device)
        ms[name] = ms.get(name, 0) + 1000 * (time.perf_counter() - start)

    places = [(pseudo_labels, "make_labels", "heads and balancing"), (run.student, "forward",
              "student"), (training, "losses", "losses"),
              (training, "standardise", "reconstruction teacher")]
    if teachers.labelling is not None:
        places.append((teachers.labelling, "encode", "labelling teacher"))
    if teachers.reconstruction not in (None, teachers.labelling):
        places += [(teachers.reconstruction, name, "reconstruction teacher")
                   for name in ("encode", "predict_pixels")]

    def within(function, name):
        def inside(*args):
            with part(name):
                return function(*args)
        return inside

    def step_in_parts():
        ms.clear()
        with ExitStack() as stack:
            for owner, function, name in places:
                stack.enter_context(mock.patch.object(
                    owner, function, within(getattr(owner, function), name)))
            step(part)
        taken.append(dict(ms))
    return step_in_parts


# ----------------------------------------------------------------------------- limit and memory

def play_step(config, images=0):
    """An optimiser step on a GPU -> bytes at its peak, FLOPs; found without one: extras/played.py.

    images: how many are kept in memory, a batch at least."""
    played = min(2, config.accumulate)     # from the second on, micro-batches take the same memory
    short = dataclasses.replace(
        config, compile=False, accumulate=played,
        batch_size=config.batch_size // config.accumulate * played,
        precision={"fp16": "bf16"}.get(config.precision, config.precision))    # as wide, no scaler
    n = max(images, config.batch_size)
    peak, flops = play(lambda: make_step(*set_up(short, torch.device("cpu"), n)))
    return peak, flops * config.accumulate // played


def limit(options):
    """The rate of a large square product, which is the device's best, and that of a step.

    A step's FLOPs are those of its products, with the scores of attention computed twice."""
    config, device = resolve(options.flags)
    dtype, compute = devices.choose_precision(config.precision, device)
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=compute or dtype)
    product, step = f"product of {n} x {n}", f"step of {config.recipe}"
    flops = {product: 2 * n ** 3, step: play_step(config)[1]}
    times = race({product: lambda: x @ x, step: make_step(*set_up(config, device))},
                 options.rounds, device)
    rate = {name: flops[name] / median(times[name]) / 1e6 for name in times}
    return config, device, [
        {"what": name, "ms": round(median(times[name]), 2), "gflop": round(flops[name] / 1e9, 2),
         "gflop_per_s": round(rate[name], 1), "percent": round(100 * rate[name] / rate[product], 1)}
        for name in times]


def card(peak):
    """Bytes at the peak -> GB of the smallest card that they fit, infinite if there is none.

    A tenth is added, for gaps and what operations take while they run, and 0.6 GB, for CUDA itself:
    a rule of thumb."""
    return min(gb for gb in (*CARDS, math.inf) if gb >= 1.1 * peak / 1e9 + 0.6)


def memory(options):
    """What a run takes on a GPU; in bf16, if --precision says nothing else."""
    config = settings.resolve(options.flags)
    if config.precision == "fp64":
        raise UsageError("--precision fp64: is not for GPUs; use bf16, fp16 or fp32")
    if config.precision == "auto":
        config.precision = "bf16"
    peak, flops = play_step(config, options.images)
    fits = card(peak)
    advice = f"too much for {CARDS[-1]} GB" if fits == math.inf else f"fits a card of {fits} GB"
    less = config
    while fits > CARDS[0] and less.batch_size % (2 * less.accumulate) == 0:
        less = dataclasses.replace(less, accumulate=2 * less.accumulate)
        try:
            settings.check(less)
        except UsageError:                                 # fewer samples than clusters
            break
        smaller = card(play_step(less, options.images)[0])
        if smaller < fits:
            advice += f"; on {smaller} GB use --accumulate {less.accumulate}"
            break
    return config, torch.device("cpu"), [
        {"what": f"step of {config.recipe}", "peak_gb": round(peak / 1e9, 2),
         "tflop": round(flops / 1e12, 3), "advice": advice}]


# ---------------------------------------------------------------------------------------- train

def write_photographs(root, n):
    """n files of 500 x 375 pixels in root/train/noise, about as large as JPEG photographs."""
    rng, folder = np.random.default_rng(0), Path(root) / "train" / "noise"
    folder.mkdir(parents=True)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375))) + rng.normal(0, 12, (375, 500, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=85)


def train_here(flags, steps, out):
    """Images/s of each epoch of train.py but the first, in a process of its own."""
    epochs = str(1 + EPOCHS)
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--crop", "0.2", "--epochs", epochs,
               "--eval-every", epochs, "--log-every", str(steps), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"train.py: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    lines = read_json_lines(Path(out) / "metrics.jsonl")
    return [line["images_per_s"] for line in lines if "images_per_s" in line][1:]


def train(options):
    """Images/s of whole programs that train plain MAE, on files in --data-root, or on noise."""
    with tempfile.TemporaryDirectory() as temporary:
        root = options.data_root or f"{temporary}/photographs"
        if options.data_root is None:
            write_photographs(root, options.images or 512)
        flags = [*options.flags, "--recipe", "mae", "--data", "imagefolder", "--data-root", root,
                 "--val-fraction", "0"]
        config, device = resolve(flags)
        steps = look(root, 0)[0] // config.batch_size
        if steps == 0:
            raise UsageError(f"--batch-size {config.batch_size}: there are fewer images in {root}; "
                             "use a smaller one")
        stream = ["--resident-gb", "0"]
        programs = {"train.py, streamed": partial(train_here, flags + stream, steps),
                    "train.py, in memory": partial(train_here, flags, steps)}
        if importlib.util.find_spec("transformers"):
            programs["Hugging Face's"] = lambda out: train_hugging_face(config, device)
        else:
            say("left out: Hugging Face's; pip install transformers")
        rates = {name: [] for name in programs}
        for turn in range(options.rounds):
            for i, (name, program) in enumerate(programs.items()):
                rates[name] += program(f"{temporary}/run-{turn}-{i}")
    return config, device, [
        {"what": name, "images_per_s": round(median(each), 1), "least": round(min(each), 1),
         "most": round(max(each), 1), "workers": config.workers} for name, each in rates.items()]


# ---------------------------------------------------------------------------------- the command

PARTS = {"peers": peers, "recipes": recipes, "limit": limit, "memory": memory, "train": train}


def circumstances(config, device):
    """What a figure depends on beside the flags."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    card = {"card": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return card | {
        "processor": f"{names[0] if names else platform.machine()}, "
                     f"{torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "precision": config.precision, "compiled": config.compile,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip()}


def main(argv=None):
    parser = Parser(usage="%(prog)s PART [--out FILE] [--rounds N] [flags of train.py ...]",
                    description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=path, metavar="FILE", help="gets the rows, as lines of JSON")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--images", type=int, default=0, help="memory: how many are kept in it "
                        "(default: a batch); train: how many are written (default: 512)")
    parser.add_argument("--data-root", type=path, help="train: the folder of images")
    options, options.flags = parser.parse_known_args(argv)
    if options.rounds < 1 or options.images < 0:
        raise UsageError("--rounds must be 1 or more, --images 0 or more")
    if options.data_root and options.part != "train":
        options.flags += ["--data-root", options.data_root]
    if options.out:
        open(options.out, "a").close()     # raises OSError now, not when all is timed
    config, device, rows = PARTS[options.part](options)
    around, columns = circumstances(config, device), None
    print("  ".join(f"{name} {value}" for name, value in around.items()))
    for row in rows:
        if row.keys() != columns:                          # a table begins
            columns = row.keys()
            print("\n" + "".join(f"{name:32}" if name == "what" else f"{name:>12}  "
                                 for name in columns))
        print("".join(f"{value:32}" if name == "what" else f"{value:>12}  "
                      for name, value in row.items()))
        if options.out:
            flags = [*options.flags, *["--images", str(options.images)] * bool(options.images)]
            what = {"what": f"{options.part}: {row['what']}", "flags": " ".join(flags)}
            append_json(options.out, row | what | around)


if __name__ == "__main__":
    run_main(main)
