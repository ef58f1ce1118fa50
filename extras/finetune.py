"""Fine-tune an encoder to classify, all of it, end to end.

    python -m extras.finetune --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt
    python -m extras.finetune --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt --from-scratch

Writes checkpoint.pt, config.json, metrics.jsonl, curves.png and result.json into --out, and ends
with a line of JSON: accuracy on the test split (top-1), of the weights at the end of the run. The
same command continues a run that was cut off.

The recipe is near that of MAE's fine-tuning (He et al. 2022): layer-wise learning rates, drop path,
label smoothing. It has no RandAugment and no random erasing, and crops are larger. Each batch gets
either MixUp (Zhang et al. 2018), which blends two images and their classes, or CutMix (Yun et al.
2019), which pastes a part of one into the other.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python extras/finetune.py`

from data import crop_boxes, crop_flip
from extras import tuning
from support.command_line import option, run_main
from support.datasets import read, require_the_same_classes
from support.devices import choose_device


@dataclass
class Config(tuning.Config):
    token: str = option("mean", "what is classified: the mean of the patch tokens, or the class "
                        "token", choices=["class", "mean"])
    label_smoothing: float = option(
        0.1, "share of a target that is spread over all classes (MAE)", range=(0, 0.9))
    mixup: float = option(
        0.8, "of MixUp: the parameter of its Beta distribution; 0 turns it off (MAE)",
        range=(0, 100))
    cutmix: float = option(1.0, "of CutMix, likewise (MAE)", range=(0, 100))


class Classifier(nn.Module):
    """An encoder and a linear layer: B C H W -> B classes."""

    def __init__(self, encoder, classes, token):
        super().__init__()
        self.encoder, self.token = encoder, token
        self.head = nn.Linear(encoder.cls_token.shape[-1], classes)
        nn.init.normal_(self.head.weight, std=2e-5)                    # as in MAE: starts undecided
        nn.init.zeros_(self.head.bias)

    def forward(self, imgs):
        tokens = self.encoder(imgs)                                    # B 1+N D
        return self.head(tokens[:, 0] if self.token == "class" else tokens[:, 1:].mean(1))


def mixing(config, classes):
    """MixUp or CutMix, whichever is on, one of them for each batch; None if both are off."""
    ways = [make(alpha=alpha, num_classes=classes)
            for make, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    return v2.RandomChoice(ways) if ways else None


@torch.no_grad()
def accuracy(model, images, ids, config, standardise, device):
    """Share of the images at ids, of those of known class, that are put into it."""
    model.eval()
    right = 0
    ids = ids[images.y[ids] >= 0]
    for part in ids.split(config.batch_size):
        scores = model(standardise(read(images, part)).to(device))
        right += (scores.argmax(1).cpu() == images.y[part]).sum().item()
    model.train()
    return round(right / len(ids), 4)


def main(argv=None):
    config, encoder, info = tuning.start(Config, "finetune", __doc__.split("\n")[0], argv)
    device = choose_device(config.device)
    images, ids, val_ids, test_images = tuning.split_images(config, encoder, classified=True)
    classes = len(images.classes)
    require_the_same_classes(config.data_root, images, test_images)
    mean, std = tuning.pixel_statistics(config, images, info)
    standardise = tuning.standardise(mean, std)
    mix = mixing(config, classes)
    torch.manual_seed(config.seed)
    model = Classifier(encoder, classes, config.token).to(device)

    def loss_of(batch):
        boxes = crop_boxes(torch.rand(len(batch), 4), *images.size, images.size, config.crop)
        flip = torch.rand(len(batch)) < 0.5
        imgs, y = read(images, batch).to(device).float() / 255, images.y[batch].to(device)
        imgs = standardise(crop_flip(imgs, boxes.to(device), flip.to(device), images.size))
        if mix:
            imgs, y = mix(imgs, y)                                             # y B classes
        return F.cross_entropy(model(imgs), y, label_smoothing=config.label_smoothing)

    def measure(images, ids):
        return {"top1": accuracy(model, images, ids, config, standardise, device)}

    def look():
        return measure(images, val_ids) if len(val_ids) else {}

    step = tuning.tune(config, encoder, model, images, ids, (mean, std), loss_of, look, device)
    everything = torch.arange(len(test_images))
    tuning.announce_test(everything)
    tuning.finish(config, "finetune", {
        "step": step, **measure(test_images, everything), "validation": look(),
        "images": len(ids), "test_images": len(test_images), "token": config.token})


if __name__ == "__main__":
    run_main(main)
