import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY

from mae import MaskedAutoencoder
from pseudo_labels import (
    BALANCING,
    CENTRE_MOMENTUM,
    Head,
    Student,
    balance,
    centring,
    image_label_loss,
    koleo,
    label_loss,
    make_labels,
    me_max,
    move_centre,
    patch_label_loss,
    plain_norm,
    remove_place,
    sinkhorn,
    swap_views,
)
from support import ranks
from teachers import Teacher


def settings(balancing, teacher_temperature=0.05):
    return SimpleNamespace(balancing=balancing, teacher_temperature=teacher_temperature,
                           remove_place=False)


def random_units(*shape, **kwargs):
    return F.normalize(torch.randn(*shape, **kwargs), dim=-1)


def random_cosines(samples, clusters):
    return random_units(samples, 64) @ random_units(clusters, 64).T


# ---------------------------------------------------------------------------------- balanced labels

def naive_sinkhorn(scores, temperature, iterations):
    """Loops over plain numbers: normalise the clusters, then the samples."""
    q = [[math.exp(s / temperature) for s in row] for row in scores.tolist()]
    for _ in range(iterations):
        for k in range(len(q[0])):
            total = sum(row[k] for row in q)
            for row in q:
                row[k] /= total
        for row in q:
            total = sum(row)
            row[:] = [v / total for v in row]
    return torch.tensor(q, dtype=torch.float64)


@pytest.mark.parametrize("samples, clusters, iterations", [(12, 5, 3), (7, 7, 1), (30, 4, 10)])
def test_sinkhorn_equals_a_naive_loop(samples, clusters, iterations):
    scores = torch.rand(samples, clusters, dtype=torch.float64) * 2 - 1
    want = naive_sinkhorn(scores, 0.05, iterations)
    torch.testing.assert_close(sinkhorn(scores, 0.05, iterations), want, atol=1e-12, rtol=1e-9)


def test_sinkhorn_rows_are_exact_and_columns_loose():
    scores = random_cosines(512, 64)
    favourites = scores + torch.linspace(0, 0.5, 64)       # some clusters are liked by all

    def uneven(q):
        return (q.sum(0) / 8 - 1).abs().mean()

    q = sinkhorn(scores)
    torch.testing.assert_close(q.sum(1), torch.ones(512))
    assert 1e-6 < uneven(q) < 0.02                         # about 1 % for cosines at 0.05
    assert uneven(sinkhorn(scores, 0.0125)) < 0.4          # more certain labels: about 30 %
    assert uneven(sinkhorn(favourites)) < 0.02
    unbalanced = balance(favourites, torch.ones(64), settings("me-max"))
    assert unbalanced.sum(0).max() > 3 * 8


def test_sinkhorn_ignores_a_constant_on_a_column_or_everywhere():
    scores = torch.rand(200, 6, dtype=torch.float64) * 2 - 1
    q = sinkhorn(scores)
    torch.testing.assert_close(sinkhorn(scores + torch.randn(6)), q)
    torch.testing.assert_close(sinkhorn(scores + 3), q)
    rows = sinkhorn(scores + 0.1 * torch.randn(200, 1))    # on a row: not nothing, in 3 iterations
    assert not torch.allclose(rows, q) and (rows - q).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_is_finite_for_huge_scores(dtype):
    scores = torch.where(torch.rand(40, 8) < 0.5, -1e4, 1e4).to(dtype)
    for each in (scores, torch.full((4, 3), 1e4), -scores):
        q = sinkhorn(each)
        assert q.isfinite().all() and q.dtype == torch.float32
        torch.testing.assert_close(q.sum(1), torch.ones(len(each)))


