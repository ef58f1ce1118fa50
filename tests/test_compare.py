import json
from itertools import permutations

import matplotlib.colors
import pytest

from extras import compare
from support import settings
from support.command_line import UsageError

STEPS = 10                                 # of an epoch, in these runs


def write_run(folder, knn, *flags, judged=(), epochs_done=None, mean=(0.4, 0.5, 0.6)):
    """A folder as train.py and eval.py leave it. knn: of the class and the mean token at the end,
    each 0.1 at the beginning; None: without labels. judged: what differs from the usual record of
    eval.py."""
    config = vars(settings.resolve([*flags, "--out", str(folder)]))
    end = config["epochs"] if epochs_done is None else epochs_done
    begin, last = {"step": 0, "epoch": 0.0}, {"step": end * STEPS, "epoch": float(end)}
    if knn:
        begin |= {"knn_class": 0.1, "knn_mean": 0.1}
        last |= {"knn_class": knn[0], "knn_mean": knn[1]}
    losses = {"step": STEPS, "epoch": 1.0, "loss": 6.0}
    losses |= {} if config["target"] == "none" else {"rec": 1.0}
    losses |= {"image": 3.0} if config["image_weight"] else {}
    losses |= {"patch": 2.0} if config["patch_weight"] else {}
    usual = {"network": "student", "data": config["data"], "step": last["step"], "split": "test"}

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config, mean=mean, channels=3)))
    for name, records in (("metrics.jsonl", [begin, losses, last]),
                          ("eval.jsonl", [usual | each for each in judged])):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def tokens(task, of_class, of_mean, **others):
    return {"task": task, "tokens": {"class": of_class, "mean": of_mean}, **others}


def write_two_settings(root):
    """Seeds 0, 1, 2 of one setting; seeds 1, 2, 5 of another."""
    same = [write_run(root / f"same-{seed}", knn, "--seed", str(seed))
            for seed, knn in enumerate([(0.30, 0.2), (0.40, 0.2), (0.50, 0.2)])]
    flags = ["--teacher-view", "same", "--seed"]
    other = [write_run(root / f"other-{seed}", knn, *flags, str(seed))
             for seed, knn in {1: (0.38, 0.25), 2: (0.56, 0.3), 5: (0.99, 0.9)}.items()]
    return same, other


def printed(capsys, tmp_path, *runs):
    compare.main([*runs, "--out", str(tmp_path / "compare.png")])
    return capsys.readouterr().out.splitlines()


# ---------------------------------------------------------------------------------- the table

def test_pairs_by_seed(tmp_path, capsys):
    """On seed 1, 38 - 40 = -2 points; on seed 2, 56 - 50 = +6; seeds 0 and 5 have no partner."""
    same, other = write_two_settings(tmp_path)
    assert printed(capsys, tmp_path, *same, *other) == [
        "| setting           | seeds |                 | k-NN class | k-NN mean |",
        "| ----------------- | ----- | --------------- | ---------: | --------: |",
        "| pl-mae            | 3     | mean            |       40.0 |      20.0 |",
        "| teacher_view=same | 2     | mean difference |       +2.0 |      +7.5 |",
        "|                   |       | least           |       -2.0 |      +5.0 |",
        "|                   |       | greatest        |       +6.0 |     +10.0 |",
        "|                   |       | above in        |     1 of 2 |    2 of 2 |",
    ]


def test_the_order_within_a_setting_changes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "picture", lambda *args: None)
    same, other = write_two_settings(tmp_path)
    expected = printed(capsys, tmp_path, *same, *other)
    for order in permutations(same):
        assert printed(capsys, tmp_path, *order, *other) == expected
        assert printed(capsys, tmp_path, order[0], *reversed(other), *order[1:]) == expected
    assert printed(capsys, tmp_path, *other, *same) != expected        # the first is the base


