"""Sets in the format of COCO."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY_SIZE, record_of
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


def first(kind, **values):
    """A change of a file of annotations: other values in the first image, category or object."""
    return lambda content: content[kind][0].update(values)


@pytest.mark.parametrize("change, says", [
    (lambda content: content.pop("categories"), "no list of categories"),
    (lambda content: content.update(annotations={}), "no list of annotations"),
    (lambda content: content["images"].append(None), "image 41 is no {...}"),
    (first("images", id="1000"), "id of image 1 is '1000', not a whole"),
    (first("images", id=True), "id of image 1 is True, not a whole"),
    (lambda content: content["images"][0].pop("file_name"), "file_name of image 1 is None"),
    (first("images", file_name="1.png"), "2 images have one file_name"),
    (first("images", id=999), "2 images have one id, 999"),
    (first("categories", name=7), "name of category 1 is 7, not a name"),
    (first("categories", id=3), "2 categories have one id, 3"),
    (first("annotations", image_id=None), "image_id of object 1 is None"),
    (first("annotations", image_id=5), "is of image 5, which is not lis"),
    (first("annotations", category_id=8), "of category 8, which is not"),
    (first("annotations", category_id=3.5), "is 3.5, not a whole number"),
])
def test_each_field_has_a_type(coco, change, says):
    path = coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        read_coco(coco, "train")
    assert says in str(error.value) and str(path) in str(error.value)


def test_the_number_of_an_object_is_not_asked_for(coco):
    path = coco / "annotations" / "instances_train2017.json"
    content, (_, want, _) = json.loads(path.read_text()), read_coco(coco, "train")
    first("annotations", id=[])(content)
    path.write_text(json.dumps(content))
    assert torch.equal(read_coco(coco, "train")[1], want)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"images": ' + "[" * 100_000, "\xff\xfe"])
def test_what_is_no_json_is_one_line(coco, text):
    path = coco / "annotations" / "instances_train2017.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="--data-root: .*instances_train2017.json: ") as error:
        read_coco(coco, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_decoded_whatever_the_locale(coco, encoding):
    """Names of classes and of files; under a locale that knows 7 bits."""
    for split in ("train", "val"):
        path = coco / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = "Fußgänger"
        (coco / f"{split}2017" / "0.png").rename(coco / f"{split}2017" / "Straße.png")
        content["images"][0]["file_name"] = "Straße.png"
        path.write_text(json.dumps(content, ensure_ascii=False), encoding)
    program = ("import sys; from support.coco import read_coco; paths, _, names = read_coco("
               "sys.argv[1], 'train'); print(ascii(names), len(paths), paths[0].is_file())")
    found = subprocess.run([sys.executable, "-c", program, str(coco)], cwd=ROOT, text=True,
                           capture_output=True, env={**os.environ, "PYTHONUTF8": "0",
                                                     "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"})
    assert found.stdout == "['blue', 'Fu\\xdfg\\xe4nger', 'none'] 40 True\n", found.stderr


def test_names_that_occur_twice_and_folders_as_windows_writes_them(coco):
    path = coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "blue"
    (coco / "train2017" / "deep").mkdir()
    (coco / "train2017" / "0.png").rename(coco / "train2017" / "deep" / "0.png")
    content["images"][0]["file_name"] = "deep\\0.png"
    path.write_text(json.dumps(content))
    paths, _, names = read_coco(coco, "train")
    assert names == ["blue (3)", "blue (7)", "none"] and paths[0].parent.name == "deep"


def test_images_that_annotations_do_not_name_are_said(coco, capsys):
    shutil.copy(coco / "train2017" / "0.png", coco / "train2017" / "more.png")
    assert len(load_images("coco", coco, "train", 8)) == 40
    assert "1 images that the annotations do not name, such as more.png" in capsys.readouterr().err
