"""Batches in which every sample has crops, flips and colours of its own.

Two ways to keep a set. Small sets lie as a uint8 tensor on the device and are augmented there, a
batch at a time: a crop with its resize is two matrix products per image, a flip reverses one of the
matrices, a change of colour is arithmetic with one number per image. Large sets stream from the
disk: DataLoader workers decode and crop, the device flips and recolours.

All random numbers of a step come from (seed, step). They are drawn on the CPU for the batch of all
processes; each process takes its part. So the number of workers or processes, or a stop and a
restart, changes none of them.

Letters:  B views in a micro-batch of one process (views x images, first views before second ones),
          n images, N patches of an image, C channels, H W height and width.
"""

import math
import signal
from collections import deque
from dataclasses import KW_ONLY, dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch

from support.datasets import Images, cut, open_file

# ------------------------------------------------------------- random numbers and augmentation

PURPOSES = {"step": 0, "epoch": 1, "picture": 2, "teacher": 3}


def generator(seed, purpose, index=0):
    """A CPU generator for the index-th use of a purpose.

    numpy's SeedSequence mixes the three numbers: neighbours give unrelated generators."""
    mixed = np.random.SeedSequence((seed, PURPOSES[purpose], index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))   # manual_seed takes 63 bits


def draw(seed, step, batch, views, patches):
    """All random numbers of a step for the batch of all processes, uniform in 0..1.

    Always all of them, so that a switch that is turned off changes no other number."""
    g, teacher = generator(seed, "step", step), generator(seed, "teacher", step)
    return {
        "crop": torch.rand(batch, views, 4, generator=g),
        "flip": torch.rand(batch, views, generator=g),
        "colour": torch.rand(batch, views, 6, generator=g),
        "noise": torch.rand(batch, views, patches, generator=g),
        "teacher_colour": torch.rand(batch, views, 6, generator=teacher),
    }


def epoch_order(seed, epoch, n):
    """The order of n images in an epoch."""
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def crop_boxes(u, H, W, out, smallest):
    """Random resized crops (Szegedy et al. 2015) of an image of H x W, to be resized to `out`.

    u ... 4 in 0..1 -> top, left, height, width: ... 4, whole pixels.

    The area is uniform in smallest..1 of the image. The aspect ratio is 3/4 to 4/3 times that of
    the output, and its logarithm uniform, so that wide and tall boxes are equally likely. A box
    that sticks out is cut to the image; torchvision draws again up to ten times instead. smallest =
    1 does not crop, unless the image has another aspect ratio than the output."""
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
    with torch.autocast(x.device.type, enabled=False):     # pixels are never in bf16
        return (rows[:, None] @ x @ columns[:, None].transpose(2, 3)).clamp(0, 1)      # B C h w


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
        return (changed * (most * (2 * number - 1)))[:, None, None, None]

    most = min(0.8, 0.4 * strength)
    x = (x * (1 + change(u[:, 1], most))).clamp(0, 1)                          # brightness
    mean = luma(x).mean((2, 3), keepdim=True)                                  # B 1 1 1
    x = (mean + (x - mean) * (1 + change(u[:, 2], most))).clamp(0, 1)          # contrast
    if x.shape[1] != 3:
        return x

    saturation = 1 + change(u[:, 3], min(1, 0.2 * strength))
    saturation = saturation * (u[:, 5] >= 0.2)[:, None, None, None]            # 0: grey
    angle = 2 * math.pi * change(u[:, 4], min(0.5, 0.1 * strength))            # hue
    # A colour is its brightness and a rest, the chroma, which is scaled and turned. All of it is
    # linear: one matrix of 3 x 3 for each image.
    kept, turned = (saturation * angle.cos()).flatten(), (saturation * angle.sin()).flatten()    # B
    entries = [LUMA[b] + kept * ((a == b) - LUMA[b]) + turned * QUARTER_TURN[a][b]
               for a in range(3) for b in range(3)]                            # 9 x B
    matrix = torch.stack(entries, dim=1).unflatten(1, (3, 3))                  # B 3 3
    with torch.autocast(x.device.type, enabled=False):     # pixels are never in bf16
        return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:]).clamp(0, 1)


# --------------------------------------------------------------------------------------- batches

