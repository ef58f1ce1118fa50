"""Draw accuracy on `shapes` over the number of labelled images, with the names of runs in words.

    python docs/draw_few.py           writes docs/few-shapes.png from results/few_labels.jsonl
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))              # so that a script in docs/ finds the modules

from results.tables import WORDS  # noqa: E402
from support.files import read_json_lines  # noqa: E402
from support.report import plot_few  # noqa: E402


def main():
    records = {}
    for line in read_json_lines(ROOT / "results" / "few_labels.jsonl"):
        if line["task"] == "lowshot" and line["data"] == "shapes":
            run = line["run"].removeprefix("evidence-shapes-").removesuffix("-11")    # the seed
            records[WORDS[run if line["network"] == "student" else line["network"]]] = line
    plot_few("lowshot", records, ROOT / "docs" / "few-shapes.png")


if __name__ == "__main__":
    main()
