"""extras/tuning.py and finetune.py: learning rates by layer, drop path, stops, the command."""

import json

import pytest
import torch
from conftest import ROOT, TOY, run

import train
from extras import finetune, tuning
from mae import MaskedAutoencoder
from support.command_line import UsageError
from support.files import read_json_lines
from support.weights import load_encoder


@pytest.fixture(scope="module")
def checkpoint(small_flags, tmp_path_factory):
    """Of a run of train.py on `photos`."""
    folder = tmp_path_factory.mktemp("runs") / "start"
    train.main([*small_flags, "--epochs", "1", "--out", str(folder)])
    return folder / "checkpoint.pt"


SMALL = ["--batch-size", "16", "--epochs", "2", "--eval-every", "1", "--log-every", "1",
         "--device", "cpu"]


def flags(checkpoint, out, *more):
    return ["--checkpoint", str(checkpoint), "--out", str(out), *SMALL, *more]


def toy_encoder():
    return MaskedAutoencoder(**TOY, target_dim=0).encoder


def test_layers_learn_at_these_rates():
    """A list by hand: two blocks, so the embedding is three layers below the last norm."""
    model = finetune.Classifier(toy_encoder(), 3, "mean")
    encoder, head = model.encoder, model.head
    config = tuning.Config(layer_decay=0.5, weight_decay=0.05)
    found = {}
    for group in tuning.parameter_groups(encoder, model, config):
        for p in group["params"]:
            found[p] = group["scale"], group["weight_decay"]
    names = {"cls_token": (0.125, 0), "patch_embed.proj.weight": (0.125, 0.05),
             "patch_embed.proj.bias": (0.125, 0), "norm.weight": (1, 0), "norm.bias": (1, 0)}
    for number, scale in ((0, 0.25), (1, 0.5)):
        for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            decay = 0 if "norm" in layer else 0.05
            names[f"blocks.{number}.{layer}.weight"] = scale, decay
            names[f"blocks.{number}.{layer}.bias"] = scale, 0
    parameters = dict(encoder.named_parameters())
    assert names.keys() == parameters.keys() - {"pos_embed"}
    for name, expected in names.items():
        assert found.pop(parameters[name]) == expected, name
    assert found == {head.weight: (1, 0.05), head.bias: (1, 0)}


def test_drop_path_skips_blocks_in_training_alone():
    encoder, imgs = toy_encoder(), torch.rand(64, 3, 16, 16)
    plain = encoder(imgs)
    tuning.drop_paths(encoder, 0.5)
    assert torch.equal(encoder.eval()(imgs), plain)
    encoder.train()
    torch.manual_seed(0)
    same = (encoder(imgs) == plain).flatten(1).all(1)
    assert not same.any()                      # kept branches are scaled up, so none is the same
    seen = {}
    hook = encoder.blocks[1].register_forward_hook(
        lambda module, inputs, out: seen.update(skipped=(inputs[0] == out).flatten(1).all(1)))
    encoder(imgs)
    hook.remove()
    assert 5 < seen["skipped"].sum() < 30      # both parts of it: a quarter of 64


