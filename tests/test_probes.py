"""Classifiers on frozen features, and scores, against scikit-learn, loops and cases by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import probes
from support.probes import (
    accuracy,
    average_precision,
    centred,
    logistic_regression,
    mean_average_precision,
    predict,
)


def hard_blobs(n, classes=4, dim=12, seed=0):
    """Overlapping clouds, of unit length, one of them larger: x n dim, y n."""
    g = torch.Generator().manual_seed(seed)
    y = (torch.arange(n) % (2 * classes) - classes).clamp(min=0)
    x = F.normalize(torch.eye(classes, dim)[y] + 0.7 * torch.randn(n, dim, generator=g), dim=1)
    return x, y


def penalised(loss, weights, strength):
    return (loss + strength / 2 * weights[:, 1:].square().sum()).item()


@pytest.mark.parametrize("strength", [1e-1, 1e-3, 1e-6])
def test_logistic_regression_is_that_of_scikit_learn(strength):
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (test_x, test_y) = hard_blobs(200), hard_blobs(500, seed=1)
    model = linear_model.LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=10_000)
    model.fit(x.double().numpy(), y.numpy())
    theirs = torch.tensor(np.concatenate([model.intercept_[:, None], model.coef_], axis=1)).float()
    ours = logistic_regression(x, y, 4, strength)
    losses = [penalised(F.cross_entropy(predict(each, x), y), each, strength)
              for each in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    scores = [accuracy(predict(each, test_x).argmax(1), test_y) for each in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], abs=0.002) and scores[0] > 0.5
    if strength > 1e-6:                                    # there the minimum is sharp
        assert (ours[:, 0] - ours[:, 0].mean()).tolist() == pytest.approx(
            (theirs[:, 0] - theirs[:, 0].mean()).tolist(), abs=0.02)
    again = logistic_regression(x, y, 4, strength, start=torch.randn_like(ours))
    assert penalised(F.cross_entropy(predict(again, x), y), again, strength) == pytest.approx(
        losses[0], abs=1e-3)


def test_several_classes_to_an_image_are_questions_of_their_own():
    """One class alone gets the weights that it gets among others; those of scikit-learn."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = hard_blobs(200)
    several = torch.stack([y == 0, (y == 1) | (y == 2)], dim=1).long()
    ours = logistic_regression(x, several, 2, 1e-3)
    for number in range(2):
        one = logistic_regression(x, several[:, [number]], 1, 1e-3)
        model = linear_model.LogisticRegression(C=1 / (1e-3 * len(x)), tol=1e-8, max_iter=10_000)
        model.fit(x.double().numpy(), several[:, number].numpy())
        theirs = torch.tensor(np.concatenate([model.intercept_[:, None], model.coef_], 1)).float()
        for each in (one, theirs):
            torch.testing.assert_close(predict(ours, x)[:, [number]], predict(each, x),
                                       atol=0.02, rtol=0.01)


def test_average_precision_by_hand():
    # sorted by score the truth is 1 0 1 0: precision 1 at the first, 2/3 at the second hit
    scores, y = torch.tensor([[0.9, 0.5], [0.8, 0.5], [0.7, 0.5], [0.1, 0.5]]), torch.zeros(4, 3)
    y[0, 0] = y[2, 0] = y[1, 1] = 1
    found = average_precision(torch.cat([scores, scores[:, :1]], 1), y)
    assert found[0].item() == pytest.approx((1 + 2 / 3) / 2)
    assert found[1].item() == pytest.approx(1 / 4)         # all alike: one in four is right
    assert math.isnan(found[2])                            # no image has the third
    assert mean_average_precision(scores, y[:, :2]) == pytest.approx((5 / 6 + 1 / 4) / 2, abs=1e-4)


def test_average_precision_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, y = torch.rand(300, 5).mul(20).round(), (torch.rand(300, 5) < 0.2).long()      # ties
    theirs = [metrics.average_precision_score(y[:, c], scores[:, c]) for c in range(5)]
    assert average_precision(scores, y).tolist() == pytest.approx(theirs, abs=1e-9)
    whole = metrics.average_precision_score(y, scores, average="macro")
    assert mean_average_precision(scores, y) == pytest.approx(whole, abs=1e-4)


def test_others_are_centred_on_the_first():
    x, other = torch.randn(50, 4) + 5, torch.randn(20, 4)
    [alone], [found, moved] = centred(x), centred(x, other)
    assert torch.equal(alone, found)
    torch.testing.assert_close(moved, F.normalize(other - x.mean(0), dim=1))


