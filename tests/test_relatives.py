"""Four other ways to change an MAE: their parts, their steps, and whole runs of them."""

import copy
import json
import math
from importlib import import_module
from itertools import combinations
from pathlib import Path

import all_recipes
import pytest
import torch
import torch.nn.functional as F
from conftest import record_of, run
from test_train import assert_same_run, power_cut_at, refused

import eval as evaluation
import mae
import train
from data import Views
from extras import finetune
from extras.relatives import __main__ as program
from extras.relatives import cae, greenmim, mixedae, sdae
from mae import SIZES, masked_mse, pixel_target, plain_norm, random_masking, restore_tokens
from support import checkpoint, report, settings
from support.command_line import UsageError
from support.datasets import load_images
from support.files import read_json_lines
from support.health import reconstruct, signs_of_collapse
from support.pictures import curves
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_batch_is_overfitted(name):
    """The teacher stands still, so that SdAE's targets are as various as new tokens are. Images are
    coarse: these networks are 32 wide, and of noise a patch would have 48 numbers to say."""
    config, student, teachers, views = setting(name, dtype=torch.float32)
    imgs = F.interpolate(torch.randn(8, 3, 8, 8), 16)
    views = views._replace(student=imgs, teacher=imgs)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(600):
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
    learning = [p for p in batch[1].parameters() if p.requires_grad]
    whole, half = (torch.autograd.grad(each, learning) for each in (loss, half_loss))
    norm, off = (sum(x.square().sum() for x in each) ** 0.5 for each in (
        whole, [a - b for a, b in zip(whole, half)]))
    assert off < 0.2 * norm


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


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "greenmim"])
def test_a_step_is_one_graph(name):
    """As --compile compiles it, but quickly."""
    config, student, teachers, views = setting(name)
    torch.compiler.reset()
    whole = torch.compile(module(name).training_step, backend="aot_eager", fullgraph=True,
                          dynamic=False)
    close(whole(student, teachers, views, config)[0], step(config, student, teachers, views)[0],
          1e-10)


