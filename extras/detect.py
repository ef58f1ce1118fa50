"""Train an encoder to detect objects: class, box and mask of each. All of it, end to end.

    pip install pycocotools
    python -m extras.detect --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt
    python -m extras.detect --checkpoint FILE --data coco --data-root COCO --img-size 256

Objects are those of `shapes`, or of a set in the format of COCO (see `support/coco.py`). Writes
checkpoint.pt, config.json, metrics.jsonl, curves.png, detections.png and result.json into --out,
and ends with a line of JSON: average precision (AP) of boxes and of masks, as pycocotools computes
it, on the test split; where a set has one file of annotations, on the images held out. The same
command continues a run that was cut off.

The detector is torchvision's Mask R-CNN (He et al. 2017). It wants maps of several resolutions, and
a plain ViT has one: a simple feature pyramid makes four of it (ViTDet, Li et al. 2022). Images keep
their shape: the longer side becomes that of the network, and the rest is filled up.

Where a set has one file of annotations, and no classes, pretraining on it has seen the images held
out as well, though not their objects.

Letters:  B images, h w rows and columns of patches, H W height and width of an image, D width of
          the encoder, n objects of an image.
"""

import io
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python extras/detect.py`

from extras import tuning
from support.coco import annotation_files, annotations_file, is_whole, read_content
from support.command_line import UsageError, option, run_main
from support.devices import choose_device
from support.images import open_image, upright_size
from support.pictures import plt, save
from support.probes import subset

try:
    from pycocotools import mask as run_lengths
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    COCO = None


@dataclass
class Config(tuning.Config):
    width: int = option(32, "channels of the pyramid and of the heads (not tuned; ViTDet: 256)",
                        range=(8, 1024))


# ------------------------------------------------------------------------- images and their objects

class Scenes:
    """The images of a split at their own size, and their objects: `coco`, a COCO of pycocotools,
    whose images come in the same order."""

    def __init__(self, images, config, split):
        self.images, self.coco = images, COCO()
        self.coco.dataset = shapes_as_coco(images) if config.data == "shapes" else read_objects(
            annotations_file(config.data_root, split))
        # From 1 on: pycocotools takes an object of number 0 for none.
        for number, each in enumerate(self.coco.dataset["annotations"], 1):
            each["id"] = number
        with redirect_stdout(io.StringIO()):               # pycocotools prints
            self.coco.createIndex()
        self.keys = [each["id"] for each in self.coco.dataset["images"]]
        if images.paths is not None:
            # images to test on are decoded now: a broken one would be an error after the training
            check_sizes(images.paths, self.coco.dataset["images"], upright_size if (
                split == "train") else lambda path: open_image(path, images.channels).size)
        # Number 0 is the ground; COCO's own numbers have gaps.
        self.number = {key: 1 + i for i, key in enumerate(sorted(self.coco.cats))}

    def categories(self):
        """{number in the file: name}"""
        return {key: each["name"] for key, each in self.coco.cats.items()}

    def read(self, index):
        """C H W uint8."""
        if self.images.paths is None:
            return self.images.pixels[index]
        return TF.pil_to_tensor(open_image(self.images.paths[index], self.images.channels))

    def objects(self, index):
        """Masks n H W uint8 and classes n of an image; crowds are left out."""
        key = self.keys[index]
        found = [each for each in self.coco.imgToAnns[key] if not each["iscrowd"]]
        masks = [torch.from_numpy(self.coco.annToMask(each)) for each in found]
        size = self.coco.imgs[key]["height"], self.coco.imgs[key]["width"]
        classes = torch.tensor([self.number[each["category_id"]] for each in found],
                               dtype=torch.long)
        return torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8), classes


def shapes_as_coco(images):
    """The objects of `shapes` in the format of COCO, as far as they are to be seen."""
    annotations = []
    for index, (owners, boxes) in enumerate(zip(images.targets["owners"].numpy(),
                                                images.targets["boxes"].tolist())):
        for number, (left, top, right, bottom, kind) in enumerate(boxes, 1):
            if kind >= 0:
                mask = owners == number                    # H W
                annotations.append({
                    "image_id": index, "category_id": kind, "segmentation": encode(mask),
                    "bbox": [left, top, right - left, bottom - top], "area": int(mask.sum()),
                    "iscrowd": 0})
    height, width = images.targets["owners"].shape[1:]
    return {"images": [{"id": index, "height": height, "width": width}
                       for index in range(len(images))],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(images.classes)]}


def encode(mask):
    """A mask H W of numpy as COCO writes it, the lengths of runs of equal pixels."""
    return run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))


def check_sizes(paths, entries, size_of):
    """Raises UsageError for an image of another size than its annotations are of."""
    with ThreadPoolExecutor() as threads:
        for path, each, size in zip(paths, entries, threads.map(size_of, paths)):
            if size != (each["width"], each["height"]):
                raise UsageError(f"--data-root: {path} has {size[0]} x {size[1]} pixels, its "
                                 f"annotations are of {each['width']} x {each['height']}; make "
                                 "them alike")


def read_objects(path):
    """A file of annotations. Raises UsageError where objects lack what detection needs."""
    content = read_content(path)
    images = {each["id"]: each for each in content["images"]}
    for each in images.values():
        if not all(is_whole(each.get(key)) and 0 < each[key] < 2**16 for key in SIZE):
            raise UsageError(f"--data-root: {path} has no height and width of the image "
                             f"{each['file_name']}; add them, in whole pixels")
    for number, each in enumerate(content["annotations"], 1):
        image = images[each["image_id"]]
        wrong = what_is_wrong(each, [image[key] for key in SIZE])
        if wrong:
            raise UsageError(f"--data-root: {path}, object {number} (of {image['file_name']}): "
                             f"{wrong}; mend or remove it")
    return content


SIZE = ("height", "width")


def what_is_wrong(annotation, size):
    """A few words, or None. size: [height, width] of the image."""
    mask, box, area = (annotation.get(key) for key in ("segmentation", "bbox", "area"))
    if not are_numbers(box) or len(box) != 4 or not {"area", "iscrowd"} <= annotation.keys():
        return "detection needs bbox (four numbers), segmentation, area and iscrowd"
    if min(box[2:]) < 0:
        return "width or height of the bbox (left, top, width, height) is negative"
    if not are_numbers([area]) or area < 0:
        return f"the area is {area!r}, not a number from 0 on"
    if annotation["iscrowd"] not in (0, 1):
        return f"iscrowd is {annotation['iscrowd']!r}, not 0 or 1"
    if isinstance(mask, dict):                             # lengths of runs of equal pixels
        runs = mask.get("counts")
        runs = decoded(runs) if isinstance(runs, str) else runs
        if not isinstance(runs, list) or not all(is_whole(n) and n >= 0 for n in runs):
            return "the counts of the segmentation are no lengths of runs"
        if mask.get("size") != size or sum(runs) != size[0] * size[1]:
            return f"the mask is not of the {size[1]} x {size[0]} pixels of its image"
    elif not isinstance(mask, list) or not mask or any(
            not are_numbers(corners) or len(corners) < 6 or len(corners) % 2 for corners in mask):
        return "the segmentation is no list of polygons of three corners or more"
    elif any(not -size[1] <= x <= 2 * size[1] or not -size[0] <= y <= 2 * size[0]
             for corners in mask for x, y in zip(corners[::2], corners[1::2])):
        return "a corner of the segmentation lies far outside of the image"
    return None


def are_numbers(values):
    return isinstance(values, list) and all(
        type(each) in (int, float) and math.isfinite(each) for each in values)


def decoded(text):
    """The lengths of runs that COCO writes as text, None where it is none. A character is a number
    of 5 bits and a sixth that says whether more follow; from the third run on it is the difference
    from the one before the last. (pycocotools reads on past the end of a text that was cut off.)"""
    runs, value, place = [], 0, 0
    for each in text:
        bits = ord(each) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << place
        place += 5
        if not bits & 32:
            value -= (bits & 16 > 0) << place              # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = place = 0
    return None if place else runs


def targets(masks, classes):
    """Masks n H W and classes n -> what Mask R-CNN learns: boxes, labels, masks of the objects that
    have a pixel."""
    there = (masks > 0).flatten(1).any(1)
    masks, classes = masks[there], classes[there]
    boxes = masks_to_boxes(masks)                          # left, top, right, bottom: first, last
    boxes[:, 2:] += 1                                      # pixel, so that one pixel is 1 wide
    return {"boxes": boxes.float(), "labels": classes, "masks": masks}


def jitter(config, side, mean):
    """Image and masks shrunk or magnified, a part of `side` x `side` of that (filled up with the
    mean colour where it is smaller), and a flip. ViTDet's augmentation, less strong."""
    strongest = config.crop ** -0.5                        # an area of 1 / 4 is a scale of 2
    fill = {tv_tensors.Image: [255 * each for each in mean], tv_tensors.Mask: 0}
    return v2.Compose([v2.ScaleJitter((side, side), (1 / strongest, strongest)),
                       v2.RandomCrop((side, side), pad_if_needed=True, fill=fill),
                       v2.RandomHorizontalFlip()])


# --------------------------------------------------------------------------------------- the model

class Pyramid(nn.Module):
    """ViTDet's simple feature pyramid: B C H W -> {name: map B width rows columns}.

    The map of the patch tokens is made four times and twice as fine, left alone, and made half as
    fine. ViTDet draws all four from the last block, as what lies below has no finer map either."""

    def __init__(self, encoder, width):
        super().__init__()
        D = encoder.cls_token.shape[-1]
        self.encoder, self.out_channels = encoder, width

        def finer(channels):
            return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)

        ways = [(nn.Sequential(finer(D), LayerNorm2d(D // 2), nn.GELU(), finer(D // 2)), D // 4),
                (finer(D), D // 2), (nn.Identity(), D), (nn.MaxPool2d(2), D)]
        self.levels = nn.ModuleList(
            nn.Sequential(way, nn.Conv2d(channels, width, 1), LayerNorm2d(width),
                          nn.Conv2d(width, width, 3, padding=1), LayerNorm2d(width))
            for way, channels in ways)

    def forward(self, imgs):
        tokens = self.encoder(imgs)[:, 1:]                                             # B N D
        patches = tokens.mT.unflatten(2, self.encoder.grid)                            # B D h w
        return {str(i): level(patches).float() for i, level in enumerate(self.levels)}


class Fit(GeneralizedRCNNTransform):
    """Resizes an image so that its longer side is that of the network. torchvision's own shrinks
    without a filter: images with edges such as training never shows."""

    def resize(self, image, target=None):
        scale = self.max_size / max(image.shape[1:])
        size = [max(1, round(scale * length)) for length in image.shape[1:]]
        return TF.resize(image, size, antialias=True), target          # training crops have it


def detector(encoder, classes, width, mean, std):
    """Mask R-CNN on the pyramid. In training: images, targets -> {name: loss}; else images, a list
    of C H W in 0..1 of any size -> for each boxes, labels, scores, masks. classes: with the ground.

    Numbers of proposals and widths of heads are smaller than torchvision's, for small images."""
    side, patch = encoder.img_size[0], encoder.patch_size[0]
    strides = [patch // 4, patch // 2, patch, 2 * patch]   # of the four maps, in pixels
    model = MaskRCNN(
        Pyramid(encoder, width),
        rpn_anchor_generator=AnchorGenerator(
            sizes=tuple((4 * stride,) for stride in strides), aspect_ratios=((0.5, 1, 2),) * 4),
        rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=64, box_batch_size_per_image=32,
        box_head=TwoMLPHead(width * 7 * 7, 4 * width),
        box_predictor=FastRCNNPredictor(4 * width, classes),
        mask_head=MaskRCNNHeads(width, (width,) * 2, 1),
        mask_predictor=MaskRCNNPredictor(width, width, classes))
    model.transform = Fit(side, side, mean, std, size_divisible=side)
    return model


def check_geometry(encoder):
    """Raises UsageError where torchvision would place anchors wrongly: it takes the four maps to be
    a whole number of pixels apart, a power of two, the same in height and width."""
    (H, W), (ph, pw), (rows, _) = encoder.img_size, encoder.patch_size, encoder.grid
    if H != W:
        raise UsageError(f"--img-size {H}x{W}: detection takes square ones; images of other shapes "
                         "are filled up")
    if ph != pw or ph < 4 or ph & (ph - 1):
        raise UsageError(f"--checkpoint: detection takes square patches of 4, 8, 16, ... pixels; "
                         f"these have {ph} x {pw}; start from another one")
    if rows % 2:
        raise UsageError(f"--img-size {H}: must hold an even number of patches of {ph} pixels; use "
                         f"{H + ph}")


# --------------------------------------------------------------------------------------- the scores

@torch.no_grad()
def detections(model, scenes, ids, batch_size, device):
    """What the model finds in the images at ids, as COCO writes results: a list."""
    model.eval()
    key_of = {number: key for key, number in scenes.number.items()}
    found = []
    for part in ids.split(batch_size):
        imgs = [scenes.read(index).to(device) / 255 for index in part.tolist()]
        for index, each in zip(part.tolist(), model(imgs)):
            for box, number, score, mask in zip(
                    each["boxes"].tolist(), each["labels"].tolist(), each["scores"].tolist(),
                    each["masks"][:, 0].cpu().numpy() > 0.5):
                left, top, right, bottom = box
                found.append({
                    "image_id": scenes.keys[index], "category_id": key_of[number], "score": score,
                    "bbox": [left, top, right - left, bottom - top], "segmentation": encode(mask)})
    model.train()
    return found


def average_precision(scenes, found, ids):
    """AP of boxes and of masks: mean over classes and over overlaps (IoU) of 0.5, 0.55, ..., 0.95
    that count as found; and AP at 0.5. None where the images hold no object."""
    keys = [scenes.keys[index] for index in ids.tolist()]
    scores = {}
    with redirect_stdout(io.StringIO()):                   # pycocotools prints its tables
        results = scenes.coco.loadRes(found) if found else COCO()
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            judge = COCOeval(scenes.coco, results, kind)
            judge.params.imgIds = keys
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            for suffix, value in (("", judge.stats[0]), ("50", judge.stats[1])):
                scores[f"{name}_ap{suffix}"] = None if value < 0 else round(float(value), 4)
    return scores


def draw(scenes, found, ids, path, most=8, certain=0.5):
    """detections.png: a few images with their objects, and below what was found with a score of at
    least `certain`."""
    ids = subset(ids, most).tolist()
    figure, axes = plt.subplots(2, len(ids), figsize=(2 * len(ids), 4.4), squeeze=False,
                                layout="constrained")
    for (truth, below), index in zip(axes.T, ids):
        image, key = scenes.read(index), scenes.keys[index]
        shown = [each for each in found if each["image_id"] == key and each["score"] >= certain]
        for axis, objects in ((truth, scenes.coco.imgToAnns[key]), (below, shown)):
            axis.imshow(image.expand(3, -1, -1).permute(1, 2, 0))
            axis.axis("off")
            for each in objects:
                left, top, width, height = each["bbox"]
                colour = f"C{scenes.number[each['category_id']] % 10}"
                axis.add_patch(plt.Rectangle((left - 0.5, top - 0.5), width, height, fill=False,
                                             color=colour))
                axis.contour(scenes.coco.annToMask({**each, "image_id": key}), [0.5],
                             colors=colour, linewidths=0.8)
                axis.text(left, top, scenes.coco.cats[each["category_id"]]["name"], fontsize=7,
                          color="white", bbox=dict(color=colour, pad=1))
    axes[0, 0].set_title("objects", loc="left")
    axes[1, 0].set_title(f"found (score {certain} or more)", loc="left")
    save(figure, path)


# -------------------------------------------------------------------------------------- the command

def main(argv=None):
    if COCO is None:
        raise UsageError("detection needs pycocotools: pip install pycocotools")
    config, encoder, info = tuning.start(Config, "detect", __doc__.split("\n")[0], argv)
    device = choose_device(config.device)
    if config.data not in ("shapes", "coco"):
        raise UsageError(f"--data {config.data}: has no boxes; use shapes, or coco for sets in its "
                         "format")
    check_geometry(encoder)
    lone = config.data == "coco" and len(annotation_files(config.data_root)) == 1
    test = "train" if lone else "test"                     # the split that is judged
    images, ids, val_ids, test_images = tuning.split_images(config, encoder, test=test,
                                                            resident_gb=0)
    test_ids = val_ids if lone else torch.arange(len(test_images))
    if len(test_ids) == 0:
        raise UsageError(f"--val-fraction {config.val_fraction}: holds no image out, and the set "
                         "has no others to test on; raise it")
    scenes = Scenes(images, config, "train")
    test_scenes = scenes if lone else Scenes(test_images, config, test)
    if scenes.categories() != test_scenes.categories():
        raise UsageError(f"--data-root {config.data_root}: the files of annotations of the two "
                         "splits have other categories; make their numbers and names alike")
    mean, std = tuning.pixel_statistics(config, images, info)
    augment = jitter(config, encoder.img_size[0], mean)
    torch.manual_seed(config.seed)
    model = detector(encoder, 1 + len(scenes.number), config.width, mean, std).to(device)
    for part in (model.rpn, model.roi_heads):              # bf16 would round places to whole pixels
        part.forward = torch.autocast(device.type, enabled=False)(part.forward)

    def loss_of(batch):
        imgs, wanted = [], []
        for index in batch.tolist():
            masks, classes = scenes.objects(index)
            img, masks = augment(tv_tensors.Image(scenes.read(index)), tv_tensors.Mask(masks))
            imgs.append(img.as_subclass(torch.Tensor).to(device) / 255)
            wanted.append({name: each.to(device) for name, each in
                           targets(masks.as_subclass(torch.Tensor), classes).items()})
        return sum(model(imgs, wanted).values())

    def measure(scenes, ids):
        found = detections(model, scenes, ids, config.batch_size, device)
        return found, average_precision(scenes, found, ids)

    def look():
        scores = measure(scenes, subset(val_ids, 200))[1] if len(val_ids) else {}
        return {name: each for name, each in scores.items() if each is not None}

    step = tuning.tune(config, encoder, model, images, ids, (mean, std), loss_of, look, device)
    tuning.announce_test(test_ids)
    found, scores = measure(test_scenes, test_ids)
    draw(test_scenes, found, test_ids, Path(config.out) / "detections.png")
    tuning.finish(config, "detect", {
        "step": step, **scores, "split": "validation" if lone else "test", "validation": look(),
        "images": len(ids), "test_images": len(test_ids)})


if __name__ == "__main__":
    run_main(main)