def test_centring_is_its_formula_and_moves_nothing():
    scores, centre = torch.randn(10, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    before = centre.clone()
    want = ((scores - before) / 0.1).exp()
    want = want / want.sum(1, keepdim=True)
    torch.testing.assert_close(centring(scores, centre, 0.1), want)
    torch.testing.assert_close(balance(scores, centre, settings("centring", 0.1)), want)
    assert torch.equal(centre, before)
    move_centre(centre, scores)
    running = CENTRE_MOMENTUM * before + (1 - CENTRE_MOMENTUM) * scores.mean(0)
    torch.testing.assert_close(centre, running)


def test_balance_does_what_its_settings_say():
    scores, centre = torch.randn(10, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(balance(scores, centre, settings("sinkhorn", 0.2)),
                               sinkhorn(scores, 0.2))
    p = (scores / 0.1).exp()                               # these leave labels as they are
    for name in ("me-max", "none"):
        torch.testing.assert_close(balance(scores, centre, settings(name, 0.1)),
                                   p / p.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match="there are sinkhorn, centring, me-max, none"):
        balance(scores, centre, settings("sinkhorm"))


@pytest.mark.parametrize("balancing", BALANCING)
def test_labels_are_of_the_tokens_and_only_centring_moves_the_centres(balancing):
    teacher = Teacher(Student(**TOY, image_clusters=5, patch_clusters=7), heads=True).double()
    config, tokens = settings(balancing), torch.randn(6, 17, 32, dtype=torch.float64)
    for centre in teacher.centres.values():
        centre.copy_(0.1 * torch.randn_like(centre))
    before = {name: centre.clone() for name, centre in teacher.centres.items()}
    labels = make_labels(teacher, tokens, config)
    scores = {"image": teacher.image_head(tokens[:, 0]),                                     # B K
              "patch": teacher.patch_head(plain_norm(tokens[:, 1:])).flatten(0, 1)}      # (B N) K
    assert labels["image"].shape == (6, 5) and labels["patch"].shape == (6, 16, 7)
    for name, each in scores.items():
        want = balance(each, before[name], config)
        torch.testing.assert_close(labels[name].flatten(0, -2), want)
        assert not labels[name].requires_grad
        centre = before[name]
        if balancing == "centring":
            centre = CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * each.mean(0)
        torch.testing.assert_close(teacher.centres[name], centre)


def test_patch_labels_without_their_place():
    """Only of patches, and before they are balanced."""
    teacher = Teacher(Student(**TOY, image_clusters=5, patch_clusters=7), heads=True).double()
    config, tokens = settings("sinkhorn"), torch.randn(6, 17, 32, dtype=torch.float64)
    plain = make_labels(teacher, tokens, config)
    config.remove_place = True
    labels = make_labels(teacher, tokens, config)
    scores = teacher.patch_head(plain_norm(tokens[:, 1:]))                               # B N K
    want = sinkhorn((scores - scores.mean(0)).flatten(0, 1)).view_as(scores)
    torch.testing.assert_close(labels["patch"], want)
    assert torch.equal(labels["image"], plain["image"])
    assert not torch.allclose(labels["patch"], plain["patch"], atol=0.01)


def test_a_teacher_makes_the_labels_it_has_heads_for():
    tokens = torch.randn(6, 17, 32)
    for clusters, kinds in (({"image_clusters": 5}, {"image"}), ({"patch_clusters": 5}, {"patch"})):
        teacher = Teacher(Student(**TOY, **clusters), heads=True)
        assert make_labels(teacher, tokens, settings("centring")).keys() == kinds


def test_swapping_views_crosses_them_and_twice_is_nothing():
    labels = torch.rand(6, 4)                              # two views of three images
    swapped = swap_views(labels, views=2)
    assert torch.equal(swapped[:3], labels[3:]) and torch.equal(swapped[3:], labels[:3])
    assert torch.equal(swap_views(swapped, views=2), labels)
    with pytest.raises(ValueError, match="3 rows"):
        swap_views(labels[:3], views=2)
    assert torch.equal(swap_views(labels, views=1), labels)


# --------------------------------------------------------------------------------------- the losses

def test_me_max_is_its_formula():
    scores = torch.randn(3, 5, 4, dtype=torch.float64)
    p = (scores / 0.1).exp()
    mean = (p / p.sum(-1, keepdim=True)).reshape(15, 4).mean(0)
    torch.testing.assert_close(me_max(scores), math.log(4) + (mean * mean.log()).sum())
    assert me_max(torch.zeros(6, 4)).abs() < 1e-6          # uniform: nothing to mend
    one = torch.zeros(6, 4)
    one[:, 2] = 1e3
    torch.testing.assert_close(me_max(one), torch.tensor(math.log(4)))   # one cluster: the most
    one.requires_grad_()                       # where the other clusters' share is exactly 0
    assert torch.autograd.grad(me_max(one, 1e-3), one)[0].isfinite().all()


def test_label_loss_is_cross_entropy_and_matched_beats_shuffled():
    scores, classes = torch.randn(50, 6), torch.randint(0, 6, (50,))
    torch.testing.assert_close(image_label_loss(scores, F.one_hot(classes, 6).float()),
                               F.cross_entropy(scores / 0.1, classes))
    cosines = random_cosines(64, 8)
    q = sinkhorn(cosines)
    assert image_label_loss(cosines, q) < image_label_loss(cosines, q[torch.randperm(64)])
    assert image_label_loss(cosines, q) < image_label_loss(cosines, q.roll(1, 0))
    line_of_collapse = torch.full((3,), math.log(8))
    torch.testing.assert_close(label_loss(torch.zeros(3, 8), q[:3]), line_of_collapse)


def test_patch_label_loss_is_a_mean_of_means():
    scores, labels = torch.randn(2, 5, 3), torch.rand(2, 5, 3).softmax(-1)
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 1.0]])
    each = {0: [], 1: []}
    for b in range(2):
        for n in range(5):
            log_p = (scores[b, n] / 0.1).log_softmax(0)
            loss = -sum(labels[b, n, k] * log_p[k] for k in range(3))
            each[int(mask[b, n])].append(loss)
    visible, masked = (torch.stack(each[m]).mean() for m in (0, 1))
    want = {"visible": visible, "masked": masked, "both": (visible + masked) / 2}
    for which, number in want.items():
        torch.testing.assert_close(patch_label_loss(scores, labels, mask, which=which), number)