def test_a_stopped_run_equals_one_that_was_not(checkpoint, tmp_path, monkeypatch):
    finetune.main(flags(checkpoint, tmp_path / "whole"))
    real = tuning.draw_curves

    def stop(out):                             # after the first checkpoint
        real(out)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "draw_curves", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(flags(checkpoint, tmp_path / "stopped"))
    monkeypatch.setattr(tuning, "draw_curves", real)
    finetune.main(flags(checkpoint, tmp_path / "stopped"))
    one, other = (torch.load(tmp_path / name / "checkpoint.pt")["tuned"]
                  for name in ("whole", "stopped"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    logs = [[(r["step"], r["loss"]) for r in read_json_lines(tmp_path / name / "metrics.jsonl")]
            for name in ("whole", "stopped")]
    assert logs[0] == logs[1] and len(logs[0]) == 8


def test_command(checkpoint, tmp_path):
    """It learns the hue of these photos, writes its files, and ends with its line."""
    out = tmp_path / "run"
    command = flags(checkpoint, out, "--epochs", "8", "--eval-every", "4", "--lr", "3e-3")
    result = run("extras.finetune", *command, cwd=ROOT)
    found = json.loads(result.stdout)
    assert found == json.loads((out / "result.json").read_text())
    assert found["top1"] > 0.6 and found["test_images"] == 18 and found["step"] == 32
    assert (out / "curves.png").exists()


@pytest.mark.parametrize("more, images", [
    (["--from-scratch"], 65), (["--token", "class", "--mixup", "0", "--cutmix", "0"], 65),
    (["--img-size", "24"], 65), (["--train-images", "32"], 32)])
def test_variants(checkpoint, tmp_path, more, images, capsys):
    finetune.main(flags(checkpoint, tmp_path / "run", "--epochs", "1", *more))
    assert json.loads(capsys.readouterr().out)["images"] == images


def test_from_scratch_without_a_checkpoint(photos, tmp_path, capsys):
    finetune.main(["--from-scratch", "--data", "imagefolder", "--data-root", str(photos),
                   "--img-size", "16", "--patch-size", "4", "--out", str(tmp_path / "run"), *SMALL])
    assert json.loads(capsys.readouterr().out)["start"] == "scratch"


def test_starts_from_the_weights_of_the_file(checkpoint, tmp_path):
    config, encoder, _ = tuning.start(finetune.Config, "finetune", "", flags(checkpoint, tmp_path))
    scratch = tuning.start(finetune.Config, "finetune", "",
                           flags(checkpoint, tmp_path, "--from-scratch"))[1]
    weights = torch.load(checkpoint)["student"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, weights[f"mae.encoder.{name}"])
        assert name == "pos_embed" or "norm" in name or "bias" in name or not torch.equal(
            value, scratch.state_dict()[name])
    assert config.data == "imagefolder" and encoder.patch_embed.proj.weight.requires_grad
    assert not encoder.pos_embed.requires_grad


@pytest.mark.parametrize("given, says", [
    ([], "--checkpoint: name a file"),
    (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["--checkpoint", "FILE", "--patch-size", "8"], "--patch-size: the checkpoint decides"),
    (["--checkpoint", "FILE", "--batch-size", "500"], "--batch-size 500"),
    (["--checkpoint", "FILE", "--train-images", "500"], "--train-images 500"),
    (["--checkpoint", "FILE", "--img-size", "18"], "--img-size 18x18"),
    (["--checkpoint", "FILE", "--data", "imagefolder", "--data-root", "PLAIN"], "have no class"),
    (["--from-scratch", "--patch-size", "5"], "--patch-size 5")])
def test_bad_input_is_one_line(checkpoint, photos, tmp_path, given, says):
    names = {"FILE": str(checkpoint), "PLAIN": str(photos / "train" / "red")}
    with pytest.raises(UsageError) as error:
        finetune.main([names.get(each, each) for each in given] + ["--out", str(tmp_path / "run")])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_run_is_left_alone(checkpoint, tmp_path):
    out = tmp_path / "run"
    finetune.main(flags(checkpoint, out, "--epochs", "1"))
    with pytest.raises(UsageError, match="lr was 0.001"):
        finetune.main(flags(checkpoint, out, "--epochs", "1", "--lr", "0.1"))
    with pytest.raises(UsageError, match="not of this program"):
        finetune.main(flags(checkpoint, checkpoint.parent))


def test_layers_really_learn_at_their_rates(checkpoint, tmp_path):
    finetune.main(flags(checkpoint, tmp_path / "run", "--layer-decay", "0.5"))
    groups = torch.load(tmp_path / "run" / "checkpoint.pt")["optimizer"]["param_groups"]
    config = tuning.Config()
    rate = tuning.learning_rate(7, 8, config)              # of the last of 8 steps
    assert {group["scale"] for group in groups} == {0.5**k for k in range(6)}
    for group in groups:
        assert group["lr"] == group["scale"] * rate


@pytest.mark.parametrize("token", ["class", "mean"])
def test_the_token_that_is_classified(token):
    model, imgs = finetune.Classifier(toy_encoder(), 3, token), torch.rand(2, 3, 16, 16)
    tokens = model.encoder(imgs)
    x = tokens[:, 0] if token == "class" else tokens[:, 1:].mean(1)
    torch.testing.assert_close(model(imgs), model.head(x))


def test_crops_have_the_shape_of_the_images():
    imgs = torch.arange(32 * 64).view(1, 32, 64)
    whole = tuning.augment(tuning.Config(crop=1.0), (32, 64))
    seen = [whole(imgs) for _ in range(20)]
    assert all(torch.equal(each, imgs) or torch.equal(each, imgs.flip(-1)) for each in seen)
    torch.manual_seed(0)
    parts = tuning.augment(tuning.Config(crop=0.35), (32, 64))
    for _ in range(20):
        _, _, h, w = parts.transforms[0].make_params([imgs]).values()
        assert 0.7 < w / h / 2 < 1.4


def test_images_without_a_label_do_not_serve(checkpoint, photos, tmp_path, monkeypatch, capsys):
    real = tuning.load_images

    def some(*given):
        images = real(*given)
        images.y[::2] = -1
        return images

    monkeypatch.setattr(tuning, "load_images", some)
    finetune.main(flags(checkpoint, tmp_path / "run", "--epochs", "1"))
    assert json.loads(capsys.readouterr().out)["images"] == 33
    with pytest.raises(UsageError, match="there are 33 images"):
        finetune.main(flags(checkpoint, tmp_path / "other", "--batch-size", "40"))


def test_what_was_tuned_can_be_evaluated_and_started_from(checkpoint, tmp_path, capsys):
    """A checkpoint of fine-tuning holds its encoder as an export does, and no second copy of it."""
    out = tmp_path / "run"
    finetune.main(flags(checkpoint, out, "--img-size", "24"))
    encoder, _ = load_encoder(out / "checkpoint.pt")
    file = torch.load(out / "checkpoint.pt")
    assert encoder.img_size == (24, 24) and encoder.blocks[0].attn.num_heads == 3
    for name, value in encoder.state_dict().items():
        there = file["tuned"][f"encoder.{name}"]
        assert torch.equal(value, there)
        assert file["encoder"]["model"][name].data_ptr() == there.data_ptr()
    info = load_encoder(checkpoint)[0].info
    assert encoder.info["mean"] == info["mean"] and encoder.info["std"] == info["std"]
    config, again, _ = tuning.start(finetune.Config, "finetune", "",
                                    flags(out / "checkpoint.pt", tmp_path / "other"))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(),
                                                 encoder.state_dict().values()))


