"""What a training step takes on a GPU, found without one: bytes at its peak, and FLOPs.

The step is played with tensors that have shapes and types but no numbers: they take no memory, and
next to no time (PyTorch's FakeTensorMode). What is made and freed is counted as the step goes on.

They play on the CPU, since backward on a GPU that is not there is refused. Two things are then put
as they are on GPUs: attention keeps no table of tokens x tokens, and bf16 is used all the same.
"""

import warnings
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import mae


class Played(FakeTensorMode):
    def __deepcopy__(self, memo):                          # teachers are deep copies of the student
        return self


class Tally(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are alive, `now` and at their `peak`.

    Each is rounded up to 512 bytes, as the allocator of a GPU does."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()                 # what is counted already

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                size = self.known[storage] = -(-storage.nbytes() // 512) * 512
                self.change(size)
                weakref.finalize(storage, self.change, -size)
        return out

    def change(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def attention_in_one(self, x):
    """mae.Attention's forward as GPUs compute it."""
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


ATTENTION_FLOPS = {                                        # torch counts those of GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *args, **kwargs: flop_counter.sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *args, **kwargs: flop_counter.sdpa_backward_flop_count(grad, q, k, v),
}


def play(make):
    """make: a function without arguments that sets up a run on the CPU, in bf16 or fp32, and gives
    a function that does one optimiser step -> bytes at the peak of a step, FLOPs of its products.

    Counted are weights, gradients, AdamW's averages, teachers, activations, and images that are
    kept in memory. Not counted is what an operation takes while it runs. torch reported more than
    this on an H200: 2 to 4 % more at ViT-B, 8 to 14 % (0.2 to 0.3 GB) at CIFAR size. See
    docs/speed.md."""
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    with warnings.catch_warnings(action="ignore"), Played(), Tally() as tally, \
            mock.patch.object(mae.Attention, "forward", attention_in_one), \
            mock.patch.object(nn.Module, "to", lambda module, *args: module):      # where they are
        step = make()
        with counter:
            step()                                         # AdamW makes its averages
        tally.peak = 0
        step()
    return tally.peak, counter.get_total_flops()
