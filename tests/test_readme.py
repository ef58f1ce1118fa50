import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_lines_are_right(page):
    """Every [`code`](file.py#L12) of a page: line 12 of the file holds that code."""
    links = re.findall(r"\[`([^`]+)`\]\(([^)#\s]+)#L(\d+)\)", page.read_text())
    assert len(links) > 15 or page.name != "method.md"
    for code, file, number in links:
        lines = (page.parent / file).read_text().split("\n")
        there = [i for i, line in enumerate(lines, 1) if code in line]
        assert int(number) in there, f"{code} is in line {there} of {file}"
