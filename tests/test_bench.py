import json
import time
from argparse import Namespace

import pytest
import torch
from conftest import TOY_SIZE
from torch.profiler import ProfilerActivity, profile

import mae
import train
from extras import bench, peers, played
from support import report, settings
from support.command_line import UsageError

SMALL = ["--img-size", "16", "--patch-size", "4", "--batch-size", "16", "--image-clusters", "4",
         "--patch-clusters", "8", "--device", "cpu", "--precision", "fp32"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(mae.SIZES, "micro", TOY_SIZE)


def resolve(*flags):
    return settings.resolve([*SMALL, *flags])


# ------------------------------------------------------------------------------------------- time

def test_contenders_take_turns_and_each_turn_lasts(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def contender(name, seconds):
        def call():
            clock[0] += seconds
            order.append(name)
        return call

    times = bench.race({"a": contender("a", 0.3), "b": contender("b", 0.07)}, 2, CPU)
    assert order == [*"aaa", *"bbb", *"abbb", *"abbb"]     # warm-up, then b thrice for 0.2 s
    assert times == {"a": pytest.approx([300, 300]), "b": pytest.approx([70, 70])}


@pytest.mark.parametrize("recipe", settings.RECIPES)
def test_parts_of_a_step_add_up_to_it(recipe):
    run, batches = bench.set_up(resolve("--recipe", recipe, "--accumulate", "2"), CPU)
    taken, shares = [], []
    step = bench.in_parts(run, bench.make_step(run, batches), taken)
    for _ in range(5):
        start = time.perf_counter()
        step()
        shares.append(sum(taken[-1].values()) / 1000 / (time.perf_counter() - start))
    assert 0.8 < max(shares) <= 1
    names = {"data", "student", "losses", "backward", "optimiser", "moving averages"}
    labelled = recipe not in ("mae", "rc-mae")
    second = recipe in ("rc-mae", "pl-mae")
    assert names <= taken[-1].keys()
    assert ("labelling teacher" in taken[-1]) == ("heads and balancing" in taken[-1]) == labelled
    assert second <= ("reconstruction teacher" in taken[-1])
    assert "encode" not in vars(run.teachers.labelling or run.student)         # it is as it was


def test_a_step_is_that_of_the_loop(tmp_path, monkeypatch):
    """Same weights after two steps as by train.train on the same images."""
    config = resolve("--out", str(tmp_path), "--epochs", "2")
    run, batches = bench.set_up(config, CPU)
    step = bench.make_step(run, batches)
    step()
    step()
    other, batches = bench.set_up(config, CPU)
    monkeypatch.setattr(train, "learning_rate", lambda *args: 1e-4)
    monkeypatch.setattr(train, "momentum", lambda *args: 0.99)
    for name in ("log", "evaluate_and_save"):
        monkeypatch.setattr(report, name, lambda *args: None)
    quiet = Namespace(told=lambda saved: False, end_if_signalled=lambda *args: None)
    train.train(other, batches, quiet)
    for a, b in ((run.student, other.student), (run.teachers.labelling, other.teachers.labelling)):
        for x, y in zip(a.parameters(), b.parameters()):
            assert torch.equal(x, y)


# ------------------------------------------------------------------------------- FLOPs and memory

def test_flops_of_mae_equal_a_count_by_hand():
    """Forward once; backward twice that, but images take no gradient, and attention computes its
    scores again: five products for two."""
    B, N, V, P, D, d = 16, 16, 4, 48, TOY_SIZE["embed_dim"], TOY_SIZE["decoder_embed_dim"]
    depths = ((1 + V, D, TOY_SIZE["depth"]), (1 + N, d, TOY_SIZE["decoder_depth"]))
    linear = sum(depth * tokens * 12 * width ** 2 for tokens, width, depth in depths)
    linear += (1 + V) * D * d + N * d * P
    attention = sum(depth * 2 * tokens ** 2 * width for tokens, width, depth in depths)
    crops = 3 * 2 * 16 ** 3                                # two products an image and channel
    by_hand = 2 * B * (3 * linear + 3.5 * attention + 2 * N * P * D + crops)
    _, flops = bench.play_step(resolve("--recipe", "mae"))
    assert flops == pytest.approx(by_hand, rel=0.02)


def peak_of_real_memory(make):
    """Of two steps: what PyTorch's profiler saw the allocator of the CPU hand out and take back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = make()
        step()
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("recipe", ["mae", "pl-mae"])
def test_memory_of_a_played_step_is_that_of_a_real_one(monkeypatch, recipe):
    config = resolve("--recipe", recipe, "--batch-size", "64")
    def make():
        return bench.make_step(*bench.set_up(config, CPU))

    played_peak = bench.play_step(config)[0]
    monkeypatch.setattr(mae.Attention, "forward", played.attention_in_one)
    assert played_peak == pytest.approx(peak_of_real_memory(make), rel=0.05)
    with played.Tally() as tally:                          # the same count, of numbers
        step = make()
        step()
        step()
    assert tally.peak == pytest.approx(played_peak, rel=0.01)


def test_a_larger_batch_takes_more_and_accumulating_less():
    def peak(*flags, images=0):
        return bench.play_step(resolve("--recipe", "mae", *flags), images)[0]

    small, large = peak("--batch-size", "128"), peak("--batch-size", "256")
    halved = peak("--batch-size", "256", "--accumulate", "2")
    assert large > 1.6 * small
    assert halved - small < 0.1 * (large - small)
    more = peak("--batch-size", "128", images=10_000) - small
    assert more == pytest.approx((10_000 - 128) * 3 * 16 * 16, rel=0.05)
    assert peak("--batch-size", "256", "--precision", "bf16") < 0.9 * large


def test_advice_names_the_card_and_what_a_smaller_one_asks_for(monkeypatch):
    def advice(gb_of_a_view, *flags):
        monkeypatch.setattr(bench, "play_step", lambda config, images: (
            gb_of_a_view * 1e9 * config.batch_size / config.accumulate, 0))
        [row] = bench.memory(Namespace(flags=[*SMALL, *flags], images=0))[2]
        return row["advice"]

    assert advice(0.01) == "fits a card of 4 GB"
    assert advice(1) == "fits a card of 24 GB; on 12 GB use --accumulate 2"
    assert advice(10) == "too much for 141 GB; on 141 GB use --accumulate 2"
    assert advice(1, "--image-clusters", "32") == "fits a card of 24 GB"       # of 32 samples
    assert advice(1, "--batch-size", "15") == "fits a card of 24 GB"


# ---------------------------------------------------------------------------------------- peers

@pytest.mark.parametrize("name, package", [("timm's blocks", "timm"), ("lightly", "lightly"),
                                           ("hugging face", "transformers")])
def test_a_peer_is_the_same_network(name, package):
    """As many parameters; where names are like ours, with our weights the same loss."""
    pytest.importorskip(package)
    config = resolve("--recipe", "mae")
    student, our_loss = bench.ours(config, 3)
    make, _, surplus = peers.PEERS[name]
    network, loss = make(config, 3)
    theirs = dict(network.named_parameters())
    count = sum(p.numel() for p in student.parameters()) + surplus(TOY_SIZE["embed_dim"])
    assert sum(p.numel() for p in theirs.values()) == count
    network.apply(mae.init_weights)
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    if name == "hugging face":
        assert loss(imgs, noise).item() == pytest.approx(our_loss(imgs, noise).item(), rel=0.3)
        return
    with torch.no_grad():
        for key, p in student.named_parameters():
            key = key.removeprefix("mae.encoder.").replace("mae.decoder.", "decoder_")
            key = key.replace("decoder_mask_token", "mask_token")
            if name == "lightly":
                decoder = key.startswith(("decoder_", "mask_token"))
                key = f"1.{key}" if decoder else f"0.vit.{key}"
            theirs[key].copy_(p)
    assert loss(imgs, noise).item() == pytest.approx(our_loss(imgs, noise).item(), rel=1e-5)


def test_hugging_faces_script_trains(photos):
    pytest.importorskip("transformers")
    config = resolve("--recipe", "mae", "--data", "imagefolder", "--data-root", str(photos),
                     "--workers", "0")
    assert len(peers.train_hugging_face(config, CPU)) == peers.EPOCHS


# ---------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("part", ["peers", "recipes", "limit", "memory"])
def test_a_part_runs(part, tmp_path, monkeypatch, capsys):
    def is_missing(config, channels):
        raise ImportError("No module named 'peer'")

    monkeypatch.setattr(bench, "PEERS", {"peer": (is_missing, ("torch",), None)})
    flags = SMALL if part == "recipes" else [*SMALL, "--recipe", "mae"]
    bench.main([part, "--rounds", "1", "--out", str(tmp_path / "rows.jsonl"), *flags])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    printed, said = capsys.readouterr()
    for row in rows:
        assert row["what"].startswith(f"{part}: ") and row["what"].removeprefix(f"{part}: ") in (
            printed)
        assert {"processor", "threads", "torch", "precision", "commit", "flags"} <= row.keys()
    if part == "peers":
        assert said == "left out: peer (No module named 'peer'); pip install torch\n"
    if part == "recipes":
        timed = [row["what"] for row in rows if "views_per_s" in row]
        assert timed == [f"recipes: {name}" for name in settings.RECIPES]
        whole = sum(row["ms"] for row in rows if row["what"].startswith("recipes: pl-mae: "))
        of_it = sum(row["percent"] for row in rows if row["what"].startswith("recipes: pl-mae: "))
        [step] = [row["ms"] for row in rows if row["what"] == "recipes: pl-mae"]
        assert whole == pytest.approx(step, rel=0.02) and of_it == pytest.approx(100, abs=1)


def test_whole_programs_run(tmp_path, monkeypatch, no_pictures):
    """On noise and on a folder; train.py in this process, as another one takes its time."""
    real = bench.subprocess.run

    def run(command, **kwargs):
        if command[0] == "git":
            return real(command, **kwargs)
        train.main(command[2:])
        return Namespace(returncode=0)

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "EPOCHS", 1)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "rows.jsonl"
    flags = ["--rounds", "1", "--out", str(out), "--workers", "0", *SMALL]
    bench.main(["train", "--images", "32", *flags])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["what"] for row in rows] == ["train: train.py, streamed",
                                             "train: train.py, in memory"]
    assert all(row["least"] <= row["images_per_s"] <= row["most"] for row in rows)
    with pytest.raises(UsageError, match="--batch-size 16: there are fewer images"):
        bench.main(["train", "--images", "15", *flags])


@pytest.mark.parametrize("flags, words", [
    (["peers", "--img-size", "16x32"], "--img-size, --patch-size: peers take squares"),
    (["memory", "--precision", "fp64"], "--precision fp64: is not for GPUs; use bf16"),
    (["limit", "--rounds", "0"], "--rounds must be 1 or more"),
    (["memory", "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
])
def test_what_cannot_be_is_said_in_one_line(flags, words):
    with pytest.raises(UsageError, match=words):
        bench.main([flags[0], *SMALL, *flags[1:]])


@pytest.mark.parametrize("flags", [[], ["abacus"], ["limit", "--rounds", "x"], ["limit", "--bach"]])
def test_an_unknown_word_ends_with_code_2(flags, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(flags)
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_found_before_anything_is_timed(tmp_path):
    with pytest.raises(OSError):
        bench.main(["limit", *SMALL, "--out", str(tmp_path / "nowhere" / "rows.jsonl")])
