"""The step and the recipes: properties of the step's functions, and whole runs of every recipe."""

import copy
import math

import pytest
import torch

import all_recipes
import train
from checkpoint import read_json_lines
from conftest import TOY, run, same
from extras.command_line import UsageError
from pseudo_labels import Student
from teachers import ema_update, make_teacher


def setting(*flags, seed=0):
    """Config, student, teachers, centres, a batch of four images in two views (or one), and its mask noise."""
    config = train.parse(["--img-size", "16", "--patch-size", "4", "--batch-size", "4", "--class-clusters", "4", "--data-clusters", "7", *flags])
    torch.manual_seed(seed)
    arch = dict(TOY, decoder_embed_dim=64)
    labelled = {k: c for k, c, w in (("class", 4, config.class_weight), ("data", 7, config.data_weight)) if w}
    if config.target == "tokens":
        arch["target_dim"] = 32
    student = Student(**arch, **{f"{k}_clusters": c for k, c in labelled.items()}).double()
    teachers = {}
    if labelled:
        teachers["labelling"] = make_teacher(student, ("decoder_", "mask_token"))
    if not labelled or config.teachers == 2 or config.consistency_weight:
        teachers["reconstruction"] = make_teacher(student, ("class_head", "data_head") + (() if config.consistency_weight else ("decoder_", "mask_token")))
    centres = {k: torch.zeros(c, dtype=torch.float64) for k, c in labelled.items()}
    imgs = torch.randn(4 * config.views, 3, 16, 16, dtype=torch.float64)
    return config, student, teachers, centres, imgs, torch.rand(len(imgs) * config.masks, 16, dtype=torch.float64)


def step(config, student, teachers, centres, imgs, noise):
    """One step as in train.main -> terms, labels, targets."""
    predicted = student(imgs, config.mask_ratio, noise)
    with torch.no_grad():
        u, labels = train.labelling_teacher_step(teachers["labelling"], imgs, centres, config) if centres else (None, {})
        targets = train.reconstruction_teacher_step(teachers.get("reconstruction"), student, u, imgs, noise, config)
    return train.losses(predicted, labels, targets, config), labels, targets


@pytest.mark.parametrize("flags", all_recipes.VARIANTS.values(), ids=all_recipes.VARIANTS)
def test_gradient_reaches_the_student_and_no_teacher(flags):
    config, student, teachers, *rest = setting(*flags)
    before = copy.deepcopy(teachers)
    terms, labels, targets = step(config, student, teachers, *rest)
    terms["loss"].backward()
    idle = ("decoder", "mask_token") if flags == all_recipes.VARIANTS["class-labels"] else ()
    without = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None and not n.startswith(idle)]
    assert not without
    if labels:
        heads = [p for n, p in student.named_parameters() if "_head" in n]
        assert heads and all(p.grad.abs().sum() > 0 for p in heads)
    for name, teacher in teachers.items():
        assert all(p.grad is None and torch.equal(p, q) for p, q in zip(teacher.parameters(), before[name].parameters()))
    assert not any(t.requires_grad for t in (*labels.values(), *targets.values()))


def test_loss_is_the_weighted_sum():
    config, *rest = setting("--rec-weight", "2", "--class-weight", "3", "--data-weight", "0.25", "--koleo-weight", "4")
    terms, _, _ = step(config, *rest)
    torch.testing.assert_close(terms["loss"], 2 * terms["rec"] + 3 * terms["class"] + 0.25 * terms["data"] + 4 * terms["koleo"])


def test_token_loss_is_its_formula():
    """Mean over masked patches of |t - target|^2 / d, the teacher's tokens standardised over the batch."""
    config, student, teachers, centres, imgs, noise = setting()
    teachers["reconstruction"].norm.weight.data *= 1.5     # a teacher of its own
    terms, _, _ = step(config, student, teachers, centres, imgs, noise)
    r = teachers["reconstruction"].encode(imgs)[:, 1:]
    target = (r - r.mean((0, 1))) / (r.var((0, 1), unbiased=False) + 1e-6).sqrt()
    out = student(imgs, config.mask_ratio, noise)
    loop = [((out["pred"][b, n] - target[b, n]) ** 2).sum() / 32 for b in range(8) for n in range(16) if out["mask"][b, n]]
    torch.testing.assert_close(terms["rec"], torch.stack(loop).mean())


