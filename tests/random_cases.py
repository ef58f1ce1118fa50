"""Random cases: settings, shapes and files that nobody thought of. What must always hold is asked
of each: that numbers are finite and equal those of a plain loop, that every entry of a folder is
accounted for, that whatever is refused is refused in one line.

    python tests/random_cases.py 10000                 # seeds 0 to 9,999: some minutes
    python tests/random_cases.py 1 --first 4711        # one case again

A case is a function of its seed. One that fails prints its kind, its seed, how to repeat it, and
the traceback; the exit code is then 1. `test_random_cases.py` runs the first 200."""

import argparse
import math
import random
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import TOY_SIZE  # noqa: E402
from random_files import annotations, attempt, flags, mask_files, schedules, walks  # noqa: E402

import data  # noqa: E402
import mae  # noqa: E402
import pseudo_labels  # noqa: E402
import teachers  # noqa: E402
import train  # noqa: E402
from support import datasets, settings  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def close(a, b, atol):
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=atol)


def finite(x):
    assert x.isfinite().all(), x


# ----------------------------------------------------------------------------------- the kinds

def patches(rng, g):
    ph, pw, rows, columns, C = (rng.randint(1, 4) for _ in range(5))
    x = torch.randn(rng.randint(1, 3), C, rows * ph, columns * pw, generator=g)
    x = x.to(rng.choice(DTYPES))
    cut = mae.patchify(x, (ph, pw))
    assert torch.equal(mae.unpatchify(cut, (ph, pw), x.shape[2:]), x)
    r, c = rng.randrange(rows), rng.randrange(columns)
    one = x[:, :, r * ph:(r + 1) * ph, c * pw:(c + 1) * pw].permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(cut[:, r * columns + c], one)
    P = rng.randint(2, 9)
    x = torch.randn(3, 4, P, generator=g, dtype=torch.float64) * 10 ** rng.uniform(-4, 3)
    y, variance = mae.standardise_patches(x), x.var(-1)
    close(y.mean(-1), torch.zeros(3, 4), 1e-8)
    close(y.var(-1), variance / (variance + 1e-6), 1e-8)


def masking(rng, g):
    N, B, D = rng.choice([2, 3, rng.randint(4, 40)]), rng.randint(1, 3), rng.randint(1, 4)
    V = rng.choice([1, N - 1, rng.randint(1, N - 1)])
    noise = torch.rand(B, N, generator=g).to(rng.choice(DTYPES)) * rng.choice([0, 1])    # 0: ties
    keep, mask, restore = mae.random_masking(noise, 1 - V / N)
    assert keep.shape == (B, V) and (mask.sum(1) == N - V).all()
    assert (mask.gather(1, keep) == 0).all() and (mask == (restore >= V)).all()
    assert torch.equal(restore.sort(1).values, torch.arange(N).expand(B, N))
    tokens, fill = torch.randn(B, N, D, generator=g), torch.full((1, 1, D), 7.0)
    back = mae.restore_tokens(mae.gather_tokens(tokens, keep), restore, fill)
    assert torch.equal(back, torch.where(mask[..., None] == 1, fill, tokens))


def plain_sinkhorn(scores, temperature, iterations=3):
    q = [[s / temperature for s in row] for row in scores.double().tolist()]
    for _ in range(iterations):
        for by_column in (True, False):
            lines = [list(line) for line in zip(*q)] if by_column else q
            for line in lines:
                top = max(line)
                total = top + math.log(math.fsum(math.exp(x - top) for x in line))
                line[:] = [x - total for x in line]
            q = [list(line) for line in zip(*lines)] if by_column else lines
    return torch.tensor(q, dtype=torch.float64).exp()


def labels(rng, g):
    S = rng.randint(2, 16)
    K, t = rng.choice([2, S, rng.randint(2, S)]), 10 ** rng.uniform(-3, 0)
    scores = torch.randn(S, K, generator=g, dtype=torch.float64)
    scores = (scores * 10 ** rng.uniform(-3, 4)).to(rng.choice(DTYPES))
    q = pseudo_labels.sinkhorn(scores, t)
    centred = pseudo_labels.centring(scores, scores[0], t)
    for each in (q, centred):
        finite(each)
        close(each.sum(1), torch.ones(S), 1e-5)
    exact, shift = scores.double(), torch.randn(K, generator=g)
    close(pseudo_labels.sinkhorn(exact, t), plain_sinkhorn(exact, t), 1e-6)
    close(pseudo_labels.sinkhorn(exact + shift, t), pseudo_labels.sinkhorn(exact, t), 1e-5)
    entropy = -torch.special.xlogy(q, q).sum(-1)
    own = torch.randn(S, K, generator=g) * rng.choice([0, 1, 1e4])
    loss = pseudo_labels.label_loss(own, q, 10 ** rng.uniform(-3, 0))
    finite(loss)
    assert (loss >= entropy - 1e-4).all()
    assert -1e-5 <= pseudo_labels.me_max(own, 0.1) <= math.log(K) + 1e-5
    unit = torch.nn.functional.normalize(own, dim=1)
    finite(pseudo_labels.koleo(unit, rng.randint(1, S)))
    patch = torch.randn(rng.randint(1, 3), S, K, generator=g)
    close(pseudo_labels.remove_place(patch).mean(0), torch.zeros(S, K), 1e-5)


