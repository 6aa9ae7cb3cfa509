"""Early rejection in a run: the same kept images, after a kill too, and what is reported."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from discl.errors import RecipeError
from discl.pipeline import generate, run_until
from discl.recipe import validate
from discl.report.page import similarity
from discl.report.text import cosine
from discl.run_folder import paths
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.spectrum.plan import PlanShard, read_plan
from discl.stages.export import export
from discl.stages.pending import known_scores, scorer_of, summarise_rejections
from discl.stages.rejection import count_rejections, describe_rule, load_learnt, rejected_images
from discl.stages.sample_pool import kept_images

STEPS, TEACH = 6, 20


def run_of(tree: dict[str, Any], folder: Path, **spectrum: Any) -> Run:
    changed = copy.deepcopy(tree)
    changed["spectrum"] |= {
        "levels": [0, 50],
        "seeds": 6,
        "num_inference_steps": STEPS,
        "guidance_scale": 1,
        **spectrum,
    }
    return open_run(validate(changed), folder)


def images_of(run: Run) -> dict[str, bytes]:
    table = run.spectrum.read(["id", "image"])
    return {row["id"]: row["image"]["bytes"] for row in table.to_pylist()}


def rule(**changes: Any) -> dict[str, Any]:
    return {"loss": 0.2, "audit": 0.25, "at": [0.5], "teach": TEACH, **changes}


@pytest.fixture(scope="module")
def whole(small_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that finishes every image."""
    run = run_of(small_tree, tmp_path_factory.mktemp("whole"))
    run_until(run, "filter")
    return run


@pytest.fixture(scope="module")
def tree(small_tree: dict[str, Any], whole: Run) -> dict[str, Any]:
    """With a threshold that about half of the images of level 0 pass."""
    levels = {request.id: request.level for request in read_plan(whole.path(paths.PLAN))}
    scores = [cosine for name, cosine in known_scores(whole).items() if levels[name] == 0]
    changed = copy.deepcopy(small_tree)
    changed["filter"]["threshold"] = round(float(np.median(scores)), 4)
    return changed


