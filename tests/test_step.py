"""The step and the recipes: properties of `training_step`, and whole runs of every recipe."""

import copy
import math
from functools import partial

import all_recipes
import pytest
import torch
from conftest import TIMES, TOY_SIZE, run

import train
from data import Batches, Views
from mae import SIZES
from pseudo_labels import image_label_loss, koleo, make_labels
from support import settings
from support.checkpoint import load_run
from support.command_line import UsageError
from support.datasets import Images, load_images
from support.files import read_json_lines
from support.probes import standardised
from teachers import between_images, make_teachers

VARIANTS = all_recipes.VARIANTS
PARTS = ("student", "labelling_teacher", "reconstruction_teacher")


def setting(*flags, dtype=torch.float64):
    """Config, student, teachers, and the views of four images: a batch of `training_step`."""
    config = settings.resolve(["--img-size", "16", "--patch-size", "4", "--batch-size", "4",
                               "--image-clusters", "4", "--patch-clusters", "7", *flags])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "micro", TOY_SIZE | dict(decoder_embed_dim=64))
        student = train.build(config, 3).to(dtype)
        teachers = make_teachers(student, config)
    imgs = torch.randn(4 * config.views, 3, 16, 16, dtype=dtype)
    teacher_imgs = imgs
    if config.teacher_view == "other-colours":
        teacher_imgs = imgs + 0.1 * torch.randn_like(imgs)
    noise = torch.rand(len(imgs), 16, dtype=dtype)
    return config, student, teachers, Views(imgs, teacher_imgs, noise)


def step(config, student, teachers, views):
    return train.training_step(student, teachers, views, config)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_reaches_all_of_the_student_and_no_teacher(name):
    config, student, teachers, views = setting(*VARIANTS[name])
    before = copy.deepcopy(teachers)
    loss, terms, labels, targets = step(config, student, teachers, views)
    loss.backward()
    learning = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert [n for n, p in learning.items() if p.grad is None] == []
    without = {n.split(".")[0] for n, p in learning.items() if not p.grad.abs().sum() > 0}
    assert without == ({"decoder_label"} if config.labelled_patches == "visible" else set())
    assert bool(labels) == any("_head" in n for n in learning)
    for role, teacher in teachers.named().items():
        for p, q in zip(teacher.parameters(), before.named()[role].parameters()):
            assert p.grad is None and torch.equal(p, q)
    assert not any(t.requires_grad for t in (*labels.values(), *targets.values()))


def test_loss_is_the_weighted_sum():
    loss, term, _, _ = step(*setting("--rec-weight", "2", "--image-weight", "3", "--patch-weight",
                                     "0.25", "--koleo-weight", "4"))
    want = 2 * term["rec"] + 3 * term["image"] + 0.25 * term["patch"] + 4 * term["koleo"]
    torch.testing.assert_close(loss, want)
    loss, term, _, _ = step(*setting("--recipe", "mim-cluster", "--consistency-weight", "5",
                                     "--balancing", "me-max", "--patch-weight", "0.25"))
    want = (term["rec"] + 5 * term["consistency"] + term["image"] + term["image_me_max"]
            + 0.25 * (term["patch"] + term["patch_me_max"]) + 0.5 * term["koleo"])
    torch.testing.assert_close(loss, want)


def test_token_loss_is_its_formula():
    """Mean over masked patches of |t - target|^2 / D, the teacher's tokens of the teachers' view
    standardised over the batch."""
    config, student, teachers, views = setting("--teacher-view", "other-colours")
    teachers.reconstruction.encoder.norm.weight.data *= 1.5          # a teacher of its own
    _, terms, _, _ = step(config, student, teachers, views)
    r = teachers.reconstruction.encode(views.teacher)[:, 1:]
    target = (r - r.mean((0, 1))) / (r.var((0, 1), unbiased=False) + 1e-6).sqrt()
    out = student(views.student, config.mask_ratio, views.noise)
    loop = []
    for b in range(8):
        for n in range(16):
            if out["mask"][b, n]:
                loop.append(((out["pred"][b, n] - target[b, n]) ** 2).sum() / 32)
    torch.testing.assert_close(terms["rec"], torch.stack(loop).mean())