def averages(rng, g):
    dtype, m = rng.choice(DTYPES), rng.choice([0.0, 1.0, rng.random()])
    old, new = ([torch.randn(k, 3, generator=g).to(dtype) for k in (1, 4)] for _ in range(2))
    want = [m * a.double() + (1 - m) * b.double() for a, b in zip(old, new)]
    teachers.ema_update(old, new, m)
    for a, b in zip(old, want):
        close(a, b, 2e-2 if dtype == torch.bfloat16 else 1e-6)
        assert 0 < m < 1 or torch.equal(a.double(), b)
    B, N, D = rng.randint(1, 4), rng.randint(1, 5), rng.randint(2, 6)
    scale = 10 ** rng.uniform(-3, 3)
    tokens = (torch.randn(B, N, D, generator=g) * scale + rng.uniform(-2, 2) * scale).to(dtype)
    for how, over, eps in (("token", -1, 1e-5), ("feature", (0, 1), 1e-6), ("position", 0, 1e-6)):
        y, variance = teachers.standardise(tokens, how), tokens.double().var(over, correction=0)
        close(y.mean(over), torch.zeros_like(variance), 1e-3)
        close(y.var(over, correction=0), variance / (variance + eps), 1e-3)
    between, share = teachers.between_images(tokens)
    assert between >= 0 and 0 <= share <= 1 + 1e-5


def crops(rng, g):
    H, W, h, w = (rng.choice([1, 2, rng.randint(3, 40)]) for _ in range(4))
    B, C, dtype = rng.randint(1, 4), rng.choice([1, 3]), rng.choice(DTYPES)
    u = torch.rand(B, 4, generator=g)
    u = torch.where(torch.rand(B, 4, generator=g) < 0.2, u.round().clamp(max=1 - 2**-24), u)
    boxes = data.crop_boxes(u, H, W, (h, w), rng.choice([1e-3, 1, rng.uniform(0.01, 1)]))
    top, left, height, width = boxes.unbind(1)
    assert (torch.stack([top, left]) >= 0).all() and (torch.stack([height, width]) >= 1).all()
    assert (top + height <= H).all() and (left + width <= W).all()
    x = torch.rand(B, C, H, W, generator=g).to(dtype)
    flip = torch.rand(B, generator=g) < 0.5
    cut = data.crop_flip(x, boxes, flip, (h, w))
    assert cut.shape == (B, C, h, w) and cut.dtype == dtype and 0 <= cut.min() <= cut.max() <= 1
    if dtype == torch.float64 and w > 1:                   # one column torchvision mixes up
        want = TF.resized_crop(x[0], *boxes[0].tolist(), [h, w], TF.InterpolationMode.BICUBIC)
        close(cut[0], (want.flip(-1) if flip[0] else want).clamp(0, 1), 1e-4)
    u, strength = torch.rand(B, 6, generator=g), rng.choice([0, 1, 5, rng.uniform(0, 5)])
    y = data.recolour(x, u, strength)
    assert y.shape == x.shape and y.dtype == dtype and 0 <= y.min() <= y.max() <= 1


