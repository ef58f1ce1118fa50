import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY

from pseudo_labels import (
    CENTRE_MOMENTUM,
    Head,
    Student,
    balance,
    centring,
    class_token_loss,
    count_labels,
    data_token_loss,
    health,
    koleo,
    label_loss,
    me_max,
    plain_norm,
    sinkhorn,
)
from utils.log import signs_of_collapse


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
    torch.testing.assert_close(sinkhorn(scores, 0.05, iterations), naive_sinkhorn(scores, 0.05, iterations), atol=1e-12, rtol=1e-9)


def test_sinkhorn_rows_are_exact_and_columns_loose():
    scores = F.normalize(torch.randn(512, 64), dim=1) @ F.normalize(torch.randn(64, 64), dim=1).T
    q = sinkhorn(scores)
    torch.testing.assert_close(q.sum(1), torch.ones(512))
    uneven = lambda q: (q.sum(0) / 8 - 1).abs().mean()     # about 1 % for cosines at 0.05
    assert 1e-6 < uneven(q) < 0.02
    assert uneven(sinkhorn(scores, 0.0125)) < 0.4          # more certain labels are balanced more loosely, about 30 %
    plain = balance(scores + torch.linspace(0, 0.5, 64), "me-max", 0.05, torch.ones(64))         # some clusters are favourites
    assert plain.sum(0).max() > 3 * 8 and uneven(sinkhorn(scores + torch.linspace(0, 0.5, 64))) < 0.02


def test_sinkhorn_ignores_a_constant_on_a_column_or_everywhere():
    scores = torch.rand(200, 6, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(sinkhorn(scores + torch.randn(6)), sinkhorn(scores))
    torch.testing.assert_close(sinkhorn(scores + 3), sinkhorn(scores))
    rows = sinkhorn(scores + 0.1 * torch.randn(200, 1))    # on a row: not nothing, at 3 iterations
    assert not torch.allclose(rows, sinkhorn(scores)) and (rows - sinkhorn(scores)).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_is_finite_for_huge_scores(dtype):
    scores = torch.where(torch.rand(40, 8) < 0.5, -1e4, 1e4).to(dtype)
    for s in (scores, torch.full((4, 3), 1e4), -scores):
        q = sinkhorn(s)
        assert q.isfinite().all() and q.dtype == torch.float32
        torch.testing.assert_close(q.sum(1), torch.ones(len(s)))


def test_centring_is_its_formula():
    scores, centre = torch.randn(10, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    old = centre.clone()
    q = centring(scores, centre, 0.1)
    want = ((scores - old) / 0.1).exp()
    torch.testing.assert_close(q, want / want.sum(1, keepdim=True))
    torch.testing.assert_close(centre, CENTRE_MOMENTUM * old + (1 - CENTRE_MOMENTUM) * scores.mean(0))


def test_me_max_is_its_formula():
    scores = torch.randn(3, 5, 4, dtype=torch.float64)
    p = (scores / 0.1).exp()
    mean = (p / p.sum(-1, keepdim=True)).reshape(15, 4).mean(0)
    torch.testing.assert_close(me_max(scores), math.log(4) + (mean * mean.log()).sum())
    assert me_max(torch.zeros(6, 4)).abs() < 1e-6                              # uniform: nothing to mend
    one = torch.zeros(6, 4)
    one[:, 2] = 1e3
    torch.testing.assert_close(me_max(one), torch.tensor(math.log(4)))         # all in one cluster: the most
    q = balance(scores[0], "me-max", 0.1, torch.ones(4))
    torch.testing.assert_close(q, p[0] / p[0].sum(-1, keepdim=True))


def test_label_loss_is_cross_entropy_and_matched_beats_shuffled():
    scores, labels = torch.randn(50, 6), torch.randint(0, 6, (50,))
    torch.testing.assert_close(class_token_loss(scores, F.one_hot(labels, 6).float()), F.cross_entropy(scores / 0.1, labels))
    cosines = F.normalize(torch.randn(64, 16), dim=1) @ F.normalize(torch.randn(8, 16), dim=1).T
    q = sinkhorn(cosines)
    assert class_token_loss(cosines, q) < class_token_loss(cosines, q[torch.randperm(64)])
    assert class_token_loss(cosines, q) < class_token_loss(cosines, q.roll(1, 0))
    torch.testing.assert_close(label_loss(torch.zeros(3, 8), q[:3]), torch.full((3,), math.log(8)))      # the line of collapse


def test_data_token_loss_is_a_mean_of_means():
    scores, labels, mask = torch.randn(2, 5, 3), torch.rand(2, 5, 3).softmax(-1), torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 1.0]])
    each = {b: [] for b in (0, 1)}
    for b in range(2):
        for n in range(5):
            each[int(mask[b, n])].append(-sum(labels[b, n, k] * (scores[b, n] / 0.1).log_softmax(0)[k] for k in range(3)))
    visible, masked = (torch.stack(each[m]).mean() for m in (0, 1))
    for where, want in dict(visible=visible, masked=masked, both=(visible + masked) / 2).items():
        torch.testing.assert_close(data_token_loss(scores, labels, mask, where), want)