def test_columns_are_the_yardsticks_that_all_runs_have(tmp_path):
    one = write_run(tmp_path / "one", (0.3, 0.2), judged=[
        tokens("knn", 0.9, 0.9),
        tokens("linear", 0.5, 0.6),
        {"task": "patches", "miou": 0.25},
        {"task": "diagnose"},
        tokens("knn", 0.4, 0.45),                          # the last record of a task counts
        tokens("knn", 0.9, 0.9, network="untrained"),      # but not of another network,
        tokens("knn", 0.9, 0.9, data="cifar10"),           # of other images,
        tokens("knn", 0.9, 0.9, split="validation"),
        tokens("knn", 0.9, 0.9, step=STEPS),               # of an earlier checkpoint
    ])
    rc_mae = write_run(tmp_path / "two", (0.3, 0.2), "--recipe", "rc-mae", judged=[
        tokens("linear", 0.5, 0.9),                        # RC-MAE is judged by its teacher
        tokens("knn", 0.6, 0.4, network="reconstruction-teacher"),
        {"task": "patches", "miou": 0.35, "network": "reconstruction-teacher"},
    ])
    heading, base, difference, *_, above = compare.table(
        compare.group([compare.read_run(one), compare.read_run(rc_mae)]))
    assert heading[3:] == ["k-NN class", "k-NN mean", "test k-NN class", "test k-NN mean",
                           "test patches mIoU"]
    assert base[3:] == ["30.0", "20.0", "40.0", "45.0", "25.0"]
    assert difference[3:] == ["+0.0", "+0.0", "+20.0", "-5.0", "+10.0"]
    assert above[3:] == ["0 of 1", "0 of 1", "1 of 1", "0 of 1", "1 of 1"]


# ------------------------------------------------------------------------------- settings

def config(*flags):
    return vars(settings.resolve(list(flags)))


def test_what_cannot_change_a_result_makes_no_setting():
    harmless = config("--seed", "3", "--out", "x", "--data-root", "y", "--workers", "0",
                      "--device", "cpu", "--eval-every", "1", "--log-every", "1", "--compile")
    assert compare.name_setting(harmless, config()) == "pl-mae"


@pytest.mark.parametrize("flags, first, name", [
    (["--teacher-view", "same"], [], "teacher_view=same"),
    ([], ["--teacher-view", "same"], "teacher_view=other-colours"),
    (["--recipe", "mae"], [], "recipe=mae"),
    (["--recipe", "mae", "--epochs", "40"], [], "recipe=mae, epochs=40"),
    (["--recipe", "mae", "--epochs", "40"], ["--epochs", "40"], "recipe=mae"),
    (["--recipe", "mae"], ["--epochs", "40"], "recipe=mae, epochs=12"),
    ([], ["--recipe", "mae"], "recipe=pl-mae"),
    (["--mask-ratio", "0.75"], ["--recipe", "mae"], "recipe=pl-mae, mask_ratio=0.75"),
])
def test_settings_are_named_by_what_differs(flags, first, name):
    assert compare.name_setting(config(*flags), config(*first)) == name


# ---------------------------------------------------------------------------- the picture