# ---------------------------------------------------------------- chosen on validation images

def test_the_strength_is_chosen_on_validation_images_which_do_not_train():
    """Against the same by hand."""
    (x, y), (test_x, test_y) = hard_blobs(300), hard_blobs(100, seed=1)
    val, names = torch.arange(300) % 3 == 0, list("abcd")
    picked = probes.pick_few(y, 4, ~val, "10", 5)
    assert not val[picked].any()
    scores = {strength: accuracy(predict(logistic_regression(x[picked], y[picked], 4, strength),
                                         x[val]).argmax(1), y[val])
              for strength in probes.STRENGTHS}
    fit = probes.fit_draw(x, y, names, val, "10", 5, test_x, test_y)
    assert len(set(scores.values())) > 1
    assert fit.validation == pytest.approx(max(scores.values()), abs=0.011)    # one image of 100
    assert fit.images == len(picked)
    weights = logistic_regression(x[picked], y[picked], 4, fit.strength)
    on_test = accuracy(predict(weights, test_x).argmax(1), test_y)
    assert fit.score == pytest.approx(on_test, abs=0.02)
    on_validation = probes.fit_draw(x, y, names, val, "10", 5, None, None)
    assert on_validation.score == on_validation.validation == fit.validation


def test_all_labels_are_all_once_the_strength_is_chosen():
    (x, y), (test_x, test_y) = hard_blobs(60), hard_blobs(100, seed=1)
    several, test_several = F.one_hot(y, 4), F.one_hot(test_y, 4)
    val = torch.arange(60) % 3 == 0
    fit = probes.fit_draw(x, several, list("abcd"), val, "all", 0, test_x, test_several)
    weights = logistic_regression(x, several, 4, fit.strength)
    assert fit.images == 60
    assert fit.score == pytest.approx(mean_average_precision(predict(weights, test_x),
                                                             test_several), abs=1e-3)
    assert sum(fit.classes.values()) / 4 == pytest.approx(fit.score, abs=1e-3)


# ---------------------------------------------------------------------------------- who is picked

def test_so_many_of_each_class_are_picked():
    y, pool = torch.arange(120) % 3, torch.arange(120) % 5 > 0
    y[:60] = 0                                             # classes are not alike in number
    before = torch.tensor([], dtype=torch.long)
    for labels in ("1", "2", "5", "10"):
        picked = probes.pick_few(y, 3, pool, labels, seed=3)
        assert y[picked].bincount().tolist() == 3 * [int(labels)]
        assert pool[picked].all() and len(picked.unique()) == len(picked)
        assert torch.isin(before, picked).all()            # those of a row are in the next one
        assert torch.equal(picked, probes.pick_few(y, 3, pool, labels, seed=3))
        before = picked
    assert not torch.equal(picked.sort().values,
                           probes.pick_few(y, 3, pool, "10", seed=4).sort().values)


def test_a_share_is_of_each_class_and_at_least_one_image():
    y = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    pool = torch.ones(1000, dtype=torch.bool)
    for labels, want in (("10%", [90, 9, 1]), ("1%", [9, 1, 1])):
        assert y[probes.pick_few(y, 3, pool, labels, 0)].bincount().tolist() == want


def test_a_class_with_fewer_images_gives_all_it_has():
    y, pool = torch.tensor([0] * 8 + [1] * 3), torch.ones(11, dtype=torch.bool)
    pool[8] = False
    assert y[probes.pick_few(y, 3, pool, "5", 0)].bincount().tolist() == [5, 2]
    assert len(probes.pick_few(y, 3, pool, "all", 0)) == 10


def test_images_with_several_classes_are_picked_for_any_of_them():
    y = (torch.rand(200, 4) < 0.3).long()
    pool = torch.ones(200, dtype=torch.bool)
    picked = probes.pick_few(y, 4, pool, "5", 0)
    assert (y[picked].sum(0) >= 5).all() and len(picked) <= 20
    assert len(probes.pick_few(y, 4, pool, "10%", 0)) == 20


def test_guessing():
    assert probes.guessing(torch.tensor([0, 0, 0, 1])) == 0.75
    assert probes.guessing(torch.tensor([[1, 0, 0], [1, 1, 0]])) == 0.75   # (1 + 1/2) / 2
