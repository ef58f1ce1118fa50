import pytest
from PIL import Image

import train
from support import settings
from support.command_line import UsageError


def folder_of(path, n, size=(40, 30), classes=()):
    """n images, in train/CLASS/ if there are classes."""
    for i in range(n):
        inside = path / "train" / classes[i % len(classes)] if classes else path
        inside.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i % 256, 0, 0)).save(inside / f"{i:04d}.png")
    return path


def resolved(*flags):
    return settings.resolve([str(flag) for flag in flags])


def test_the_later_row_wins():
    config = resolved("--data", "cifar10", "--recipe", "mae")
    assert (config.batch_size, config.lr, config.image_clusters) == (256, 2e-3, 128)
    assert (config.views, config.target) == (1, "pixels")
    assert resolved("--data", "cifar10", "--lr", 1e-4).lr == 1e-4
    assert resolved("--data", "shapes").mask_ratio == 0.5
    assert resolved("--data", "shapes", "--recipe", "mae").mask_ratio == 0.75


def test_looks_are_ten_in_a_run():
    assert resolved("--data", "cifar10").eval_every == 10
    assert resolved("--data", "cifar10", "--epochs", 5).eval_every == 1
    assert resolved("--data", "cifar10", "--eval-every", 3).eval_every == 3
    assert resolved("--epochs", 0).eval_every == 4         # of `shapes`


@pytest.mark.parametrize("side, model, want", [
    (3000, "micro", (64, 8)), (3000, "tiny", (96, 8)), (3000, "base", (224, 16)),
    (100, "base", (96, 8)), (64, "base", (64, 8)), (40, "micro", (32, 4)), (20, "tiny", (32, 4))])
def test_images_are_no_larger_than_they_are_and_than_suits_the_model(side, model, want):
    assert settings.size_and_patch(side, model) == want


def test_sixty_photographs(tmp_path):
    """Small batches, and so many epochs that something is learned."""
    root = folder_of(tmp_path, 60, (300, 200))
    config = resolved("--data", "imagefolder", "--data-root", root)
    assert (config.img_size, config.patch_size) == (64, 8)
    assert (config.batch_size, config.image_clusters) == (16, 8)
    assert config.teacher_temperature == 0.0125            # or its labels would say nothing
    assert config.epochs * (60 // 16) >= 2000 > (config.epochs - 1) * (60 // 16)
    assert config.eval_every == pytest.approx(config.epochs / 10, abs=1)


def test_what_is_given_decides_what_is_left_open(tmp_path):
    root = folder_of(tmp_path, 60, (300, 200))
    of_folder = ("--data", "imagefolder", "--data-root", root)
    config = resolved(*of_folder, "--batch-size", 30, "--recipe", "mae")
    assert config.epochs == 1000 and config.batch_size == 30
    assert resolved(*of_folder, "--img-size", 128).patch_size == 8
    assert resolved(*of_folder, "--img-size", 224).patch_size == 16
    assert resolved(*of_folder, "--batch-size", 16, "--accumulate", 2).image_clusters == 4
    assert resolved(*of_folder, "--epochs", 1).epochs == 1
    with pytest.raises(UsageError, match="--patch-size 7 does not divide"):
        resolved(*of_folder, "--patch-size", 7)


@pytest.mark.parametrize("flag, value", [
    ("--batch-size", 0), ("--accumulate", 0), ("--val-fraction", "nan"), ("--views", 0),
    ("--seed", "9" * 400), ("--img-size", 1), ("--img-size", "1x1")])
def test_numbers_that_can_never_be_are_one_line(tmp_path, flag, value, capsys):
    """Also where a folder's row is computed of them."""
    with pytest.raises((UsageError, SystemExit)) as error:
        resolved("--data", "imagefolder", "--data-root", folder_of(tmp_path, 20), flag, value)
    line = capsys.readouterr().err or str(error.value)
    assert flag in line and len(line.splitlines()) == 1


def test_images_that_are_held_out_do_not_count(tmp_path):
    root = folder_of(tmp_path, 100, classes=("a", "b"))
    config = resolved("--data", "imagefolder", "--data-root", root, "--batch-size", 45)
    assert config.epochs == 1000                           # of 90 images, 2 steps each
    config = resolved("--data", "imagefolder", "--data-root", root, "--batch-size", 45,
                      "--val-fraction", 0)
    assert config.epochs == 1000 and config.img_size == 32


def test_a_folder_that_is_not_there_is_left_to_whoever_reads_it(tmp_path):
    config = resolved("--data", "imagefolder", "--data-root", tmp_path / "none")
    assert (config.img_size, config.batch_size) == (224, 128)
    for number in range(10):
        (tmp_path / f"broken{number}.png").write_bytes(b"no image")
    config = resolved("--data", "imagefolder", "--data-root", tmp_path)
    assert config.img_size == 32


def test_a_folder_of_few_images_is_refused(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="--data-root .* 7 images .* too few; name a folder"):
        resolved("--data", "imagefolder", "--data-root", tmp_path)


def test_help_comes_in_groups(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{heading}:") for heading in settings.GROUPS.values()]
    assert places == sorted(places)
    first = text[places[0]:places[1]]
    assert first.count("\n  --") == 10 and "--epochs" in first and "--data-root" in first


def test_nothing_is_divided_by_nothing(tmp_path):
    root = folder_of(tmp_path, 60)
    for flag in ("--batch-size", "--accumulate"):
        with pytest.raises(UsageError, match=f"{flag} 0: must be 1 or more"):
            resolved("--data", "imagefolder", "--data-root", root, flag, 0)


def test_few_clusters_that_were_given_get_the_lower_temperature_too(tmp_path):
    root = folder_of(tmp_path, 420)
    of_folder = ("--data", "imagefolder", "--data-root", root)
    assert resolved(*of_folder).teacher_temperature == 0.05
    assert resolved(*of_folder, "--image-clusters", 8).teacher_temperature == 0.0125


def test_the_half_life_of_a_teacher_without_labels_can_be_set():
    config = resolved("--teachers", 1, "--image-weight", 0, "--patch-weight", 0,
                      "--reconstruction-half-life", "5%")
    assert config.reconstruction_half_life == "5%"


def test_a_run_among_the_images_is_no_image_of_the_next(tmp_path, no_pictures, monkeypatch):
    """`cd PHOTOS; train.py --data-root .` writes runs/ there, with pictures."""
    root = folder_of(tmp_path, 20)
    monkeypatch.chdir(root)
    flags = ["--data", "imagefolder", "--data-root", ".", "--batch-size", "10", "--epochs", "1",
             "--patch-clusters", "16", "--device", "cpu"]
    train.main(flags)
    [out] = (root / "runs").iterdir()
    Image.new("RGB", (40, 30)).save(out / "curves.png")
    train.main([*flags, "--workers", "0"])                 # goes on: the images are the same
    with pytest.raises(UsageError, match="--out .: is the folder of the images"):
        train.main([*flags, "--out", "."])


def test_a_forgotten_data_flag_is_said(tmp_path, capsys):
    root = folder_of(tmp_path, 2)
    assert resolved("--data-root", root).data == "shapes"
    assert "for images of your own add --data imagefolder" in capsys.readouterr().err
    resolved("--data-root", tmp_path / "none")
    resolved("--data", "shapes", "--data-root", root)
    assert not capsys.readouterr().err
