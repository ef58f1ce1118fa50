"""extras/segment.py: masks, scores, and the command."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, run
from PIL import Image

import train
from extras import segment
from mae import MaskedAutoencoder
from support.command_line import UsageError
from support.probes import overlaps

SMALL = ["--batch-size", "4", "--epochs", "2", "--eval-every", "1", "--log-every", "1", "--device",
         "cpu"]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Pairs: a bright square (1) on a dark ground (0), its frame void (11). 8 to train on, 4 to
    test on."""
    root, rng = tmp_path_factory.mktemp("streets"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir()
        for i in range(count):
            picture, mask = rng.integers(0, 60, (24, 32, 3)), np.zeros((24, 32))
            top, left = rng.integers(0, 12, 2)
            picture[top:top + 12, left:left + 12] += 150
            mask[top:top + 12, left:left + 12] = 11
            mask[top + 1:top + 11, left + 1:left + 11] = 1
            Image.fromarray(picture.astype(np.uint8)).save(root / split / f"{i}.jpg")
            Image.fromarray(mask.astype(np.uint8)).save(root / f"{split}annot" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(streets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "start"
    train.main(["--data", "imagefolder", "--data-root", str(streets), "--img-size", "24x32",
                "--patch-size", "4", "--batch-size", "4", "--image-clusters", "4",
                "--patch-clusters", "8", "--epochs", "1", "--device", "cpu", "--out", str(folder)])
    return folder / "checkpoint.pt"


def flags(checkpoint, out, *more):
    return ["--checkpoint", str(checkpoint), "--out", str(out), *SMALL, "--void", "11", *more]


def test_overlaps_by_hand_and_beside_scikit_learn():
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, 2, segment.IGNORED]])
    painted = torch.tensor([[0, 1, 1, 1], [2, 0, 2, 3]])
    counts = segment.confusion(painted, truth, 4)
    assert counts.sum() == 7                   # one pixel is void
    found = overlaps(counts)
    assert torch.allclose(found[:3], torch.tensor([1 / 3, 2 / 3, 2 / 3])) and found[3].isnan()
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    truth, painted = torch.randint(5, (2, 1000), generator=g)
    theirs = metrics.jaccard_score(truth, painted, average=None)
    assert np.allclose(overlaps(segment.confusion(painted, truth, 5)), theirs)


def test_a_batch_of_void_costs_nothing():
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    void = torch.full((2, 4, 4), segment.IGNORED)
    loss = segment.pixel_loss(scores, void)
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all()
    half = void.clone()
    half[0] = 1
    expected = torch.nn.functional.cross_entropy(scores[:1], half[:1])
    assert torch.allclose(segment.pixel_loss(scores, half), expected)


def test_the_mask_is_of_what_the_network_sees():
    """A mask twice as wide as high, an image that is square: its middle is used."""
    mask = torch.arange(8).repeat(4, 1).to(torch.uint8)
    found = segment.target(mask, (16, 16), void=3)
    assert found.shape == (4, 4) and found[0].tolist() == [2, segment.IGNORED, 4, 5]
    assert segment.shrink(found, (2, 2))[0].tolist() == [segment.IGNORED, 5]


def test_scores_have_the_size_of_the_images():
    encoder = MaskedAutoencoder(**dict(TOY, img_size=(16, 24)), target_dim=0).encoder
    model = segment.Segmenter(encoder, 5)
    assert model.taken == [1, 2] and model(torch.rand(2, 3, 16, 24)).shape == (2, 5, 16, 24)


def test_command(checkpoint, tmp_path):
    """It learns to tell the squares from the ground, and ends with its line."""
    out = tmp_path / "run"
    command = flags(checkpoint, out, "--epochs", "40", "--eval-every", "20", "--lr", "3e-3",
                    "--drop-path", "0")
    result = run("extras.segment", *command, cwd=ROOT)
    found = json.loads(result.stdout)
    assert found == json.loads((out / "result.json").read_text())
    assert (out / "segmentations.png").exists()
    assert found["miou"] > 0.7 and set(found["iou"]) == {"0", "1"} and found["test_images"] == 4


