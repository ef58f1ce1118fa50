"""A walk over a folder accounts for every entry; classes are what they are taken for."""

import os
import shutil
import unicodedata

import pytest
import torch
from conftest import run
from PIL import Image

from support import datasets, images
from support.command_line import UsageError
from support.datasets import load_images, walk


def put(*paths, colour=0):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (colour, 60, 60)).save(path)


def two_classes(root):
    for split in ("train", "test"):
        for name in "ab":
            put(*(root / split / name / f"{i}.png" for i in range(3)), colour=200 * (name == "b"))
    return root


def train_images(root, capsys, split="train"):
    """What is loaded, and what is said."""
    capsys.readouterr()
    return load_images("imagefolder", root, split, 8), capsys.readouterr().err


# ------------------------------------------------------------------------------------- the account

def test_an_ordinary_folder_says_nothing(tmp_path, capsys):
    found, said = train_images(two_classes(tmp_path), capsys)
    assert (len(found), said) == (6, "")


def test_links_to_folders_and_files_are_followed_once(tmp_path, capsys):
    root = two_classes(tmp_path / "set")
    put(*(tmp_path / "store" / f"{i}.png" for i in range(4)))
    (root / "train" / "c").symlink_to(tmp_path / "store")                  # a class that is a link
    (root / "train" / "b" / "more").symlink_to(tmp_path / "store")         # a second time
    (root / "train" / "a" / "up").symlink_to(root)                         # would never end
    (root / "train" / "a" / "here").symlink_to(root / "train" / "a")
    (root / "train" / "b" / "0 again.png").symlink_to(root / "train" / "b" / "0.png")
    (root / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "train" / "a" / "self").symlink_to("self")
    put(tmp_path / "elsewhere.png")
    (root / "train" / "a" / "x.png").symlink_to(tmp_path / "elsewhere.png")
    found, said = train_images(root, capsys)
    assert found.classes == ["a", "b", "c"] and found.y.bincount().tolist() == [4, 3, 4]
    assert len(found) == 6 + 4 + 1 and said.count("left out are") == 1
    assert "2 links that lead nowhere, such as a/gone.png" in said
    assert "3 links to folders that are read already" in said
    assert "1 links to files that are read already, such as b/0 again.png" in said


def test_all_classes_may_be_links(tmp_path, capsys):
    store = two_classes(tmp_path / "store")
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for name in "ab":
            (tmp_path / "set" / split / name).symlink_to(store / split / name)
    found, said = train_images(tmp_path / "set", capsys)
    assert found.y.tolist() == [0] * 3 + [1] * 3 and said == ""


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "WEBP", "PNG", "JPEG", "TGA", "ICO",
                                  "JPEG2000", "AVIF", "QOI", "DDS", "PCX", "SGI"])
def test_each_suffix_that_pillow_decodes_is_an_image(kind, tmp_path):
    Image.init()
    if kind not in Image.OPEN:
        pytest.skip("not in this Pillow")
    mine = [each for each, of in Image.registered_extensions().items() if of == kind]
    for suffix in (mine[0], mine[-1].upper()):
        Image.new("RGB", (32, 32), (200, 0, 0)).save(tmp_path / f"{suffix[1:]}{suffix}", kind)
    found = load_images("imagefolder", tmp_path, "train", 8)
    assert len(found) == len({mine[0], mine[-1].upper()}) and (found.pixels[:, 0] > 150).all()


def test_what_pillow_does_not_decode_is_no_image():
    known = images.suffixes()
    assert {".jpg", ".jfif", ".png", ".gif", ".tif", ".webp", ".bmp"} <= known
    assert not known & {".pdf", ".mpg", ".eps", ".h5", ".hdf", ".wmf", ".txt", ""}
    assert known <= set(Image.registered_extensions())