# ---------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def flags(small_flags):
    return [*small_flags, "--precision", "fp64", "--epochs", "2"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """All of them, uninterrupted, in one process; without pictures, which take most of the time."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for each in ("curves", "draw_rows"):
            patch.setattr(report, each, lambda *args: None)
        all_recipes.relatives(out, *flags)
    return out


def losses_of(folder):
    return [r["loss"] for r in read_json_lines(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_logs_and_draws_what_ours_does(name, whole, tmp_path):
    records = read_json_lines(whole / name / "metrics.jsonl")
    assert len(losses_of(whole / name)) == 8
    assert [r["step"] for r in records if "knn_mean" in r] == [0, 4, 8]
    assert json.loads((whole / name / "config.json").read_text())["recipe"] == name
    student, teachers, config = checkpoint.load_run(whole / name / "checkpoint.pt")
    images = load_images("imagefolder", config.data_root, "test", 16)
    rows = reconstruct(student, teachers.reconstruction, config, images, torch.arange(18),
                       torch.rand(8, 16), config.mean, config.std, torch.device("cpu"))
    assert len(rows["masked"]) == len(rows["prediction"]) == 8
    if name in ("cae", "mixedae"):                         # which have losses of their own
        curves(records, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 1000


def test_two_processes_equal_one(flags, whole, tmp_path):
    run("tests/all_recipes.py", "relatives", tmp_path, *flags, processes=2)
    for name in NAMES:
        one, two = losses_of(whole / name), losses_of(tmp_path / name)
        assert len(one) == len(two) == 8
        assert one == pytest.approx(two, abs=1e-8), name
        one, two = (torch.load(f / name / "checkpoint.pt")["student"] for f in (whole, tmp_path))
        assert max((v - two[k]).abs().max().item() for k, v in one.items()) < 1e-8, name


@pytest.mark.parametrize("name", NAMES)
def test_a_run_cut_off_and_continued_equals_one_that_was_not(
        name, flags, whole, tmp_path, monkeypatch, no_pictures):
    own = [*flags, "--out", str(tmp_path / name)]
    repair = power_cut_at(6, monkeypatch)              # a look at step 4 was the last
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
    assert momenta[0] == pytest.approx(momentum(0, 8, "5.7%:23%"))
    assert momenta[-1] == pytest.approx(0.5 ** (1 / (0.23 * 8)))


def test_another_setting_of_its_own_is_another_run(flags, whole, no_pictures):
    stored = json.loads((whole / "sdae" / "config.json").read_text())
    assert stored["folds"] == 3
    own = ["sdae", *flags, "--out", str(whole / "sdae")]
    program.main(own)                                      # finished already
    with pytest.raises(UsageError, match="folds was 3, now 2"):
        program.main([*own, "--folds", "2"])


# -------------------------------------------------------------------------------------- CAE

def test_cross_attention_is_torchs():
    ours = cae.CrossAttention(32, 4).double()
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for layer in (ours.q, ours.k, ours.v, ours.proj):
            layer.bias.normal_()
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    q, k, v = (torch.randn(3, n, 32, dtype=torch.float64) for n in (5, 9, 9))
    found = ours(q, k, v)
    close(found, theirs(q, k, v)[0], 1e-12)
    ours.k.bias.data.normal_(std=9)                        # adds the same to all scores of a query
    close(ours(q, k, v), found, 1e-12)


def cae_forward(*changes):
    config, student, _, views = setting("cae")
    for change in changes:
        change(student)
    return config, student, views, student(views.student, config.mask_ratio, views.noise)


def test_half_of_the_patches_are_masked_and_they_come_in_blocks():
    """More neighbours are masked alike than in noise that is not smoothed."""
    config, student, views, out = cae_forward()
    mask, plain = out["mask"], random_masking(views.noise, 0.5)[1]
    assert (mask.sum(1) == 8).all()
    alike = [sum((each.unflatten(1, (4, 4)).diff(dim=d) == 0).float().mean() for d in (1, 2))
             for each in (mask, plain)]
    assert alike[0] > alike[1] + 0.2


def test_the_target_is_what_the_encoder_makes_of_masked_patches_and_has_no_gradient():
    config, student, views, out = cae_forward()
    target, encoder = out["target"], student.mae.encoder
    assert not target.requires_grad and out["latents"].requires_grad
    masked = out["mask"].nonzero()[:, 1].view(8, 8)        # in order; the student's are shuffled
    tokens = encoder(views.student, masked)[:, 1:]
    nearest = torch.cdist(target, tokens.detach())
    close(nearest.amin(-1), torch.zeros(8, 8, dtype=torch.float64), 1e-6)
    assert (nearest.argmin(-1).sort(-1).values == torch.arange(8)).all()


def test_one_fold_and_a_teacher_that_is_the_student_make_caes_target():
    config, student, views, out = cae_forward()
    noise = torch.nn.functional.pad(views.noise.unflatten(1, (4, 4)), (1, 1, 1, 1), "replicate")
    noise = F.avg_pool2d(noise, 3, 1).flatten(1)
    _, tokens = sdae.fold_tokens(student.mae.encoder, views.student, 0.5, noise, 1)
    assert torch.equal(tokens, plain_norm(out["target"]))


def test_without_rec_the_alignment_trains_encoder_and_regressor_alone():
    config, student, teachers, views = setting("cae", "--rec-weight", "1e-300")
    step(config, student, teachers, views)[0].backward()
    with_gradient = {name.split(".")[0] for name, p in student.named_parameters()
                     if p.grad is not None and p.grad.abs().max() > 1e-100}
    assert with_gradient == {"mae", "mask_token", "regressor", "norm"}


def test_no_loss_reads_the_class_token():
    """What the encoder makes of it has no gradient; it is trained as a key alone."""
    config, student, teachers, views = setting("cae")
    kept = []

    def keep(module, inputs, output):
        if output.requires_grad:
            output.retain_grad()
            kept.append(output)

    student.mae.encoder.register_forward_hook(keep)
    step(config, student, teachers, views)[0].backward()
    [tokens] = kept
    assert (tokens.grad[:, 0] == 0).all() and (tokens.grad[:, 1:] != 0).any()


def test_the_decoder_sees_the_latents_alone():
    """With latents that do not depend on the image, neither does the prediction."""
    def constant(student):
        student.norm.weight.data.zero_()
        student.norm.bias.data.normal_()

    config, student, views, out = cae_forward(constant)
    other = student(torch.randn_like(views.student), config.mask_ratio, views.noise)
    assert torch.equal(out["pred"], other["pred"]) and out["pred"].abs().sum() > 0


def test_the_order_of_visible_tokens_does_not_matter():
    block = cae.RegressorBlock(32, 4, 4.0).double()
    x, visible, place, visible_place = (torch.randn(2, n, 32, dtype=torch.float64)
                                        for n in (5, 7, 5, 7))
    order = torch.randperm(7)
    close(block(x, visible[:, order], place, visible_place[:, order]),
          block(x, visible, place, visible_place), 1e-12)


def test_tokens_that_become_alike_are_warned_of():
    healthy = {"align": 0.1, "align_variance": 0.6}
    assert signs_of_collapse(healthy) == set()
    [sign] = signs_of_collapse({"align": 0.001, "align_variance": 0.002})
    assert "makes all alike" in sign
    config, student, teachers, views = setting("cae")
    for p in (student.mae.encoder.norm.weight, ):          # an encoder that has collapsed
        p.data.mul_(1e-3)
    terms = step(config, student, teachers, views)[1]
    assert signs_of_collapse({key: value.item() for key, value in terms.items()})
    assert report.line({"step": 1, "epoch": 1, "loss": 1, "images_per_s": 1, "eta_s": 1,
                        **healthy}).count("align 0.100 (variance 0.60)") == 1


# ------------------------------------------------------------------------------------ MixedAE

def test_true_owners_make_mae_on_four_views_of_it(monkeypatch):
    """Where each patch looks only at those of its own image, and nothing at the class token,
    predictions and loss are MAE's, with masks that are complementary."""
    config, student, teachers, views = setting("mixedae")
    ranks = views.noise[::4].argsort(1).argsort(1)                                         # 2 16
    owner = ranks // 4

    def true_owners(scores, keep):
        own = (owner[:, None] == owner[..., None])[:, None].expand_as(scores[..., 1:, 1:])
        allowed = F.pad(own, (1, 0, 1, 0), value=False)
        allowed[..., 0, 0] = True                          # the class token looks at itself
        return allowed

    monkeypatch.setattr(mixedae, "most_alike", true_owners)
    out = student(views.student, config.mask_ratio, views.noise)
    loss = step(config, student, teachers, views)[1]["rec"]
    assert torch.equal(out["mask"].view(2, 4, 16).sum(1), torch.full((2, 16), 3.0).double())

    # MAE, view by view, its encoder without the class token.
    encoder, decoder = student.mae.encoder, student.mae.decoder
    cls = encoder.cls_token
    for block in encoder.blocks:
        cls = block(cls)
    preds = []
    for i, img in enumerate(views.student):
        ids = (owner[i // 4] == i % 4).nonzero()[:, 0]
        x = (encoder.patch_embed(img[None]) + encoder.pos_embed[:, 1:])[:, ids]
        for block in encoder.blocks:
            x = block(x)
        mask = out["mask"][i]
        restore = torch.cat([ids, mask.nonzero()[:, 0]]).argsort()[None]
        latent = torch.cat([encoder.norm(cls), encoder.norm(x)], dim=1)
        preds.append(decoder.pred(decoder(latent, restore)))
    close(out["pred"], torch.cat(preds), 1e-6)
    want = masked_mse(torch.cat(preds), pixel_target(views.student, 4), out["mask"])
    close(loss, want, 1e-6)


def test_topk_of_all_keys_is_plain_attention():
    block = setting("mixedae")[1].mae.encoder.blocks[0]
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    found, allowed = mixedae.mixed_attention(block.attn, x, 16)
    assert allowed.all()
    close(found, block.attn(x), 1e-12)


def test_topk_keeps_the_likeliest_and_the_class_token():
    scores = torch.randn(2, 3, 17, 17)
    allowed = mixedae.most_alike(scores, 4)
    assert allowed[..., 0, :].all() and allowed[..., :, 0].all()
    kept, patches = allowed[..., 1:, 1:], scores[..., 1:, 1:]
    assert (kept.sum(-1) == 4).all()
    assert (patches.masked_fill(~kept, 9).amin(-1) > patches.masked_fill(kept, -9).amax(-1)).all()
    assert (mixedae.most_alike(torch.zeros(1, 1, 17, 17), 4)[..., 1:, 1:].sum(-1) == 4).all()


class Nothing:
    """A block that adds nothing."""
    attn, norm1, norm2, mlp = None, torch.nn.Identity(), torch.nn.Identity(), torch.zeros_like


@pytest.mark.parametrize("ratio, G", [(0.75, 4), (0.5, 2)])
def test_masks_of_a_mix_share_out_the_places_and_unmixing_puts_patches_back(ratio, G, monkeypatch):
    config, student, _, views = setting("mixedae", "--mask-ratio", str(ratio))
    N = 16

    encoder, seen = student.mae.encoder, {}
    del encoder.blocks, encoder.norm
    encoder.blocks, encoder.norm = [Nothing], torch.nn.Identity()
    monkeypatch.setattr(student.mae, "forward_decoder", lambda latent, ids: seen.update(
        latent=latent, ids=ids) or latent.new_zeros(8, N, 32))
    monkeypatch.setattr(mixedae, "mixed_attention", lambda attn, x, keep: (
        torch.zeros_like(x), torch.ones(len(x), 1, N + 1, N + 1, dtype=torch.bool)))
    out = student(views.student, ratio, views.noise)
    mask = out["mask"]
    assert (mask.sum(1) == N - N // G).all()
    assert (mask.view(8 // G, G, N).sum(1) == G - 1).all()
    whole = encoder.patch_embed(views.student) + encoder.pos_embed[:, 1:]                # B N D
    back = restore_tokens(seen["latent"][:, 1:], seen["ids"], torch.zeros(1, 1, 32))
    close(back, whole * (1 - mask[..., None]), 1e-12)
    # chance: all keys kept, so the share of the own image is 1 / G
    assert out["attention_own"].item() == pytest.approx(1 / G)


def test_a_few_images_for_a_picture_are_filled_up():
    """Three of four: a mix needs a fourth, which is the first once more."""
    config, student, _, views = setting("mixedae")
    out = student(views.student[:3], 0.75, views.noise[:3])
    four = student(views.student[[0, 1, 2, 0]], 0.75, views.noise[[0, 1, 2, 0]])
    assert out["pred"].shape[0] == 3 and torch.equal(out["pred"], four["pred"][:3])


def test_the_contrast_lies_between_its_lines():
    owner = torch.arange(16).repeat(2, 1) // 4
    alike = torch.ones(2, 16, 8)
    close(mixedae.contrast(alike, owner, 0.25), torch.tensor(math.log(15)), 1e-6)
    apart = F.one_hot(owner, 8).float()
    close(mixedae.contrast(apart, owner, 0.01), torch.tensor(math.log(3)), 1e-6)
    terms = step(*setting("mixedae"))[1]
    assert terms["contrast_alike"] == pytest.approx(math.log(15))
    assert terms["contrast_apart"] == pytest.approx(math.log(3))


def test_the_contrast_is_its_formula():
    tokens, owner = torch.randn(2, 16, 8).double(), torch.randperm(16).repeat(2, 1) // 4
    unit, losses = F.normalize(tokens, dim=-1), []
    for x in range(2):
        for i in range(16):
            others = [j for j in range(16) if j != i]
            total = sum(math.exp(unit[x, i] @ unit[x, j] / 0.5) for j in others)
            losses += [-math.log(math.exp(unit[x, i] @ unit[x, j] / 0.5) / total)
                       for j in others if owner[x, j] == owner[x, i]]
    want = torch.tensor(sum(losses) / len(losses), dtype=torch.float64)
    close(mixedae.contrast(tokens, owner, 0.5), want, 1e-9)


def test_gradient_reaches_the_patches_of_all_views():
    config, student, teachers, views = setting("mixedae")
    imgs = views.student.clone().requires_grad_()
    out = student(imgs, 0.75, views.noise)
    out["pred"][0].square().sum().backward()               # of the first view: TopK sees them all
    assert (imgs.grad[:4].abs().amax((1, 2, 3)) > 0).all()
    assert (imgs.grad[4:] == 0).all()                      # another mix


def test_the_pictures_of_a_segment_code_have_it_too():
    student = setting("mixedae", "--segment-code")[1]
    assert student.segment_code and not setting("mixedae")[1].segment_code


@pytest.mark.slow
def test_a_segment_code_solves_the_contrast_without_looking():
    """On images of noise no patch says whose it is: without the code the contrast stays at chance,
    with it, it falls (found: 2.454 and 2.708, where ln 15 = 2.708). Contrast nearly alone, new
    images at each step."""
    found = {}
    for flag in ("--segment-code", "--no-segment-code"):
        torch.manual_seed(0)
        config, student, teachers, _ = setting("mixedae", flag, "--contrast-weight", "1",
                                               "--rec-weight", "1e-3", dtype=torch.float32)
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        last = []
        for _ in range(500):
            views = Views(torch.randn(32, 3, 16, 16), None, torch.rand(32, 16))
            loss, terms, _, _ = step(config, student, teachers, views)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last.append(terms["contrast"].item())
        found[flag] = sum(last[-50:]) / 50
    chance = math.log(15)
    assert found["--no-segment-code"] == pytest.approx(chance, abs=0.005)
    assert found["--segment-code"] < chance - 0.2


# ----------------------------------------------------------------------------------- GreenMIM

def encoder_of_greenmim():
    """64 units of four fine patches: 16 x 16 tokens, then 8 x 8, windows of 4."""
    return greenmim.Encoder(4, 32, 4, 3, 32, 4, 2, 4.0).double()


def masked_attention(encoder, imgs, ids_keep):
    """The same by attention over all visible tokens, where other windows are masked."""
    columns = encoder.grid[1]
    x = encoder.patch_embed(imgs) + encoder.pos_embed[:, 1:]                         # B 4N D/2
    units = ids_keep[0].tolist()
    fine = [(2 * (u // columns) + i, 2 * (u % columns) + j)
            for u in units for i in (0, 1) for j in (0, 1)]
    x = x[:, [r * 2 * columns + c for r, c in fine]]
    coarse = [(u // columns, u % columns) for u in units]
    for number, block in enumerate(encoder.blocks):
        places = fine if number < 2 else coarse
        if number == 2:
            x = encoder.merge(x.reshape(len(x), len(units), -1))
        shift = 2 * (number % 2)
        window = [((r + shift) // 4, (c + shift) // 4) for r, c in places]
        allowed = torch.tensor([[a == b for b in window] for a in window])
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(
            -1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, allowed)
        x = x + block.attn.proj(found.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)


@torch.no_grad()
@pytest.mark.parametrize("visible", [1, 5, 16, 40, 64])
def test_grouped_attention_is_masked_attention_over_all(visible):
    encoder, imgs = encoder_of_greenmim(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ids = torch.randperm(64)[:visible].expand(2, -1)
    close(encoder(imgs, ids)[:, 1:], masked_attention(encoder, imgs, ids), 1e-6)


@torch.no_grad()
def test_windows_of_a_whole_image_are_cut_by_reshaping():
    """A block without a shift: attention in squares of 4 x 4."""
    encoder = encoder_of_greenmim()
    block, x = encoder.blocks[0], torch.randn(2, 256, 16, dtype=torch.float64)
    cut = x.unflatten(1, (4, 4, 4, 4)).transpose(2, 3).reshape(32, 16, 16)
    want = mae.Attention.forward(block.attn, cut)
    want = want.reshape(2, 4, 4, 4, 4, 16).transpose(2, 3).reshape(2, 256, 16)
    close(block.attn(x, *greenmim.group(torch.arange(256), 16, 4, 0)), want, 1e-12)


@torch.no_grad()
def test_masked_units_have_no_influence_and_the_order_of_the_visible_none():
    encoder, imgs = encoder_of_greenmim(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ids = torch.randperm(64)[:16]
    found = encoder(imgs, ids.expand(2, -1))
    hidden = torch.ones(64, dtype=torch.bool)
    hidden[ids] = False
    where = hidden.view(8, 8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(encoder(imgs + 5 * where, ids.expand(2, -1)), found)
    order = torch.randperm(16)
    other = encoder(imgs, ids[order].expand(2, -1))
    close(other[:, 1:], found[:, 1:][:, order], 1e-10)
    close(encoder(imgs[:1], ids[None]), found[:1], 1e-12)  # an image by itself


@torch.no_grad()
def test_a_whole_image_is_all_units_in_order():
    encoder, imgs = encoder_of_greenmim(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tokens = encoder(imgs)
    assert tokens.shape == (2, 65, 32)
    close(tokens, encoder(imgs, torch.arange(64).expand(2, -1)), 0)
    close(tokens[:, 0], tokens[:, 1:].mean(1), 1e-12)      # the parameter is 0 at first


def test_packing():
    """Every window is in one group, none holds more than the size, each is as full as it can be."""
    assert greenmim.pack([3, 1, 2, 2], 4) == [[0, 1], [2, 3]]
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        counts = torch.randint(1, 17, (12,), generator=g).tolist()
        groups = greenmim.pack(counts, 16)
        assert sorted(sum(groups, [])) == list(range(12))
        left = set(range(12))
        for windows in groups:
            best = max(total for n in range(len(left) + 1) for part in combinations(left, n)
                       if (total := sum(counts[w] for w in part)) <= 16) if len(left) < 10 else None
            total = sum(counts[w] for w in windows)
            assert total <= 16 and best in (None, total)
            left -= set(windows)


def test_every_token_has_one_place_in_the_groups():
    places = torch.randperm(256)[:64]
    ids, allowed = greenmim.group(places, 16, 4, 2)
    assert ids[ids < 64].sort().values.equal(torch.arange(64))
    assert allowed.diagonal(dim1=-2, dim2=-1).all()
    rows, columns = (places // 16 + 2) // 4, (places % 16 + 2) // 4
    for tokens, who in zip(ids, allowed[:, 0]):
        for i, a in enumerate(tokens.tolist()):
            for j, b in enumerate(tokens.tolist()):
                inside = a < 64 and b < 64 and rows[a] == rows[b] and columns[a] == columns[b]
                assert who[i, j] == (inside or a == b == 64)


def test_one_mask_serves_all_images():
    config, student, _, views = setting("greenmim")
    mask = student(views.student, 0.75, views.noise)["mask"]
    assert (mask == mask[:1]).all() and (mask.sum(1) == 12).all()


def test_what_greenmim_cannot_do_is_one_line(whole, tmp_path, capsys, monkeypatch, flags):
    path = whole / "greenmim" / "checkpoint.pt"
    for command, words in (
            (("eval.py", "export", "--out", str(tmp_path / "export")), "export: only plain"),
            (("eval.py", "knn", "--img-size", "32"), "--img-size 32: only plain")):
        words_of = refused(lambda: evaluation.main([*command[1:], "--checkpoint", str(path)]),
                           capsys, monkeypatch)
        assert words in words_of and words_of.splitlines()[-1].startswith("train.py: error:")
    assert not (tmp_path / "export").exists()
    more = ["--checkpoint", str(path), "--from-scratch", "--out", str(tmp_path / "scratch")]
    assert "--from-scratch: only plain" in refused(lambda: finetune.main(more), capsys, monkeypatch)
    drawn = []
    for each in ("draw_neighbours", "draw_components", "draw_rows"):
        monkeypatch.setattr(report, each, lambda *args: drawn.append(Path(args[-1]).name))
    evaluation.main(["knn", "--pictures", "--checkpoint", str(path)])
    assert "no attention.png" in capsys.readouterr().err
    assert drawn == ["neighbours.png", "components.png"]
    init = ["--init", str(path), "--recipe", "mae", "--out", str(tmp_path / "init")]
    assert "another network" in refused(lambda: train.main([*flags, *init]), capsys, monkeypatch)


def test_what_was_trained_is_exported(whole, tmp_path, capsys):
    for name in ("sdae", "cae", "mixedae"):
        record_of(capsys, "export", "--checkpoint", whole / name / "checkpoint.pt",
                  "--out", tmp_path / name)
        assert (tmp_path / name / "encoder.pt").exists()


# ------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("name, more, words", [
    ("sdae", ["--folds", "13"], "--folds 13: more than the 12 masked patches"),
    ("sdae", ["--folds", "0"], "--folds 0: must be 1 or more"),
    ("sdae", ["--target", "pixels"], "--target pixels: in sdae it is tokens; leave it out"),
    ("sdae", ["--views", "2"], "--views 2: in sdae it is 1; leave it out"),
    ("sdae", ["--recipe", "mae"], "--recipe"),
    ("mixedae", ["--mask-ratio", "0.6"], "--mask-ratio 0.6: leaves an image 6 of 16 patches"),
    ("mixedae", ["--mask-ratio", "0.9375"], "--mask-ratio 0.9375: leaves an image 1 of 16"),
    ("mixedae", ["--batch-size", "10"], "--batch-size 10: a process has 10 images at once"),
    ("mixedae", ["--accumulate", "8"], "a process has 2 images at once; make it a multiple of"),
    ("greenmim", ["--patch-size", "1"], "--patch-size 1: is cut into 2 x 2; use an even one"),
    ("greenmim", ["--compile"], "--compile True: in greenmim it is False; leave it out"),
    ("greenmim", ["--window", "1"], "--window 1: must be 2 or more"),
    ("cae", ["--align-weight", "-1"], "--align-weight -1.0: must be 0 or more"),
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