def test_swapping_the_views_swaps_the_class_labels_and_nothing_else():
    config, _, teachers, centres, imgs, _ = setting()
    u, labels = train.labelling_teacher_step(teachers["labelling"], imgs, centres, config)
    v, swapped = train.labelling_teacher_step(teachers["labelling"], imgs.roll(4, 0), centres, config)
    close = torch.testing.assert_close
    close(v, u.roll(4, 0)), close(swapped["data"], labels["data"].roll(4, 0)), close(swapped["class"], labels["class"].roll(4, 0))
    own = setting("--views", "1")[0]                       # with one view a class token has its own label: the two are crossed
    close(train.labelling_teacher_step(teachers["labelling"], imgs, centres, own)[1]["class"], labels["class"].roll(4, 0))


def test_all_masks_of_a_view_have_its_labels():
    config, student, teachers, centres, imgs, noise = setting("--masks", "2", "--mask-ratio", "0.5", "--koleo-weight", "0")
    both, _, _ = step(config, student, teachers, centres, imgs, noise)
    one = copy.copy(config)
    one.masks = 1
    each = [step(one, student, teachers, centres, imgs, part)[0] for part in noise.chunk(2)]
    for name in both:
        torch.testing.assert_close(both[name], (each[0][name] + each[1][name]) / 2)


def test_rc_maes_teacher_sees_the_students_mask():
    config, student, teachers, centres, imgs, noise = setting("--recipe", "rc-mae")
    assert step(config, student, teachers, centres, imgs, noise)[0]["consistency"] == 0     # same weights, same mask
    predicted = student(imgs, config.mask_ratio, noise)
    other = train.reconstruction_teacher_step(teachers["reconstruction"], student, None, imgs, noise.flip(1), config)
    assert train.losses(predicted, {}, other, config)["consistency"] > 1e-3


