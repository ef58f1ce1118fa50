"""Train an encoder to segment images, all of it, end to end: a class for each pixel.

    python -m extras.segment --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt
    python -m extras.segment --checkpoint FILE --data imagefolder --data-root STREETS --void 11

Masks are those of `shapes`, or of pairs of folders: DIR/train/NAME.jpg with DIR/trainannot/NAME.png
and DIR/test/NAME.jpg with DIR/testannot/NAME.png. Writes checkpoint.pt, metrics.jsonl, curves.png
and result.json into --out, and ends with a line of JSON: the mean over classes of the overlap of
painted and true pixels (mIoU, intersection over union). The same command continues a run that was
cut off. `eval.py patches` does the same with a frozen encoder and a linear layer.

The head sees the patch tokens of four blocks, evenly spread, as SETR's MLA head does (Zheng et al.
2021). Two transposed convolutions make their map four times as high and wide; the rest is bilinear
interpolation. Its width is not tuned.

Letters:  B images, N patches, h w rows and columns of patches, H W height and width of an image,
          D width of the encoder, C classes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from data import read
from extras import tuning
from features import CHUNK, subset
from utils.command_line import UsageError, option, run_main
from utils.devices import choose_device
from utils.masks import classes_in, masks_of

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

    def new_parts(self):
        """What is not of the encoder."""
        return nn.ModuleList([self.norms, self.head])


def centre(mask, size, void):
    """The part of a mask H W that the network sees of its image, the centre of the shape of `size`.
    Void pixels become IGNORED."""
    H, W = mask.shape
    scale = max(size[0] / H, size[1] / W)
    mask = TF.center_crop(mask, [min(H, round(size[0] / scale)), min(W, round(size[1] / scale))])
    return torch.where(mask == void, IGNORED, mask.long())


def shrink(mask, size):
    """A mask in another size, by the nearest pixel."""
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].long()


def pixel_loss(scores, masks):
    """Cross-entropy of the pixels that have a class: scores B C H W, masks B H W. 0 if none has."""
    loss = F.cross_entropy(scores, masks, ignore_index=IGNORED, reduction="sum")
    return loss / (masks != IGNORED).sum().clamp(min=1)


def confusion(predicted, truth, classes):
    """How many pixels of each class (rows) were painted in each class: C C. IGNORED ones are not
    counted. predicted, truth: integers of one shape."""
    known = truth != IGNORED
    cells = truth[known] * classes + predicted[known]
    return cells.bincount(minlength=classes**2).view(classes, classes)


def overlaps(counts):
    """Intersection over union of each class, C, from a confusion matrix; nan for a class that is
    not there."""
    hit, truth = counts.diag(), counts.sum(1)
    return torch.where(truth > 0, hit / (truth + counts.sum(0) - hit), math.nan)


@torch.no_grad()
def evaluate_on(model, images, ids, classes, config, standardise, device):
    """The confusion matrix on the images at ids, counted in the pixels of their own masks."""
    model.eval()
    counts = torch.zeros(classes, classes, dtype=torch.long)
    for part in ids.split(CHUNK):
        scores = model(standardise(read(images, part)).to(device))                     # b C H W
        for each, mask in zip(scores, masks_of(images, part)):
            truth = centre(mask, images.size, config.void)
            predicted = F.interpolate(each[None], truth.shape, mode="bilinear").argmax(1)[0]
            counts += confusion(predicted.cpu(), truth, classes)
    model.train()
    return counts


def main(argv=None):
    config, encoder, info = tuning.start(Config, "segment", __doc__.split("\n")[0], argv)
    device = choose_device(config.device)
    images, ids, val_ids, test_images = tuning.split_images(config, encoder)
    everything = torch.arange(len(test_images))
    masks = {split: masks_of(each, torch.arange(len(each)))
             for split, each in (("train", images), ("test", test_images))}
    classes = max(classes_in(each, config.void) for each in masks.values())
    if classes > IGNORED:
        raise UsageError(f"--void {config.void}: the masks hold the number {IGNORED}, which can "
                         "only be that of pixels without a class; leave --void out, or number "
                         "the classes from 0")
    if classes < 2:
        raise UsageError(f"--void {config.void}: beside it the masks hold no number but 0; number "
                         "the classes from 0, and name with --void the number of pixels without "
                         "one")
    seen = [centre(mask, images.size, config.void) for mask in masks["train"]]
    if all((mask == IGNORED).all() for mask in seen):
        raise UsageError(f"--void {config.void}: no pixel of the training masks has a class")
    small = [shrink(mask, images.size) for mask in seen]
    mean, std = tuning.pixel_statistics(config, images, info)
    torch.manual_seed(config.seed)
    model = Segmenter(encoder, classes).to(device)
    tuning.drop_paths(encoder, config.drop_path)
    groups = tuning.parameter_groups(encoder, model.new_parts(), config)
    standardise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    augment = v2.Compose([tuning.random_crop(config, images.size), v2.RandomHorizontalFlip()])

    def loss_of(batch):
        imgs, truth = [], []
        for index, img in zip(batch.tolist(), read(images, batch)):
            img, mask = augment(tv_tensors.Image(img), tv_tensors.Mask(small[index]))
            imgs.append(img)
            truth.append(mask)
        imgs = standardise(torch.stack(imgs)).to(device)
        return pixel_loss(model(imgs), torch.stack(truth).to(device))

    def measure(which, at):
        counts = evaluate_on(model, which, at, classes, config, standardise, device)
        return overlaps(counts)

    def evaluate():
        return {"miou": round(measure(images, subset(val_ids, 500)).nanmean().item(), 4)} if len(
            val_ids) else {}

    step = tuning.tune(config, model, groups, images, ids, loss_of, evaluate, device)
    found = measure(test_images, everything)
    names = ["ground", *images.classes] if config.data == "shapes" else range(classes)
    tuning.finish(config, "segment", {
        "step": step, "miou": round(found.nanmean().item(), 4),
        "iou": {str(name): None if each.isnan() else round(each.item(), 4)
                for name, each in zip(names, found)},
        "validation": evaluate().get("miou"), "images": len(ids), "test_images": len(test_images)})


if __name__ == "__main__":
    run_main(main)
