"""Every recipe, and every way to balance labels and to standardise targets, trained one after another: run by test_recipes.py
in this process, and by torchrun in two.   python all_recipes.py OUT FLAG ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import distributed

import train

VARIANTS = {
    **{recipe: ["--recipe", recipe] for recipe in train.RECIPES},
    "class-labels": ["--rec-weight", "0", "--data-weight", "0"],
    "centring": ["--balancing", "centring", "--standardise", "position", "--data-labels", "visible", "--views", "1"],
    "me-max": ["--balancing", "me-max", "--standardise", "token", "--data-labels", "masked", "--masks", "2"],
    "labels-and-consistency": ["--recipe", "mim-cluster", "--consistency-weight", "1", "--accumulate", "2"],
}


def main(out, *flags):
    for name, own in VARIANTS.items():
        train.main([*flags, *own, "--out", str(Path(out) / name)])


if __name__ == "__main__":                                 # one process group for all runs: gloo cannot soon start another
    start, end = distributed.init_process_group, distributed.destroy_process_group
    distributed.init_process_group = lambda *args, **kwargs: distributed.is_initialized() or start(*args, **kwargs)
    distributed.destroy_process_group = lambda: None
    main(*sys.argv[1:])
    end()