def test_koleo_is_the_distance_to_the_nearest_token_of_another_image():
    unit = random_units(8, 5, dtype=torch.float64)         # two views of four images
    unit[4] = unit[0]                                      # the other view may be as near as it is
    unit.requires_grad_()
    loop = []
    for i in range(8):
        distances = [(unit[i] - unit[j].detach()).norm() for j in range(8) if j % 4 != i % 4]
        loop.append(min(distances).log())
    loss, want = koleo(unit, 4), -torch.stack(loop).mean()
    torch.testing.assert_close(loss, want, atol=1e-4, rtol=0)
    (gradient,) = torch.autograd.grad(loss, unit)
    (want_gradient,) = torch.autograd.grad(want, unit)
    torch.testing.assert_close(gradient, want_gradient, atol=1e-4, rtol=0)     # others stand still
    assert koleo(F.normalize(unit - 0.01 * gradient, dim=1), 4) < loss


def test_koleo_of_one_image_is_nothing():
    unit = random_units(2, 5).requires_grad_()             # its two views need not be kept apart
    loss = koleo(unit, 1)
    loss.backward()
    assert loss == 0 and not unit.grad.any()


# ------------------------------------------------------------------------------------ several ranks

class PlayedRanks:
    """What support.ranks needs of torch.distributed. Each thread is a rank."""

    ReduceOp = SimpleNamespace(SUM=torch.Tensor.sum, MAX=torch.Tensor.amax)

    def __init__(self, world):
        self.world, self.handed_in = world, [None] * world
        self.barrier = threading.Barrier(world, timeout=30)
        self.this = threading.local()

    def is_initialized(self):
        return True

    def get_world_size(self):
        return self.world

    def get_rank(self):
        return self.this.rank

    def exchange(self, x):
        self.handed_in[self.this.rank] = x.clone()
        self.barrier.wait()                                # all have handed in
        everything = list(self.handed_in)
        self.barrier.wait()                                # all have taken
        return everything

    def all_reduce(self, x, operation):
        x.copy_(operation(torch.stack(self.exchange(x)), 0))

    def all_gather(self, parts, x):
        for part, received in zip(parts, self.exchange(x)):
            part.copy_(received)

    def run(self, function, *parts):
        """function(part of the rank) of each rank, at the same time -> a list of results."""
        def as_rank(rank):
            self.this.rank = rank
            return function(parts[rank])

        with ThreadPoolExecutor(self.world) as threads:
            return list(threads.map(as_rank, range(self.world)))


@pytest.fixture
def two_ranks(monkeypatch):
    """Called with a function and two halves of a batch."""
    def run(function, *halves):
        with monkeypatch.context() as patch:
            played = PlayedRanks(2)
            patch.setattr(ranks, "distributed", played)
            return played.run(function, *halves)
    return run


def test_sinkhorn_of_two_ranks_is_that_of_the_whole_batch(two_ranks):
    scores = torch.rand(24, 5, dtype=torch.float64)
    scores[:12] *= 0.3                                     # the halves differ
    labels = torch.cat(two_ranks(sinkhorn, *scores.chunk(2)))
    torch.testing.assert_close(labels, sinkhorn(scores))
    apart = torch.cat([sinkhorn(half) for half in scores.chunk(2)])
    assert not torch.allclose(labels, apart, atol=1e-2)    # each half by itself is something else


