"""Images that a person keeps or drops: what the filter and trainings make of `overrides.csv`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from discl import Run, load_recipe, open_run, run_until
from discl.audit.findings import Finding
from discl.audit.table import key_of_real, write_findings
from discl.errors import BrokenFileError, RunError
from discl.pipeline import amend_filter
from discl.run_folder import paths
from discl.run_folder.overrides import BY_HAND, Override, change_overrides
from discl.stages.filter import filter_spectrum
from discl.stages.sample_pool import kept_images
from helpers.site import Site


@pytest.fixture
def run(filtered_run: Path, tmp_path: Path) -> Run:
    """A copy of a run whose filter keeps every image."""
    shutil.copytree(filtered_run, tmp_path / "run")
    return open_run(load_recipe(tmp_path / "run" / paths.RECIPE), tmp_path / "run")


def verdicts(run: Run) -> dict[str, tuple[bool, str]]:
    rows = pq.read_table(run.path(paths.FILTER)).to_pylist()
    return {row["id"]: (row["keep"], row["reason"]) for row in rows}


def middle(run: Run) -> float:
    """A threshold that drops about half of the images."""
    scores = pq.read_table(run.path(paths.FILTER))["clip_similarity"].to_pylist()
    return round(sorted(scores)[len(scores) // 2], 4)


def test_without_the_file_nothing_changes(run: Run) -> None:
    before = run.path(paths.FILTER).read_bytes()
    filter_spectrum(run)
    assert run.path(paths.FILTER).read_bytes() == before
    change_overrides(run.folder, [(next(iter(verdicts(run))), Override("none", "only a tag"))])
    filter_spectrum(run)
    assert run.path(paths.FILTER).read_bytes() == before


def test_the_filter_honours_what_was_done_by_hand(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    names = list(verdicts(run))
    changes = [(names[0], Override("drop")), ("elsewhere", Override("drop"))]
    change_overrides(run.folder, changes)
    with caplog.at_level("INFO"):
        filter_spectrum(run)
    assert "1 row of" in caplog.text
    assert verdicts(run)[names[0]] == (False, BY_HAND)
    assert all(keep for name, (keep, _) in verdicts(run).items() if name != names[0])
    assert "elsewhere" in (run.folder / paths.OVERRIDES).read_text()
    assert names[0] not in kept_images(run)["id"][:]
    assert names[0] not in kept_images(run, -1)["id"][:]  # the threshold of a method


def test_it_survives_another_threshold(run: Run) -> None:
    scores = pq.read_table(run.path(paths.FILTER)).sort_by("clip_similarity").to_pylist()
    worst, best = scores[0]["id"], scores[-1]["id"]
    change_overrides(run.folder, [(worst, Override("keep")), (best, Override("drop"))])
    amend_filter(run.folder, {"filter.threshold": middle(run)})
    found = verdicts(run)
    assert found[worst] == (True, BY_HAND) and found[best] == (False, BY_HAND)
    assert 10 < sum(keep for keep, _ in found.values()) < 24
    amended = load_recipe(run.folder / paths.RECIPE)
    assert amended.filter.threshold == middle(run)
    kept = kept_images(open_run(amended, run.folder), 1)
    assert kept["id"][:] == [worst]


def test_a_copy_of_a_held_out_image_is_not_kept(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    names = list(verdicts(run))
    leak = Finding("leakage", "synthetic", names[0], 2, 0, 1.0, "test", "x.png")
    write_findings(run.path(paths.AUDIT), [leak], key_of_real(run.path(paths.DATA)))
    change_overrides(run.folder, [(name, Override("keep")) for name in names[:2]])
    filter_spectrum(run)
    assert "audit.leakage" in caplog.text
    assert verdicts(run)[names[0]][1].startswith("leakage")
    assert verdicts(run)[names[1]] == (True, BY_HAND)


def test_a_wrong_file_stops_the_filter_with_its_line(run: Run) -> None:
    (run.folder / paths.OVERRIDES).write_text("id,verdict\na,maybe\n")
    with pytest.raises(BrokenFileError, match="line 2"):
        filter_spectrum(run)


@pytest.mark.slow
def test_the_page_applies_threshold_and_overrides(run: Run) -> None:
    site = Site(run.folder, lambda changes: amend_filter(run.folder, changes))
    name = str(site.columns()[1]["id"][0])
    site.change("/api/overrides", [{"id": name, "verdict": "drop"}])
    answer = site.change("/api/threshold", {"apply": True})
    assert answer.status_code == 200 and answer.json()["kept"] == 31
    answer = site.change("/api/threshold", {"threshold": middle(run), "apply": True})
    kept = sum(keep for keep, _ in verdicts(run).values())
    assert answer.json() == {**answer.json(), "applied": True, "kept": kept} and kept < 20
    about = site.json("/api/run")
    assert about["threshold"] == middle(run) and about["stamp"] == answer.json()["stamp"]
    assert list((run.folder / paths.EARLIER).iterdir())


def test_the_page_generates_nothing(run: Run) -> None:
    shutil.rmtree(run.folder / paths.SPECTRUM)
    before = run.path(paths.FILTER).read_bytes()
    with pytest.raises(RunError, match="32 images"):
        amend_filter(run.folder, {"filter.threshold": 0.5})
    site = Site(run.folder, lambda changes: amend_filter(run.folder, changes))
    answer = site.change("/api/threshold", {"threshold": 0.5, "apply": True})
    assert answer.status_code == 409 and "filter.threshold=0.5" in answer.json()["command"]
    assert run.path(paths.FILTER).read_bytes() == before
    assert load_recipe(run.folder / paths.RECIPE).filter.threshold == -1


def test_the_page_waits_for_no_other_stage(run: Run) -> None:
    site = Site(run.folder, lambda changes: amend_filter(run.folder, changes))
    with run.lock("train"):
        answer = site.change("/api/threshold", {"threshold": 0.1, "apply": True})
        assert answer.status_code == 409 and "train" in answer.json()["error"]
        assert site.change("/api/overrides", [{"id": "a", "tag": "b"}]).status_code == 200
    assert not site.json("/api/run")["generating"]
    assert run_until(run, "filter").exists()
