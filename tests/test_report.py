import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train
from mae import Mlp
from support.health import signs_of_collapse
from support.report import Meter, conclude, line

WELL = {
    "image": 3.0,
    "image_ln_k": math.log(64),
    "image_entropy": 2.0,
    "image_effective": 60.0,
    "rec_between": 0.5,
}


def test_nothing_is_said_in_health():
    assert signs_of_collapse(WELL) == set()
    assert signs_of_collapse({"rec": 0.5}) == set()


def test_signs_of_collapse():
    ills = {
        "not being predicted": {"image": math.log(64)},
        "uniform": {"image_entropy": math.log(64)},
        "few": {"image_effective": 1.5},
        "targets": {"rec_between": 0.01},
    }
    for word, ill in ills.items():
        (sign,) = signs_of_collapse(WELL | ill)
        assert word in sign
        assert word == "targets" or "image pseudo labels" in sign


def test_patch_pseudo_labels_are_watched_too():
    well = {key.replace("image", "patch"): value for key, value in WELL.items()}
    assert signs_of_collapse(well) == set()
    (sign,) = signs_of_collapse(well | {"patch_effective": 1.5})
    assert "patch pseudo labels" in sign


def test_line_shows_what_the_record_has():
    record = dict(step=50, epoch=0.6, loss=4.25, images_per_s=812.3, eta_s=61.0)
    start = "step     50  epoch    0.6  loss 4.2500"
    assert line(record) == f"{start}  812 images/s  61 s to go"
    record |= dict(rec=0.5, image=3.0, image_ln_k=math.log(32), peak_memory_gb=3.21)
    losses = "rec 0.500  image 3.000 (ln K 3.47)"
    assert line(record) == f"{start}  {losses}  812 images/s  peak 3.2 GB  61 s to go"
    assert "rec 0.500 (constant 0.91)" in line(record | dict(rec_constant=0.911))


@pytest.mark.parametrize("done, looks", [(1, 4), (3, 4), (4, 3), (9, 2), (10, 1)])
def test_time_to_go_counts_the_looks(done, looks):
    """Of ten steps, looks at 3, 6, 9 and at the end; a line that comes with a look counts it."""
    run = SimpleNamespace(config=SimpleNamespace(eval_every=3, batch_size=8), steps_per_epoch=1,
                          total=10, look_s=100.0, device=torch.device("cpu"))
    assert round(Meter(0).speed(run, done)["eta_s"]) == 100 * looks


def test_a_look_that_takes_long_is_said_once(small_flags, tmp_path, no_pictures, capsys):
    """And it computes in the precision of the run."""
    seen = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(out.dtype) if isinstance(module, Mlp) else None)
    with hook:
        train.main([*small_flags, "--epochs", "3", "--eval-every", "1", "--precision", "bf16",
                    "--out", str(tmp_path)])
    assert set(seen) == {torch.bfloat16}
    assert capsys.readouterr().err.count("raise --eval-every (now 1 epochs)") == 1


def test_labels_that_hold_nothing_are_said_at_the_end(tmp_path, capsys):
    run = SimpleNamespace(out=tmp_path, rank=0, total=9, val_ids=[],
                          images=SimpleNamespace(classes=[], y=torch.full((3,), -1)),
                          config=SimpleNamespace(data="shapes", data_root="x",
                                                 consistency_weight=0), say=print)
    for alike, words in ((0.13, "in 13.0%, by chance in 12.0%"), (0.4, "")):
        (tmp_path / "metrics.jsonl").write_text(
            json.dumps({"image_two_views": alike, "image_two_views_chance": 0.12}) + "\n")
        conclude(run)
        said = capsys.readouterr().out
        assert words in said and ("warning" in said) == bool(words)
        assert "features --split train --pictures" in said
        assert f"before and after: {alike:.1%} and {alike:.1%}, of images that were" in said


def test_of_two_clusters_both_may_be_in_use():
    record = dict(image=0.5, image_ln_k=math.log(2), image_entropy=0.1, image_effective=1.98)
    assert signs_of_collapse(record) == set()
    assert signs_of_collapse(record | {"image_effective": 1.2})


def test_nothing_is_said_of_labels_that_there_are_not(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n")
    conclude(SimpleNamespace(out=tmp_path, rank=0, total=9, val_ids=[],
                             images=SimpleNamespace(classes=[], y=torch.full((3,), -1)), say=print,
                             config=SimpleNamespace(data="shapes", data_root="x",
                                                    consistency_weight=0)))
    assert "warning" not in capsys.readouterr().out
