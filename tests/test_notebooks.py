import json

import matplotlib
import pytest
from conftest import ROOT

import train
from checkpoint import OLDER, load_checkpoint


@pytest.mark.parametrize("recipe, epochs", [("mae", 24), ("pl-mae", 12)])
def test_models_are_of_the_present_defaults(recipe, epochs):
    """Otherwise `python notebooks/make_checkpoints.py` and both notebooks have to be run again."""
    kept = OLDER | load_checkpoint(ROOT / "notebooks" / f"{recipe}.pt")["config"]
    now = vars(train.resolve(["--recipe", recipe, "--epochs", str(epochs)]))
    for name in now.keys() | kept.keys():
        assert name in train.FREE or now[name] == kept[name], name


@pytest.mark.parametrize("name", [
    "clusters", pytest.param("reconstructions", marks=pytest.mark.slow)])
def test_notebook(name, monkeypatch):
    """Its cells run from top to bottom, in its folder, and it comes with the pictures that they
    made."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert not any(output["output_type"] == "error" for output in outputs)
    monkeypatch.chdir(ROOT / "notebooks")
    matplotlib.use("Agg")
    names = {}
    for cell in cells:
        exec("".join(line for line in cell["source"] if not line.startswith("%")), names)
    matplotlib.pyplot.close("all")
