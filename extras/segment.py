"""Train an encoder to segment images, all of it, end to end: a class for each pixel.

    python -m extras.segment --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt
    python -m extras.segment --checkpoint FILE --data imagefolder --data-root STREETS --void 11

Masks are those of `shapes`, or of pairs of folders: DIR/train/NAME.jpg with DIR/trainannot/NAME.png
and DIR/test/NAME.jpg with DIR/testannot/NAME.png. Writes checkpoint.pt, config.json, metrics.jsonl,
curves.png, segmentations.png and result.json into --out, and ends with a line of JSON: the mean
over classes of the overlap of painted and true pixels on the test split (mIoU, intersection over
union). The same command continues a run that was cut off. `eval.py patches` is the same with a
frozen encoder and a linear layer.

Classes that the true masks lack are left out of the mean, also where they were painted.

The head sees the patch tokens of four blocks, evenly spread, as SETR's MLA head does (Zheng et al.
2021). Two transposed convolutions make their map four times as high and wide; the rest is bilinear
interpolation. Its width is not tuned.

Letters:  B images, N patches, h w rows and columns of patches, H W height and width of an image,
          D width of the encoder, C classes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python extras/segment.py`

from extras import tuning
from support.command_line import UsageError, option, run_main
from support.datasets import read
from support.devices import choose_device
from support.masks import check_pairs, classes_in, masks_of, seen_part
from support.pictures import draw_rows, plt
from support.probes import overlaps, subset

IGNORED = 255                              # pixels without a class, once a mask is read


@dataclass
class Config(tuning.Config):
    void: int = option(255, "pixels of a mask with this number have no class", range=(0, 255))


class Segmenter(nn.Module):
    """An encoder and a head: B C H W -> scores of classes for each pixel, B C H W."""

    def __init__(self, encoder, classes, width=64):
        super().__init__()
        self.encoder = encoder
        depth, D = len(encoder.blocks), encoder.cls_token.shape[-1]
        self.taken = sorted({depth * (k + 1) // 4 for k in range(4)} - {0})    # numbered from 1
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in self.taken)
        self.head = nn.Sequential(
            nn.Conv2d(D * len(self.taken), width, 1), nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2), nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2), nn.GELU(),
            nn.Conv2d(width, classes, 1))

    def forward(self, imgs):
        outputs = []
        hooks = [self.encoder.blocks[number - 1].register_forward_hook(
            lambda module, inputs, tokens: outputs.append(tokens[:, 1:])) for number in self.taken]
        self.encoder(imgs)
        for hook in hooks:
            hook.remove()
        maps = torch.cat([norm(each) for norm, each in zip(self.norms, outputs)], -1)  # B N 4D
        maps = maps.mT.unflatten(2, self.encoder.grid)                                 # B 4D h w
        scores = self.head(maps)                                                       # B C 4h 4w
        return F.interpolate(scores.float(), imgs.shape[2:], mode="bilinear")


def target(mask, size, void):
    """The part of a mask H W that the network sees of its image of `size`. Void pixels become
    IGNORED."""
    seen = seen_part(mask, size)
    return seen.masked_fill(seen == void, IGNORED)


def shrink(mask, size):
    """A mask in another size, by the nearest pixel."""
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].to(mask.dtype)


def pixel_loss(scores, masks):
    """Cross-entropy of the pixels that have a class: scores B C H W, masks B H W. 0 if none has."""
    loss = F.cross_entropy(scores, masks, ignore_index=IGNORED, reduction="sum")
    return loss / (masks != IGNORED).sum().clamp(min=1)


def confusion(painted, truth, classes):
    """How many pixels were painted in the class of the row and are of that of the column: C C.
    IGNORED ones are not counted. painted, truth: integers of one shape."""
    known = truth != IGNORED
    cells = painted[known].long() * classes + truth[known]
    return cells.bincount(minlength=classes**2).view(classes, classes)


@torch.no_grad()
def evaluate_on(model, images, ids, classes, config, standardise, device):
    """The confusion matrix on the images at ids, counted in the pixels of their own masks."""
    model.eval()
    counts = torch.zeros(classes, classes, dtype=torch.long)
    for part in ids.split(config.batch_size):
        scores = model(standardise(read(images, part)).to(device))                     # b C H W
        for each, mask in zip(scores, masks_of(images, part)):
            truth = target(mask, images.size, config.void)
            painted = F.interpolate(each[None], truth.shape, mode="bilinear").argmax(1)[0]
            counts += confusion(painted.cpu(), truth, classes)
    model.train()
    return counts


def mean_of(ious):
    """{"miou": the mean over the classes that are there}; {} if none is."""
    return {} if ious.isnan().all() else {"miou": round(ious.nanmean().item(), 4)}


def masks_one_by_one(images):
    for index in range(len(images)):                       # all of them may be too large
        yield from masks_of(images, [index])


def number_of_classes(images, test_images, config):
    """1 + the highest number in the masks of both splits. Raises UsageError where it is none."""
    classes = max(classes_in(masks_one_by_one(each), config.void)
                  for each in (images, test_images))
    if classes > IGNORED:
        raise UsageError(f"--void {config.void}: the masks hold the number {IGNORED}, which can "
                         "only be that of pixels without a class; leave --void out, or number "
                         "the classes from 0")
    if classes < 2:
        raise UsageError(f"--void {config.void}: beside it the masks hold no number but 0; number "
                         "the classes from 0, and name with --void the number of pixels without "
                         "one")
    return classes


@torch.no_grad()
def draw(model, images, ids, config, standardise, device, path):
    """segmentations.png: images, their masks, and what the model paints. White: no class."""
    model.eval()
    imgs = read(images, ids)                                                           # b C H W
    painted = model(standardise(imgs).to(device)).argmax(1).cpu()                      # b H W
    truth = [shrink(target(mask, images.size, config.void), images.size)
             for mask in masks_of(images, ids)]

    def coloured(mask):
        picture = plt.get_cmap("tab20")(mask.numpy() % 20)[..., :3]                    # H W 3
        picture[mask.numpy() == IGNORED] = 1
        return picture

    draw_rows({"image": list((imgs.expand(-1, 3, -1, -1) / 255).permute(0, 2, 3, 1).numpy()),
               "mask": list(map(coloured, truth)), "painted": list(map(coloured, painted))}, path)


def main(argv=None):
    config, encoder, info = tuning.start(Config, "segment", __doc__.split("\n")[0], argv)
    device = choose_device(config.device)
    if config.data not in ("shapes", "imagefolder"):
        raise UsageError(f"--data {config.data}: has no masks; use shapes, or imagefolder with "
                         "pairs DIR/train/NAME.jpg, DIR/trainannot/NAME.png")
    images, ids, val_ids, test_images = tuning.split_images(config, encoder)
    for each in (images, test_images):
        check_pairs(each)
    classes = number_of_classes(images, test_images, config)
    masks = [shrink(target(mask, images.size, config.void), images.size)
             for mask in masks_one_by_one(images)]                     # kept in memory, uint8
    if all((mask == IGNORED).all() for mask in masks):
        raise UsageError(f"--void {config.void}: no pixel of the training masks has a class")
    mean, std = tuning.pixel_statistics(config, images, info)
    standardise, augment = tuning.standardise(mean, std), tuning.augment(config, images.size)
    torch.manual_seed(config.seed)
    model = Segmenter(encoder, classes).to(device)

    def loss_of(batch):
        imgs, truth = [], []
        for index, img in zip(batch.tolist(), read(images, batch)):
            img, mask = augment(tv_tensors.Image(img), tv_tensors.Mask(masks[index]))
            imgs.append(img)
            truth.append(mask)
        imgs = standardise(torch.stack(imgs)).to(device)                               # B C H W
        return pixel_loss(model(imgs), torch.stack(truth).long().to(device))

    def measure(images, ids):
        return overlaps(evaluate_on(model, images, ids, classes, config, standardise, device))

    def look():
        if len(val_ids) == 0:
            return {}
        return mean_of(measure(images, subset(val_ids, 500)))

    step = tuning.tune(config, encoder, model, images, ids, (mean, std), loss_of, look, device)
    everything = torch.arange(len(test_images))
    tuning.announce_test(everything)
    found = measure(test_images, everything)
    draw(model, test_images, subset(everything, 8), config, standardise, device,
         Path(config.out) / "segmentations.png")
    names = ["ground", *images.classes] if config.data == "shapes" else range(classes)
    tuning.finish(config, "segment", {
        "step": step, **mean_of(found),
        "iou": {str(name): None if each.isnan() else round(each.item(), 4)
                for name, each in zip(names, found)},
        "validation": look(), "images": len(ids), "test_images": len(test_images)})


if __name__ == "__main__":
    run_main(main)
