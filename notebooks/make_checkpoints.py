"""Train the two models of the notebooks, or take them from `runs/` if they are there, and keep what
the notebooks need.

    python notebooks/make_checkpoints.py         # a quarter of an hour on two cores

Writes notebooks/mae.pt and notebooks/pl-mae.pt: student and teachers in half precision, without the
optimiser.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

EPOCHS = {"mae": 24, "pl-mae": 12}         # as many views of the images each


def half(value):
    return value.half() if isinstance(value, torch.Tensor) else value


for recipe, epochs in EPOCHS.items():
    flags = ["--recipe", recipe, "--epochs", str(epochs)]
    run = ROOT / "runs" / f"notebook-{recipe}"
    train.main([*flags, "--out", str(run)])                # a finished run is left as it is
    file = load_checkpoint(run / "checkpoint.pt")
    del file["optimizer"]
    for part in ("student", "labelling_teacher", "reconstruction_teacher"):
        if part in file:
            file[part] = {name: half(value) for name, value in file[part].items()}
    config = vars(train.resolve(flags))                    # folders of this machine do not matter
    file["config"] |= {name: config[name] for name in ("out", "data_root")}
    save_checkpoint(ROOT / "notebooks" / f"{recipe}.pt", file)
