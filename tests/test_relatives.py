"""Four other ways to change an MAE: their parts, their steps, and whole runs of them."""

import copy
import json
from importlib import import_module
from pathlib import Path

import all_recipes
import pytest
import torch
import torch.nn.functional as F
from conftest import record_of, run
from test_train import assert_same_run, power_cut_at, refused

import train
from data import Views
from extras import finetune
from extras.relatives import __main__ as program
from extras.relatives import sdae
from mae import SIZES, plain_norm, random_masking
from support import checkpoint, settings
from support.command_line import UsageError
from support.files import read_json_lines
from teachers import make_teachers, momentum

NAMES = checkpoint.RELATIVES
SMALL = ["--img-size", "16", "--patch-size", "4", "--batch-size", "8"]
MICRO = SIZES["micro"]


def module(name):
    return import_module(f"extras.relatives.{name}")


@pytest.fixture(scope="module", autouse=True)
def toys():
    """What is tested here does not depend on the width of the networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "micro", all_recipes.RELATIVES_SIZE)
        yield


def setting(name, *flags, dtype=torch.float64):
    """Config, student, teachers, and the views of eight images: a batch of `training_step`."""
    config = settings.resolve([*SMALL, *flags], module(name))
    student = train.build(config, 3).to(dtype)
    teachers = make_teachers(student, config)
    imgs = torch.randn(8, 3, 16, 16, dtype=dtype)
    return config, student, teachers, Views(imgs, imgs, torch.rand(8, 16, dtype=dtype))


def step(config, student, teachers, views):
    return module(config.recipe).training_step(student, teachers, views, config)


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ------------------------------------------------------------------------------ what all have

@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_all_of_the_student_and_no_teacher(name):
    config, student, teachers, views = setting(name)
    before = copy.deepcopy(teachers.reconstruction)
    loss, terms, labels, targets = step(config, student, teachers, views)
    loss.backward()
    without = [n for n, p in student.named_parameters()
               if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert without == [] and labels == {}
    for p, q in zip(teachers.reconstruction.parameters(), before.parameters()):
        assert p.grad is None and torch.equal(p, q)
    assert not any(t.requires_grad for t in targets.values())


@pytest.mark.parametrize("name", NAMES)
def test_one_batch_is_overfitted(name):
    """The teacher stands still, so that SdAE's targets are as various as new tokens are."""
    config, student, teachers, views = setting(name, dtype=torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(300):
        loss, terms, _, _ = step(config, student, teachers, views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["rec"] < 0.1 * terms.get("rec_constant", 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_bf16_is_near_one_in_fp32(name):
    batch = setting(name, dtype=torch.float32)
    loss, terms, _, _ = step(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half_terms, _, _ = step(*batch)
    assert all(x.dtype == torch.float32 for x in (half_loss, *half_terms.values()))
    for key, value in terms.items():
        assert abs(half_terms[key] - value) < 0.03 * max(1, abs(value)), key


@pytest.mark.parametrize("name", NAMES)
def test_own_settings_are_flags_with_a_heading_and_the_row_is_the_method(name, capsys):
    config = settings.resolve(SMALL, module(name))
    for key, value in module(name).SETTINGS.items():
        assert getattr(config, key) == value
    assert config.recipe == name and config.out == f"runs/{name}-shapes-micro"
    with pytest.raises(UsageError, match="--image-weight 1.0: in .* it is 0.0; leave it out"):
        settings.resolve([*SMALL, "--image-weight", "1", "--image-clusters", "2"], module(name))
    with pytest.raises(SystemExit):
        settings.resolve(["--help"], module(name))
    own = set(vars(config)) - set(vars(settings.Config()))
    printed = capsys.readouterr().out
    assert all(f"--{each.replace('_', '-')}" in printed for each in own)
    assert (f"of {name}:" in printed) == bool(own)


# ---------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def flags(small_flags):
    return [*small_flags, "--precision", "fp64", "--eval-every", "2"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """All of them, uninterrupted, in one process."""
    out = tmp_path_factory.mktemp("whole")
    all_recipes.relatives(out, *flags)
    return out


def losses_of(folder):
    return [r["loss"] for r in read_json_lines(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_writes_what_ours_writes(name, whole):
    out = whole / name
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "curves.png",
            "reconstructions.png"} <= {path.name for path in out.iterdir()}
    assert len(losses_of(out)) == 12
    assert json.loads((out / "config.json").read_text())["recipe"] == name


def test_two_processes_equal_one(flags, whole, tmp_path):
    run("tests/all_recipes.py", "relatives", tmp_path, *flags, processes=2)
    for name in NAMES:
        one, two = losses_of(whole / name), losses_of(tmp_path / name)
        assert len(one) == len(two) == 12
        assert one == pytest.approx(two, abs=1e-8), name
        one, two = (torch.load(f / name / "checkpoint.pt")["student"] for f in (whole, tmp_path))
        assert max((v - two[k]).abs().max().item() for k, v in one.items()) < 1e-8, name


@pytest.mark.parametrize("name", NAMES)
def test_a_run_cut_off_and_continued_equals_one_that_was_not(
        name, flags, whole, tmp_path, monkeypatch, no_pictures):
    own = [*flags, "--out", str(tmp_path / name)]
    repair = power_cut_at(10, monkeypatch)             # a look at step 8 was the last
    with pytest.raises(OSError):
        program.main([name, *own])
    repair()
    program.main([name, *own])
    assert_same_run(whole / name, tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_trained_is_evaluated(name, whole, capsys):
    path = whole / name / "checkpoint.pt"
    found = record_of(capsys, "knn", "--checkpoint", path)
    assert found["tokens"].keys() == {"class", "mean"} and found["network"] == "student"
    found = record_of(capsys, "knn", "--checkpoint", path, "--network", "untrained")
    before = read_json_lines(whole / name / "metrics.jsonl")[0]
    assert before["step"] == 0 and found["network"] == "untrained"
    assert record_of(capsys, "diagnose", "--checkpoint", path)["effective_rank_mean"] > 1


@pytest.mark.parametrize("name", NAMES)
def test_what_was_trained_is_trained_further(name, whole, tmp_path, capsys):
    finetune.main(["--checkpoint", str(whole / name / "checkpoint.pt"), "--out", str(tmp_path),
                   "--epochs", "1", "--batch-size", "16", "--device", "cpu"])
    assert 0 <= json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] <= 1


# ------------------------------------------------------------------------------------- SdAE

@torch.no_grad()
def folds_of(folds, ratio="0.75"):
    """A batch, the ids of the patches in folds, and the teacher's tokens of these."""
    config, student, teachers, views = setting("sdae", "--mask-ratio", ratio)
    encoder = teachers.reconstruction.encoder
    encoder.norm.weight *= 1.5                             # a teacher of its own
    found = sdae.fold_tokens(encoder, views.student, config.mask_ratio, views.noise, folds)
    return encoder, views, *found


def test_folds_equal_separate_calls_of_the_encoder():
    encoder, views, ids, tokens = folds_of(3)
    for ids_fold, fold in zip(ids.split(4, dim=1), tokens.split(4, dim=1), strict=True):
        assert torch.equal(fold, plain_norm(encoder(views.student, ids_fold)[:, 1:]))


def test_a_fold_does_not_know_the_others():
    """Other pixels in the second fold leave the tokens of the first and the third to the bit."""
    encoder, views, ids, tokens = folds_of(3)
    imgs = views.student.clone()
    for image, patches in zip(imgs, ids[:, 4:8]):
        for i in patches.tolist():
            image[:, i // 4 * 4:i // 4 * 4 + 4, i % 4 * 4:i % 4 * 4 + 4] += 1
    _, other = sdae.fold_tokens(encoder, imgs, 0.75, views.noise, 3)
    assert torch.equal(other[:, :4], tokens[:, :4]) and torch.equal(other[:, 8:], tokens[:, 8:])
    assert ((other - tokens)[:, 4:8].abs().amax(-1) > 1e-6).all()


def test_every_masked_patch_is_in_one_fold_and_what_is_left_over_in_none():
    encoder, views, ids, _ = folds_of(3)
    found = torch.zeros(8, 16).scatter_add(1, ids, torch.ones(8, 12))
    _, mask, _ = random_masking(views.noise.float(), 0.75)
    assert torch.equal(found, mask)                        # once each, and no visible one
    _, views, ids, tokens = folds_of(5)                    # 5 x 2 of 12: two are left over
    assert ids.shape == tokens.shape[:2] == (8, 10)
    assert all(len(each.unique()) == 10 for each in ids)
    found = torch.zeros(8, 16).scatter_add(1, ids, torch.ones(8, 10))
    assert (found <= random_masking(views.noise.float(), 0.75)[1]).all()


def test_what_is_in_no_fold_is_not_in_the_loss(monkeypatch):
    config, student, teachers, views = setting("sdae", "--folds", "5")
    ids, _ = sdae.fold_tokens(teachers.reconstruction.encoder, views.student, 0.75, views.noise, 5)
    before = step(config, student, teachers, views)[1]["rec"]
    forward = sdae.Student.forward

    def other(self, *args):
        out = forward(self, *args)
        inside = torch.zeros(8, 16, 1, dtype=torch.bool).scatter(1, ids[..., None], True)
        return out | {"pred": torch.where(inside, out["pred"], 7.0)}

    monkeypatch.setattr(sdae.Student, "forward", other)
    assert torch.equal(step(config, student, teachers, views)[1]["rec"], before)


def test_the_loss_is_of_directions(monkeypatch):
    """0 for the tokens themselves, 4 for their opposite, whatever the length; else twice what the
    cosine, over the features of a token less its mean, lacks to 1."""
    config, student, teachers, views = setting("sdae")
    ids, tokens = sdae.fold_tokens(teachers.reconstruction.encoder, views.student, 0.75,
                                   views.noise, 3)
    places = ids[..., None].expand(-1, -1, tokens.shape[-1])
    told = torch.randn(8, 16, tokens.shape[-1], dtype=torch.float64)

    def loss(pred):
        monkeypatch.setattr(sdae.pseudo_labels.Student, "forward", lambda *args: {
            "pred": told.scatter(1, places, pred)})
        return step(config, student, teachers, views)[1]["rec"]

    close(loss(3 * tokens), torch.tensor(0.0, dtype=torch.float64), 1e-6)
    close(loss(-tokens), torch.tensor(4.0, dtype=torch.float64), 1e-4)
    pred = torch.randn_like(tokens)
    cosine = F.cosine_similarity(pred - pred.mean(-1, keepdim=True), tokens, dim=-1)
    close(loss(pred), (2 - 2 * cosine).mean(), 1e-4)
    close(loss(5 * pred), loss(pred), 1e-4)                # the norm adds 1e-5 to the variance


def test_the_loss_of_places_is_that_of_the_best_token_for_each_place():
    config, student, teachers, views = setting("sdae")
    ids, tokens = sdae.fold_tokens(teachers.reconstruction.encoder, views.student, 0.75,
                                   views.noise, 3)
    best = torch.zeros(16, tokens.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([best], max_iter=200, line_search_fn="strong_wolfe")
    best.data.normal_()

    def closure():
        optimizer.zero_grad()
        loss = (plain_norm(best)[ids] - tokens).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    close(sdae.loss_of_places(ids, tokens, 16), closure().detach(), 1e-3)


def test_sdaes_teacher_follows_in_the_schedule_of_the_run(whole):
    momenta = [r["reconstruction_momentum"]
               for r in read_json_lines(whole / "sdae" / "metrics.jsonl") if "loss" in r]
    assert momenta[0] == pytest.approx(momentum(0, 12, "5.7%:23%"))
    assert momenta[-1] == pytest.approx(0.5 ** (1 / (0.23 * 12)))


def test_another_setting_of_its_own_is_another_run(flags, whole, no_pictures):
    stored = json.loads((whole / "sdae" / "config.json").read_text())
    assert stored["folds"] == 3
    own = ["sdae", *flags, "--out", str(whole / "sdae")]
    program.main(own)                                      # finished already
    with pytest.raises(UsageError, match="folds was 3, now 2"):
        program.main([*own, "--folds", "2"])


# ------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("name, more, words", [
    ("sdae", ["--folds", "13"], "--folds 13: more than the 12 masked patches"),
    ("sdae", ["--folds", "0"], "--folds 0: must be 1 or more"),
    ("sdae", ["--target", "pixels"], "--target pixels: in sdae it is tokens; leave it out"),
    ("sdae", ["--views", "2"], "--views 2: in sdae it is 1; leave it out"),
    ("sdae", ["--recipe", "mae"], "--recipe"),
    ("cake", [], "invalid choice: 'cake'"),
])
def test_what_cannot_be_is_one_line(name, more, words, small_run, capsys, monkeypatch):
    error = refused(lambda: program.main([name, *small_run, *more]), capsys, monkeypatch)
    assert error.count("\n") == 1 and words in error
    assert not Path(small_run[-1]).exists()


def test_without_a_name_it_lists_them(capsys):
    program.main([])
    assert [line.split(",")[0].split(":")[0].lower() for line in
            capsys.readouterr().out.splitlines()] == list(NAMES)


# ------------------------------------------------------------------------------- do they learn

@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The folder that the scenes are drawn into, once."""
    return tmp_path_factory.mktemp("data")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_five_epochs_on_shapes_beat_the_mean_token_of_its_place(
        name, shapes, tmp_path, no_pictures, monkeypatch):
    """Pixels, normed within a patch, have a mean of about 0 at each place: that loses about 1."""
    monkeypatch.setitem(SIZES, "micro", MICRO)
    program.main([name, "--data", "shapes", "--data-root", str(shapes), "--epochs", "5",
                  "--eval-every", "5", "--device", "cpu", "--out", str(tmp_path)])
    last = [r for r in read_json_lines(tmp_path / "metrics.jsonl") if "loss" in r][-1]
    assert last["rec"] < 0.5 * last.get("rec_constant", 0.9)
