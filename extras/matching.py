"""Do pseudo labels agree with true classes? Two ways to compare two labellings of the same n samples."""

import numpy as np


def table(a, b):
    """How often label i of a meets label j of b: labels n and n (ints from 0) -> I J."""
    counts = np.zeros((int(max(a)) + 1, int(max(b)) + 1))
    np.add.at(counts, (np.asarray(a), np.asarray(b)), 1)
    return counts


def nmi(a, b):
    """Normalised mutual information, 2 I(a; b) / (H(a) + H(b)): 0 for unrelated labellings, 1 for the same up to names. With many
    clusters and few samples also unrelated ones reach well above 0: compare runs of equal K and n only."""
    p = table(a, b) / len(a)
    entropy = lambda q: -(q[q > 0] * np.log(q[q > 0])).sum()
    whole = entropy(p.sum(0)) + entropy(p.sum(1))
    return float(2 * (whole - entropy(p)) / whole) if whole > 0 else 1.0


def best_matching(gain):
    """The one-to-one matching of rows to columns with the largest sum of gain I J: for each row its column, or -1.

    The Hungarian method as successive shortest paths: rows enter one by one, each along the cheapest chain of re-matchings,
    with prices u, v that keep all reduced costs non-negative (Kuhn 1955, Munkres 1957)."""
    if gain.shape[0] > gain.shape[1]:
        columns = best_matching(gain.T)
        rows = np.full(gain.shape[0], -1)
        rows[columns] = np.arange(len(columns))
        return rows
    cost, (I, J) = -gain, gain.shape
    u, v, owner = np.zeros(I), np.zeros(J + 1), np.full(J + 1, -1)             # column J is where a chain starts
    for i in range(I):
        owner[J], j = i, J
        distance, before, done = np.full(J, np.inf), np.full(J, J), np.zeros(J + 1, bool)
        while owner[j] >= 0:
            done[j] = True
            reduced = cost[owner[j]] - u[owner[j]] - v[:J]
            nearer = ~done[:J] & (reduced < distance)
            distance[nearer], before[nearer] = reduced[nearer], j
            j = int(np.where(done[:J], np.inf, distance).argmin())
            step = distance[j]
            u[owner[done]] += step
            v[done] -= step
            distance[~done[:J]] -= step
        while j != J:                                      # back along the chain: each column takes its predecessor's row
            owner[j] = owner[before[j]]
            j = before[j]
        owner[J] = -1
    rows = np.full(I, -1)
    rows[owner[:J][owner[:J] >= 0]] = np.flatnonzero(owner[:J] >= 0)
    return rows


def matched_accuracy(clusters, classes):
    """Accuracy if each cluster is named after one class, no two alike, in the best way. Clusters beyond the number of classes
    get no name and their samples count as wrong: with K clusters of equal size at most classes / K."""
    counts = table(clusters, classes)
    match = best_matching(counts)
    return float(counts[match >= 0, match[match >= 0]].sum() / len(clusters))
