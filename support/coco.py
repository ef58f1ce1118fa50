"""The annotations of COCO, and of sets in its format: which classes of objects an image shows."""

import os
from collections import Counter
from pathlib import Path

import torch

from support.command_line import UsageError
from support.files import read_json

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
    content = read_content(path)
    categories = sorted(content["categories"], key=lambda each: each["id"])
    column = {each["id"]: i for i, each in enumerate(categories)}
    row = {each["id"]: i for i, each in enumerate(content["images"])}
    multilabel = torch.zeros(len(row), len(column), dtype=torch.uint8)
    places = [(row[each["image_id"]], column[each["category_id"]])
              for each in content["annotations"]]
    multilabel[tuple(torch.tensor(places, dtype=torch.long).view(-1, 2).T)] = 1
    folder = folder_of(path)
    # a name is UTF-8 on the disk too, whatever the locale; and Windows writes \ between folders
    paths = [folder / os.fsdecode(each["file_name"].replace("\\", "/").encode())
             for each in content["images"]]
    missing = [each for each in paths if not each.is_file()]
    if missing or not paths:
        raise UsageError(f"--data-root: {path} names {len(missing) or 'no'} images that are not "
                         f"there, such as {(missing or [folder])[0]}; put them into {folder}")
    several = Counter(each["name"] for each in categories)             # Roboflow writes such
    names = [each["name"] + f" ({each['id']})" * (several[each["name"]] > 1) for each in categories]
    return paths, multilabel, names


def folder_of(path):
    """Of a file of annotations: the folder of its images."""
    return path.parent.parent / path.stem.removeprefix("instances_")


def read_content(path):
    """What a file of annotations holds: lists of images, annotations and categories, whose numbers
    and names are in order. Raises UsageError where they are not."""
    def refuse(reason):
        raise UsageError(f"--data-root: {path} is not in the format of COCO ({reason}); mend it")

    try:
        content = read_json(path)
    except UsageError as error:
        raise UsageError(f"--data-root: {error}") from error
    known = {}
    for kind, one, text in (("images", "image", "file_name"), ("categories", "category", "name"),
                            ("annotations", "object", None)):
        if not isinstance(content.get(kind), list):
            refuse(f"it has no list of {kind}")
        for number, each in enumerate(content[kind], 1):
            if not isinstance(each, dict):
                refuse(f"{one} {number} is no {{...}}")
            for key in ("image_id", "category_id") if text is None else ("id",):
                if not is_whole(each.get(key)):
                    refuse(f"{key} of {one} {number} is {each.get(key)!r}, not a whole number")
            if text and not is_name(each.get(text)):
                refuse(f"{text} of {one} {number} is {each.get(text)!r}, not a name")
            if text is None and each["image_id"] not in known["images"]:
                refuse(f"object {number} is of image {each['image_id']}, which is not listed")
            if text is None and each["category_id"] not in known["categories"]:
                refuse(f"object {number} is of category {each['category_id']}, which is not listed")
        known[kind] = {each["id"] for each in content[kind]} if text else None
        for key in ("id", "file_name") if kind == "images" else ("id",) if text else ():
            value, times = Counter(each[key] for each in content[kind]).most_common(1)[0] if (
                content[kind]) else (None, 0)
            if times > 1:
                refuse(f"{times} {kind} have one {key}, {value}")
    return content


def is_whole(value):
    return type(value) is int and abs(value) < 2**63       # True is no number here


def is_name(value):
    """Text that can be written as UTF-8, and is not empty."""
    try:
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:
        return False