@pytest.fixture(scope="module")
def rejecting(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_of(tree, tmp_path_factory.mktemp("rejecting"), early_rejection=rule())
    run_until(run, "filter")
    return run


@pytest.mark.slow
def test_what_is_made_is_what_a_run_without_rejection_makes(whole: Run, rejecting: Run) -> None:
    made, wanted = images_of(rejecting), images_of(whole)
    gone = rejected_images(rejecting, scorer_of(rejecting))
    assert gone and set(wanted) - set(made) == set(gone)
    assert all(made[name] == wanted[name] for name in made)
    plan = {request.id: request for request in read_plan(rejecting.path(paths.PLAN))}
    assert {plan[name].level for name in gone} == {0}  # three steps at level 50 are too few


@pytest.mark.slow
def test_rows_say_what_was_rejected(rejecting: Run, tmp_path: Path) -> None:
    gone = rejected_images(rejecting, scorer_of(rejecting))
    rows = {row["id"]: row for row in pq.read_table(rejecting.path(paths.FILTER)).to_pylist()}
    assert set(gone) <= set(rows) and len(rows) == 120
    for name, row in rows.items():
        assert (name in gone) == row["reason"].startswith("rejected after 3 of 6 steps: ")
        assert (name in gone) == math.isnan(row["clip_similarity"])
        assert not (row["keep"] and name in gone)
    kept = {row["id"] for row in rows.values() if row["keep"]}
    assert set(kept_images(rejecting)["id"]) == kept
    folder = export(rejecting, "imagefolder", tmp_path / "all", everything=True)
    assert len(list(folder.rglob("*.webp"))) == 120 - len(gone)


@pytest.mark.slow
def test_the_report_draws_what_was_finished(rejecting: Run) -> None:
    verdicts = pq.read_table(rejecting.path(paths.FILTER))
    summary: Any = SimpleNamespace(verdicts=verdicts, recipe=rejecting.recipe.plain())
    found = similarity(summary)
    assert [row.level for row in found.levels] == [50, 0]
    assert all(math.isfinite(row.median) and row.planned == 60 for row in found.levels)
    assert cosine(math.nan) == "–"


@pytest.mark.slow
def test_savings_and_loss_are_those_of_the_whole_run(whole: Run, rejecting: Run) -> None:
    scorer, plan = scorer_of(rejecting), read_plan(rejecting.path(paths.PLAN))
    found = count_rejections(rejecting, scorer, plan, known_scores(rejecting))
    gone = rejected_images(rejecting, scorer)
    assert found.rows_saved == 3 * len(gone) == 3 * (found.rejected - found.audited)
    assert found.rows_made == 60 * 6 + 60 * 3 - found.rows_saved
    [learnt] = load_learnt(rejecting, scorer).values()
    assert set(learnt.bounds) == {3} and learnt.bounds[3] > -math.inf
    assert len(learnt.teachers) == TEACH and not learnt.teachers & set(gone)
    summary = summarise_rejections(rejecting)
    assert f"dropped {len(gone)} images" in summary and f"saved {3 * len(gone)} UNet" in summary
    assert summarise_rejections(whole) == ""
    threshold, scores = rejecting.recipe.filter.threshold, known_scores(whole)
    if found.audited:
        kept = sum(scores[request.id] >= threshold for request in plan if request.id not in gone)
        lost = found.audited_kept / found.audited * len(gone)
        assert found.loss == pytest.approx(lost / (kept + lost))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_images(tree: dict[str, Any], rejecting: Run) -> None:
    """Half of the images and of the looks are lost, and then the bound too."""
    images, gone = images_of(rejecting), rejected_images(rejecting, scorer_of(rejecting))
    [learnt] = rejecting.path(paths.BOUNDS).glob("*.json")
    text = learnt.read_text()
    for lost in ([], [learnt]):
        for name in (paths.SPECTRUM, paths.SCORES, paths.LOOKS):
            for shard in sorted(rejecting.path(name).glob("part-*.parquet"))[::2]:
                shard.unlink()
        for path in lost:
            path.unlink()
        run_until(open_run(rejecting.recipe, rejecting.folder), "filter")
        assert images_of(rejecting) == images
        assert rejected_images(rejecting, scorer_of(rejecting)) == gone
        assert learnt.read_text() == text


@pytest.mark.slow
def test_a_rejected_image_is_drawn_again_like_one_that_the_filter_drops(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(tree, tmp_path, levels=[0], tries=2, early_rejection=rule(audit=0.01))
    run_until(run, "filter")
    rows = pq.read_table(run.path(paths.FILTER)).to_pylist()
    again = {(row["source_id"], row["seed"]) for row in rows if row["attempt"] == 1}
    first = [row for row in rows if row["attempt"] == 0]
    assert again == {(row["source_id"], row["seed"]) for row in first if not row["keep"]}
    assert any(row["reason"].startswith("rejected") for row in first)


@pytest.mark.slow
def test_several_workers_make_the_same_images(
    tree: dict[str, Any], rejecting: Run, tmp_path: Path
) -> None:
    changed = copy.deepcopy(tree)
    changed["runtime"]["processes"] = 2
    run = run_of(changed, tmp_path, early_rejection=rule())
    run_until(run, "filter")
    assert images_of(run) == images_of(rejecting)
    assert rejected_images(run, scorer_of(run)) == rejected_images(rejecting, scorer_of(rejecting))


@pytest.mark.slow
def test_where_too_few_are_kept_nothing_is_rejected(
    tree: dict[str, Any], tmp_path: Path, shown_messages: Any
) -> None:
    changed = copy.deepcopy(tree)
    changed["filter"]["threshold"] = 0.99
    run = run_of(changed, tmp_path, levels=[0], seeds=3, early_rejection=rule())
    run_until(run, "filter")
    assert len(images_of(run)) == 30
    assert not rejected_images(run, scorer_of(run))


@pytest.mark.slow
def test_rounds_learn_from_the_first_that_asks_and_end_alike_after_a_kill(
    tree: dict[str, Any], whole: Run, tmp_path: Path
) -> None:
    """Both rounds ask for both levels; then images, looks and the bound of round 1 are lost."""
    changed = copy.deepcopy(tree) | {
        "methods": {"all": {"strategy": "all-levels", "missing": "nearest", "undersample": False}},
        "loop": {"rounds": 2},
    }
    changed["train"] |= {
        "epochs": 2,
        "curriculum_epochs": 2,
        "steps_per_epoch": 1,
        "image_size": 32,
        "model": {"stem": "3x3", "width": 4},
    }
    run = run_of(changed, tmp_path, early_rejection=rule())
    run_until(run, "filter")
    rows = {row["id"]: row for row in pq.read_table(run.path(paths.FILTER)).to_pylist()}
    gone, wanted = rejected_images(run, scorer_of(run)), images_of(whole)
    assert {rows[name]["round"] for name in gone} >= {1} and len(rows) == 120
    assert images_of(run) == {name: wanted[name] for name in rows if name not in gone}
    [learnt] = run.path(paths.BOUNDS).glob("*.json")
    text, kept = learnt.read_text(), kept_images(run)["id"][:]
    assert all(rows[name]["round"] == 0 for name in json.loads(text)["teachers"])
    for name in (paths.SPECTRUM, paths.SCORES, paths.LOOKS):
        for shard in sorted(run.path(name).glob("part-*.parquet"))[::2]:
            shard.unlink()
    learnt.unlink()
    run_until(open_run(run.recipe, run.folder), "filter")
    assert learnt.read_text() == text and kept_images(run)["id"][:] == kept
    assert rejected_images(run, scorer_of(run)) == gone


# ---------------------------------------------------------------- what cannot be


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"early_rejection": {"audit": 0}}, "audit"),
        ({"early_rejection": {"loss": 0}}, "loss"),
        ({"early_rejection": {"at": []}}, "at"),
        ({"early_rejection": {"at": [1.0]}}, "at"),
    ],
)
def test_bad_settings_are_refused(
    tree: dict[str, Any], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(RecipeError, match=rf"spectrum\.early_rejection\.{named}"):
        run_of(tree, tmp_path, **changes)


@pytest.mark.slow
def test_what_needs_dropped_images_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    alia = copy.deepcopy(tree)
    alia["filter"]["rule"] = "alia"
    lower = copy.deepcopy(tree)
    lower["methods"] = {"ce": {"threshold": tree["filter"]["threshold"] - 0.1}}
    for changed, named in ((alia, "filter.rule alia"), (lower, r"methods\.ce\.threshold")):
        with pytest.raises(RecipeError, match=named):
            run_of(changed, tmp_path, early_rejection=rule())


@pytest.mark.slow
def test_a_part_of_a_plan_sets_no_bound(tree: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(tree, tmp_path, early_rejection=rule())
    run_until(run, "plan")
    assert "after 20 images of 0 % are finished" in describe_rule(run, scorer_of(run))
    with pytest.raises(RecipeError, match="--shard 1/2") as raised:
        generate(run, PlanShard(1, 2))
    assert raised.value.argument == "spectrum.early_rejection"
    assert not images_of(run)
