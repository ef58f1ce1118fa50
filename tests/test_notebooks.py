"""Notebooks: each runs from top to bottom, says nothing on stderr, and comes with its outputs. It
asks before each figure and answers after it, folded."""

import json
import re
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from support import settings
from support.checkpoint import RELATIVES, load_checkpoint
from support.health import signs_of_collapse

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
QUICK = "2-sinkhorn"                       # runs always; the others are marked slow
sys.path.insert(0, str(FOLDER))


def cells(name, kind):
    """(source, outputs) of the cells of a kind, "code" or "markdown"."""
    content = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return [("".join(cell["source"]), cell.get("outputs", []))
            for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_seven():
    assert [name[0] for name in NOTEBOOKS] == list("1234567")


@pytest.mark.parametrize("file, run", [
    ("mae", "mae"), ("pl-mae", "pl-mae"), ("pl-mae-same-colours", "same-colours"),
    *((name, name) for name in ("your-images", "rc-mae", *RELATIVES))])
def test_models_are_of_the_present_defaults(file, run, tmp_path):
    """Otherwise `python notebooks/make_checkpoints.py` and the notebooks have to be run again."""
    from make_checkpoints import RUNS, draw_pictures, relative_of
    kept = load_checkpoint(FOLDER / f"{file}.pt")["config"]
    if run == "your-images":
        draw_pictures(tmp_path)
    now = vars(settings.resolve([*RUNS[run], "--data-root", str(tmp_path)],
                                relative_of(run)))
    for name in now:
        assert name in settings.FREE or now[name] == kept.get(name), name


def test_models_are_small():
    assert all(path.stat().st_size < 1.5e6 for path in FOLDER.glob("*.pt"))


def log(name):
    """The lines of a history that come after a training step."""
    lines = [json.loads(line) for line in
             (FOLDER / f"history-{name}.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"]]


def test_one_log_is_healthy_and_one_is_sick():
    """By what docs/guide.md says of them; both are whole runs."""
    healthy, sick = log("b"), log("a")
    assert [line["step"] for line in healthy] == [line["step"] for line in sick]
    assert not signs_of_collapse(healthy[-1]) and signs_of_collapse(sick[-1])
    last = healthy[-1]
    assert last["image"] < 0.8 * last["image_ln_k"] and last["patch"] < 0.8 * last["patch_ln_k"]
    assert last["rec"] < last["rec_constant"]
    assert last["image_two_views"] > 3 * last["image_two_views_chance"]
    assert last["knn_class"] > sick[-1]["knn_class"]
    assert sick[-1]["image"] < last["image"]               # the loss alone deceives


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stored(name):
    """Each code cell that shows something has its output, and none is an error or a warning."""
    code = cells(name, "code")
    assert 10 <= len(code) <= 15
    for number, (source, outputs) in enumerate(code):
        assert outputs or number == 0, source              # the first one finds the project
        for output in outputs:
            assert output["output_type"] != "error", source
            assert output.get("name") != "stderr", output["text"]
    assert sum("image/png" in output.get("data", {}) for _, outputs in code
               for output in outputs) >= 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_says_what_it_shows_and_how_long_it_takes(name):
    text = [source for source, _ in cells(name, "markdown")]
    assert "You will see" in text[0] and re.search(r"It takes .*(second|minute)", text[0])
    exercises = text[-1]
    assert exercises.startswith("## Exercises") or "\n## Exercises" in exercises
    marks = re.findall(r"\n\d\. \((easy|hard|needs a run)", exercises)
    assert 3 <= len(marks) <= 5 and set(marks) == {"easy", "hard", "needs a run"}
    assert (FOLDER / "solutions" / f"{name}.md").is_file()
    for target in re.findall(r"\]\(([^)#]+)\)", "\n".join(text)):
        assert (FOLDER / target).exists(), target


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_asks_before_a_figure_and_answers_after_it(name):
    """The answer is folded, so that a class can bet: never above its figure, nor in its cell."""
    content = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    figures = [i for i, cell in enumerate(content) if any(
        "image/png" in output.get("data", {}) for output in cell.get("outputs", []))]
    for i in figures:
        before, after = ("".join(content[j]["source"]) for j in (i - 1, i + 1))
        question = before.rpartition("</details>")[2]
        assert "?" in question, question
        assert after.startswith("<details><summary>Answer</summary>\n\n"), after
        answer, end, _ = after.partition("\n\n</details>")
        assert end and len(answer) > 60, after


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_size(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 2e6


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_names_no_setting_that_is_gone(name):
    """Where a run prints its settings, they are the present ones."""
    for source, outputs in cells(name, "code"):
        for output in outputs:
            text = "".join(output.get("text", ""))
            printed = re.findall(r"(?:^|  )(\w+)=", text, re.MULTILINE) if "recipe=" in text else []
            assert not printed or printed == [each.name for each in fields(settings.Config)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_first_cell_is_the_same_everywhere(name):
    """It finds the project."""
    assert cells(name, "code")[0] == cells(QUICK, "code")[0]


@pytest.mark.parametrize("name", [
    each if each == QUICK else pytest.param(each, marks=pytest.mark.slow) for each in NOTEBOOKS])
def test_notebook(name):
    """An error in a cell, or anything on stderr, fails. So does a cell that showed something when
    it was stored and shows nothing now."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    content = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    stored = [cell.get("outputs", []) for cell in content.cells]
    client = nbclient.NotebookClient(content, timeout=600, kernel_name="python3",
                                     resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    for cell, before in zip(content.cells, stored):
        if cell.cell_type == "code":
            assert bool(cell.outputs) == bool(before), cell.source
            for output in cell.outputs:
                assert output.get("name") != "stderr", output["text"]
