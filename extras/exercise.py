"""Exercises that mark themselves: write a function of the method again, until its tests pass.

    python -m extras.exercise             # lists them
    python -m extras.exercise sinkhorn    # writes a copy of the project to exercise/sinkhorn

In the copy the body of the function is gone. Its name, its arguments and its docstring are still
there, and say what it has to do. The tests named on the screen fail, and pass when it is written.
The answer is the function in the project itself.
"""

import ast
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python extras/exercise.py`

from support.command_line import Parser, UsageError, path, run_main

ROOT = Path(__file__).parent.parent
COPIED = ("support", "extras", "results", "tests")          # beside the files *.py and *.ini
BODY = 'raise NotImplementedError("your turn")'


class Exercise(NamedTuple):
    file: str                                  # that holds the function
    tests: tuple                               # of the file of the same name in tests/
    what: str


EXERCISES = {
    "random_masking": Exercise(
        "mae.py", ("test_masking",), "which patches stay visible"),
    "ema_update": Exercise(
        "teachers.py", ("test_following_equals_its_formula", "test_half_life_is_the_half_life"),
        "a teacher is a moving average"),
    "momentum": Exercise(
        "teachers.py", ("test_momentum_at_both_ends_and_between",),
        "from a half-life to the factor of one step"),
    "standardise": Exercise(
        "teachers.py", ("test_standardised_targets",), "tokens become targets"),
    "sinkhorn": Exercise(
        "pseudo_labels.py",
        ("test_sinkhorn_equals_a_naive_loop", "test_sinkhorn_rows_are_exact_and_columns_loose",
         "test_sinkhorn_ignores_a_constant_on_a_column_or_everywhere",
         "test_sinkhorn_is_finite_for_huge_scores"), "pseudo labels that use all clusters"),
    "patch_label_loss": Exercise(
        "pseudo_labels.py", ("test_patch_label_loss_is_a_mean_of_means",),
        "visible and masked patches predict their pseudo labels"),
    "koleo": Exercise(
        "pseudo_labels.py",
        ("test_koleo_is_the_distance_to_the_nearest_token_of_another_image",
         "test_koleo_of_one_image_is_nothing"), "class tokens keep apart"),
}


def without_body(source, name):
    """The source of a file, in which a function has its signature and docstring alone."""
    lines = source.splitlines(keepends=True)
    [function] = [node for node in ast.parse(source).body
                  if isinstance(node, ast.FunctionDef) and node.name == name]
    docstring, *body = function.body
    indent = " " * docstring.col_offset
    kept = lines[:docstring.end_lineno] + [f"{indent}{BODY}\n"]
    return "".join(kept + lines[body[-1].end_lineno:])


def write_exercise(name, out):
    """A copy of the project in the folder `out`, without the body of a function."""
    out = Path(out)
    if out.exists():
        raise UsageError(f"--out {out}: is there already; name another folder, or delete it if "
                         "nothing you wrote there is needed")
    shutil.copytree(ROOT, out, ignore=lambda folder, names: [
        each for each in names if each == "__pycache__" or Path(folder) == ROOT
        and each not in COPIED and not each.endswith((".py", ".ini"))])
    file = out / EXERCISES[name].file
    file.write_text(without_body(file.read_text("utf-8"), name), "utf-8")


def command(name):
    """The tests of an exercise, as arguments of pytest in the folder of the copy."""
    exercise = EXERCISES[name]
    return [f"tests/test_{exercise.file}::{test}" for test in exercise.tests]


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", choices=EXERCISES)
    parser.add_argument("--out", type=path, metavar="DIR",
                        help="folder of the copy (default: exercise/NAME)")
    options = parser.parse_args(argv)
    if options.name is None:
        for name, exercise in EXERCISES.items():
            print(f"{name:18}{exercise.file:18}{exercise.what}")
        return
    out = options.out or f"exercise/{options.name}"
    write_exercise(options.name, out)
    file = EXERCISES[options.name].file
    print(f"Write the body of {options.name} in {out}/{file}. It is right when this passes:"
          f"\n\n    cd {out} && python -m pytest -q {' '.join(command(options.name))}\n")


if __name__ == "__main__":
    run_main(main)
