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
        defined = [i for i in there if re.match(rf"\s*(def |class )?(self\.)?{re.escape(code)}\b",
                                                lines[i - 1])]
        assert int(number) in (defined or there), f"{code} is in line {defined or there} of {file}"


def anchors(page):
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_and_headings_are_right(page):
    """Every [text](FILE#heading), pictures too."""
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    for file, anchor in links:
        if not file.startswith("http"):
            target = page.parent / file if file else page
            assert target.exists(), file
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target), f"{file}#{anchor}"
