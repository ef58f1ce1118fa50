import numpy as np
import pytest
import torch

from utils.agreement import nmi, purity, table


def test_table_counts_pairs():
    a = torch.tensor([0, 2, 2, 0])
    b = torch.tensor([1, 0, 0, 1])
    assert table(a, b).tolist() == [[0, 2], [0, 0], [2, 0]]


def test_nmi_of_a_case_worked_by_hand():
    a = np.array([0, 0, 1, 1])
    b = np.array([0, 1, 1, 1])
    mutual = (0.25 * np.log(0.25 / (0.5 * 0.25)) + 0.25 * np.log(0.25 / (0.5 * 0.75))
              + 0.5 * np.log(0.5 / (0.5 * 0.75)))
    entropies = -np.log(0.5) - 0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    assert nmi(a, b) == pytest.approx(2 * mutual / entropies)


def test_nmi_at_its_ends():
    classes = np.arange(60) % 3
    assert nmi((classes + 1) % 3, classes) == pytest.approx(1)           # names do not count
    assert nmi(np.zeros(60, int), classes) == pytest.approx(0)
    assert nmi(np.zeros(60, int), np.zeros(60, int)) == 1


def test_nmi_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for clusters in (2, 9, 40):
        a = rng.integers(0, clusters, 200)
        b = np.where(rng.random(200) < 0.5, a % 5, rng.integers(0, 5, 200))
        assert nmi(a, b) == pytest.approx(metrics.normalized_mutual_info_score(a, b))


def test_purity_is_the_accuracy_of_naming_clusters():
    rng = np.random.default_rng(0)
    clusters = torch.from_numpy(rng.integers(0, 12, 200))
    classes = torch.from_numpy(rng.integers(0, 5, 200))
    right = 0
    for cluster in range(12):
        members = classes[clusters == cluster].tolist()
        right += max(members.count(name) for name in range(5))
    assert purity(clusters, classes) == right / 200
    assert purity(classes + 5 * (clusters > 6), classes) == 1     # a class may have many clusters
    assert purity(np.arange(200), classes) == 1                   # chance grows with clusters