def test_who_sees_which_view():
    """Labels and tokens are of the teachers' view, predictions and pixels of the student's."""
    config, student, teachers, views = setting()
    _, _, labels, targets = step(config, student, teachers, views)
    other = views._replace(student=torch.randn_like(views.student))
    _, _, labels2, targets2 = step(config, student, teachers, other)
    assert torch.equal(labels["image"], labels2["image"])
    assert torch.equal(labels["patch"], labels2["patch"])
    assert torch.equal(targets["rec"], targets2["rec"])
    config, student, teachers, views = setting("--recipe", "mae")
    targets = step(config, student, teachers, views)[3]
    other = views._replace(teacher=torch.randn_like(views.student))
    assert torch.equal(step(config, student, teachers, other)[3]["rec"], targets["rec"])
    config, student, teachers, views = setting("--recipe", "rc-mae")
    targets = step(config, student, teachers, views)[3]
    other = views._replace(teacher=torch.randn_like(views.student))
    of_other = step(config, student, teachers, other)[3]
    assert torch.equal(of_other["consistency"], targets["consistency"])


@pytest.mark.parametrize("name", [
    name if name in settings.RECIPES else pytest.param(name, marks=pytest.mark.slow)
    for name in VARIANTS])
def test_step_and_augmentation_are_a_graph_each(name):
    """As --compile compiles them, but quickly. Centring starts from equal centres both times."""
    config, student, teachers, _ = setting(*VARIANTS[name])
    pixels = torch.randint(0, 256, (4, 3, 20, 24), dtype=torch.uint8)
    images = Images(torch.full((4,), -1), [], (16, 16), 3, pixels)
    batches = Batches(images, torch.arange(4), [0.5] * 3, [0.2] * 3, seed=0, batch=4, patches=16,
                      views=config.views, colours=config.colours, teacher_view=config.teacher_view,
                      dtype=torch.float64)
    numbers, found = batches.numbers(0), []
    torch.compiler.reset()
    whole = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    for made in (lambda function: function, whole):
        views = made(batches.augment)(numbers, pixels[numbers["ids"]][:, None])
        found.append(made(train.training_step)(student, copy.deepcopy(teachers), views, config)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_swapping_the_views_swaps_the_image_labels_and_nothing_else():
    config, student, teachers, views = setting()
    _, _, labels, _ = step(config, student, teachers, views)
    swapped = Views(views.student.roll(4, 0), views.teacher.roll(4, 0), views.noise)
    _, _, other, _ = step(config, student, teachers, swapped)
    torch.testing.assert_close(other["patch"], labels["patch"].roll(4, 0))
    torch.testing.assert_close(other["image"], labels["image"].roll(4, 0))
    # With one view a class token has its own label. So with two they are crossed:
    one_view = copy.copy(config)
    one_view.views = 1
    own = step(one_view, student, teachers, views)[2]["image"]
    torch.testing.assert_close(own, labels["image"].roll(4, 0))
    assert not torch.allclose(own, labels["image"])


def test_rc_maes_teacher_sees_the_students_mask():
    config, student, teachers, views = setting("--recipe", "rc-mae")
    assert step(config, student, teachers, views)[1]["consistency"] == 0     # same weights, mask
    own_mask = teachers.reconstruction.predict_pixels

    def under_another_mask(imgs, mask_ratio, noise):
        return own_mask(imgs, mask_ratio, noise.flip(1))

    teachers.reconstruction.predict_pixels = under_another_mask
    assert step(config, student, teachers, views)[1]["consistency"] > 1e-3


@pytest.mark.parametrize("name", [
    name if name in ("pl-mae", "rc-mae") else pytest.param(name, marks=pytest.mark.slow)
    for name in VARIANTS])
def test_one_batch_is_overfitted(name):
    """Every term comes near the least it can be: 0 for reconstructions, the entropy of the labels
    for the losses of pseudo labels."""
    config, student, teachers, views = setting(*VARIANTS[name])
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for i in range(600):
        loss, terms, labels, targets = step(config, student, teachers, views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m = 0.9 if i < 200 else 1                          # at last the targets stand still
        teachers.follow(student, {"labelling": m, "reconstruction": m})
    for kind, q in labels.items():
        entropy = -torch.special.xlogy(q, q).sum(-1).mean()
        uneven, loss = 0, terms[kind]
        if config.balancing == "me-max":                   # the least is at most these labels'
            mean = q.flatten(0, -2).mean(0)
            uneven = math.log(q.shape[-1]) + torch.special.xlogy(mean, mean).sum()
            loss = loss + terms[f"{kind}_me_max"]
        assert loss < entropy + uneven + 0.1, kind
    if "rec" in terms:
        constant = between_images(targets["rec"])[0] if config.target == "tokens" else 1
        assert terms["rec"] < 0.1 * constant


@pytest.mark.parametrize("name", ["pl-mae", "mim-cluster", "rc-mae", "me-max", "centring"])
def test_a_step_in_bf16_is_near_one_in_fp32(name):
    """Where a cosine were rounded to bf16, a temperature of 0.0125 would turn the 0.004 into a
    third of a nat. Statistics and losses come out in fp32."""
    batch = setting(*VARIANTS[name], "--teacher-temperature", "0.0125", dtype=torch.float32)
    loss, terms, _, _ = step(*copy.deepcopy(batch))        # a copy: centring moves its centres
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half_terms, labels, _ = step(*batch)
    for x in (half_loss, *half_terms.values(), *labels.values()):
        assert x.dtype == torch.float32
    for key, value in terms.items():
        assert abs(half_terms[key] - value) < 0.03 * max(1, abs(value)), key
    assert abs(half_loss - loss) < 0.03 * loss


@pytest.mark.parametrize("name", ["pl-mae", "labels-and-consistency", "me-max"])
def test_losses_in_autocast_are_losses_outside(name):
    """To the bit. The class tokens lie so close together that bf16 finds other neighbours."""
    config, student, teachers, views = setting(*VARIANTS[name], dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predicted = student(views.student, config.mask_ratio, views.noise)
        _, _, labels, targets = step(config, student, teachers, views)
        unit = 1 + 0.01 * torch.randn(*predicted["unit"].shape)
        predicted["unit"] = torch.nn.functional.normalize(unit, dim=1)
        inside = train.losses(predicted, labels, targets, config)
        rounded = koleo(predicted["unit"], 4)
    with torch.no_grad():
        outside = train.losses(predicted, labels, targets, config)
    assert inside.keys() == outside.keys()
    assert all(torch.equal(inside[key], outside[key]) for key in inside)
    assert not torch.equal(rounded, outside["koleo"])      # or this test would say nothing


# --------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module", autouse=True)
def toys():
    """What is tested here does not depend on the width of the networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "micro", TOY_SIZE)
        yield


@pytest.fixture(scope="module")
def flags(small_flags):
    """20 steps in float64. The labelling teacher is not gone by the next step, as 0.3% of 20 would
    be."""
    return [*small_flags, "--image-clusters", "8", "--epochs", "5", "--eval-every", "5",
            "--precision", "fp64", "--labelling-half-life", "3"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """All variants, uninterrupted, in one process."""
    out = tmp_path_factory.mktemp("whole")
    all_recipes.main(out, *flags)
    return out


def losses_of(folder):
    """The log's lines about steps, without the times."""
    lines = [r for r in read_json_lines(folder / "metrics.jsonl") if "loss" in r]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in lines]


def test_two_teachers_of_equal_half_lives_are_one(flags, tmp_path, no_pictures):
    own = {"pl-mae": ["--reconstruction-half-life", "3:9"], "pl-mae-one-teacher": []}
    for recipe, more in own.items():
        train.main([*flags, "--out", str(tmp_path / recipe), "--recipe", recipe,
                    "--labelling-half-life", "3:9", *more])
    two, one = (torch.load(tmp_path / recipe / "checkpoint.pt") for recipe in own)
    for part in ("student", "labelling_teacher"):
        assert all(torch.equal(v, one[part][k]) for k, v in two[part].items())
    for name, value in two["reconstruction_teacher"].items():
        assert torch.equal(value, one["labelling_teacher"][name])
    assert "reconstruction_teacher" not in one
    losses = [[r["loss"] for r in losses_of(tmp_path / recipe)] for recipe in own]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_two_processes_equal_one(flags, whole, tmp_path):
    """Batch statistics are of the global batch: Sinkhorn, centres, ME-MAX, KoLeo, standardised
    targets. Losses and weights to 1e-8, in float64. `mae` also in two micro-batches against
    none."""
    run("tests/all_recipes.py", tmp_path, *flags, processes=2)
    for name in VARIANTS:
        one, two = losses_of(whole / name), losses_of(tmp_path / name)
        assert len(one) == len(two) == 20
        for a, b in zip(one, two):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-8), name
        one, two = (torch.load(f / name / "checkpoint.pt")["student"] for f in (whole, tmp_path))
        assert max((v - two[k]).abs().max().item() for k, v in one.items()) < 1e-8, name


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_continues_bit_for_bit(
        flags, whole, tmp_path, monkeypatch, no_pictures, name):
    own = [*flags, *VARIANTS[name], "--out", str(tmp_path), "--eval-every", "2"]

    def power_cut(step, *args):
        if step == 9:
            raise OSError("power cut")
        return rate(step, *args)

    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", power_cut)
    with pytest.raises(OSError):
        train.main(own)
    monkeypatch.setattr(train, "learning_rate", rate)
    train.main(own)                                        # from step 8
    cut, uncut = (torch.load(f / "checkpoint.pt") for f in (tmp_path, whole / name))
    assert cut.keys() == uncut.keys() and cut["step"] == 20
    for part in PARTS:
        assert all(torch.equal(v, cut[part][k]) for k, v in uncut.get(part, {}).items()), part
    assert losses_of(tmp_path) == losses_of(whole / name) and len(losses_of(tmp_path)) == 20


def test_logged_means_are_means_of_the_steps(flags, whole, tmp_path, no_pictures):
    """A line for five steps holds the means of five lines for one."""
    train.main([*flags, "--log-every", "5", "--out", str(tmp_path)])
    every, fifth = losses_of(whole / "pl-mae"), losses_of(tmp_path)
    assert [r["step"] for r in fifth] == [5, 10, 15, 20]
    for i, record in enumerate(fifth):
        lines = every[5 * i:5 * i + 5]
        for key in ("loss", "rec", "image", "patch", "koleo", "image_entropy", "patch_entropy"):
            mean = sum(r[key] for r in lines) / 5
            assert record[key] == pytest.approx(mean, rel=1e-9), key
        assert record["rec_constant"] == lines[-1]["rec_constant"]         # of the last step alone


def test_labels_of_a_short_run_beat_shuffled_ones(flags, tmp_path, no_pictures):
    """After a few epochs the student predicts the image pseudo labels of its own images better than
    those of others."""
    train.main([*flags, "--epochs", "40", "--eval-every", "40", "--colours", "0", "--precision",
                "fp32", "--out", str(tmp_path)])
    student, teachers, config = load_run(tmp_path / "checkpoint.pt")
    images = load_images("imagefolder", config.data_root, "test", 16)
    ids = torch.arange(len(images))
    imgs = standardised(images, ids, config.mean, config.std).double()
    student, teacher = student.double(), teachers.labelling.double()
    labels = make_labels(teacher, teacher.encode(imgs), config)["image"]
    scores = student(imgs, config.mask_ratio, torch.rand(len(imgs), 16))["image"]
    shuffled = [image_label_loss(scores, labels[torch.randperm(len(labels))]) for _ in range(20)]
    assert image_label_loss(scores, labels) < min(shuffled) - 0.1


@pytest.mark.parametrize("flags, words", [
    (["--image-clusters", "33"], "--image-clusters 33: more than the 32 samples"),
    (["--patch-clusters", "513"], "--patch-clusters 513: more than the 512 samples"),
    (["--image-clusters", "17", "--accumulate", "2"], "more than the 16 samples of a micro-batch"),
    (["--rec-weight", "0", "--image-weight", "0", "--patch-weight", "0"], "nothing to learn"),
    (["--target", "none", "--image-weight", "0", "--patch-weight", "0"], "nothing to learn"),
    (["--target", "none"], "use --patch-weight 0"),
    (["--views", "1", "--batch-size", "1"], "--remove-place: one view in a micro-batch"),
    (["--consistency-weight", "1"], "use --target pixels"),
    (["--recipe", "pl-mae-one-teacher", "--reconstruction-half-life", "9"],
     "use --labelling-half-life"),
    (["--accumulate", "32"], "--batch-size 16: must be a multiple"),
    (["--labelling-half-life", "-3"], "--labelling-half-life"),
    (["--labelling-half-life", "0.01"], "--labelling-half-life"),
    (["--views", "3"], "--views"),
])
def test_impossible_settings(small_run, flags, words, capsys):
    with pytest.raises((UsageError, SystemExit)) as stop:
        train.main(small_run + flags)
    assert words in str(stop.value) + capsys.readouterr().err


def test_many_clusters_for_few_samples_are_warned_about(small_run, tmp_path, capsys):
    train.main([*small_run, "--epochs", "0", "--image-clusters", "9"])
    assert "warning: --image-clusters 9 for 32 samples" in capsys.readouterr().err
    train.main([*small_run, "--epochs", "0", "--out", str(tmp_path / "fewer")])
    assert "warning" not in capsys.readouterr().err