def test_health():
    spread = health(count_labels(torch.eye(4).repeat(3, 1)))
    assert spread == pytest.approx(dict(entropy=0, clusters=4, effective=4, largest=0.25), abs=1e-5)
    gathered = health(count_labels(torch.eye(4)[[1, 1, 1, 1]].reshape(2, 2, 4)))
    assert gathered == pytest.approx(dict(entropy=0, clusters=1, effective=1, largest=1), abs=1e-5)
    vague = health(count_labels(torch.full((5, 4), 0.25)))
    assert (vague["entropy"], vague["effective"]) == pytest.approx((math.log(4), 4), abs=1e-5)
    two = count_labels(torch.eye(4)[:1]) + count_labels(torch.eye(4)[1:2])     # counts add up over steps and ranks
    assert health(two) == pytest.approx(health(count_labels(torch.eye(4)[:2])))


def test_signs_of_collapse():
    well = {"class": 3.0, "class_ln_k": math.log(64), "class_entropy": 2.0, "class_effective": 60.0, "rec_between": 0.5}
    assert signs_of_collapse(well) == set() and signs_of_collapse({"rec": 0.5}) == set()
    for ill, word in (({"class": math.log(64)}, "not being predicted"), ({"class_entropy": math.log(64)}, "uniform"),
                      ({"class_effective": 1.5}, "few"), ({"rec_between": 0.01}, "targets")):
        (sign,) = signs_of_collapse(well | ill)
        assert word in sign


def test_scores_are_cosines():
    head = Head(8, (16, 12), 6, 5)
    scores = head(torch.randn(3, 7, 8))
    assert scores.shape == (3, 7, 5) and scores.abs().max() <= 1 + 1e-6
    head.prototypes.data *= 7                              # lengths do not count
    with torch.no_grad():
        x = torch.randn(2, 8)
        torch.testing.assert_close(head(x), F.cosine_similarity(head.mlp(x)[:, None], head.prototypes, dim=-1))


def test_student_is_the_masked_autoencoder_and_its_heads():
    """Visible patches are labelled from the encoder's tokens, masked ones from the decoder's states, each at its own place."""
    model = Student(**TOY, class_clusters=5, data_clusters=7, target_dim=32).double()
    imgs, noise = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.rand(4, 16, dtype=torch.float64)
    out = model(imgs, 0.75, noise)                         # two masks of two views
    assert {k: tuple(v.shape) for k, v in out.items()} == {"mask": (4, 16), "unit": (4, 21), "class": (4, 5), "pred": (4, 16, 32), "data": (4, 16, 7)}
    z, mask, ids_restore = model.forward_encoder(torch.cat([imgs, imgs]), 0.75, noise)
    states = model.forward_decoder(z, ids_restore)
    torch.testing.assert_close(out["class"], model.class_head(z[:, 0]))
    order = noise.argsort(1)
    for b in range(4):
        for place, n in enumerate(order[b].tolist()):
            y = z[b, 1 + place] if place < 4 else model.decoder_label(states[b, n])
            assert mask[b, n] == (place >= 4)
            torch.testing.assert_close(out["data"][b, n], model.data_head(plain_norm(y)))
    short = model(imgs, 0.75, noise, decode=False)
    assert short.keys() == {"mask", "unit", "class"} and torch.equal(short["class"], out["class"])


def test_koleo_is_the_distance_to_the_nearest_token_of_another_image():
    unit = F.normalize(torch.randn(8, 5, dtype=torch.float64), dim=1)                    # two views of four images
    unit[4] = unit[0]                                      # the other view may be as near as it likes
    unit.requires_grad_()
    loop = [min((unit[i] - unit[j].detach()).norm() for j in range(8) if j % 4 != i % 4).log() for i in range(8)]
    loss = koleo(unit, 4)
    torch.testing.assert_close(loss, -torch.stack(loop).mean(), atol=1e-4, rtol=0)
    (gradient,) = torch.autograd.grad(loss, unit)
    assert koleo(F.normalize(unit - 0.01 * gradient, dim=1), 4) < loss
    assert koleo(unit[:2], 1) == 0                         # two views of one image: no other to be kept apart from