def test_other_files_are_counted_by_suffix(tmp_path, capsys):
    root = two_classes(tmp_path)
    for name in ("a/1.heic", "a/2.HEIC", "labels.csv", "a/README"):
        (root / "train" / name).write_text("text")
    (root / "notes.txt").write_text("text")
    (root / "unlabelled").mkdir()
    found, said = train_images(root, capsys)
    assert len(found) == 6 and len(said.splitlines()) == 1
    for words in ("2 files .heic, such as a/1.heic", "1 files .csv", "1 files without a suffix",
                  "beside it: notes.txt, unlabelled"):
        assert words in said


@pytest.mark.parametrize("name", ["._0.png", ".DS_Store", ".ipynb_checkpoints/0.png",
                                  "__MACOSX/0.png", "Thumbs.db", "desktop.ini"])
@pytest.mark.parametrize("place", ["train", "train/a"])
def test_hidden_names_are_no_images_and_no_classes(name, place, tmp_path, capsys):
    root = two_classes(tmp_path / ".cache" / "set")        # above the folder dots say nothing
    path = root / place / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes.fromhex("00051607"))
    found, said = train_images(root, capsys)
    assert found.classes == ["a", "b"] and len(found) == 6 and "1 hidden, such as" in said


def test_no_file_is_opened_that_is_none(tmp_path, capsys):
    root = two_classes(tmp_path)
    os.mkfifo(root / "train" / "a" / "pipe.png")           # reading it would never end
    put(root / "train" / "a" / "folder.png" / "1.png")     # a folder with the name of an image
    found, said = train_images(root, capsys)
    assert len(found) == 7 and "1 no files and no folders, such as a/pipe.png" in said


