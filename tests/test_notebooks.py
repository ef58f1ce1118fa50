import json

import matplotlib
import pytest
from conftest import ROOT

import train
from checkpoint import load_checkpoint


@pytest.mark.parametrize("recipe, epochs", [("mae", 40), ("pl-mae", 20)])
def test_models_are_of_the_present_defaults(recipe, epochs):
    """Otherwise `python notebooks/make_checkpoints.py` and both notebooks have to be run again."""
    kept, now = load_checkpoint(ROOT / "notebooks" / f"{recipe}.pt")["config"], vars(train.parse(["--recipe", recipe, "--epochs", str(epochs)]))
    assert {k: v for k, v in now.items() if k not in train.FREE} == {k: v for k, v in kept.items() if k not in train.FREE}


@pytest.mark.parametrize("name", ["clusters", pytest.param("reconstructions", marks=pytest.mark.slow)])
def test_notebook(name, monkeypatch):
    """Its cells run from top to bottom, in its folder, and it comes with the pictures that they made."""
    cells = [c for c in json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c["outputs"]]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6 and not any(o["output_type"] == "error" for o in outputs)
    monkeypatch.chdir(ROOT / "notebooks")
    matplotlib.use("Agg")
    names = {}
    for cell in cells:
        exec("".join(line for line in cell["source"] if not line.startswith("%")), names)
    matplotlib.pyplot.close("all")
