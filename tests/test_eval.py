import json
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MEAN, STD, TOY, TOY_SIZE, inputs, record_of, some_images
from PIL import Image

import eval as evaluation
import train
from mae import SIZES
from pseudo_labels import Student
from results import probes as compare_probes
from support import pictures, probes, report, shapes, weights
from support.checkpoint import load_run
from support.command_line import UsageError
from support.datasets import Images
from support.settings import kept_network
from support.weights import load_encoder, to_official

CPU = torch.device("cpu")


def blobs(n, seed=0, classes=3, dim=8):
    """A cloud around one axis for each class: x n dim, y n."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return 3 * torch.eye(classes, dim)[y] + torch.randn(n, dim, generator=g), y


# ---------------------------------------------------------------------------- features, classifiers

def test_features_are_the_class_token_and_the_mean_of_the_patches(monkeypatch):
    images, ids = some_images(20), torch.tensor([3, 17, 4, 9, 11])
    encoder = Student(**TOY).mae.encoder.double()
    monkeypatch.setattr(probes, "CHUNK", 2)            # two, two, and one that is left over
    found = probes.features(encoder, images, ids, MEAN, STD, CPU)
    tokens = encoder(inputs(images, ids)).float()
    assert found.keys() == {"class", "mean"} and not found["class"].requires_grad
    torch.testing.assert_close(found["class"], tokens[:, 0])
    torch.testing.assert_close(found["mean"], tokens[:, 1:].mean(1))
    pixels = probes.features(None, images, ids, MEAN, STD, CPU)
    torch.testing.assert_close(pixels, {"pixels": inputs(images, ids, torch.float32).flatten(1)})


def test_a_subset_is_evenly_spread():
    ids = torch.arange(100, 200)
    assert probes.subset(ids, 4).tolist() == [100, 133, 166, 199]
    assert torch.equal(probes.subset(ids, 100), ids)
    assert torch.equal(probes.subset(ids, 1000), ids)


def test_knn_equals_brute_force():
    (x, y), (test_x, _) = blobs(90), blobs(30, seed=1)
    want = []
    for query in test_x:
        cosines = [F.cosine_similarity(query, each, dim=0).item() for each in x]
        nearest = sorted(zip(cosines, y.tolist()), reverse=True)[:5]
        votes = [0.0, 0.0, 0.0]
        for cosine, label in nearest:
            votes[label] += torch.tensor(cosine / 0.07).exp().item()
        want.append(votes.index(max(votes)))
    assert probes.knn(x, y, test_x, 3, k=5).tolist() == want
    few = probes.knn(x[:2], y[:2], test_x, 3)          # fewer images than neighbours
    assert few.shape == (30,)


def test_linear_separates_what_a_plane_separates():
    (x, y), (test_x, test_y) = blobs(600), blobs(300, seed=1)
    predictions = probes.linear(x, y, test_x, 3, epochs=10)
    scores = [probes.accuracy(p, test_y) for p in predictions]
    assert max(scores) > 0.95 and len(scores) == len(probes.LINEAR_RATES)
    alone = probes.linear(x, y, test_x, 3, rates=probes.LINEAR_RATES[1:2], epochs=10)
    assert torch.equal(alone[0], predictions[1])           # side by side, they do not touch
    one = probes.linear(x, y, test_x[:1], 3, epochs=10)
    assert torch.equal(one, predictions[:, :1])            # nor do the images that are tested


def test_classify_tunes_on_validation_images_and_then_uses_all():
    """It is not given test labels. Which test images there are changes none of its choices."""
    x, y = blobs(300, dim=100)
    x = x + torch.randn_like(x)                            # overlapping: rates differ in accuracy
    (test_x, _), val = blobs(60, seed=1, dim=100), torch.arange(300) % 4 == 0
    val_predictions = probes.linear(x[~val], y[~val], x[val], 3)
    scores = [probes.accuracy(p, y[val]) for p in val_predictions]
    best = probes.LINEAR_RATES[scores.index(max(scores))]
    assert len(set(scores)) > 1
    validation, predictions = probes.classify("linear", x, y, val, test_x, 3)
    assert validation == max(scores)
    assert torch.equal(predictions, probes.linear(x, y, test_x, 3, rates=[best])[0])
    assert probes.classify("linear", x, y, val, 9 * torch.randn(60, 100), 3)[0] == validation

    validation, predictions = probes.classify("knn", x, y, val, test_x, 3)
    on_val = probes.knn(x[~val], y[~val], x[val], 3)
    assert validation == probes.accuracy(on_val, y[val])
    assert torch.equal(predictions, probes.knn(x, y, test_x, 3))


# ------------------------------------------------------------------------------------- the networks

@pytest.fixture
def untrained(small_run, no_pictures):
    """The checkpoint of a run that has not begun."""
    train.main([*small_run, "--epochs", "0"])
    return f"{small_run[-1]}/checkpoint.pt"


@pytest.mark.parametrize("network, tokens", [
    ("student", {"class", "mean"}), ("labelling-teacher", {"class", "mean"}),
    ("untrained", {"class", "mean"}), ("pixels", {"pixels"})])
def test_networks(untrained, capsys, network, tokens):
    record = record_of(capsys, "knn", "--checkpoint", untrained, "--network", network)
    assert record["network"] == network and record["step"] == 0 and record["data"] == "imagefolder"
    assert record["tokens"].keys() == record["validation"].keys() == tokens
    assert record["images"] == 72 and record["test_images"] == 18
    assert record["top1"] == record["tokens"][record["token"]] > 0.5           # hues: easy
    lines = (Path(untrained).parent / "eval.jsonl").read_text().splitlines()
    assert [json.loads(each) for each in lines] == [record]


def test_the_token_that_is_named_is_reported(untrained, capsys):
    for token in ("class", "mean"):
        record = record_of(capsys, "knn", "--checkpoint", untrained, "--token", token)
        assert record["token"] == token and record["top1"] == record["tokens"][token]


def load(path, network):
    return weights.load_network(str(path), network)


@pytest.mark.parametrize("recipe", ["pl-mae", "rc-mae"])
def test_the_yardstick_untrained_is_the_network_before_its_training(
        small_run, tmp_path, no_pictures, recipe):
    flags = [*small_run, "--recipe", recipe, "--seed", "3"]
    train.main([*flags, "--epochs", "0"])
    train.main([*flags, "--epochs", "1", "--out", str(tmp_path / "trained")])
    before, _ = load(f"{small_run[-1]}/checkpoint.pt", "student")
    trained, _ = load(tmp_path / "trained" / "checkpoint.pt", "student")
    yardstick, info = load(tmp_path / "trained" / "checkpoint.pt", "untrained")
    assert info["network"] == "untrained"
    for name, weight in yardstick.state_dict().items():
        assert torch.equal(weight, before.state_dict()[name])
    assert not torch.equal(trained.norm.weight, yardstick.norm.weight)


def test_rc_mae_is_judged_by_its_teacher(small_run, capsys, no_pictures):
    train.main([*small_run, "--epochs", "1", "--recipe", "rc-mae"])
    path = f"{small_run[-1]}/checkpoint.pt"
    assert record_of(capsys, "knn", "--checkpoint", path)["network"] == "reconstruction-teacher"
    student, teachers, config = load_run(path)
    judged, _ = load(path, None)
    assert torch.equal(judged.norm.weight, teachers.reconstruction.encoder.norm.weight)
    assert not torch.equal(judged.norm.weight, student.mae.encoder.norm.weight)
    assert kept_network(vars(config)) == "reconstruction-teacher"
    assert kept_network({"consistency_weight": 0.0}) == "student"


def test_others_weights_can_be_judged(untrained, photos, tmp_path, capsys):
    """A bare file of weights names no data: they are given. It is judged as the run's student."""
    student, _, _ = load_run(untrained)
    torch.save(to_official(student.mae), tmp_path / "bare.pt")
    record = record_of(capsys, "knn", "--checkpoint", tmp_path / "bare.pt", "--num-heads", 3,
                       "--data", "imagefolder", "--data-root", photos)
    assert record["network"] == "student" and record["step"] is None and record["top1"] > 0.5