def test_files_without_content_and_broken_ones_are_all_named(tmp_path):
    root = two_classes(tmp_path)
    for name in "01":
        (root / "train" / "a" / f"{name}.png").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match=r"a/0.png cannot be decoded .* 1 others .*: .*a/1.png"):
        load_images("imagefolder", root, "train", 8)
    for name in "01":
        (root / "train" / "a" / f"{name}.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"2 images are files of 0 bytes, such as .*a/1.png"):
        load_images("imagefolder", root, "train", 8)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root, scandir = two_classes(tmp_path), os.scandir

    def refuse(path):
        if path == root / "train" / "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="train/b cannot be read .Permission denied"):
        load_images("imagefolder", root, "train", 8)


def test_the_order_is_that_of_paths(tmp_path):
    put(*(tmp_path / name for name in ("b/2.png", "b/10.png", "a.png", "b.png", "a/z/1.png")))
    found = walk(tmp_path).paths
    assert found == sorted(tmp_path.rglob("*.png")) and len(found) == 5


# ----------------------------------------------------------------------------------------- classes

@pytest.mark.parametrize("train, test", [("Train", "TEST"), ("train", "Val")])
def test_capital_letters_of_the_parts_do_not_count(train, test, tmp_path, capsys):
    root = two_classes(tmp_path)
    (root / "train").rename(root / train)
    (root / "test").rename(root / test)
    for split in ("train", "test"):
        found, said = train_images(root, capsys, split)
        assert found.classes == ["a", "b"] and said == ""


def test_parts_of_other_names_are_said(tmp_path, capsys):
    root = two_classes(tmp_path)
    (root / "train").rename(root / "training")
    (root / "test").rename(root / "validation")
    found, said = train_images(root, capsys)
    assert found.classes == [] and "training, validation is a part, call it train or test" in said


def test_val_beside_test_is_said(tmp_path, capsys):
    root = two_classes(tmp_path)
    put(root / "val" / "a" / "1.png")
    assert "beside it: val" in train_images(root, capsys, "test")[1]
    assert train_images(root, capsys, "train")[1] == ""


def test_two_ways_to_write_an_umlaut_are_one_class(tmp_path):
    for split, way in (("train", "NFD"), ("test", "NFC")):                 # macOS, and others
        put(tmp_path / split / unicodedata.normalize(way, "Vögel") / "1.png",
            tmp_path / split / "b" / "1.png")
    train, test = (load_images("imagefolder", tmp_path, split, 8) for split in ("train", "test"))
    datasets.require_the_same_classes(tmp_path, train, test)
    assert train.classes == ["Vögel", "b"]


def test_classes_that_differ_in_capital_letters(tmp_path, capsys):
    root = two_classes(tmp_path)
    (root / "test" / "a").rename(root / "test" / "A")
    train, test = (load_images("imagefolder", root, split, 8) for split in ("train", "test"))
    with pytest.raises(UsageError, match="of the classes a .is it A. capital letters count"):
        datasets.require_the_same_classes(root, train, test)
    put(root / "train" / "A" / "1.png")
    assert "differ in capital letters alone: A, a" in train_images(root, capsys)[1]


def test_what_classes_lack_is_said(tmp_path, capsys):
    root = two_classes(tmp_path)
    (root / "train" / "empty").mkdir()
    put(root / "train" / "c" / "deep" / "1.png")
    found, said = train_images(root, capsys)
    assert found.classes == ["a", "b", "c"] and len(said.splitlines()) == 1
    for words in ("1 class folders hold no image: empty", "1 images lie in folders inside a class",
                  "classes have 1 to 3 images; always guessing a is right in 42.9%",
                  "of one image: c"):
        assert words in said


def test_guessing_is_the_commonest_class_of_the_images_scored(tmp_path):
    """In train.py as in eval.py: 38 of a and 2 of b, of which every tenth is held out."""
    put(*(tmp_path / "set" / "train" / "a" / f"{i}.png" for i in range(38)),
        *(tmp_path / "set" / "train" / "b" / f"{i}.png" for i in range(2)))
    flags = ["--data", "imagefolder", "--data-root", tmp_path / "set", "--img-size", "8",
             "--patch-size", "4", "--batch-size", "8", "--image-clusters", "4", "--patch-clusters",
             "8", "--epochs", "1", "--device", "cpu", "--out", tmp_path / "run"]
    said = run("train.py", *flags).stderr
    assert "held-out images" in said and "guessing gives 75.0%" in said    # 3 of the 4 are a
    found = run("eval.py", "knn", "--split", "validation", "--checkpoint",
                tmp_path / "run" / "checkpoint.pt").stdout
    assert '"guessing": 0.75' in found


def test_one_class_is_nothing_to_tell_apart(tmp_path, capsys):
    put(*(tmp_path / "train" / "images" / f"{i}.png" for i in range(12)))
    found, said = train_images(tmp_path, capsys)
    assert "there is one class, images, so there is nothing to tell apart" in said
    with pytest.raises(UsageError, match="has one class"):
        datasets.require_classes(tmp_path, found)
    assert torch.equal(found.y, torch.zeros(12).long())


def test_links_to_what_is_left_out_are_used(tmp_path, capsys):
    """As git-annex has it: names without a suffix, beside the links that have one."""
    root = two_classes(tmp_path)
    for i in range(2):
        (root / "train" / "a" / f"{i}.png").rename(root / "train" / "a" / f"sha{i}")
        (root / "train" / "a" / f"{i}.png").symlink_to(f"sha{i}")
    found, said = train_images(root, capsys)
    assert len(found) == 6 and "2 files without a suffix" in said and "read already" not in said


def test_a_class_written_in_two_ways_is_said(tmp_path, capsys):
    root = two_classes(tmp_path)
    for way in ("NFD", "NFC"):
        put(*(root / "train" / unicodedata.normalize(way, "ä") / f"{i}.png" for i in range(2)))
    found, said = train_images(root, capsys)
    assert found.classes == ["a", "b", "ä"] and "are one class: ä" in said


def test_a_set_one_folder_deeper_is_pointed_at(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "download" / "photos")
    assert len(load_images("imagefolder", tmp_path / "download", "train", 16)) == 90
    assert f"use --data-root {tmp_path / 'download' / 'photos'}" in capsys.readouterr().err
