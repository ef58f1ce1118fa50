"""Train the two models of the notebooks, or take them from `runs/` if they are there, and keep what the notebooks need.

    python notebooks/make_checkpoints.py        # in the repository's root; a quarter of an hour on two cores

Writes notebooks/mae.pt and notebooks/pl-mae.pt: student, teachers and centres in half precision, without the optimiser."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from checkpoint import load_checkpoint, save_checkpoint

for recipe, epochs in (("mae", 40), ("pl-mae", 20)):      # as many views of the images each
    run = Path("runs") / f"{recipe}-shapes-micro"
    train.main(["--recipe", recipe, "--epochs", str(epochs), "--out", str(run)])    # a finished run is left as it is
    file = load_checkpoint(run / "checkpoint.pt")
    del file["optimizer"]
    if recipe == "mae":
        del file["reconstruction_teacher"]                 # its average weights are not looked at
    for part in ("model", "labelling_teacher", "reconstruction_teacher", "centres"):
        file[part] = {name: value.half() for name, value in file.get(part, {}).items()}
    file = {name: value for name, value in file.items() if value != {} or name == "centres"}
    save_checkpoint(Path(__file__).parent / f"{recipe}.pt", file)