@pytest.mark.parametrize("flags", all_recipes.VARIANTS.values(), ids=all_recipes.VARIANTS)
def test_one_batch_is_overfitted(flags):
    """Every term comes near the least it can be: 0 for reconstructions, the entropy of the labels for label losses."""
    config, student, teachers, centres, imgs, noise = setting(*flags)
    noise = noise[:len(imgs)].repeat(config.masks, 1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for i in range(600):
        terms, labels, targets = step(config, student, teachers, centres, imgs, noise)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        for teacher in teachers.values():
            ema_update(teacher, student, 0.9 if i < 200 else 1)                # at last the targets stand still
    for name, q in labels.items():
        entropy = -torch.special.xlogy(q, q).sum(-1).mean()
        mean = q.flatten(0, -2).mean(0)                    # of ME-MAX the least is at most that of predicting the labels
        uneven = math.log(q.shape[-1]) + torch.special.xlogy(mean, mean).sum() if config.balancing == "me-max" else 0
        assert terms[name] + terms.get(f"{name}_me_max", 0) < entropy + uneven + 0.1, name
    if "rec" in terms:
        assert terms["rec"] < 0.1 * targets.get("rec_constant", 1)


def test_two_teachers_of_equal_half_lives_are_one(small_run, tmp_path):
    for recipe, second in (("pl-mae", ["--reconstruction-half-life", "3:9"]), ("pl-mae-one-teacher", [])):
        train.main([*map(str, small_run[:-1]), str(tmp_path / recipe), "--recipe", recipe, "--labelling-half-life", "3:9", *second])
    two, one = (torch.load(tmp_path / r / "checkpoint.pt") for r in ("pl-mae", "pl-mae-one-teacher"))
    for part in ("model", "labelling_teacher"):
        assert all(torch.equal(v, one[part][k]) for k, v in two[part].items())
    assert all(torch.equal(v, one["labelling_teacher"][k]) for k, v in two["reconstruction_teacher"].items())
    assert "reconstruction_teacher" not in one
    losses = [[r["loss"] for r in read_json_lines(tmp_path / recipe / "metrics.jsonl") if "loss" in r] for recipe in ("pl-mae", "pl-mae-one-teacher")]
    assert losses[0] == losses[1] and len(losses[0]) == 12


@pytest.fixture(scope="module")
def flags(photos):
    return ["--data", "imagefolder", "--data-root", str(photos), "--img-size", "16", "--patch-size", "4", "--batch-size", "16",
            "--class-clusters", "8", "--data-clusters", "16", "--epochs", "5", "--eval-every", "5", "--log-every", "1", "--device", "cpu",
            "--precision", "fp64", "--labelling-half-life", "3"]        # not gone by the next step, as 0.003 of 20 would be


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """All variants, 20 steps in float64, uninterrupted."""
    out = tmp_path_factory.mktemp("whole")
    all_recipes.main(out, *flags)
    return out


def test_two_processes_equal_one(flags, whole, tmp_path):
    """Batch statistics are of the global batch: Sinkhorn, centres, ME-MAX, target standardisation; losses, weights to 1e-8."""
    run("tests/all_recipes.py", tmp_path, *flags, processes=2)
    for name in all_recipes.VARIANTS:
        assert same(whole / name, tmp_path / name, exact=False) == 20 + 2


@pytest.mark.parametrize("name", all_recipes.VARIANTS)
def test_every_recipe_continues_bit_for_bit(flags, whole, tmp_path, monkeypatch, name):
    own, rate = [*flags, *all_recipes.VARIANTS[name], "--out", str(tmp_path), "--eval-every", "2"], train.learning_rate

    def power_cut(step, *args):
        if step == 9:
            raise OSError("power cut")
        return rate(step, *args)

    monkeypatch.setattr(train, "learning_rate", power_cut)
    with pytest.raises(OSError):
        train.main(own)
    monkeypatch.setattr(train, "learning_rate", rate)
    train.main(own)                                        # from step 8
    cut, all_ = (torch.load(folder / "checkpoint.pt") for folder in (tmp_path, whole / name))
    assert cut.keys() == all_.keys() and cut["step"] == 20
    for part in ("model", "labelling_teacher", "reconstruction_teacher", "centres"):
        assert all(torch.equal(v, cut[part][k]) for k, v in all_.get(part, {}).items())
    terms = [[{k: v for k, v in r.items() if k not in ("images_per_s", "data_wait", "eta_s")} for r in read_json_lines(folder / "metrics.jsonl")
              if "loss" in r] for folder in (tmp_path, whole / name)]
    assert terms[0] == terms[1] and len(terms[0]) == 20


@pytest.mark.parametrize("flags, words", [
    (["--class-clusters", "33"], "--class-clusters 33: more than the 32 samples"),
    (["--data-clusters", "513"], "--data-clusters 513: more than the 512 samples"),
    (["--class-clusters", "17", "--accumulate", "2"], "more than the 16 samples of a micro-batch"),
    (["--rec-weight", "0", "--class-weight", "0", "--data-weight", "0"], "nothing to learn"),
    (["--consistency-weight", "1"], "use --target pixels"),
    (["--recipe", "pl-mae-one-teacher", "--reconstruction-half-life", "0.5"], "use --labelling-half-life"),
    (["--accumulate", "32"], "--batch-size 16: must be a multiple"),
    (["--labelling-half-life", "-3"], "--labelling-half-life"),
    (["--views", "3"], "--views"),
])
def test_impossible_settings(small_run, flags, words, capsys):
    with pytest.raises((UsageError, SystemExit)) as stop:
        train.main([str(f) for f in small_run] + flags)
    assert words in (str(stop.value) + capsys.readouterr().err) and not small_run[-1].exists()


def test_many_clusters_for_few_samples_are_warned_about(small_run, capsys):
    train.main([*map(str, small_run), "--epochs", "0", "--class-clusters", "9"])
    assert "warning: --class-clusters 9 for 32 samples" in capsys.readouterr().err
    train.main([*map(str, small_run[:-1]), str(small_run[-1]) + "2", "--epochs", "0"])
    assert "warning" not in capsys.readouterr().err
