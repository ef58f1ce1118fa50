"""Numbers of all processes of a torchrun. A *rank* is the number of a process; with one process
everything here leaves its argument as it is.

The batch of a step is shared out: each rank computes an equal part of it. What is a statistic of
the whole batch (the sum of a cluster, the mean of a feature) has to be summed up over ranks, so
that a run on eight GPUs is the same run as on one."""

from contextlib import contextmanager

import torch
from torch import distributed

_alone = False


@contextmanager
def alone():
    """Inside, this process works by itself, as if there were no other: nothing is exchanged.

    Rank 0 looks at pictures and k-NN like this, while the others wait for it at the next step."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size():
    """The number of processes that work together."""
    return distributed.get_world_size() if distributed.is_initialized() and not _alone else 1


def over_ranks(x, operation="SUM"):
    """x summed over ranks, or with "MAX" its greatest, the same on each of them. No gradient."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    distributed.all_reduce(x, getattr(distributed.ReduceOp, operation))
    return x


def from_rank_0(x):
    """x as rank 0 has it, on all ranks; elsewhere x says its shape alone, and is written over."""
    if world_size() > 1:
        distributed.broadcast(x, 0)
    return x


def of_each_rank(x):
    """x of all ranks, one after the other, the same on each of them: ranks ... No gradient."""
    if world_size() == 1:
        return x.detach()[None]
    every = torch.zeros(world_size(), *x.shape, dtype=x.dtype, device=x.device)
    every[distributed.get_rank()] = x.detach()
    return over_ranks(every)


def mean_over_ranks(x):
    """The mean of x over ranks. Each has an equal part of the batch, so a mean of means is the
    mean.

    Where x carries gradient, the gradient of the mean is handed to x undivided:
    DistributedDataParallel averages gradients over ranks later, and that is the division. Without
    gradient the mean is the same to the bit on each rank: centres that move by it would otherwise
    drift apart, and a run that goes on from those of rank 0 would be another one."""
    if world_size() == 1:
        return x
    if not x.requires_grad:
        return over_ranks(x) / world_size()
    return x + (over_ranks(x) / world_size() - x.detach())


def gather_over_ranks(x, ids, n):
    """The rows of x of all ranks, one rank after the other; the ids of these; the ids of our own.

    x without gradient, the same shape on each rank. ids: numbers in 0..n-1, one for each row of x,
    the same on each rank. Rank r adds r n to its own, so that no two ranks share one."""
    if world_size() == 1:
        return x.detach(), ids, ids
    parts = [torch.empty_like(x) for _ in range(world_size())]
    distributed.all_gather(parts, x.detach().contiguous())
    all_ids = torch.cat([ids + n * rank for rank in range(world_size())])
    return torch.cat(parts), all_ids, ids + n * distributed.get_rank()