def test_a_setting_has_one_colour_and_one_line(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(compare, "save", lambda figure, path: figures.append(figure))
    same, other = write_two_settings(tmp_path)
    mae = write_run(tmp_path / "mae", (0.2, 0.1), "--recipe", "mae")
    compare.main([*same, *other, mae])
    axes = {axis.get_title(): axis for axis in figures[0].axes if axis.get_visible()}
    assert list(axes) == list(compare.PANELS)

    lines = axes["k-NN of the class token, held out, %"].get_lines()
    styles = [(matplotlib.colors.to_hex(line.get_color()), line.get_linestyle()) for line in lines]
    assert styles[:3] == styles[:1] * 3 and styles[3:6] == styles[3:4] * 3
    assert len({colour for colour, _ in styles}) == len({line for _, line in styles}) == 3
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["pl-mae", "teacher_view=same", "recipe=mae"]

    steps = 12 * STEPS                     # of 64 images, in two views or in one
    assert lines[0].get_xydata().tolist() == [[0, 10], [steps * 64 * 2 / 1000, 30]]
    assert lines[6].get_xydata().tolist() == [[0, 10], [steps * 64 / 1000, 20]]
    for target, drawn in (("tokens", [1] * 6 + [0]), ("pixels", [0] * 6 + [1])):
        curves = axes[f"loss: reconstruction of {target}"].get_lines()
        assert [len(curve.get_xdata()) for curve in curves] == drawn


def test_says_where_runs_saw_another_number_of_views(tmp_path, capsys):
    """10 steps of 64 images an epoch, in two views or in one."""
    runs = [write_run(tmp_path / "ours", (0.3, 0.3), "--epochs", "12"),
            write_run(tmp_path / "mae", (0.3, 0.3), "--recipe", "mae", "--epochs", "12"),
            write_run(tmp_path / "longer", (0.3, 0.3), "--recipe", "mae", "--epochs", "24")]
    flags = ["--out", str(tmp_path / "compare.png")]
    compare.main([*runs[:2], *flags])
    said = capsys.readouterr().err
    assert "pl-mae: 15,360; recipe=mae: 7,680" in said and "twice the --epochs" in said
    compare.main([runs[0], runs[2], *flags])
    assert not capsys.readouterr().err
    compare.main([*runs[1:], *flags])                      # both have one view
    assert "twice" not in capsys.readouterr().err


def test_writes_the_picture(tmp_path):
    runs = [write_run(tmp_path / name, (0.3, 0.2), "--recipe", name)
            for name in ("mae", "image-labels")]           # without patch pseudo labels: 4 panels
    path = tmp_path / "new" / "compare.png"
    compare.main([*runs, "--out", str(path)])
    assert path.stat().st_size > 10_000


# ------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("write, message", [
    (lambda path: None, "is no run; name a folder"),
    (lambda path: write_run(path, None), "no k-NN in its log.*--val-fraction"),
    (lambda path: write_run(path, (0.3, 0.2), epochs_done=8), "of epoch 8 of 12; let it finish"),
    (lambda path: write_run(path, (0.3, 0.2)), "settings and the seed .0. of .*one; name one"),
    (lambda path: write_run(path, (0.3, 0.2), "--data", "cifar10"), "compare runs on the same"),
    (lambda path: write_run(path, (0.3, 0.2), "--img-size", "32"), "compare runs on the same"),
    (lambda path: write_run(path, (0.3, 0.2), "--val-fraction", "0.2"), "compare runs on the same"),
    (lambda path: write_run(path, (0.3, 0.2), mean=[0.5, 0.5, 0.5]), "compare runs on the same"),
])
def test_refuses_a_run(tmp_path, write, message):
    """In one line that begins with the name of its folder."""
    one, other = write_run(tmp_path / "one", (0.3, 0.2)), tmp_path / "other"
    write(other)
    with pytest.raises(UsageError, match=f"^{other}: .*{message}") as error:
        compare.main([one, str(other), "--out", str(tmp_path / "compare.png")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "compare.png").exists()


def test_refuses_settings_that_share_no_seed(tmp_path):
    same, other = write_two_settings(tmp_path)
    with pytest.raises(UsageError, match="same: .* with pl-mae: 1, 5 here, 0, 2 there"):
        compare.main([same[0], same[2], other[0], other[2]])


def test_refuses_a_single_run(tmp_path):
    with pytest.raises(UsageError, match="only one run; name another"):
        compare.main([write_run(tmp_path / "one", (0.3, 0.2))])


@pytest.mark.parametrize("text, words", [("{", "config.json: is not JSON"),
                                         ('{"seed": 0}', "config.json has no recipe")])
def test_a_broken_config_is_one_line(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match=words):
        compare.read_run(tmp_path)
