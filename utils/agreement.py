"""Do pseudo labels agree with true classes? Two labellings of the same n samples, compared.

Labellings are arrays or CPU tensors of n integers from 0.
"""

import numpy as np


def table(a, b):
    """How often label i of a meets label j of b -> counts I J."""
    a = np.asarray(a)
    b = np.asarray(b)
    columns = b.max() + 1
    cells = np.bincount(a * columns + b, minlength=(a.max() + 1) * columns)
    return cells.reshape(-1, columns)


def entropy(p):
    """Of probabilities of any shape, in nats; 0 ln 0 is 0."""
    p = p[p > 0]
    return -(p * np.log(p)).sum()


def nmi(a, b):
    """Normalised mutual information, 2 I(a; b) / (H(a) + H(b)): 0 for unrelated labellings, 1 for
    the same one under other names.

    With many clusters and few samples unrelated labellings reach well above 0 too: compare with
    shuffled ones, or runs of equal K and n."""
    p = table(a, b) / len(a)                                                             # I J
    both = entropy(p.sum(0)) + entropy(p.sum(1))
    if both == 0:                                           # one label each: the same labelling
        return 1.0
    return float(2 * (both - entropy(p)) / both)


def purity(clusters, classes):
    """The share of samples whose class is the commonest one of their cluster, up to 1.

    It is the accuracy of naming each cluster after a class, of these samples. Chance is not
    1 / classes: it grows with the number of clusters, up to 1 where each sample has its own. So
    compare with purity(clusters, shuffled classes)."""
    return float(table(clusters, classes).max(1).sum() / len(clusters))
