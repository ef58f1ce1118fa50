"""Images by name, and batches in which every sample has crops, flips and colours of its own.

Small sets are decoded once into a uint8 tensor that lives on the device, and are augmented there, a batch at a time: a crop with
its resize is two matrix products per image, a flip reverses a matrix, a colour change is arithmetic with one number per image.
Sets larger than `resident_gb` stream from the disk: DataLoader workers decode and crop, the device flips and recolours.

All random numbers of a step are drawn on the CPU, for the *global* batch, from (seed, step), and sliced by rank. So
neither workers, nor the number of processes, nor a stop and restart changes them.

Letters:  B images of the global batch, b those of one rank and micro-batch, V views of an image,
          k masks of a view, N patches.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as TF

from extras.command_line import UsageError, make_folder
from extras.images import decode, fit, open_image
from extras.shapes import load_shapes
from mae import pair

# name: side of the images, patch size that suits it, channels
SETS = {
    "shapes": (64, 8, 3),
    "cifar10": (32, 4, 3),
    "cifar100": (32, 4, 3),
    "stl10": (96, 8, 3),
    "fashion-mnist": (28, 4, 1),
    "imagenette": (224, 16, 3),
    "imagefolder": (224, 16, 3),
}
LUMA = (0.2989, 0.587, 0.114)          # grey of red, green, blue (ITU-R BT.601, torchvision's digits)
# A quarter turn of the two chroma axes of YIQ, on red, green, blue. Plain numbers: copying a matrix to a GPU makes the host wait.
YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
QUARTER_TURN = (np.linalg.inv(YIQ) @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ YIQ).tolist()


@dataclass
class Images:
    """One split of a data set: `pixels` (N C H W uint8, of any size), or, for a set that streams, the `paths` of its files."""
    labels: torch.Tensor                                   # N, int64; -1 where there is no label
    classes: list
    size: tuple                                            # (H, W) that images are given in, by `read` and `Batches`
    channels: int
    pixels: torch.Tensor | None = None
    paths: list | None = None
    targets: dict = field(default_factory=dict)            # what else is known: `shapes` has multilabel, masks, boxes

    def __len__(self):
        return len(self.labels)


# -------------------------------------------------------------------------------------------------------- sets by name

def load_images(name, root, split, size=None, channels=None, resident_gb=4.0):
    """The "train" or "test" split of a named set (imagefolder: ROOT/test or else ROOT/val) as `Images`.

    size: int or (H, W), default the set's own; other images are cropped to the centre and resized (bicubic).
    Raises UsageError where the files are missing, with what to do about it."""
    size, channels = pair(size or SETS[name][0]), channels or SETS[name][2]
    if name == "imagefolder":
        return folder(root, split, size, channels, resident_gb)
    if name == "imagenette":
        torchvision_set(lambda **kw: datasets.Imagenette(root, size="320px", **kw), root)       # both splits
        return folder(Path(root) / "imagenette2-320", split, size, channels, resident_gb)
    if name == "shapes":
        pixels, labels, classes, targets = load_shapes(root, split)
    elif name == "stl10":                                  # trains on the 100,000 unlabelled images as well
        files = torchvision_set(lambda **kw: datasets.STL10(root, {"train": "train+unlabeled"}.get(split, split), **kw), root)
        pixels, labels, classes, targets = torch.from_numpy(files.data), files.labels, files.classes, {}
    else:
        make = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion-mnist": datasets.FashionMNIST}[name]
        files = torchvision_set(lambda **kw: make(root, train=split == "train", **kw), root)
        pixels = torch.as_tensor(files.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)                    # N C H W
        labels, classes, targets = files.targets, files.classes, {}
    return Images(torch.as_tensor(labels).long(), list(classes), size, channels,
                  fit(pixels, tuple(pixels.shape[2:]), channels), None, targets)


def torchvision_set(make, root):
    """A data set of torchvision, downloaded if it is not under root yet."""
    try:
        return make(download=False)
    except (RuntimeError, OSError):                        # torchvision's words for "not found"
        make_folder(root, "--data-root")
    try:
        return make(download=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--data-root {root}: the data set is not there and its download failed "
                         f"({str(error).strip().splitlines()[0][:120]}); put torchvision's files there by hand") from error


def folder(root, split, size, channels, resident_gb):
    """ROOT/<split>/<class>/*; for training also a plain folder of images, without labels, at any depth."""
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"--data-root {root}: there is no such folder; name the one that holds the images")
    names = {"train": ("train", "."), "test": ("test", "val")}[split]
    if split == "train" and not (root / "train").is_dir() and ((root / "test").is_dir() or (root / "val").is_dir()):
        raise UsageError(f"--data-root {root}: has images to test on but no folder `train`")
    base = next((root / n for n in names if (root / n).is_dir()), None)
    if base is None:
        raise UsageError(f"--data-root {root}: has neither test/<class>/* nor val/<class>/* to evaluate on")
    paths = sorted(p for p in base.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UsageError(f"--data-root {root}: no images in {base} ({', '.join(IMG_EXTENSIONS)})")
    parents = [p.relative_to(base).parts[0] if p.parent != base else None for p in paths]
    labelled = base != root and any(parents)
    if labelled and None in parents:
        raise UsageError(f"--data-root {root}: {paths[parents.index(None)]} lies beside the class folders; move or remove it")
    classes = sorted(set(parents)) if labelled else []
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[p] for p in parents] if labelled else [-1] * len(paths)
    return from_files(paths, labels, classes, size, channels, resident_gb)


def from_files(paths, labels, classes, size, channels, resident_gb):
    """Image files, decoded into one tensor if that takes at most resident_gb."""
    images = Images(torch.tensor(labels), classes, size, channels, None, list(paths))
    if len(paths) * channels * size[0] * size[1] <= resident_gb * 1e9:
        images.pixels = read(images, range(len(paths)))
    return images


def held_out(images, fraction):
    """Indices to train on, and the `fraction` of all images kept out of training to be tested on meanwhile: every n-th one,
    whatever the seed, so that all runs on a set share them and the test split stays untouched. Without labels none is."""
    ids, labelled = torch.arange(len(images)), torch.nonzero(images.labels >= 0).flatten()
    out = labelled[(torch.arange(len(labelled)) * fraction).long() != ((torch.arange(len(labelled)) + 1) * fraction).long()]
    return ids[~torch.isin(ids, out)], out


def mean_std(images):
    """Mean and standard deviation of each channel, in units of 0..1, over up to 2,000 images spread over the set."""
    ids = torch.linspace(0, len(images) - 1, min(len(images), 2000)).long()
    x = read(images, ids).transpose(0, 1).flatten(1).double() / 255                                     # C (n H W)
    return x.mean(1).tolist(), x.std(1).clamp(min=1e-3).tolist()


def read(images, ids):
    """The images at ids, not augmented: n C H W uint8."""
    if images.pixels is not None:
        return fit(images.pixels[ids], images.size, images.channels)
    with ThreadPoolExecutor() as threads:                  # Pillow decodes outside Python's lock
        return torch.stack(list(threads.map(lambda i: decode(images.paths[i], images.size, images.channels), ids)))


# -------------------------------------------------------------------------------------- random numbers and augmentation

def generator(seed, purpose, index=0):
    """A CPU generator for the index-th use of a purpose; numpy's SeedSequence mixes the three: near ones are unrelated."""
    seeds = seed, {"step": 0, "epoch": 1, "picture": 2}[purpose], index
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def draw(seed, step, batch, views, masks, patches):
    """All random numbers of a step, uniform in 0..1. Always all of them: a switch turned off changes no other number."""
    g = generator(seed, "step", step)
    return dict(crop=torch.rand(batch, views, 4, generator=g), flip=torch.rand(batch, views, generator=g),
                colour=torch.rand(batch, views, 6, generator=g), noise=torch.rand(batch, views, masks, patches, generator=g))


def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def crop_boxes(u, H, W, out, smallest):
    """Random resized crops (Szegedy et al. 2015): u ... 4 in 0..1 -> top, left, height, width (... 4, whole pixels).

    Area uniform in smallest..1 of the image, log of the aspect ratio uniform in 3/4..4/3 times that of the output. A box
    that sticks out is cut to the image; torchvision draws again up to ten times instead. smallest = 1 does not crop, unless the image is of another shape than the output."""
    wide = 2 * u[..., 1] - 1 if smallest < 1 else torch.zeros_like(u[..., 1])
    area, ratio = smallest + u[..., 0] * (1 - smallest), (4 / 3) ** wide * out[1] / out[0]
    h = (area * H * W / ratio).sqrt().round().clamp(1, H)
    w = (area * H * W * ratio).sqrt().round().clamp(1, W)
    top, left = (u[..., 2] * (H - h + 1)).floor(), (u[..., 3] * (W - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=-1).long()


def resize_matrix(start, length, n_in, n_out):
    """Matrices that crop [start, start + length) from n_in pixels and resize it to n_out: B n_out n_in.

    Cubic filter (a = -1/2), widened when shrinking: what torchvision and Pillow call antialiased bicubic."""
    start, length = start[:, None, None], length[:, None, None]                                         # B 1 1
    j = torch.arange(n_in, device=start.device)                                                         # input pixels
    i = torch.arange(n_out, device=start.device)[:, None]                                               # output pixels
    x = (j + 0.5 - start - (i + 0.5) * length / n_out) / (length / n_out).clamp(min=1)                  # B n_out n_in
    x = x.abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)
    weight = weight * ((j >= start) & (j < start + length))
    return weight / weight.sum(-1, keepdim=True)


def crop_flip(x, boxes, flip, out):
    """x B C H W, boxes B 4, flip B (bool) -> B C *out, each image with its own crop and flip."""
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], x.shape[2], out[0]).to(x.dtype)                      # B h H
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], x.shape[3], out[1]).to(x.dtype)                   # B w W
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return (rows[:, None] @ x @ columns[:, None].transpose(2, 3)).clamp(0, 1)                           # B C h w


def recolour(x, u, strength=1.0):
    """Brightness and contrast by up to 40 %, and in colour images saturation by 20 %, hue by a tenth of a turn, all times the
    strength (up to 80 %, 100 %, half a turn), for 4 of 5 images; 1 of 5 made grey. x B C H W in 0..1, u B 6 in 0..1.

    Rates, and strengths at 1, as in MC-SSL. Saturation scales and hue turns the two chroma axes of YIQ, which is linear; for
    the hue torchvision goes through HSV. Always in this order (torchvision shuffles it)."""
    u = u.to(x.dtype)
    change = lambda k, amount: ((u[:, 0] < 0.8) * amount * (2 * u[:, k] - 1))[:, None, None, None]      # B 1 1 1
    luma = lambda x: sum(c * x[:, i:i + 1] for i, c in enumerate(LUMA)) if x.shape[1] == 3 else x       # B 1 H W
    x = (x * (1 + change(1, min(0.8, 0.4 * strength)))).clamp(0, 1)
    mean = luma(x).mean((2, 3), keepdim=True)
    x = (mean + (x - mean) * (1 + change(2, min(0.8, 0.4 * strength)))).clamp(0, 1)
    if x.shape[1] != 3:
        return x
    y = luma(x)
    scale = (1 + change(3, min(1, 0.2 * strength))) * (u[:, 5] >= 0.2)[:, None, None, None]
    angle = 2 * math.pi * change(4, min(0.5, 0.1 * strength))
    chroma = scale * (x - y)                               # colour without its brightness: a plane through zero
    turned = torch.cat([sum(row[i] * chroma[:, i:i + 1] for i in range(3)) for row in QUARTER_TURN], dim=1)
    return (y + chroma * angle.cos() + turned * angle.sin()).clamp(0, 1)


# -------------------------------------------------------------------------------------------------------------- batches

class CroppedFiles(torch.utils.data.Dataset):
    """Items (index, crop numbers V 4) -> the V crops of that image file, at the file's own resolution: V C H W uint8."""

    def __init__(self, images, smallest):
        self.images, self.smallest = images, smallest

    def __getitem__(self, item):
        index, u = item
        image = open_image(self.images.paths[index], self.images.channels)
        boxes = crop_boxes(torch.tensor(u), image.height, image.width, self.images.size, self.smallest).tolist()
        return torch.stack([TF.pil_to_tensor(TF.resized_crop(
            image, *box, self.images.size, interpolation=TF.InterpolationMode.BICUBIC)) for box in boxes])


@dataclass
class Batches:
    """Training batches of one rank. `run(start, stop)` yields the `accumulate` micro-batches of each step: images (V b) C H W,
    standardised, all first views before all second ones, and mask noise (k V b) N, one mask of all views before the next.

    ids: the images to train on; batch: B, of all ranks and micro-batches together; patches: N; smallest: least area of a
    crop; colours: how strongly colours are changed. The last, incomplete batch of an epoch is left out."""

    images: Images
    ids: torch.Tensor
    mean: list
    std: list
    seed: int
    batch: int
    patches: int
    views: int = 1
    masks: int = 1
    smallest: float = 0.2
    colours: float = 0.0
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    workers: int = 0

    def __post_init__(self):
        self.steps_per_epoch = len(self.ids) // self.batch
        self.epoch = None                                  # of which `order` is the order
        self.pixels = None if self.images.pixels is None else self.images.pixels.to(self.device)
        self.mean, self.std = (torch.tensor(v, device=self.device, dtype=self.dtype)[:, None, None]
                               for v in (self.mean, self.std))

    def numbers(self, step):
        """Image indices and random numbers of this rank at this step, each (accumulate b) ...: rank r of R takes the r-th of
        R equal parts of each micro-batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.epoch != epoch:
            self.epoch, self.order = epoch, self.ids[epoch_order(self.seed, epoch, len(self.ids))]
        numbers = draw(self.seed, step, self.batch, self.views, self.masks, self.patches)
        numbers["ids"] = self.order[place * self.batch:(place + 1) * self.batch]
        return {k: v.unflatten(0, (self.accumulate, self.world, -1))[:, self.rank].flatten(0, 1) for k, v in numbers.items()}

    def run(self, start, stop):
        stream, cuda = None, self.device.type == "cuda"
        if self.pixels is None:
            plan = (list(zip(n["ids"].tolist(), n["crop"].tolist())) for n in map(self.numbers, range(start, stop)))
            stream = iter(torch.utils.data.DataLoader(CroppedFiles(self.images, self.smallest), batch_sampler=plan,
                                                      num_workers=self.workers, pin_memory=cuda))
        for step in range(start, stop):
            numbers = self.numbers(step)
            if cuda:                                       # from pinned memory the copies do not make the host wait
                numbers = {k: v.pin_memory() for k, v in numbers.items()}
            numbers = {k: v.to(self.device, non_blocking=cuda) for k, v in numbers.items()}
            files = next(stream).to(self.device, non_blocking=cuda) if stream is not None else None     # (A b) V C H W
            b = self.batch // self.accumulate // self.world
            for k in range(self.accumulate):
                n = {name: v[k * b:(k + 1) * b] for name, v in numbers.items()}
                yield self.augment(n, self.pixels[n["ids"]][:, None] if files is None else files[k * b:(k + 1) * b])

    def augment(self, n, x):
        """x b V C H W (crops) or b 1 C H W (whole images) uint8 -> images (V b) C H W, noise (k V b) N."""
        n = {k: v.transpose(0, 1).flatten(0, 1) for k, v in n.items() if k != "ids"}                    # (V b) ...
        x = x.expand(-1, self.views, -1, -1, -1).transpose(0, 1).flatten(0, 1).to(self.dtype) / 255     # (V b) C H W
        if self.pixels is not None:
            boxes = crop_boxes(n["crop"], x.shape[2], x.shape[3], self.images.size, self.smallest)
            x = crop_flip(x, boxes, n["flip"] < 0.5, self.images.size)
        else:
            x = torch.where(n["flip"][:, None, None, None] < 0.5, x.flip(-1), x)
        if self.colours:
            x = recolour(x, n["colour"], self.colours)
        return (x - self.mean) / self.std, n["noise"].transpose(0, 1).flatten(0, 1)
