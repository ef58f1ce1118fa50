import re

from conftest import ROOT


def test_links_to_lines_are_right():
    """Every [`code`](file.py#L12) of the README: line 12 of the file holds that code."""
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\[`([^`]+)`\]\(([\w.]+\.py)#L(\d+)\)", text)
    assert len(links) > 15
    for code, file, number in links:
        lines = (ROOT / file).read_text().split("\n")
        there = [i for i, line in enumerate(lines, 1) if code in line]
        assert code in lines[int(number) - 1], f"{code} is in line {there} of {file}"
