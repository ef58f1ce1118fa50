"""The annotations of COCO, and of sets in its format: which classes of objects an image shows."""

import json
from pathlib import Path

import torch

from support.command_line import UsageError

SPLITS = {"train": "train", "test": "val"}     # COCO keeps the answers to its own test split


def read_coco(root, split):
    """Of a split: paths of the images, classes in each (n C of 0 and 1, uint8), names of the
    classes. Objects that are marked as crowds count."""
    return read_annotations(annotations_file(root, split))


def annotations_file(root, split):
    """The path of the annotations of a split. Raises UsageError where there are none.

    ROOT/annotations/instances_NAME.json belongs to the images ROOT/NAME/*; NAME begins with `train`
    or `val`, as in val2017. Where there is one such file, it is the one to train on."""
    files = annotation_files(root)
    found = [path for path in files
             if path.stem.removeprefix("instances_").startswith(SPLITS[split])]
    if len(files) == 1 and split == "train":
        found = files
    if len(files) == 1 and split == "test":
        raise UsageError(f"--data-root {root}: {files[0].name} is all there is, and it is trained "
                         "on; eval.py tests on a part of it with --split validation")
    if not found:
        raise UsageError(f"--data-root {root}: holds no annotations/instances_{SPLITS[split]}*"
                         ".json; give one file of annotations this name")
    if len(found) > 1:
        raise UsageError(f"--data-root {root}: {' and '.join(each.name for each in found)} are of "
                         "one split; keep one of them in the folder annotations")
    return found[0]


def annotation_files(root):
    """Those of all splits. Raises UsageError if there is none."""
    files = sorted(Path(root).glob("annotations/instances_*.json"))
    if not files:
        raise UsageError(f"--data-root {root}: holds no annotations/instances_*.json; name the "
                         "folder of a set in the format of COCO")
    return files


def read_annotations(path):
    try:
        content = json.loads(path.read_text())
        categories = sorted(content["categories"], key=lambda each: each["id"])
        column = {each["id"]: i for i, each in enumerate(categories)}
        row = {each["id"]: i for i, each in enumerate(content["images"])}
        if len(row) < len(content["images"]):
            raise ValueError("two images have one id")
        multilabel = torch.zeros(len(row), len(column), dtype=torch.uint8)
        places = [(row[each["image_id"]], column[each["category_id"]])
                  for each in content["annotations"]]
        multilabel[tuple(torch.tensor(places, dtype=torch.long).view(-1, 2).T)] = 1
        folder = path.parent.parent / path.stem.removeprefix("instances_")
        paths = [folder / each["file_name"] for each in content["images"]]
        names = [each["name"] for each in categories]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--data-root: {path} is not in the format of COCO "
                         f"({type(error).__name__}: {error}); mend it") from error
    missing = [each for each in paths if not each.is_file()]
    if missing or not paths:
        raise UsageError(f"--data-root: {path} names {len(missing) or 'no'} images that are not "
                         f"there, such as {(missing or [folder])[0]}; put them into {folder}")
    return paths, multilabel, names