# ------------------------------------------------------------------ choices without the test labels

@pytest.fixture
def hard_photos(tmp_path):
    """60 + 30 images whose class is hard to see: a little more of red, green or blue."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for number, name in enumerate("abc"):
            folder = tmp_path / "hard" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 200, (16, 16, 3)) + rng.integers(0, 40)
                picture[..., number] += 12
                Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "hard"


def with_other_test_labels(photos, root, seed):
    """A copy of the photos whose test images lie in the folders of random classes."""
    shutil.copytree(photos, root)
    rng = np.random.default_rng(seed)
    for name in "abc":
        for path in sorted((photos / "test" / name).iterdir()):
            (root / "test" / name / path.name).unlink()
            shutil.copy(path, root / "test" / rng.choice(list("abc")) / f"{name}-{path.name}")
    return root


@pytest.mark.parametrize("task", ["knn", "linear", "lowshot"])
def test_choices_do_not_depend_on_the_test_labels(
        untrained, hard_photos, tmp_path, capsys, monkeypatch, task):
    """Token and learning rate are chosen on images of the training split. With other test labels
    they are the same, and only the accuracy on the test split is another one."""
    chosen = []

    def linear(*args, rates=probes.LINEAR_RATES):
        if len(rates) == 1:                                # the last fit, at the rate of choice
            chosen.extend(rates)
        return fit(*args, rates=rates, epochs=30)

    fit = probes.linear
    monkeypatch.setattr(probes, "linear", linear)
    roots = [hard_photos] + [with_other_test_labels(hard_photos, tmp_path / str(seed), seed)
                             for seed in range(4)]
    records, rates = [], []
    for root in roots:
        records.append(record_of(capsys, task, "--checkpoint", untrained, "--data", "imagefolder",
                                 "--data-root", root))
        rates.append(list(chosen))
        chosen.clear()
    for record, chosen_rates in zip(records, rates):
        assert record["token"] == records[0]["token"] and chosen_rates == rates[0]
        assert record.get("strengths") == records[0].get("strengths")
        assert record["validation"] == records[0]["validation"]
    assert len(rates[0]) == (2 if task == "linear" else 0)             # one for each token
    assert len({json.dumps(record["top1"]) for record in records}) > 1
    def best_on_test(record):
        def score(token):
            found = record["tokens"][token]
            return found if task != "lowshot" else sum(sum(each) for each in found.values())
        return max(record["tokens"], key=score)

    # who looks there chooses otherwise
    assert {*map(best_on_test, records)} - {records[0]["token"]}


# ------------------------------------------------------------------------------------- a few labels

@pytest.fixture
def shapes_run(tmp_path, monkeypatch, no_pictures):
    """A small set of shapes, and the checkpoint of a run on it that has not begun."""
    monkeypatch.setattr(shapes, "SCENES", {"train": (0, 120), "test": (500, 40)})
    monkeypatch.setitem(SIZES, "micro", TOY_SIZE)
    out = tmp_path / "run"
    train.main(["--data-root", str(tmp_path), "--out", str(out), "--epochs", "0", "--device", "cpu",
                "--batch-size", "64"])
    return out / "checkpoint.pt"


def test_lowshot(untrained, capsys):
    record = record_of(capsys, "lowshot", "--checkpoint", untrained, "--draws", "2")
    assert list(record["top1"]) == ["1", "2", "5", "10", "1%", "10%"] and record["draws"] == 2
    assert record["images"] == {"1": 3, "2": 6, "5": 15, "10": 30, "1%": 3, "10%": 6}  # 3 classes
    found = record["tokens"][record["token"]]
    assert all(len(each) == 2 for each in found.values())
    assert record["top1"]["10"] == pytest.approx(sum(found["10"]) / 2, abs=1e-4)
    assert record["top1"]["10"] > record["guessing"] + 0.3                     # hues: easy
    strengths = record["strengths"]["class"]
    assert set(strengths["1"]) == {probes.ONE_STRENGTH}
    assert set(strengths["10"]) <= set(probes.STRENGTHS)


def test_lowshot_says_where_there_are_fewer_images_than_asked_for(untrained, photos, tmp_path,
                                                                  capsys):
    shutil.copytree(photos, tmp_path / "few")
    for i in range(20):
        (tmp_path / "few" / "train" / "red" / f"{i}.png").unlink()
    record = record_of(capsys, "lowshot", "--checkpoint", untrained, "--data", "imagefolder",
                       "--data-root", tmp_path / "few")
    assert record["images"]["10"] < 30
    evaluation.main(["lowshot", "--checkpoint", untrained, "--data", "imagefolder", "--data-root",
                     str(tmp_path / "few"), "--device", "cpu"])
    assert "fewer than ten images to draw from" in capsys.readouterr().err


def test_several_networks_stand_side_by_side(untrained, capsys, tmp_path):
    """The same network twice differs by nothing, in each draw; features are computed once."""
    copy = tmp_path / "copy" / "checkpoint.pt"
    copy.parent.mkdir()
    shutil.copy(untrained, copy)
    evaluation.main(["knn", "lowshot", "--checkpoint", untrained, str(copy), "--device", "cpu",
                     "--network", "student", "pixels", "--plot", str(tmp_path / "few.png")])
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [(each["task"], each["network"]) for each in records] == [
        ("knn", "student"), ("lowshot", "student"), ("knn", "pixels"), ("lowshot", "pixels"),
        ("knn", "student"), ("lowshot", "student")]        # pixels: of the first checkpoint alone
    assert records[1]["tokens"] == records[5]["tokens"]
    assert len((copy.parent / "eval.jsonl").read_text().splitlines()) == 2
    lines = captured.err.splitlines()
    *lines, last = lines[next(i for i, line in enumerate(lines) if line.startswith("lowshot")):]
    assert "images are scored" in last
    assert [line.split("  ")[0] for line in lines] == [
        "lowshot, test, %", f"run student, {records[1]['token']}", "run pixels", "",
        f"copy student, {records[1]['token']}", "", "guessing"]
    assert lines[-2].split() == ["minus", "the", "first", *6 * ["+0.0", "±", "0.0"]]
    assert plt.imread(tmp_path / "few.png").shape[2] == 4


def test_differences_are_of_the_same_draws():
    record = {"task": "lowshot", "split": "test", "token": "mean", "guessing": 0.1}
    records = {"a": record | {"tokens": {"mean": {"1": [0.2, 0.4]}}},
               "b": record | {"tokens": {"mean": {"1": [0.3, 0.5]}}}}
    assert report.table("lowshot", records, {"a", "b"}).splitlines() == [
        "lowshot, test, %             1", "a, mean            30.0 ± 14.1",
        "b, mean            40.0 ± 14.1", "  minus the first  +10.0 ± 0.0",
        "guessing                  10.0"]


@pytest.mark.parametrize("scored", [25, 100])
def test_scores_of_few_images_come_with_a_caution(scored):
    record = {"task": "knn", "split": "test", "tokens": {"class": 0.5}, "scored": scored}
    words = "images are scored: one is 4.0 points, and a score has a standard error of up to 10"
    table = report.table("knn", {"a": record}, {"a"})
    assert ("images are scored" in table) == (words in table) == (scored < 100)


def test_multilabel(shapes_run, capsys):
    record = record_of(capsys, "multilabel", "--checkpoint", shapes_run, "--draws", "1")
    assert list(record["map"])[-1] == "all" and record["images"]["all"] == 120
    assert record["classes"].keys() == shapes.KINDS.keys()
    alone = [each for each in record["classes"].values() if each is not None]
    assert sum(alone) / len(alone) == pytest.approx(record["map"]["all"], abs=1e-3)
    assert 0 < record["guessing"] < 0.5 and record["map"]["10%"] > 0.1
    out = shapes_run.parent / "x.npz"
    record_of(capsys, "features", "--checkpoint", shapes_run, "--out", out)
    with np.load(out) as file:
        assert file["multilabel"].shape == (40, 10) and file["multilabel"].any(1).all()
    on_validation = record_of(capsys, "multilabel", "--checkpoint", shapes_run, "--draws", "1",
                              "--split", "validation")
    assert on_validation["test_images"] == 0
    assert on_validation["tokens"] == on_validation["validation"]


# ---------------------------------------------------------------------------- features, pictures

@pytest.mark.parametrize("split, n", [("train", 72), ("validation", 7), ("test", 18)])
def test_features_are_written(untrained, photos, capsys, tmp_path, split, n):
    out = tmp_path / "x.npz"
    record = record_of(capsys, "features", "--checkpoint", untrained, "--split", split, "--patches",
                       "--out", out)
    with np.load(out) as file:
        found = dict(file)
    assert found["class_token"].shape == (n, 96) and found["patch_tokens"].shape == (n, 16, 96)
    np.testing.assert_allclose(found["patch_tokens"].mean(1), found["mean_token"], atol=1e-5)
    encoder, transform = load_encoder(untrained)
    image = transform(Image.open(found["paths"][2]))
    np.testing.assert_allclose(found["class_token"][2], encoder(image[None])[0, 0], atol=1e-4)
    assert Path(found["paths"][2]).parent.name == found["classes"][found["y"][2]]
    if split == "train":
        assert found["held_out"].sum() == 7
    assert record["arrays"]["y"] == [n]


def test_attention_is_what_the_class_token_gathers_values_by():
    encoder, imgs = Student(**TOY).mae.encoder, torch.randn(2, 3, 16, 16)
    weights = probes.class_attention(encoder, imgs)                                # B heads N
    assert weights.shape == (2, 2, 16) and (weights.sum(-1) < 1).all()
    attention, seen = encoder.blocks[-1].attn, {}
    attention.proj.register_forward_pre_hook(lambda _, inputs: seen.update(out=inputs[0]))
    attention.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    encoder(imgs)
    values = attention.qkv(seen["x"])[..., 64:].unflatten(-1, (2, 16))         # B 1+N heads 16
    every = torch.cat([1 - weights.sum(-1, keepdim=True), weights], dim=-1)
    want = torch.einsum("bhn,bnhd->bhd", every, values).flatten(1)
    torch.testing.assert_close(seen["out"][:, 0], want)


def test_components_are_the_directions_of_the_largest_variance():
    x = torch.randn(500, 6) * torch.tensor([1.0, 5.0, 0.1, 2.0, 0.1, 0.1]) + 7
    points, shares = probes.first_components(x)
    assert abs(torch.corrcoef(torch.stack([points[:, 0], x[:, 1]]))[0, 1]) > 0.99
    assert abs(torch.corrcoef(torch.stack([points[:, 1], x[:, 3]]))[0, 1]) > 0.99
    assert points.std(0).tolist() == pytest.approx([5, 2], rel=0.1)
    assert shares == pytest.approx([25 / 30, 4 / 30], abs=0.05)


@pytest.mark.parametrize("network, names", [
    ("student", {"neighbours", "components", "attention"}),
    ("pixels", {"neighbours", "components"})])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_pictures(untrained, monkeypatch, network, names, split):
    drawn = {}
    monkeypatch.setattr(report, "draw_rows", pictures.draw_rows)       # of runs none are drawn here
    monkeypatch.setattr(report, "draw_neighbours", lambda rows, *rest: drawn.update(rows=rows))
    evaluation.main(["knn", "--checkpoint", untrained, "--device", "cpu", "--pictures", "--network",
                     network, "--split", split])
    found = {path.stem for path in Path(untrained).parent.glob(f"*-{network}.png")}
    assert found == {f"{name}-{network}" for name in names - {"neighbours"}}
    colours = [colour for row in drawn["rows"] for _, (_, colour) in row[1:]]
    assert len(drawn["rows"]) == (8 if split == "test" else 7)
    assert colours.count("green") > 0.6 * len(colours)     # hues: neighbours are of a class
    for (first, _), *near in drawn["rows"]:                # none is its own neighbour
        assert not any(np.array_equal(first, each) for each, _ in near)


def test_pictures_of_files_of_ones_own(untrained, photos, tmp_path, monkeypatch, capsys):
    """Of a folder: an image of the training split is nearest to itself. Of another set: no class is
    said to be right or wrong. A file that is no image is said before there are scores."""
    drawn = []
    monkeypatch.setattr(report, "draw_rows", pictures.draw_rows)
    monkeypatch.setattr(report, "draw_neighbours", lambda rows, *rest: drawn.append(rows))
    own = sorted((photos / "train/red").iterdir())[:2]
    folder = shutil.copytree(Path(untrained).parent, tmp_path / "copy")
    flags = ["knn", "--checkpoint", str(folder / "checkpoint.pt"), "--device", "cpu"]
    evaluation.main([*flags, "--pictures", *map(str, own)])
    evaluation.main([*flags, "--data", "imagefolder", "--data-root", str(photos), "--pictures",
                     *map(str, own)])
    of_hues, of_folder = drawn
    for rows in drawn:
        assert [row[0][1] for row in rows] == [(path.name, "black") for path in own]
        assert {colour for row in rows for _, (_, colour) in row} == {"black"}
    assert np.array_equal(of_folder[1][0][0], of_folder[1][1][0])
    assert f"nearest to {own[1]} are {own[1]} (1.00), " in capsys.readouterr().err
    assert {path.stem for path in folder.glob("*.png")} == {"attention"}       # no components

    evaluation.main(["features", *flags[1:], "--token", "mean", "--pictures"])
    assert len(drawn) == 3

    before = (folder / "eval.jsonl").read_bytes()
    (tmp_path / "no.jpg").write_text("no image")
    for name in ("no.jpg", "not-there.jpg"):
        with pytest.raises(UsageError, match=f"^--pictures: .*{name} cannot be decoded"):
            evaluation.main([*flags, "--pictures", str(own[0]), str(tmp_path / name)])
    assert before == (folder / "eval.jsonl").read_bytes()


def test_pictures_of_few_images_of_which_none_validates(untrained, photos, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "draw_neighbours", lambda rows, *rest: drawn.extend(rows))
    for name in ("red", "green"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for path in sorted((photos / "train" / name).iterdir())[:4]:
            shutil.copy(path, tmp_path / "train" / name)
    evaluation.main(["features", "--split", "train", "--pictures", "--checkpoint", untrained,
                     "--data", "imagefolder", "--data-root", str(tmp_path), "--device", "cpu"])
    assert len(drawn) == 8
    for (first, _), *near in drawn:
        assert not any(np.array_equal(first, each) for each, _ in near)


def test_a_caption_is_the_class_or_the_name_of_the_file():
    images = Images(torch.tensor([1, 0, -1]), ["cat", "dog"], (8, 8), 3,
                    paths=[Path("a.jpg"), Path("b.jpg"), Path("x/of-a-long-name.jpg")])
    assert report.caption(images, 0) == ("dog", "black")
    assert [report.caption(images, i, 1) for i in (0, 1)] == [("dog", "green"), ("cat", "red")]
    assert report.caption(images, 2, 1) == ("…long-name.jpg", "black")
    assert report.caption(replace(images, paths=None), 2) == ("", "black")


def test_three_probes_of_one_run(untrained, capsys):
    compare_probes.main([str(untrained)])
    line = json.loads(capsys.readouterr().out)
    record = record_of(capsys, "linear", "--checkpoint", untrained)
    assert line["four"] == record["tokens"]                # as eval.py has it
    for probe in ("seven", "logistic"):
        assert all(score > 0.5 for score in line[probe].values())          # hues: easy


# ---------------------------------------------------------------------------------- what is refused

@pytest.fixture
def refused(capsys, monkeypatch):
    """Called with flags that cannot be: the one line that eval.py says."""
    def call(*flags):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["eval.py"])
        with pytest.raises(SystemExit) as stop:
            evaluation.run_main(lambda: evaluation.main([str(flag) for flag in flags]))
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.err.count("\n") == 1
        return captured.err
    return call


def test_bad_flags(untrained, tmp_path, refused):
    knn = ["knn", "--checkpoint", untrained]
    assert "--device abacus" in refused(*knn, "--device", "abacus")
    assert "--token class" in refused(*knn, "--network", "pixels", "--token", "class")
    assert "invalid choice" in refused("dance", "--checkpoint", untrained)
    assert "--checkpoint" in refused("knn")
    assert "--draws: not used by knn" in refused(*knn, "--draws", "2")
    assert "--draws 0: must be 1 or more" in refused("lowshot", *knn[1:], "--draws", "0")
    assert "--patches: not used by knn" in refused(*knn, "--patches")
    assert "--split train: only the task features takes it" in refused(*knn, "--split", "train")
    assert "there is no encoder to write" in refused("export", *knn[1:], "--network", "pixels")
    assert "--out: names the output of one task and one network" in refused(
        "export", *knn[1:], "--network", "student", "untrained", "--out", tmp_path)
    assert "one of lowshot and multilabel" in refused("lowshot", "multilabel", *knn[1:], "--plot",
                                                      "x.png")
    assert "an image has one class here" in refused("multilabel", *knn[1:], "--device", "cpu")
    student, _, _ = load_run(untrained)                    # others' weights, with no settings
    torch.save(student.mae.encoder.state_dict(), tmp_path / "bare.pt")
    bare = ["--checkpoint", tmp_path / "bare.pt", "--num-heads", 3, "--pixel-mean", 0.5,
            "--pixel-std", 0.5, "--device", "cpu"]
    assert "--data: this checkpoint does not name" in refused("knn", *bare)
    assert "--data-root: name the folder" in refused("knn", *bare, "--data", "imagefolder")
    words = refused("knn", *bare, "--network", "untrained")
    assert "--network untrained: needs a checkpoint of train.py" in words
    assert not (Path(untrained).parent / "eval.jsonl").exists()


def test_bad_folders(untrained, photos, tmp_path, refused):
    def words(name):
        return refused("knn", "--checkpoint", untrained, "--data", "imagefolder", "--data-root",
                       tmp_path / name, "--device", "cpu")

    shutil.copytree(photos, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "test" / "red")
    assert "no test images of the classes red" in words("fewer")

    shutil.copytree(photos / "train" / "red", tmp_path / "flat" / "train")
    shutil.copytree(photos / "test", tmp_path / "flat" / "test")
    assert "training images do not have one class" in words("flat")

    for split in ("train", "test"):
        for name in ("red", "blue"):
            folder = tmp_path / "few" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                shutil.copy(photos / "train" / name / f"{i}.png", folder)
    assert "8 training images of known class; at least 10" in words("few")


def test_networks_that_are_not_there(small_run, refused, no_pictures):
    train.main([*small_run, "--epochs", "0", "--recipe", "mae"])
    run = ["--checkpoint", f"{small_run[-1]}/checkpoint.pt"]
    words = refused("knn", *run, "--network", "labelling-teacher")
    assert "it has student, reconstruction-teacher" in words
    for network in ("pixels", "untrained"):
        assert "has no pseudo labels" in refused("diagnose", *run, "--network", network)


def test_a_run_whose_images_have_moved_asks_for_them(small_run, photos, tmp_path, no_pictures):
    there = tmp_path / "there"
    there.symlink_to(photos)
    train.main([*small_run, "--epochs", "0", "--data-root", str(there)])
    there.unlink()
    with pytest.raises(UsageError, match=f"the run read {there}, which is not to be found"):
        evaluation.main(["knn", "--checkpoint", f"{small_run[-1]}/checkpoint.pt"])