def test_a_stopped_run_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    segment.main(flags(checkpoint, tmp_path / "whole"))
    real = segment.tuning.draw_curves

    def stop(out):
        real(out)
        raise KeyboardInterrupt

    monkeypatch.setattr(segment.tuning, "draw_curves", stop)
    with pytest.raises(KeyboardInterrupt):
        segment.main(flags(checkpoint, tmp_path / "stopped"))
    monkeypatch.setattr(segment.tuning, "draw_curves", real)
    segment.main(flags(checkpoint, tmp_path / "stopped"))
    one, other = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert one == other


@pytest.mark.parametrize("given, says", [
    (["--data-root", "BLACK"], "no number but 0"),
    (["--data-root", "PHOTOS"], "has no mask"),
    (["--data", "coco"], "--data coco: has no masks"),
    (["--batch-size", "9"], "--batch-size 9")])
def test_bad_input_is_one_line(checkpoint, streets, photos, tmp_path, given, says):
    shutil.copytree(streets, tmp_path / "black")
    for path in tmp_path.glob("black/*annot/*"):
        Image.fromarray(np.zeros((24, 32), np.uint8)).save(path)
    names = {"PHOTOS": str(photos), "BLACK": str(tmp_path / "black")}
    given = [names.get(each, each) for each in given]
    with pytest.raises(UsageError) as error:
        segment.main(flags(checkpoint, tmp_path / "run", *given))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_head_sees_these_blocks():
    """Written out: the patch tokens after every second of eight blocks."""
    encoder = MaskedAutoencoder(**dict(TOY, depth=8), target_dim=0).encoder
    model, imgs = segment.Segmenter(encoder, 3), torch.rand(2, 3, 16, 16)
    assert model.taken == [2, 4, 6, 8]
    tokens = encoder.patch_embed(imgs) + encoder.pos_embed[:, 1:]
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1)
    x, maps = torch.cat([cls, tokens], 1), []
    for number, block in enumerate(encoder.blocks, 1):
        x = block(x)
        if number % 2 == 0:
            maps.append(model.norms[number // 2 - 1](x[:, 1:]).mT.reshape(2, 32, 4, 4))
    scores = torch.nn.functional.interpolate(model.head(torch.cat(maps, 1)), (16, 16),
                                             mode="bilinear")
    torch.testing.assert_close(model(imgs), scores)


def test_nothing_is_dropped_while_it_is_judged(checkpoint, streets):
    """Twice the same counts, and the model learns on afterwards."""
    config, encoder, info = segment.tuning.start(
        segment.Config, "segment", "", flags(checkpoint, "nowhere"))
    segment.tuning.drop_paths(encoder, 0.9)
    model = segment.Segmenter(encoder, 2).train()
    images, ids, _, _ = segment.tuning.split_images(config, encoder)
    one, two = (segment.evaluate_on(model, images, ids, 2, config,
                                    segment.tuning.standardise(info["mean"], info["std"]),
                                    torch.device("cpu")) for _ in range(2))
    assert torch.equal(one, two) and model.training
    assert one.sum() < len(ids) * 24 * 32                  # void pixels do not count


def test_a_split_without_classes_has_no_score(checkpoint, streets, tmp_path, capsys):
    """All void: the line is still JSON."""
    shutil.copytree(streets, tmp_path / "void")
    for path in tmp_path.glob("void/testannot/*"):
        Image.fromarray(np.full((24, 32), 11, np.uint8)).save(path)
    segment.main(flags(checkpoint, tmp_path / "run", "--data-root", str(tmp_path / "void"),
                       "--epochs", "1"))
    found = json.loads(capsys.readouterr().out)
    assert "miou" not in found and set(found["iou"].values()) == {None}
