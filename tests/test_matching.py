from itertools import permutations

import numpy as np
import pytest

from extras.matching import best_matching, matched_accuracy, nmi


@pytest.mark.parametrize("shape", [(3, 3), (4, 6), (6, 4), (2, 6)])
def test_matching_is_the_best_of_all(shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        gain = rng.integers(0, 9, shape).astype(float)
        match = best_matching(gain)
        wide = gain if shape[0] <= shape[1] else gain.T
        best = max(sum(wide[i, c] for i, c in enumerate(p)) for p in permutations(range(wide.shape[1]), wide.shape[0]))
        assert gain[match >= 0, match[match >= 0]].sum() == best and len(set(match[match >= 0])) == min(shape)


def test_agreement_of_labellings():
    classes = np.arange(60) % 3
    renamed = (classes + 1) % 3
    assert nmi(renamed, classes) == pytest.approx(1) and matched_accuracy(renamed, classes) == 1
    assert nmi(np.zeros(60, int), classes) == pytest.approx(0) and matched_accuracy(np.zeros(60, int), classes) == pytest.approx(1 / 3)
    split = classes + 3 * (np.arange(60) >= 30)            # six clusters of three classes: half of the samples have no name
    assert matched_accuracy(split, classes) == pytest.approx(0.5)
    a, b = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    mutual = 0.25 * np.log(0.25 / (0.5 * 0.25)) + 0.25 * np.log(0.25 / (0.5 * 0.75)) + 0.5 * np.log(0.5 / (0.5 * 0.75))
    entropies = -np.log(0.5) - 0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    assert nmi(a, b) == pytest.approx(2 * mutual / entropies)