def test_centres_of_two_ranks_are_those_of_the_whole_batch(two_ranks):
    scores, start = torch.randn(24, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    want = start.clone()
    move_centre(want, scores)

    def moved(half):
        centre = start.clone()
        move_centre(centre, half)
        return centre

    for centre in two_ranks(moved, *scores.chunk(2)):
        torch.testing.assert_close(centre, want)


def images_of_a_rank(x, rank):
    """Rank 0 has the first half of the images, with both of their views."""
    return x.unflatten(0, (2, 2, -1))[:, rank].flatten(0, 1)


@pytest.mark.parametrize("loss_of", [me_max, lambda unit: koleo(unit, len(unit) // 2)],
                         ids=["me_max", "koleo"])
def test_losses_of_two_ranks_are_those_of_the_whole_batch(two_ranks, loss_of):
    """Value and gradient. DistributedDataParallel halves the gradients that two ranks bring."""
    x = random_units(24, 3, dtype=torch.float64).requires_grad_()
    want = loss_of(x)
    (want_gradient,) = torch.autograd.grad(want, x)

    def loss_and_gradient(part):
        part.requires_grad_()
        loss = loss_of(part)
        return loss.detach(), torch.autograd.grad(loss, part)[0]

    parts = [images_of_a_rank(x.detach(), rank).clone() for rank in (0, 1)]
    results = two_ranks(loss_and_gradient, *parts)
    torch.testing.assert_close(sum(loss for loss, _ in results) / 2, want.detach())
    for rank, (_, gradient) in enumerate(results):
        torch.testing.assert_close(gradient / 2, images_of_a_rank(want_gradient, rank))


# ---------------------------------------------------------------------------- heads and the student

def test_scores_are_cosines():
    head = Head(8, (16, 12), 6, 5)
    scores = head(torch.randn(3, 7, 8))
    assert scores.shape == (3, 7, 5) and scores.abs().max() <= 1 + 1e-6
    head.prototypes.data *= 7                              # lengths do not count
    with torch.no_grad():
        x = torch.randn(2, 8)
        want = F.cosine_similarity(head.mlp(x)[:, None], head.prototypes, dim=-1)
        torch.testing.assert_close(head(x), want)


def test_cosines_are_not_rounded_in_bf16():
    """The MLP computes in bf16, the cosines of what comes out of it in fp32. In bf16 a cosine near
    1 is off by up to 0.002, and so is a label by 0.16 nats at a temperature of 0.0125."""
    head, x = Head(16, (32,), 24, 10), torch.randn(40, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        head.prototypes.copy_(head.mlp(x[:10]) + 0.02 * torch.randn(10, 24))     # cosines near 1
        hidden, unit, scores = head.mlp(x), head.project(x), head(x)
    assert hidden.dtype == torch.bfloat16 and unit.dtype == scores.dtype == torch.float32
    want = F.cosine_similarity(hidden.float()[:, None], head.prototypes.detach(), dim=-1)
    assert (scores - want).abs().max() / 0.0125 < 1e-3     # nats
    assert (want.bfloat16() - want).abs().max() / 0.0125 > 0.1
    torch.testing.assert_close(unit, F.normalize(hidden.float(), dim=-1))


def test_student_is_a_masked_autoencoder_and_its_heads():
    """Visible patches are labelled from the encoder's tokens, masked ones from the decoder's
    states, each at its own place."""
    student = Student(**TOY, image_clusters=5, patch_clusters=7, target_dim=32).double()
    assert isinstance(student.mae, MaskedAutoencoder)
    imgs = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    noise = torch.rand(4, 16, dtype=torch.float64)
    out = student(imgs, 0.75, noise)
    assert {name: tuple(x.shape) for name, x in out.items()} == {
        "mask": (4, 16), "unit": (4, 21), "image": (4, 5), "pred": (4, 16, 32), "patch": (4, 16, 7)}
    z, mask, ids_restore = student.mae.forward_encoder(imgs, 0.75, noise)
    states = student.mae.forward_decoder(z, ids_restore)
    torch.testing.assert_close(out["image"], student.image_head(z[:, 0]))
    torch.testing.assert_close(out["image"], student.image_head.compare(out["unit"]))
    torch.testing.assert_close(out["pred"], student.mae.decoder.pred(states))
    order = noise.argsort(1)
    for b in range(4):
        for place, n in enumerate(order[b].tolist()):
            y = z[b, 1 + place] if place < 4 else student.decoder_label(states[b, n])
            assert out["mask"][b, n] == mask[b, n] == (place >= 4)
            torch.testing.assert_close(out["patch"][b, n], student.patch_head(plain_norm(y)))


@pytest.mark.parametrize("parts, keys", [
    (dict(), {"mask", "pred"}),
    (dict(image_clusters=5), {"mask", "unit", "image", "pred"}),
    (dict(patch_clusters=7), {"mask", "patch", "pred"}),
    (dict(image_clusters=5, target_dim=0), {"mask", "unit", "image"}),
])
def test_a_student_says_what_it_has_the_parts_for(parts, keys):
    student = Student(**TOY, **parts)
    assert student(torch.randn(2, 3, 16, 16), 0.75, torch.rand(2, 16)).keys() == keys


def test_scores_without_their_place():
    """What is the same at a place in all images goes; labels then cannot be read off the place."""
    place, content = 5 * torch.randn(6, 4), torch.randn(200, 6, 4)
    scores = place + content
    labels = sinkhorn(remove_place(scores).flatten(0, 1), 0.5).view_as(scores)
    plain = sinkhorn(scores.flatten(0, 1), 0.5).view_as(scores)
    assert (labels.mean(0) - 1 / 4).abs().max() < 0.05 < (plain.mean(0) - 1 / 4).abs().max()
    torch.testing.assert_close(remove_place(scores), content - content.mean(0))
