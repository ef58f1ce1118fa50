"""Images by name: sets that torchvision knows, `shapes`, and folders of your own.

Small sets are decoded once into a uint8 tensor. Sets larger than `resident_gb` stay files on the
disk, and are decoded when they are asked for.

Letters:  n images, C channels, H W height and width.
"""

import math
import os
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

from mae import pair
from support.coco import annotations_file, folder_of, read_coco
from support.command_line import UsageError, make_folder, say, shortened
from support.images import decode, fit, open_image, suffixes
from support.ranks import from_rank_0
from support.shapes import load_shapes


class Set(NamedTuple):
    """Defaults of a data set."""

    size: int              # side of the images
    patch: int             # side of the patches that suits them
    channels: int


RUN = ("config.json", "metrics.jsonl")     # what tells the folder of a run from one of images

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

    y: torch.Tensor                            # the class of each, n, int64; -1: unknown
    classes: list                              # their names
    size: tuple                                # (H, W) of what `read` and `Batches` give
    channels: int
    pixels: torch.Tensor | None = None         # n C H W uint8, of any H and W
    paths: list | None = None
    # `shapes` also has multilabel, masks, owners, boxes; `coco` multilabel
    targets: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.y)

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
    no one class, but `multilabel`. stl10: "train" includes its 100,000 images of unknown class.
    Raises UsageError, with what to do about it, where files are missing."""
    size, channels = pair(size or SETS[name].size), channels or SETS[name].channels
    if name == "imagefolder":
        return folder(root, split, size, channels, resident_gb)
    if name == "coco":
        paths, multilabel, classes = read_coco(root, split)
        images_in = folder_of(annotations_file(root, split))
        unnamed = sorted({*walk(images_in).paths} - {*paths})
        if unnamed:
            say(f"{images_in}: left out are {len(unnamed)} images that the annotations do not name,"
                f" such as {unnamed[0].relative_to(images_in)}")
        images = Images(torch.full((len(paths),), -1), classes, size, channels, paths=paths,
                        targets={"multilabel": multilabel})
        return resident(images, resident_gb)
    if name == "imagenette":
        torchvision_set(datasets.Imagenette, root, size="320px")       # brings both splits
        return folder(Path(root) / "imagenette2-320", split, size, channels, resident_gb)

    targets = {}
    if name == "shapes":
        pixels, y, classes, targets = load_shapes(root, split)
    elif name == "stl10":
        part = "train+unlabeled" if split == "train" else split
        files = torchvision_set(datasets.STL10, root, split=part)
        pixels, y, classes = torch.from_numpy(files.data), files.labels, files.classes
    else:
        known = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
                 "fashion-mnist": datasets.FashionMNIST}
        files = torchvision_set(known[name], root, train=split == "train")
        pixels, y, classes = torch.as_tensor(files.data), files.targets, files.classes
        grey = pixels.ndim == 3
        pixels = pixels[:, None] if grey else pixels.permute(0, 3, 1, 2)           # n C H W
    pixels = fit(pixels, tuple(pixels.shape[2:]), channels)
    return Images(torch.as_tensor(y).long(), list(classes), size, channels, pixels,
                  targets=targets)


def choose(data, root, config):
    """--data and --data-root (None: not given) of a checkpoint -> name, root.

    config: the settings it was trained with, {} if there are none."""
    data = data or config.get("data")
    if data is None:
        raise UsageError("--data: this checkpoint does not name a data set; name one")
    if data == config.get("data"):
        if not root and data in ("imagefolder", "coco") and not Path(config["data_root"]).is_dir():
            raise UsageError(f"--data-root: the run read {config['data_root']}, which is not to be "
                             "found from here; name the folder")
        return data, root or config["data_root"]
    if data in ("imagefolder", "coco") and not root:
        raise UsageError("--data-root: name the folder of the images")
    return data, root or "data"


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
    """ROOT/<split>/<class>/*. To train, also a plain folder of images at any depth, without
    classes. What is left out of it, and what classes lack, is said."""
    root = Path(root)
    base = base_folder(root, split)
    walked = walk(base)
    paths = walked.paths
    if text := account(root, base, walked):
        say(text)
    if not paths:
        raise UsageError(f"--data-root {root}: no images in {base}; name the folder that holds "
                         "them")

    y, classes = torch.full((len(paths),), -1), []
    if base != root:
        inside = [path.parent != base for path in paths]               # inside a class folder
        if any(inside):
            if not all(inside):
                stray = paths[inside.index(False)]
                raise UsageError(f"--data-root {root}: {stray} lies beside the class folders; "
                                 "move or remove it")
            names = [class_name(path.relative_to(base).parts[0]) for path in paths]
            classes = sorted(set(names))
            number = {name: i for i, name in enumerate(classes)}
            y = torch.tensor([number[name] for name in names])
            for text in about_classes(base, walked, names):
                say(text)

    return resident(Images(y, classes, size, channels, paths=paths), resident_gb)


def single_files(paths, size, channels, flag):
    """Image files that belong to no set, as `Images`. flag: what names them, for UsageError."""
    pixels = torch.stack([decode(path, size, channels, flag) for path in paths])
    return Images(torch.full((len(paths),), -1), [], size, channels, pixels, [*map(Path, paths)])


def class_name(folder):
    """The name of a class folder. Of two ways to write an umlaut (macOS has another one than Linux
    and Windows) it is always the composed one; and it is UTF-8 whatever the locale."""
    return unicodedata.normalize("NFC", os.fsencode(folder).decode("utf-8", "replace"))


class Walked(NamedTuple):
    """What lies below a folder."""
    paths: list                # of the images, sorted
    folders: list              # all folders but the first, sorted
    left_out: dict             # {reason: [paths of entries]}


# What systems leave behind. Names that begin with a dot are hidden too.
HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN",
          "System Volume Information", "lost+found")


def hidden(name):
    return name.startswith(".") or name in HIDDEN


def holds_images(root):
    """Whether a folder looks like images of one's own: some in it, or a folder `train`."""
    root = Path(root)
    return root.is_dir() and (part_of(root, "train") is not None or any(
        each.suffix.lower() in suffixes() for each in root.iterdir()))


def walk(base):
    """All entries below a folder: images, and what is left out and why.

    Links to files and folders are followed. A file that is reached in two ways counts once, and its
    real place wins over a link. So links in a circle end. Hidden files and folders, and folders of
    runs, are no images and no classes. Raises UsageError for a folder that cannot be read, and for
    images without content."""
    base = Path(base)
    paths, folders, empty, left_out = [], [], [], {}
    real = os.path.realpath(base)
    above, visited, linked = {str(each) for each in Path(real).parents}, {real}, set()
    known, to_do, links = suffixes(), [(base, real)], []

    def leave_out(reason, path):
        left_out.setdefault(reason, []).append(path)

    def is_read(real):
        return (str(real.parent) in visited and real.suffix.lower() in known
                and not hidden(real.name))

    def take(path, real, entry):
        suffix = path.suffix.lower()
        if entry.is_dir() and all((path / name).exists() for name in RUN):
            leave_out("folders of runs", path)             # with pictures that the run has drawn
        elif entry.is_dir():
            if real in visited or real in above:
                return leave_out("links to folders that are read already", path)
            visited.add(real)
            folders.append(path)
            to_do.append((path, real))
        elif not entry.is_file():
            leave_out("no files and no folders", path)
        elif suffix not in known:
            leave_out(f"files {suffix}" if suffix else "files without a suffix", path)
        elif real in linked or entry.is_symlink() and is_read(Path(real)):
            leave_out("links to files that are read already", path)
        else:
            paths.append(path)
            if entry.is_symlink():
                linked.add(real)
            if entry.stat().st_size == 0:
                empty.append(path)

    while to_do or links:
        if not to_do:                                      # all that really lies here is known
            path, entry = links.pop(0)
            if os.path.exists(path):
                take(path, os.path.realpath(path), entry)
            else:
                leave_out("links that lead nowhere", path)
            continue
        here, real = to_do.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise UsageError(f"--data-root: {here} cannot be read ({error.strerror}); see who may "
                             "(ls -l), or remove it") from error
        for entry in entries:
            path = here / entry.name
            if hidden(entry.name):
                leave_out("hidden", path)
            elif entry.is_symlink():
                links.append((path, entry))
            else:
                take(path, os.path.join(real, entry.name), entry)
    if empty:
        raise UsageError(f"--data-root: {len(empty)} images are files of 0 bytes, such as "
                         f"{shortened(sorted(map(str, empty)))}; copy them again, or remove them")
    return Walked(sorted(paths), sorted(folders), left_out)


def account(root, base, walked):
    """One line of all that is not used, in the folder `base` of a split and beside it. "" if
    everything is."""
    parts = [f"{len(paths)} {reason}, such as {min(paths).relative_to(base)}"
             for reason, paths in sorted(walked.left_out.items())]
    there = sorted(each.name for each in root.iterdir() if not hidden(each.name))
    splits = {"train", "test", "val"} - ({"val"} if base.name.lower() == "test" else set())
    beside = [name for name in there if name != base.name and (
        name.lower() == base.name.lower() or name.lower().removesuffix("annot") not in splits)]
    if beside and base != root:
        parts.append(f"what lies beside it: {shortened(beside)}")
    text = f"{base}: left out are {'; '.join(parts)}" if parts else ""
    unnamed = [name for name in there if name.lower() in OTHER_NAMES and (root / name).is_dir()]
    if unnamed and base == root:
        text = (text or f"{base}") + (f"; all of it is one set without classes; if "
                                      f"{shortened(unnamed)} is a part, call it train or test")
    deeper = [name for name in there if (root / name).is_dir() and part_of(root / name, "train")]
    if deeper and base == root:
        text = (text or f"{base}") + (f"; all of it is one set without classes, also "
                                      f"{deeper[0]}/train; if that is the set, use --data-root "
                                      f"{root / deeper[0]}")
    return text


OTHER_NAMES = ("training", "testing", "valid", "validation", "eval", "dev")        # of splits


def about_classes(base, walked, names):
    """Lines of what one should know of the classes of images, whose names are those."""
    counts = Counter(names)
    (most, n), few = counts.most_common(1)[0], min(counts.values())
    empty = [each.name for each in walked.folders
             if each.parent == base and class_name(each.name) not in counts]
    alone = sorted(name for name, count in counts.items() if count == 1)
    deep = [path for path in walked.paths if path.parent.parent != base]
    same = Counter(name.casefold() for name in counts)
    spelled = Counter(class_name(each.name) for each in walked.folders if each.parent == base)
    twice = sorted(name for name, times in spelled.items() if times > 1)
    alike = sorted(name for name in counts if same[name.casefold()] > 1)
    lines = []
    if empty:
        lines.append(f"{len(empty)} class folders hold no image: {shortened(empty)}")
    if deep:
        lines.append(f"{len(deep)} images lie in folders inside a class folder and are of its "
                     f"class, such as {deep[0].relative_to(base)}")
    if alike:
        lines.append(f"classes whose names differ in capital letters alone: {shortened(alike)}")
    if twice:
        lines.append(f"two folders, whose umlauts are written in two ways, are one class: "
                     f"{shortened(twice)}")
    if len(counts) == 1:
        lines.append(f"there is one class, {most}, so there is nothing to tell apart, and no k-NN")
    elif n >= 2 * few:
        lines.append(f"classes have {few} to {n} images; always guessing {most} is right in "
                     f"{n / len(names):.1%}")
    if alone and len(counts) > 1:
        lines.append(f"of one image: {shortened(alone)}")
    return [f"{base}: {'; '.join(lines)}"] if lines else []


def look(root, val_fraction):
    """Of a folder of images: how many there are to train on, and how long their shorter sides are
    (the median of up to 100, of which only the headers are read). 0, 0 if there is none."""
    root = Path(root)
    if not root.is_dir():
        return 0, 0
    base = part_of(root, "train") or root
    paths = walk(base).paths
    if not paths:
        return 0, 0
    in_classes = base != root and all(path.parent != base for path in paths)
    held_out = int(len(paths) * val_fraction) if in_classes else 0
    sides = []
    for path in paths[::math.ceil(len(paths) / 100)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except (OSError, Image.DecompressionBombError):    # reading it will say what is wrong
            continue
    return len(paths) - held_out, median(sides) if sides else 0


def resident(images, resident_gb):
    """Images of files, decoded into one tensor if that takes at most resident_gb."""
    if fits(images, resident_gb):
        images.pixels = read(images, range(len(images)))
    return images


def fits(images, resident_gb):
    return len(images) * images.channels * math.prod(images.size) <= resident_gb * 1e9


def share(images, resident_gb, device):
    """Hand the images of files that rank 0 has decoded to the other ranks."""
    if images.paths is not None and fits(images, resident_gb):
        if images.pixels is None:
            shape = len(images), images.channels, *images.size
            images.pixels = torch.empty(shape, dtype=torch.uint8)
        for part in images.pixels.split(1000):             # some of them at a time on the device
            part.copy_(from_rank_0(part.to(device)))


def part_of(root, split):
    """The folder ROOT/<split>, or the one that differs in capital letters alone; None without."""
    found = [each for each in Path(root).iterdir() if each.name.lower() == split and each.is_dir()]
    return max(found, key=lambda each: (each.name == split, each.name), default=None)


def base_folder(root, split):
    """The folder under root that holds the images of a split."""
    if not root.is_dir():
        raise UsageError(f"--data-root {root}: there is no such folder; "
                         "name the one that holds the images")
    train, test, val = (part_of(root, name) for name in ("train", "test", "val"))
    if split == "train":
        if train:
            return train
        if test or val:
            raise UsageError(f"--data-root {root}: has images to test on but no folder `train`")
        return root
    if test or val:
        return test or val
    raise UsageError(f"--data-root {root}: has neither test/<class>/* nor val/<class>/* to "
                     "evaluate on; put some images of each class there, or see --split validation, "
                     "and for features --split train")


# ------------------------------------------------------------------------- which images serve

def held_out(images, fraction):
    """Indices to train on, and those kept out of training, to be tested on while it runs.

    That is every n-th image of those whose class is known, the same for every seed: all runs on a
    set share them, and the test split stays untouched. Without classes none is kept out."""
    ids = torch.arange(len(images))
    known = ids[images.y >= 0]
    out = known[spread_out(len(known), fraction)]
    return ids[~torch.isin(ids, out)], out


def spread_out(n, fraction):
    """True at a fraction of n places, evenly spread: where place * fraction passes a whole
    number."""
    place = torch.arange(n)
    return (place * fraction).long() != ((place + 1) * fraction).long()


def require_images(root, n, what):
    """Raises UsageError for fewer images than can be shared out."""
    if n < 10:
        raise UsageError(f"--data-root {root}: {n} {what}; at least 10 are needed, one to validate "
                         "on")


def require_classes(root, images):
    """Raises UsageError unless images have several classes."""
    if len(images.classes) < 2:
        raise UsageError(f"--data-root {root}: has one class, so there is nothing to tell apart; "
                         "add another")


def require_the_same_classes(root, train, test):
    """Raises UsageError unless both splits have the same classes, and more than one."""
    require_classes(root, train)
    for ours, theirs, lacks in ((train, test, "test"), (test, train, "training")):
        missing = [name for name in ours.classes if name not in theirs.classes]
        other = [name for name in theirs.classes for each in missing
                 if name.casefold() == each.casefold()]
        if missing:
            hint = f" (is it {shortened(other)}? capital letters count)" if other else ""
            raise UsageError(f"--data-root {root}: no {lacks} images of the classes "
                             f"{shortened(missing)}{hint}; add some, or remove these classes")
    if train.classes != test.classes:
        raise UsageError(f"--data-root {root}: training and test classes are not in the same "
                         "order; sort them alike")


# ---------------------------------------------------------------------------------- pixels

def open_file(images, index, least):
    """One of the images that are streamed, C H W uint8, with sides of `least` pixels or more, if
    it has as many."""
    return TF.pil_to_tensor(open_image(images.paths[index], images.channels, least))


def cut(image, boxes, size):
    """Crops of an image C H W uint8, resized: boxes (top, left, height, width), n of them ->
    n C H W uint8. size: (H, W).

    Of a tensor this takes half the time that it takes of a Pillow image."""
    bicubic = TF.InterpolationMode.BICUBIC
    return torch.stack([TF.resized_crop(image, *box, size, interpolation=bicubic)
                        for box in boxes])


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

    pixels = torch.empty(len(ids), images.channels, *images.size, dtype=torch.uint8)

    def decode_one(place, i):
        try:
            pixels[place] = decode(images.paths[i], images.size, images.channels)
        except UsageError as error:                        # of several broken ones all are said
            return images.paths[i], error

    with ThreadPoolExecutor() as threads:      # Pillow decodes outside Python's lock
        broken = [each for each in threads.map(decode_one, range(len(ids)), ids) if each]
    if len(broken) > 1:
        names = [str(path) for path, _ in broken]
        raise UsageError(f"{broken[0][1]}; {len(broken) - 1} others cannot be used either: "
                         f"{shortened(names[1:])}")
    if broken:
        raise broken[0][1]
    return pixels
