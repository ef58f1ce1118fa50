"""Images by name, and batches in which every sample has crops, flips and colours of its own.

Two ways to keep a set. Small sets are decoded once into a uint8 tensor on the device and augmented
there, a batch at a time: a crop with its resize is two matrix products per image, a flip reverses
one of the matrices, a change of colour is arithmetic with one number per image. Sets larger than
`resident_gb` stream from the disk: DataLoader workers decode and crop, the device flips and
recolours.

All random numbers of a step come from (seed, step). They are drawn on the CPU for the batch of all
processes; each process takes its part. So the number of workers or processes, or a stop and a
restart, changes none of them.

Letters:  B views in a micro-batch of one process (views x images, first views before second ones),
          n images, N patches of an image, k masks of a view, C channels, H W height and width.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as TF

from mae import pair
from utils.coco import read_coco
from utils.command_line import UsageError, make_folder
from utils.images import decode, fit, open_image
from utils.shapes import load_shapes


class Set(NamedTuple):
    """Defaults of a data set."""

    size: int              # side of the images
    patch: int             # side of the patches that suits them
    channels: int


SETS = {
    "shapes": Set(size=64, patch=8, channels=3),
    "cifar10": Set(size=32, patch=4, channels=3),
    "cifar100": Set(size=32, patch=4, channels=3),
    "stl10": Set(size=96, patch=8, channels=3),
    "fashion-mnist": Set(size=28, patch=4, channels=1),
    "imagenette": Set(size=224, patch=16, channels=3),
    "imagefolder": Set(size=224, patch=16, channels=3),
    "coco": Set(size=224, patch=16, channels=3),
}


@dataclass
class Images:
    """One split of a data set, kept in one of two ways. Training crops differ between them:

    - `pixels`: in memory. Crops are cut from these. Files of a folder were first shrunk to `size`
      (so a crop of a part is enlarged again and a little soft); the arrays of torchvision's sets
      and of `shapes` stay as large as they are.
    - `paths`: streamed. Crops are cut from the files at their own resolution, then resized.
    """

    labels: torch.Tensor                       # n, int64; -1 where there is no label
    classes: list
    size: tuple                                # (H, W) of what `read` and `Batches` give
    channels: int
    pixels: torch.Tensor | None = None         # n C H W uint8, of any H and W
    paths: list | None = None
    # `shapes` also has multilabel, masks, owners, boxes; `coco` multilabel
    targets: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.labels)

    @property
    def kept(self):
        """In a few words, where the images are and what crops are cut from."""
        if self.pixels is None:
            return "streamed, cropped from the files at full size"
        height, width = self.pixels.shape[2:]
        return f"in memory, cropped from images of {height} x {width}"


# ---------------------------------------------------------------------------------- sets by name

def load_images(name, root, split, size=None, channels=None, resident_gb=4.0):
    """The "train" or "test" split of a named set as `Images`.

    size: an int or (H, W); the default is the set's own. `read` crops the centre of other images
    and resizes it (bicubic). What random crops are cut from depends on how the set is kept:
    image files that take at most resident_gb once they are shrunk to `size` stay in memory, and
    crops are cut from the shrunken images; more are streamed, and crops are cut from the files at
    their own resolution. `Images.kept` says which it is; resident_gb=0 always streams.

    imagefolder: "test" is ROOT/test or else ROOT/val. coco: the files of the COCO data sets,
    ROOT/annotations/instances_train2017.json (or val2017) with ROOT/train2017/*.jpg; an image has
    no label, but `multilabel`. stl10: "train" includes its 100,000 images
    without labels. Raises UsageError, with what to do about it, where files are missing."""
    size, channels = pair(size or SETS[name].size), channels or SETS[name].channels
    if name == "imagefolder":
        return folder(root, split, size, channels, resident_gb)
    if name == "coco":
        paths, multilabel, classes = read_coco(root, split)
        images = Images(torch.full((len(paths),), -1), classes, size, channels, paths=paths,
                        targets={"multilabel": multilabel})
        return resident(images, resident_gb)
    if name == "imagenette":
        torchvision_set(datasets.Imagenette, root, size="320px")       # brings both splits
        return folder(Path(root) / "imagenette2-320", split, size, channels, resident_gb)

    targets = {}
    if name == "shapes":
        pixels, labels, classes, targets = load_shapes(root, split)
    elif name == "stl10":
        part = "train+unlabeled" if split == "train" else split
        files = torchvision_set(datasets.STL10, root, split=part)
        pixels, labels, classes = torch.from_numpy(files.data), files.labels, files.classes
    else:
        known = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
                 "fashion-mnist": datasets.FashionMNIST}
        files = torchvision_set(known[name], root, train=split == "train")
        pixels, labels, classes = torch.as_tensor(files.data), files.targets, files.classes
        grey = pixels.ndim == 3
        pixels = pixels[:, None] if grey else pixels.permute(0, 3, 1, 2)           # n C H W
    pixels = fit(pixels, tuple(pixels.shape[2:]), channels)
    return Images(torch.as_tensor(labels).long(), list(classes), size, channels, pixels,
                  targets=targets)


def torchvision_set(make, root, **which):
    """A data set of torchvision, downloaded if it is not under root yet.

    A download that fails leaves no empty folders."""
    root = Path(root)
    before = {root, *root.rglob("*")} if root.exists() else set()
    try:
        return make(root, download=False, **which)
    except (RuntimeError, OSError):            # how torchvision says "not found"
        make_folder(root, "--data-root")
    try:
        return make(root, download=True, **which)
    except (OSError, RuntimeError) as error:
        for path in sorted({root, *root.rglob("*")} - before, reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        reason = str(error).strip().splitlines()[0][:120]
        raise UsageError(f"--data-root {root}: the data set is not there and its download failed "
                         f"({reason}); put torchvision's files there by hand") from error


def folder(root, split, size, channels, resident_gb):
    """ROOT/<split>/<class>/*. To train, also a plain folder of images at any depth, no labels."""
    root = Path(root)
    base = base_folder(root, split)
    paths = sorted(path for path in base.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UsageError(f"--data-root {root}: no images in {base} ({', '.join(IMG_EXTENSIONS)}); "
                         "name the folder that holds them")

    labels, classes = torch.full((len(paths),), -1), []
    if base != root:
        inside = [path.parent != base for path in paths]               # inside a class folder
        if any(inside):
            if not all(inside):
                stray = paths[inside.index(False)]
                raise UsageError(f"--data-root {root}: {stray} lies beside the class folders; "
                                 "move or remove it")
            names = [path.relative_to(base).parts[0] for path in paths]
            classes = sorted(set(names))
            number = {name: i for i, name in enumerate(classes)}
            labels = torch.tensor([number[name] for name in names])

    return resident(Images(labels, classes, size, channels, paths=paths), resident_gb)


def resident(images, resident_gb):
    """Images of files, decoded into one tensor if that takes at most resident_gb."""
    if len(images) * images.channels * math.prod(images.size) <= resident_gb * 1e9:
        images.pixels = read(images, range(len(images)))
    return images


def base_folder(root, split):
    """The folder under root that holds the images of a split."""
    if not root.is_dir():
        raise UsageError(f"--data-root {root}: there is no such folder; "
                         "name the one that holds the images")
    found = [name for name in ("train", "test", "val") if (root / name).is_dir()]
    if split == "train":
        if "train" in found:
            return root / "train"
        if found:
            raise UsageError(f"--data-root {root}: has images to test on but no folder `train`")
        return root
    for name in ("test", "val"):
        if name in found:
            return root / name
    raise UsageError(f"--data-root {root}: has neither test/<class>/* nor val/<class>/* to "
                     "evaluate on; put some images of each class there")


def held_out(images, fraction):
    """Indices to train on, and those kept out of training, to be tested on while it runs.

    That is every n-th labelled image, the same for every seed: all runs on a set share them, and
    the test split stays untouched. Without labels none is kept out."""
    ids = torch.arange(len(images))
    labelled = ids[images.labels >= 0]
    out = labelled[spread_out(len(labelled), fraction)]
    return ids[~torch.isin(ids, out)], out


def spread_out(n, fraction):
    """True at a fraction of n places, evenly spread: where place * fraction passes a whole
    number."""
    place = torch.arange(n)
    return (place * fraction).long() != ((place + 1) * fraction).long()


def mean_std(images):
    """Mean and standard deviation of each channel, in units of 0..1.

    Over up to 2,000 images spread over the set, a hundred at a time. Sums of grey levels and of
    their squares are whole numbers, so no order of adding them up changes the result."""
    ids = torch.linspace(0, len(images) - 1, min(len(images), 2000)).long()
    total = squares = torch.zeros(images.channels, dtype=torch.int64)
    count = 0
    for part in ids.split(100):
        x = read(images, part)                                         # n C H W uint8
        total = total + x.sum((0, 2, 3))
        squares = squares + x.int().square().sum((0, 2, 3))
        count += x.numel() // images.channels
    mean, std = [], []
    for t, s in zip(total.tolist(), squares.tolist()):
        variance = (count * s - t * t) / (count * (count - 1))         # whole numbers until "/"
        mean.append(t / count / 255)
        std.append(max(math.sqrt(variance) / 255, 1e-3))
    return mean, std


def read(images, ids):
    """The images at ids, not augmented: n C H W uint8."""
    if images.pixels is not None:
        return fit(images.pixels[ids], images.size, images.channels)

    def decode_one(i):
        return decode(images.paths[i], images.size, images.channels)

    with ThreadPoolExecutor() as threads:      # Pillow decodes outside Python's lock
        return torch.stack(list(threads.map(decode_one, ids)))


# ------------------------------------------------------------- random numbers and augmentation

PURPOSES = {"step": 0, "epoch": 1, "picture": 2, "teacher": 3}


def generator(seed, purpose, index=0):
    """A CPU generator for the index-th use of a purpose.

    numpy's SeedSequence mixes the three numbers: neighbours give unrelated generators."""
    mixed = np.random.SeedSequence((seed, PURPOSES[purpose], index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))   # manual_seed takes 63 bits


def draw(seed, step, batch, views, masks, patches):
    """All random numbers of a step for the batch of all processes, uniform in 0..1.

    Always all of them, so that a switch that is turned off changes no other number."""
    g, teacher = generator(seed, "step", step), generator(seed, "teacher", step)
    return {
        "crop": torch.rand(batch, views, 4, generator=g),
        "flip": torch.rand(batch, views, generator=g),
        "colour": torch.rand(batch, views, 6, generator=g),
        "noise": torch.rand(batch, views, masks, patches, generator=g),
        "teacher_colour": torch.rand(batch, views, 6, generator=teacher),
    }


def epoch_order(seed, epoch, n):
    """The order of n images in an epoch."""
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def crop_boxes(u, H, W, out, smallest):
    """Random resized crops (Szegedy et al. 2015) of an image of H x W, to be resized to `out`.

    u ... 4 in 0..1 -> top, left, height, width: ... 4, whole pixels.

    The area is uniform in smallest..1 of the image. The logarithm of the aspect ratio is uniform
    in 3/4..4/3 times that of the output. A box that sticks out is cut to the image; torchvision
    draws again up to ten times instead. smallest = 1 does not crop, unless the image has another
    aspect ratio than the output."""
    wide = 2 * u[..., 1] - 1 if smallest < 1 else torch.zeros_like(u[..., 1])
    area = smallest + u[..., 0] * (1 - smallest)
    ratio = (4 / 3) ** wide * out[1] / out[0]
    h = (area * H * W / ratio).sqrt().round().clamp(1, H)
    w = (area * H * W * ratio).sqrt().round().clamp(1, W)
    top = (u[..., 2] * (H - h + 1)).floor()
    left = (u[..., 3] * (W - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=-1).long()


def resize_matrix(start, length, n_in, n_out):
    """Matrices that crop [start, start + length) from n_in pixels and resize it to n_out.

    start B, length B -> B n_out n_in. Cubic filter (a = -1/2), widened when shrinking: what
    torchvision and Pillow call antialiased bicubic."""
    start, length = start[:, None, None], length[:, None, None]        # B 1 1
    j = torch.arange(n_in, device=start.device)                        # input pixels
    i = torch.arange(n_out, device=start.device)[:, None]              # output pixels
    # Distance of each input pixel to the centre of each output pixel, in widths of the filter.
    x = (j + 0.5 - start - (i + 0.5) * length / n_out) / (length / n_out).clamp(min=1)
    x = x.abs()                                                        # B n_out n_in
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, far) * (x < 2)
    weight = weight * ((j >= start) & (j < start + length))
    return weight / weight.sum(-1, keepdim=True)


def crop_flip(x, boxes, flip, out):
    """Each image with its own crop and flip: x B C H W, boxes B 4, flip B (bool) -> B C *out."""
    top, left, height, width = boxes.unbind(1)
    rows = resize_matrix(top, height, x.shape[2], out[0]).to(x.dtype)          # B h H
    columns = resize_matrix(left, width, x.shape[3], out[1]).to(x.dtype)       # B w W
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return (rows[:, None] @ x @ columns[:, None].transpose(2, 3)).clamp(0, 1)  # B C h w


# Grey of red, green, blue (ITU-R BT.601, with torchvision's digits).
LUMA = (0.2989, 0.587, 0.114)
# A quarter turn of the two chroma axes of YIQ, written for red, green, blue. Plain numbers, not a
# tensor: they need no copy to the GPU, and such a copy at every step makes the host wait.
YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
QUARTER_TURN_YIQ = np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]])
QUARTER_TURN = (np.linalg.inv(YIQ) @ QUARTER_TURN_YIQ @ YIQ).tolist()


def luma(x):
    """Brightness: B C H W -> B 1 H W."""
    if x.shape[1] != 3:
        return x
    return sum(share * x[:, i:i + 1] for i, share in enumerate(LUMA))


def recolour(x, u, strength=1.0):
    """Change the colours of each image: x B C H W in 0..1, u B 6 in 0..1 -> B C H W in 0..1.

    4 of 5 images are changed: brightness and contrast by up to 40 %, and in colour images
    saturation by 20 % and hue by a tenth of a turn. All of these are multiplied by the strength,
    but go no further than 80 %, 100 % and half a turn. 1 of 5 colour images is made grey.

    Rates, and the strengths at 1, are those of MC-SSL. Two things differ from torchvision:
    saturation scales and hue turns the two chroma axes of YIQ, which is linear, where torchvision
    goes through HSV; and the order is always the same, where torchvision shuffles it."""
    u = u.to(x.dtype)
    changed = u[:, 0] < 0.8

    def change(number, most):
        """A number uniform in -most..most for each image, 0 where it is not changed: B 1 1 1."""
        return (changed * most * (2 * number - 1))[:, None, None, None]

    most = min(0.8, 0.4 * strength)
    x = (x * (1 + change(u[:, 1], most))).clamp(0, 1)                          # brightness
    mean = luma(x).mean((2, 3), keepdim=True)                                  # B 1 1 1
    x = (mean + (x - mean) * (1 + change(u[:, 2], most))).clamp(0, 1)          # contrast
    if x.shape[1] != 3:
        return x

    saturation = 1 + change(u[:, 3], min(1, 0.2 * strength))
    saturation = saturation * (u[:, 5] >= 0.2)[:, None, None, None]            # 0: grey
    angle = 2 * math.pi * change(u[:, 4], min(0.5, 0.1 * strength))            # hue
    y = luma(x)
    chroma = saturation * (x - y)              # colour without its brightness: a plane through zero
    red, green, blue = chroma.split(1, dim=1)
    turned = torch.cat([a * red + b * green + c * blue for a, b, c in QUARTER_TURN], dim=1)
    return (y + chroma * angle.cos() + turned * angle.sin()).clamp(0, 1)


# --------------------------------------------------------------------------------------- batches

class CroppedFiles(torch.utils.data.Dataset):
    """Item (index, crop numbers: views 4) -> crops of that image file: views C H W uint8.

    They are cut at the file's own resolution, then resized."""

    def __init__(self, images, smallest):
        self.images, self.smallest = images, smallest

    def __getitem__(self, item):
        index, u = item
        size = self.images.size
        image = open_image(self.images.paths[index], self.images.channels)
        boxes = crop_boxes(torch.tensor(u), image.height, image.width, size, self.smallest)
        crops = []
        for box in boxes.tolist():
            crop = TF.resized_crop(image, *box, size, interpolation=TF.InterpolationMode.BICUBIC)
            crops.append(TF.pil_to_tensor(crop))
        return torch.stack(crops)


class Views(NamedTuple):
    """A micro-batch of one process: views x n images, all first views, then all second ones."""

    student: torch.Tensor      # B C H W, standardised
    teacher: torch.Tensor      # B C H W: the very same tensor; or same crops, flips, other colours
    noise: torch.Tensor        # (k B) N: noise of one mask for all views, then of the next mask


@dataclass
class Batches:
    """Training batches of one process. `run(start, stop)` yields the micro-batches of each step.

    The last, incomplete batch of an epoch is left out."""

    images: Images
    ids: torch.Tensor                  # the images to train on
    mean: list                         # of each channel; __post_init__ makes tensors C 1 1 of both
    std: list
    seed: int
    batch: int                         # images of a step: all processes and micro-batches together
    patches: int                       # N
    _: KW_ONLY
    views: int = 1                     # of an image
    masks: int = 1                     # k, of a view
    smallest: float = 0.2              # least area of a crop
    colours: float = 0.0               # how strongly colours are changed
    teacher_view: str = "other-colours"        # drawn apart; or "same", the student's view
    accumulate: int = 1                # micro-batches of a step
    rank: int = 0                      # number of this process
    world: int = 1                     # how many processes there are
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    workers: int = 0                   # processes that decode what is streamed

    def __post_init__(self):
        self.steps_per_epoch = len(self.ids) // self.batch
        self.epoch = None              # the epoch that `order` is the order of
        pixels = self.images.pixels
        self.pixels = None if pixels is None else pixels.to(self.device)
        self.mean, self.std = (torch.tensor(v, device=self.device, dtype=self.dtype)[:, None, None]
                               for v in (self.mean, self.std))

    def numbers(self, step):
        """Image indices and random numbers of this process at this step: (accumulate n) ... each.

        Process r of R takes the r-th of R equal parts of each micro-batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.epoch != epoch:
            self.epoch = epoch
            self.order = self.ids[epoch_order(self.seed, epoch, len(self.ids))]
        numbers = draw(self.seed, step, self.batch, self.views, self.masks, self.patches)
        numbers["ids"] = self.order[place * self.batch:(place + 1) * self.batch]
        for name, values in numbers.items():
            parts = values.unflatten(0, (self.accumulate, self.world, -1))
            numbers[name] = parts[:, self.rank].flatten(0, 1)
        return numbers

    def run(self, start, stop):
        """Yield `Views`, `accumulate` of them for each step from start to before stop."""
        stream = self.stream(start, stop) if self.pixels is None else None
        n = self.batch // self.accumulate // self.world
        for step in range(start, stop):
            numbers = {name: self.to_device(v) for name, v in self.numbers(step).items()}
            if stream is not None:
                files = self.to_device(next(stream))                   # (accumulate n) views C H W
            for first in range(0, self.accumulate * n, n):
                part = {name: v[first:first + n] for name, v in numbers.items()}
                if stream is not None:
                    x = files[first:first + n]                         # n views C H W
                else:
                    x = self.pixels[part["ids"]][:, None]              # n 1 C H W
                yield self.augment(part, x)

    def stream(self, start, stop):
        """An iterator over the crops of each step, cut by workers: (accumulate n) views C H W."""
        def plan():
            for step in range(start, stop):
                numbers = self.numbers(step)
                yield list(zip(numbers["ids"].tolist(), numbers["crop"].tolist()))

        files = CroppedFiles(self.images, self.smallest)
        loader = torch.utils.data.DataLoader(files, batch_sampler=plan(), num_workers=self.workers,
                                             pin_memory=self.device.type == "cuda")
        return iter(loader)

    def to_device(self, x):
        """x on the device. From pinned memory the copy does not make the host wait."""
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def augment(self, numbers, x):
        """Crop (unless a worker did), flip, recolour and standardise -> `Views`.

        numbers: what `numbers` gives, n views ... each, on the device. x uint8: n 1 C H W, whole
        images, or n views C H W, crops of streamed files. Nothing is drawn here, and the host
        reads nothing back from the device."""
        numbers = {name: views_first(v) for name, v in numbers.items() if name != "ids"}   # B ...
        x = views_first(x.expand(-1, self.views, -1, -1, -1)).to(self.dtype) / 255     # B C H W
        flip = numbers["flip"] < 0.5
        if self.pixels is not None:
            H, W = x.shape[2:]
            boxes = crop_boxes(numbers["crop"], H, W, self.images.size, self.smallest)
            x = crop_flip(x, boxes, flip, self.images.size)
        else:
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        student = teacher = self.finish(x, numbers["colour"])
        if self.teacher_view == "other-colours" and self.colours:
            teacher = self.finish(x, numbers["teacher_colour"])
        noise = numbers["noise"].transpose(0, 1).flatten(0, 1)                         # (k B) N
        return Views(student, teacher, noise)

    def finish(self, x, u):
        """Recolour x by the numbers u, then standardise it."""
        if self.colours:
            x = recolour(x, u, self.colours)
        return (x - self.mean) / self.std


def views_first(x):
    """n views ... -> (views n) ...: all first views, then all second ones."""
    return x.transpose(0, 1).flatten(0, 1)