def test_out_of_memory_is_one_line(checkpoint, tmp_path, monkeypatch):
    def too_large(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(finetune.F, "cross_entropy", too_large)
    with pytest.raises(UsageError, match="--batch-size 16: the memory of cpu is too small"):
        finetune.main(flags(checkpoint, tmp_path / "run"))


def test_images_are_mixed_labels_smoothed_and_layers_dropped(checkpoint, tmp_path, monkeypatch):
    """What the loss is really called with, at the defaults."""
    seen, dropped = [], []
    real_loss, real_drop = finetune.F.cross_entropy, tuning.stochastic_depth

    def loss(scores, labels, label_smoothing):
        seen.append((labels, label_smoothing))
        return real_loss(scores, labels, label_smoothing=label_smoothing)

    def drop(x, p, mode, training):
        dropped.append((round(p, 3), training))
        return real_drop(x, p, mode, training)

    monkeypatch.setattr(finetune.F, "cross_entropy", loss)
    monkeypatch.setattr(tuning, "stochastic_depth", drop)
    finetune.main(flags(checkpoint, tmp_path / "run", "--epochs", "1", "--drop-path", "0.3"))
    labels = torch.cat([each for each, _ in seen])
    assert labels.shape[1] == 3 and torch.allclose(labels.sum(1), torch.ones(len(labels)))
    assert ((labels > 0).sum(1) == 2).any()                # two images in one
    assert {smoothing for _, smoothing in seen} == {0.1}
    assert {p for p, training in dropped if training} == {0, 0.1, 0.2, 0.3}        # four blocks
    assert any(not training for _, training in dropped)    # and none while it is looked at


def test_images_with_other_classes_are_refused(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "run"
    finetune.main(flags(checkpoint, out, "--epochs", "1"))
    real = tuning.load_images

    def more(*given):
        images = real(*given)
        images.classes = [*images.classes, "violet"]
        return images

    monkeypatch.setattr(tuning, "load_images", more)
    with pytest.raises(UsageError, match="other classes"):
        finetune.main(flags(checkpoint, out, "--epochs", "1"))


def test_pixels_are_standardised_as_the_weights_are_used_to(checkpoint, photos):
    images = tuning.load_images("imagefolder", photos, "test", 16)
    info = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    config = tuning.Config(checkpoint="there")
    assert tuning.pixel_statistics(config, images, info) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    config.from_scratch = True
    assert tuning.pixel_statistics(config, images, info) == tuning.mean_std(images)


def test_images_without_classes_are_refused(checkpoint, photos, tmp_path):
    """A folder of images alone has nothing to learn."""
    for split in ("train", "test"):
        (tmp_path / "plain" / split).mkdir(parents=True)
        for path in (photos / split / "red").glob("*"):
            (tmp_path / "plain" / split / path.name).write_bytes(path.read_bytes())
    for given in (["--data-root", str(tmp_path / "plain")], ["--data", "coco"]):
        with pytest.raises(UsageError, match="images have no class to learn"):
            finetune.main(flags(checkpoint, tmp_path / "run", *given))


def test_other_images_hold_out_their_own_share(small_flags, photos, tmp_path):
    """The share of the run counts for its own images, not for others of the same kind."""
    train.main([*small_flags, "--epochs", "0", "--val-fraction", "0.5", "--out", str(tmp_path)])
    for root, share in ((photos, 0.5), (tmp_path / "others", 0.1)):
        config, _, _ = tuning.start(finetune.Config, "finetune", "",
                                    ["--checkpoint", str(tmp_path / "checkpoint.pt"),
                                     "--data-root", str(root)])
        assert config.val_fraction == share and config.data == "imagefolder"


def test_shapes_are_not_drawn_into_another_folder(photos, tmp_path):
    """Whoever names a folder of photographs has to name the kind of set too."""
    with pytest.raises(UsageError, match="holds no `shapes`.*say what it holds with --data"):
        finetune.main(["--from-scratch", "--data-root", str(photos), "--out", str(tmp_path / "x")])
    assert not (photos / "shapes").exists()
