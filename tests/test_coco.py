"""Sets in the format of COCO."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TOY_SIZE, record_of
from PIL import Image

import train
from mae import SIZES
from support.coco import read_coco
from support.command_line import UsageError
from support.datasets import load_images


@pytest.fixture
def coco(tmp_path):
    """40 + 20 images: a red half if class 7 is there, a blue one if class 3 is. Numbers of images
    and classes are not those of rows and columns. Class 9 never occurs."""
    root, rng = tmp_path / "coco", np.random.default_rng(0)
    for split, count in (("train2017", 40), ("val2017", 20)):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            there = rng.integers(0, 2, 2)
            picture = rng.integers(0, 60, (20, 30, 3)).astype(np.uint8)
            picture[:10, :, 0] += np.uint8(150 * there[0])
            picture[10:, :, 2] += np.uint8(150 * there[1])
            Image.fromarray(picture).save(root / split / f"{i}.png")
            images.append({"id": 1000 - i, "file_name": f"{i}.png"})
            for category, each in zip((7, 3), there):      # an object, twice
                annotations += 2 * each * [{"image_id": 1000 - i, "category_id": category}]
        content = {"images": images, "annotations": annotations, "categories": [
            {"id": 7, "name": "red"}, {"id": 3, "name": "blue"}, {"id": 9, "name": "none"}]}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_classes_of_images(coco):
    paths, multilabel, names = read_coco(coco, "train")
    assert names == ["blue", "red", "none"] and multilabel.shape == (40, 3)
    for path, (blue, red, none) in zip(paths, multilabel.tolist()):
        picture = np.array(Image.open(path))
        assert red == (picture[:10, :, 0].mean() > 100)
        assert blue == (picture[10:, :, 2].mean() > 100) and none == 0
    images = load_images("coco", coco, "test", 16)
    assert len(images) == 20 and (images.y == -1).all() and images.pixels is not None
    assert images.targets["multilabel"].dtype == torch.uint8


@pytest.fixture
def run_on_coco(coco, tmp_path, no_pictures, monkeypatch):
    monkeypatch.setitem(SIZES, "micro", TOY_SIZE)
    train.main(["--data", "coco", "--data-root", str(coco), "--img-size", "16", "--patch-size", "4",
                "--batch-size", "16", "--image-clusters", "4", "--patch-clusters", "16", "--epochs",
                "1", "--device", "cpu", "--out", str(tmp_path / "run")])
    return tmp_path / "run" / "checkpoint.pt"


def test_training_and_multilabel_on_coco(run_on_coco, capsys):
    record = record_of(capsys, "multilabel", "--checkpoint", run_on_coco)
    assert record["images"]["all"] == 40 and record["test_images"] == 20
    assert record["map"]["all"] > record["guessing"] + 0.2             # halves: easy
    assert record["classes"]["none"] is None               # no image has it: left out of the mean
    with pytest.raises(UsageError, match="do not have one class; use the task multilabel"):
        record_of(capsys, "knn", "--checkpoint", run_on_coco)


def test_one_file_of_annotations_is_trained_on(run_on_coco, coco, capsys):
    (coco / "annotations" / "instances_train2017.json").unlink()
    multilabel = ["multilabel", "--checkpoint", run_on_coco, "--data-root", coco]
    with pytest.raises(UsageError, match="is all there is.*--split validation"):
        record_of(capsys, *multilabel)
    record = record_of(capsys, *multilabel, "--split", "validation")
    assert record["images"]["1"] == 2                      # classes that occur


def test_other_classes_to_test_on_are_refused(run_on_coco, coco, capsys):
    """Columns of both splits would not mean the same."""
    path = coco / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for categories, words in (
            ([*content["categories"], {"id": 11, "name": "more"}], "no training images of.*more"),
            ([{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}, {"id": 9, "name": "none"}],
             "not in the same order")):
        path.write_text(json.dumps(content | {"categories": categories}))
        with pytest.raises(UsageError, match=words):
            record_of(capsys, "multilabel", "--checkpoint", run_on_coco)


def test_broken_sets_are_refused(coco, tmp_path):
    with pytest.raises(UsageError, match="holds no annotations/instances"):
        read_coco(tmp_path / "nothing", "train")
    shutil.rmtree(coco / "val2017")
    with pytest.raises(UsageError, match="names 20 images that are not there"):
        read_coco(coco, "test")
    shutil.copy(coco / "annotations" / "instances_train2017.json",
                coco / "annotations" / "instances_train2014.json")
    with pytest.raises(UsageError, match="train2014.json and .*train2017.json are of one split"):
        read_coco(coco, "train")
    (coco / "annotations" / "instances_train2014.json").unlink()
    (coco / "annotations" / "instances_train2017.json").write_text('{"images": []}')
    with pytest.raises(UsageError, match="is not in the format of COCO"):
        read_coco(coco, "train")
