"""Who may import whom: the rooms of the house, and the arrows between them."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

FIGURES = {"torch", "torchvision", "numpy", "matplotlib", "PIL"}
CONCEPTS = {"mae", "pseudo_labels", "teachers"}
TOP = {                                    # beside the standard library
    "mae": {"torch"},
    "pseudo_labels": {"torch", "mae", "support.ranks"},
    "teachers": {"torch", "mae", "support.ranks"},
    "data": {"torch", "numpy", "mae.pair", "support.datasets"},
    "train": {"torch", *CONCEPTS, "data", "support"},
    "eval": {"torch", "numpy", "support"},
}
# What the files of support use of the files above them. `health` and `report` show what these make.
# The others need single names: to know what a setting may be, and to build networks for weights.
UP = {
    "health": {*CONCEPTS, "data"},
    "report": {*CONCEPTS, "data"},
    "settings": {"mae.SIZES", "mae.count_visible", "mae.pair", "pseudo_labels.BALANCING",
                 "teachers.STANDARDISE", "teachers.half_life"},
    "checkpoint": {"pseudo_labels.Student", "teachers.make_teachers"},
    "weights": {"safetensors.torch", "mae.VisionTransformer", "mae.pair"},
    "datasets": {"mae.pair"},
    "probes": {"mae.patchify"},
}


def imports(path):
    """Names that a file imports, anywhere in it: `from mae import pair` is "mae.pair"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def outside(names, allowed):
    return [name for name in names
            if not any(name == good or name.startswith(good + ".") for good in allowed)]


def test_six_files_stand_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP)


@pytest.mark.parametrize("name", TOP)
def test_a_file_at_the_top_imports_what_its_row_allows(name):
    assert outside(imports(ROOT / f"{name}.py"), TOP[name]) == []


def test_support_looks_up_as_little_as_possible():
    for path in ROOT.glob("support/*.py"):
        allowed = FIGURES | {"support"} | UP.get(path.stem, set())
        assert outside(imports(path), allowed) == [], path.name


def test_nothing_imports_extras_or_results():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")):
        assert not {name.split(".")[0] for name in imports(path)} & {"extras", "results"}, path.name
    for path in ROOT.glob("extras/**/*.py"):
        assert "results" not in {name.split(".")[0] for name in imports(path)}, path.name


def test_no_file_imports_itself_in_a_circle():
    """`support.ranks` of `from support.ranks import alone` is the longest part that is a file."""
    files = {}
    for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("extras/**/*.py")):
        files[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    graph = {name: {".".join(each.split(".")[:n]) for each in imports(path) for n in (1, 2, 3)}
             & files.keys() for name, path in files.items()}
    list(TopologicalSorter(graph).static_order())          # raises CycleError