def batches(rng, g):
    accumulate, world, n = (rng.randint(1, 3) for _ in range(3))
    batch, views, C = accumulate * world * n, rng.choice([1, 2]), rng.choice([1, 3])
    H, W = rng.randint(1, 9), rng.randint(1, 9)
    count = batch * rng.randint(1, 3) + rng.randint(1, 5)
    pixels = torch.randint(0, 256, (count, C, H, W), generator=g, dtype=torch.uint8)
    y = torch.randint(-1, 3, (count,), generator=g)
    found = datasets.Images(y, ["a", "b", "c"], (rng.randint(1, 9), rng.randint(1, 9)), C, pixels)
    fraction = rng.choice([0, 0.1, rng.uniform(0, 0.9)])
    ids, out = datasets.held_out(found, fraction)
    assert sorted([*ids.tolist(), *out.tolist()]) == list(range(count))
    assert abs(len(out) - fraction * (y >= 0).sum()) <= 1 and (y[out] >= 0).all()
    mean, std = datasets.mean_std(found)
    x = datasets.read(found, torch.arange(count))
    x = x.transpose(0, 1).flatten(1).double() / 255
    close(torch.tensor(mean), x.mean(1), 1e-6)
    close(torch.tensor(std), x.std(1).clamp(min=1e-3), 1e-6)
    make = dict(mean=mean, std=std, seed=rng.choice([0, 2**63 - 1, rng.randrange(2**31)]),
                batch=batch, patches=rng.randint(2, 9), views=views, colours=rng.uniform(0, 5),
                smallest=rng.uniform(0.001, 1), teacher_view=rng.choice(["same", "other-colours"]))
    whole = data.Batches(found, torch.arange(count), **make)
    step = rng.randrange(5 * whole.steps_per_epoch)
    parts = [data.Batches(found, torch.arange(count), **make, accumulate=accumulate, rank=rank,
                          world=world) for rank in range(world)]
    numbers = [part.numbers(step) for part in parts]
    for name, want in whole.numbers(step).items():
        each = torch.stack([own[name].unflatten(0, (accumulate, n)) for own in numbers], dim=1)
        assert torch.equal(each.flatten(0, 2), want), name
    got = list(parts[-1].run(step, step + 1))
    assert len(got) == accumulate
    for each in got:
        assert each.student.shape == each.teacher.shape == (n * views, C, *found.size)
        finite(each.student), finite(each.teacher)


def steps(rng, g):
    """One training step of a random setting."""
    (h, w), (rows, columns) = ((rng.randint(1, 4), rng.randint(1, 4)) for _ in range(2))
    own = ["--data", rng.choice(["shapes", "fashion-mnist"]), "--img-size",
           f"{h * rows}x{w * columns}", "--patch-size", f"{h}x{w}", "--batch-size",
           rng.randint(1, 4)]
    for name, values in {
            "recipe": [*settings.RECIPES], "views": [1, 2], "balancing": pseudo_labels.BALANCING,
            "mask-ratio": [0.1, 0.5, 0.75, 0.9], "standardise": teachers.STANDARDISE,
            "labelled-patches": ["visible", "masked", "both"], "teacher-temperature": [1e-3, 1],
            "image-clusters": [2, 4], "patch-clusters": [2, 8], "student-temperature": [1e-3, 1],
            "teachers": [1, 2], "consistency-weight": [0, 1], "target": ["pixels", "tokens"],
            "rec-weight": [0, 1], "koleo-weight": [0, 3], "image-weight": [0, 1]}.items():
        if rng.random() < 0.5 or name in ("image-clusters", "patch-clusters"):
            own += [f"--{name}", rng.choice(values)]
    own += [flag for flag in ("--no-remove-place", "--no-norm-pix-loss") if rng.random() < 0.4]
    config, _ = attempt(settings.resolve, [*map(str, own)])
    if config is None:
        return
    channels = datasets.SETS[config.data].channels
    with mock.patch.dict(mae.SIZES, micro=TOY_SIZE):
        dtype = rng.choice(DTYPES[:2])
        student = train.build(config, channels).to(dtype)
    both = teachers.make_teachers(student, config)
    shape = (config.batch_size * config.views, channels, h * rows, w * columns)
    x = torch.randn(shape, generator=g, dtype=dtype) * rng.choice([0, 1, 1, 30])
    noise = torch.rand(len(x), rows * columns, generator=g, dtype=dtype)
    bf16 = dtype == torch.float32 and rng.random() < 0.3
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        loss, *_ = train.training_step(student, both, data.Views(x, x, noise), config)
    loss.backward()
    finite(loss)
    for name, p in student.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


KINDS = (patches, masking, labels, schedules, averages, crops, batches, steps, walks, annotations,
         mask_files, flags)


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    args, start, failed = parser.parse_args(argv), time.time(), 0
    for seed in range(args.first, args.first + args.count):
        rng = random.Random(seed)
        kind = rng.choice(KINDS)
        torch.manual_seed(seed)
        try:
            kind(rng, torch.Generator().manual_seed(seed))
        except Exception:
            failed += 1
            print(f"{kind.__name__}, seed {seed}; again with: python tests/random_cases.py 1 "
                  f"--first {seed}\n{traceback.format_exc()}", flush=True)
    print(f"{args.count} cases of {len(KINDS)} kinds in {time.time() - start:.0f} s: {failed} "
          "failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
