import json
import re

from results import tables


def a_row(stage, name, seed, score, **other):
    tokens = {"class": score, "mean": score + 0.1}
    return dict(stage=stage, data="shapes", name=name, seed=seed, knn={"tokens": tokens},
                linear={"tokens": tokens}, microseconds_per_view=1000, **other)


def test_means_and_differences_are_paired_by_seed():
    rows = [a_row("evidence", "pl-mae", 1, 0.4), a_row("evidence", "mae", 1, 0.3),
            a_row("evidence", "mae", 2, 0.1), a_row("evidence", "pl-mae", 2, 0.5),
            a_row("evidence", "mae", 3, 0.9, patches={"miou": 0.2}),
            dict(a_row("evidence", "mae", 4, 0.9), error="broken"),
            dict(a_row("evidence", "pixels", 1, 0), knn={"tokens": {"pixels": 0.25}})]
    means, differences = tables.table(rows, "all", "evidence", "shapes").split("\n\n")
    assert "| pl-mae | 2 | 45.0 (40.0 to 50.0) | 55.0 (50.0 to 60.0) |" in means
    assert "| mae | 3 | 43.3 (10.0 to 90.0) |" in means and "| 20.0 | 1000 |" in means
    assert "| pixels | 1 | 25.0 | 25.0 |" in means
    assert "| mae | 2 | -25.0 (-40.0 to -10.0) |" in differences     # of seeds 1 and 2
    assert "| pl-mae |" not in differences
    assert tables.table(rows, "pair", "evidence", "shapes", "mae", "pl-mae").splitlines()[2:] == [
        "| MAE | 2 | 20.0 (10.0 to 30.0) | 30.0 (20.0 to 40.0) | 20.0 (10.0 to 30.0) "
        "| 30.0 (20.0 to 40.0) |  |",
        "| two teachers, tokens: pl-mae | 2 | 45.0 (40.0 to 50.0) | 55.0 (50.0 to 60.0) "
        "| 45.0 (40.0 to 50.0) | 55.0 (50.0 to 60.0) |  |",
        "| difference |  | -25.0 (-40.0 to -10.0) | -25.0 (-40.0 to -10.0) "
        "| -25.0 (-40.0 to -10.0) | -25.0 (-40.0 to -10.0) |  |"]


def test_the_search_has_its_own_baseline():
    rows = [a_row("search", "same", 1, 0.3), a_row("search", "other-colours", 1, 0.4)]
    text = tables.table(rows, "all", "search", "shapes")
    assert "| minus `other-colours` |" in text and "| same | 1 | -10.0 |" in text


def test_agreements_stand_beside_chance():
    diagnose = dict(patch_nmi_place=0.5, patch_nmi_place_shuffled=0.01, image_two_views=0.31,
                    image_two_views_chance=0.02)
    rows = [a_row("search", "other-colours", seed, 0.4, diagnose=diagnose) for seed in (1, 2)]
    text = tables.table(rows, "all", "search", "shapes")
    assert "| other-colours | 0.50 (0.01) |  |  |  |  | 0.31 (0.02) |" in text


def test_fills_a_page_and_draws(tmp_path):
    rows = [a_row("evidence", "pl-mae", 1, 0.4), a_row("evidence", "mae", 1, 0.3),
            a_row("search", "same", 1, 0.3), a_row("evidence", "mae, longer", 1, 0.35)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- all evidence shapes -->\nold\n<!-- end -->\n\nFinding: B\n\n"
                    "<!-- pair evidence shapes mae unknown -->\n<!-- end -->\n\n"
                    "<!-- pair evidence shapes \"mae, longer\" mae -->\n<!-- end -->\n\n"
                    "<!-- all evidence moon -->\n<!-- end -->\n")
    flags = [str(tmp_path / "rows.jsonl"), "--pages", str(page)]
    tables.main(flags)
    text = page.read_text()
    assert "| difference |  | +5.0 |" in text
    assert "| mae | 1 | 30.0 |" in text and "old" not in text and "| same |" not in text
    assert text.startswith("# A\n\n<!-- all evidence shapes -->\n\n| run |")
    assert "<!-- end -->\n\nFinding: B\n" in text
    assert text.endswith("<!-- all evidence moon -->\n<!-- end -->\n")
    tables.main(flags)
    assert page.read_text() == text                        # again: the same
    assert [path.name for path in tmp_path.glob("*.png")] == ["results-shapes.png"]


def test_the_summary_has_ranges_and_flags_in_its_own_order():
    rows = [a_row("evidence", "pl-mae", 1, 0.4, flags="--recipe pl-mae --eval-every 4 --lr 1"),
            a_row("evidence", "pl-mae", 2, 0.5, patches={"miou": 0.3}),
            dict(a_row("evidence", "pixels", 1, 0), knn={"tokens": {"pixels": 0.25}},
                 linear={"tokens": {"pixels": 0.15}}),
            a_row("evidence", "mae-equal-time", 1, 0.3)]
    lines = tables.table(rows, "summary", "shapes").splitlines()
    assert lines[2:] == [
        "| raw pixels | none: nothing is trained | 1 | 25.0 | 25.0 | 15.0 | 15.0 |  |",
        "| two teachers, tokens: pl-mae | `--recipe pl-mae --lr 1` | 2 | 45.0 (40.0 to 50.0) "
        "| 55.0 (50.0 to 60.0) | 45.0 (40.0 to 50.0) | 55.0 (50.0 to 60.0) | 30.0 |"]


def test_the_pages_of_the_project_have_the_results_of_the_project():
    """Otherwise run `python -m results.tables`."""
    rows = tables.read_json_lines(tables.RESULTS)
    for path in tables.PAGES:
        page = path.read_text()
        assert tables.fill(page, rows) == page
        assert not re.search(r"<!-- (pair|all|summary|pick) [^\n]* -->\n<!-- end", page)


def test_large_numbers_of_the_speed_page_occur_in_its_lines():
    """Each number in a cell is some number of results/speed.jsonl, rounded. The page is written by
    hand: this finds a large number that is mistyped. Of two digits, most would pass."""
    lines = (tables.ROOT / "results" / "speed.jsonl").read_text()
    measured = [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", lines)]
    page = (tables.ROOT / "docs" / "speed.md").read_text()
    cells = [cell for row in re.findall(r"^\|.*\|$", page, re.M)
             for cell in re.sub(r"`[^`]*`", "", row).split("|")[2:]]
    for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", " | ".join(cells)):
        digits = number.replace(",", "")
        half = 0.5 * 10.0 ** -len(digits.partition(".")[2])          # of the last place
        if digits.endswith("000"):
            half = 500                                     # in thousands
        assert any(abs(float(digits) - value) <= half + 1e-9 for value in measured), number
