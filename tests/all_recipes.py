"""Every recipe, and every way to balance pseudo labels and to standardise targets, trained one
after another: by test_step.py in its own process, and by torchrun in two. And the relatives, by
test_relatives.py.

    python all_recipes.py OUT FLAG ...
    python all_recipes.py relatives OUT FLAG ..."""

import os
import sys
from importlib import import_module
from pathlib import Path

from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import TOY_SIZE  # noqa: E402

import train  # noqa: E402
from mae import SIZES  # noqa: E402
from support import checkpoint, datasets, report, settings  # noqa: E402

VARIANTS = {recipe: ["--recipe", recipe] for recipe in settings.RECIPES} | {
    "centring": ["--balancing", "centring", "--standardise", "position", "--labelled-patches",
                 "visible", "--views", "1"],
    "me-max": ["--balancing", "me-max", "--standardise", "token", "--labelled-patches", "masked"],
    "labels-and-consistency": ["--recipe", "mim-cluster", "--consistency-weight", "1",
                               "--accumulate", "2"],
    "same-view": ["--teacher-view", "same", "--standardise", "none", "--remove-place"],
}
RELATIVES_SIZE = TOY_SIZE | dict(depth=4, decoder_embed_dim=32)        # two stages of two blocks


def main(out, *flags):
    for name, own in VARIANTS.items():
        train.main([*flags, *own, "--out", str(Path(out) / name)])


def relatives(out, *flags):
    for name in checkpoint.RELATIVES:
        SIZES["micro"] = RELATIVES_SIZE
        relative = import_module(f"extras.relatives.{name}")
        train.main([*flags, "--out", str(Path(out) / name)], relative)


def in_two_processes(main, out, *flags):
    """All of them in one process group, as gloo cannot soon start another one. No pictures: rank 0
    alone draws these. `mae` computes each step in two micro-batches as well."""
    SIZES["micro"] = TOY_SIZE
    for name in ("curves", "draw_rows", "clusters"):
        setattr(report, name, lambda *args: None)
    VARIANTS["mae"] += ["--accumulate", "2"]
    if os.environ["RANK"] != "0":
        datasets.decode = None             # a folder is decoded once, not once a rank
    start, end = distributed.init_process_group, distributed.destroy_process_group

    def start_once(*args, **kwargs):
        if not distributed.is_initialized():
            start(*args, **kwargs)

    distributed.init_process_group = start_once
    distributed.destroy_process_group = lambda: None
    main(out, *flags)
    end()


if __name__ == "__main__":
    if sys.argv[1] == "relatives":
        in_two_processes(relatives, *sys.argv[2:])
    else:
        in_two_processes(main, *sys.argv[1:])
