import pytest
import torch
from conftest import ROOT

from results import study
from support.command_line import UsageError
from support.files import read_json_lines

SMALL = ("--img-size 16 --patch-size 4 --batch-size 16 --epochs 1 --device cpu --image-clusters 4 "
         "--patch-clusters 16 --val-fraction 0.2")


def test_a_plan_is_read(tmp_path):
    plan = tmp_path / "plan.txt"
    plan.write_text("# runs\n\nsearch  shapes  7  other colours: --recipe mae --lr 1e-3  # half\n")
    [run] = study.read_plan(plan)
    assert run == ("search", "shapes", 7, "other colours", ["--recipe", "mae", "--lr", "1e-3"])
    for line in ("search shapes same: --lr 1", "search moon 7 same: --lr 1", "search shapes x y:"):
        plan.write_text("\n" + line)
        with pytest.raises(UsageError, match="line 2: write"):
            study.read_plan(plan)


def test_the_plan_of_the_project_can_be_read_and_names_each_run_once():
    runs = study.read_plan(ROOT / "results" / "plan.txt")
    keys = [study.key(run._asdict()) for run in runs]
    assert len(keys) == len(set(keys)) > 5


def test_works_off_a_plan(photos, tmp_path, monkeypatch, no_pictures):
    """Validation for the search, the test split for the evidence; nothing is done twice; a run
    that fails leaves a line and does not stop the others; one that is taken is left alone."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "photos").symlink_to(photos)
    monkeypatch.setattr(study, "SETS", {"photos": "--data imagefolder"})
    plan, results = tmp_path / "plan.txt", tmp_path / "results.jsonl"
    plan.write_text(f"search photos 1 other: {SMALL} --teacher-view other-colours\n"
                    f"search photos 1 broken: {SMALL} --patch-size 5\n"
                    f"search photos 1 taken: {SMALL}\n"
                    f"evidence photos 2 mae: --recipe mae {SMALL}\n"
                    f"evidence photos 2 pixels: --recipe mae {SMALL} --epochs 0\n")
    flags = [str(plan), str(tmp_path / "data"), str(tmp_path / "runs"), "--results", str(results)]
    (tmp_path / "runs").mkdir()
    with study.taken(tmp_path / "runs" / "search-photos-taken-1.lock"):
        study.main(flags)
    rows = {row["name"]: row for row in read_json_lines(results)}
    assert rows.keys() == {"other", "broken", "mae", "pixels"}
    assert rows["other"]["linear"]["split"] == "validation"
    assert rows["other"]["linear"]["test_images"] == 0
    assert 0 <= rows["other"]["diagnose"]["image_two_views"] <= 1
    assert "--patch-size 5 does not divide" in rows["broken"]["error"]
    assert rows["mae"]["knn"]["split"] == "test" and rows["mae"]["knn"]["test_images"] == 18
    assert rows["pixels"]["knn"]["network"] == "pixels" and "diagnose" not in rows["pixels"]
    for row in rows.values():
        assert row["torch"] == torch.__version__ and row["threads"] == 1 and row["commit"]
    text = results.read_text()
    study.main([*flags, "--stage", "evidence"])            # all of them are done
    assert results.read_text() == text
    plan.write_text(plan.read_text() + f"evidence photos 3 mae: --recipe mae {SMALL}\n")
    study.main([*flags, "--limit", "1"])                   # now the one that was taken is free
    assert [row["name"] for row in read_json_lines(results)][4:] == ["taken"]


def test_trains_a_run_of_the_evidence_further(photos, tmp_path, monkeypatch, no_pictures):
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.setattr(study, "SETS", {"photos": "--data imagefolder"})
    plan, results = tmp_path / "plan.txt", tmp_path / "results.jsonl"
    further = "--epochs 1 --batch-size 16 --device cpu"
    plan.write_text(f"evidence photos 2 pl-mae: {SMALL}\n"
                    f"finetune photos 2 pl-mae: {further}\n"
                    f"finetune photos 2 scratch: {further}\n"
                    f"finetune photos 2 nobody: {further}\n")
    study.main([str(plan), str(tmp_path), str(tmp_path / "runs"), "--results", str(results)])
    _, tuned, scratch, nobody = read_json_lines(results)
    assert tuned["finetune"]["top1"] >= 0 and tuned["finetune"]["test_images"] == 18
    assert scratch["finetune"].keys() == tuned["finetune"].keys()
    assert "there is no such file" in nobody["error"]


def test_a_signal_ends_the_plan_and_the_run_stays_open(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SETS", {"photos": "--data imagefolder"})
    plan, results = tmp_path / "plan.txt", tmp_path / "results.jsonl"
    plan.write_text(f"evidence photos 2 pl-mae: {SMALL}\nevidence photos 3 pl-mae: {SMALL}\n")

    def stopped(*args):
        raise SystemExit(143)
    monkeypatch.setattr(study.train, "main", stopped)
    with pytest.raises(SystemExit):
        study.main([str(plan), str(tmp_path), str(tmp_path / "runs"), "--results", str(results)])
    assert read_json_lines(results) == []
