"""Who may import whom: the rooms of the house, and the arrows between them."""

import ast
import sys

import pytest
from conftest import ROOT

CONCEPTS = ["mae", "pseudo_labels", "teachers", "data", "checkpoint", "features", "diagnosis",
            "eval", "train"]
FIGURES = {"torch", "torchvision", "numpy", "matplotlib", "PIL"}
ALLOWED = {                                # beside the standard library
    "mae": {"torch"},
    "pseudo_labels": {"torch", "mae", "utils.ranks"},
    "teachers": {"torch", "mae", "pseudo_labels", "utils.ranks"},
    "data": {"torch", "torchvision", "numpy", "mae.pair", "utils"},
    "checkpoint": {"torch", "mae", "pseudo_labels", "teachers", "data", "utils"},
    "features": {"torch", "mae", "data"},
    "diagnosis": {"torch", "mae", "pseudo_labels", "teachers", "data", "checkpoint", "features",
                  "utils"},
    "eval": {"torch", "numpy", "mae", "data", "checkpoint", "features", "diagnosis", "utils"},
    "train": {"torch", "mae", "pseudo_labels", "teachers", "data", "checkpoint", "features",
              "diagnosis", "utils"},
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


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_imports_what_its_row_allows(name):
    assert outside(imports(ROOT / f"{name}.py"), ALLOWED[name]) == []


def test_every_file_has_its_room():
    assert {path.stem for path in ROOT.glob("*.py")} == set(CONCEPTS)


def test_utils_are_leaves():
    for path in (ROOT / "utils").glob("*.py"):
        assert outside(imports(path), FIGURES | {"utils"}) == [], path.name


def test_nothing_imports_extras_or_train():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")):
        found = {name.split(".")[0] for name in imports(path)}
        assert not found & {"extras", "train"}, path.name