class CroppedFiles(torch.utils.data.Dataset):
    """Item (index, crop numbers: views 4) -> crops of that image file: views C H W uint8.

    They are cut from the file at its own resolution. A large JPEG may be decoded smaller, but never
    so small that a crop has to be enlarged for it."""

    def __init__(self, images, smallest):
        self.images, self.smallest = images, smallest

    def __getitem__(self, item):
        index, u = item
        size = self.images.size
        # a crop of the least area, and of the narrowest shape, still has as many pixels as `size`
        image = open_file(self.images, index, max(size) / math.sqrt(3 / 4 * self.smallest))  # C H W
        boxes = crop_boxes(torch.tensor(u), *image.shape[1:], size, self.smallest)
        return cut(image, boxes.tolist(), size)


def survive_one_signal(worker):
    """Queues and torchrun send SIGTERM to all processes of a run, a terminal SIGINT. Its workers
    leave the first one to the run, which finishes its step and ends them; a second one ends
    them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


class Views(NamedTuple):
    """A micro-batch of one process: views x n images, all first views, then all second ones."""

    student: torch.Tensor      # B C H W, standardised
    teacher: torch.Tensor      # B C H W: the very same tensor; or same crops, flips, other colours
    noise: torch.Tensor        # B N: chooses the masks


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
        self.resident = pixels is not None
        self.pixels = pixels.to(self.device) if self.resident else None
        self.mean, self.std = (torch.tensor(v, device=self.device, dtype=self.dtype)[:, None, None]
                               for v in (self.mean, self.std))

    def numbers(self, step):
        """Image indices and random numbers of this process at this step: (accumulate n) ... each.

        Process r of R takes the r-th of R equal parts of each micro-batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.epoch != epoch:
            self.epoch = epoch
            self.order = self.ids[epoch_order(self.seed, epoch, len(self.ids))]
        numbers = draw(self.seed, step, self.batch, self.views, self.patches)
        numbers["ids"] = self.order[place * self.batch:(place + 1) * self.batch]
        for name, values in numbers.items():
            parts = values.unflatten(0, (self.accumulate, self.world, -1))
            numbers[name] = parts[:, self.rank].flatten(0, 1)
        return numbers

    def run(self, start, stop):
        """Yield `Views`, `accumulate` of them for each step from start to before stop."""
        n = self.batch // self.accumulate // self.world
        steps = map(self.numbers, range(start, stop))
        batches = zip(steps, repeat(None)) if self.resident else self.stream(steps)
        for numbers, files in batches:                     # files: (accumulate n) views C H W
            numbers = {name: self.to_device(v) for name, v in numbers.items()}
            for first in range(0, self.accumulate * n, n):
                part = {name: v[first:first + n] for name, v in numbers.items()}
                # n 1 C H W, whole images; or n views C H W, crops of files
                x = self.pixels[part["ids"]][:, None] if self.resident else files[first:first + n]
                yield self.augment(part, x)

    def stream(self, steps):
        """The numbers of each step, and with them the crops that workers cut ahead by these:
        (accumulate n) views C H W."""
        ahead = deque()                    # numbers of steps that workers are at

        def plan():
            for numbers in steps:
                ahead.append(numbers)
                yield list(zip(numbers["ids"].tolist(), numbers["crop"].tolist()))

        files = CroppedFiles(self.images, self.smallest)
        for crops in torch.utils.data.DataLoader(
                files, batch_sampler=plan(), num_workers=self.workers,
                worker_init_fn=survive_one_signal, pin_memory=self.device.type == "cuda"):
            yield ahead.popleft(), self.to_device(crops)

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
        if self.resident:
            H, W = x.shape[2:]
            boxes = crop_boxes(numbers["crop"], H, W, self.images.size, self.smallest)
            x = crop_flip(x, boxes, flip, self.images.size)
        else:
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        student = teacher = self.finish(x, numbers["colour"])
        if self.teacher_view == "other-colours" and self.colours:
            teacher = self.finish(x, numbers["teacher_colour"])
        return Views(student, teacher, numbers["noise"])

    def finish(self, x, u):
        """Recolour x by the numbers u, then standardise it."""
        if self.colours:
            x = recolour(x, u, self.colours)
        return (x - self.mean) / self.std


def views_first(x):
    """n views ... -> (views n) ...: all first views, then all second ones."""
    return x.transpose(0, 1).flatten(0, 1)
