"""Budgets and wanted images of a run: the same images after a kill, and clear errors before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from discl import RecipeError
from discl.cli import main
from discl.errors import TrainingError
from discl.pipeline import run_until
from discl.recipe import load_recipe, validate
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.spectrum.plan import read_plan
from discl.spectrum.store import Shards
from discl.stages.plan import check_models, describe_budget, estimate_cost

ROWS = {0: 8, 50: 4}
"""UNet rows of an image of the small run at each level."""


def with_spectrum(tree: dict[str, Any], threshold: float = -1, **values: Any) -> dict[str, Any]:
    return tree | {
        "spectrum": tree["spectrum"] | values,
        "filter": tree["filter"] | {"threshold": threshold},
    }


def made(tree: dict[str, Any], folder: Path, stage: str = "filter", amend: bool = False) -> Run:
    run = open_run(validate(tree), folder, amend)
    run_until(run, stage)
    return run


def verdicts(run: Run) -> list[dict[str, Any]]:
    return pq.read_table(run.path("filter.parquet")).to_pylist()


@pytest.fixture(scope="module")
def whole(small_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(small_tree, tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.slow
def test_a_budget_caps_a_run_which_goes_on_with_what_it_has(
    small_tree: dict[str, Any], whole: Run, tmp_path: Path
) -> None:
    tree = with_spectrum(small_tree, budget={"unet_rows": 100})
    run = made(tree, tmp_path / "run")
    rows = verdicts(run)
    assert 100 - max(ROWS.values()) < sum(ROWS[row["level"]] for row in rows) <= 100
    assert run.spectrum.ids() == {row["id"] for row in rows}
    assert Counter(Counter(row["source_id"] for row in rows).values()).keys() <= {1, 2}
    assert min(Counter((row["label"], row["level"]) for row in rows).values()) >= 3
    before = run.spectrum.ids()
    all_ids = [row["id"] for row in verdicts(whole)]
    assert [row["id"] for row in rows] == [name for name in all_ids if name in before]
    more = made(with_spectrum(small_tree, budget={"images": 30}), tmp_path / "run", amend=True)
    assert len(verdicts(more)) == 30 and before <= {row["id"] for row in verdicts(more)}
    rest = made(with_spectrum(small_tree, budget={"images": 10**6}), tmp_path / "run", amend=True)
    assert verdicts(rest) == verdicts(whole)


@pytest.mark.slow
def test_a_killed_run_comes_to_the_same_images_of_a_budget(
    small_tree: dict[str, Any],
    whole: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropped images are followed by further seeds, within a budget that ends among them."""
    threshold = float(np.median([row["clip_similarity"] for row in verdicts(whole)]))
    tree = with_spectrum(
        small_tree, threshold, wanted=1, tries=3, levels=[50], budget={"images": 14}
    )
    finished = made(tree, tmp_path / "finished")
    rows = verdicts(finished)
    assert len(rows) == 14 and {row["seed"] for row in rows} == {0, 1}
    assert all(row["attempt"] == 0 for row in rows)
    kept = {row["source_id"] for row in rows if row["keep"]}
    assert not any(row["seed"] and row["source_id"] in kept and not row["keep"] for row in rows)
    append, calls = Shards.append, iter(range(1, 10**6))

    def killed(shards: Shards, new: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        append(shards, new)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Shards, "append", killed)
        made(tree, tmp_path / "run")
    again = made(tree, tmp_path / "run")
    assert verdicts(again) == rows
    assert again.spectrum.ids() == finished.spectrum.ids()


def test_wanted_without_dropped_images_is_as_many_seeds(
    small_tree: dict[str, Any], tmp_path: Path
) -> None:
    whole = made(small_tree, tmp_path / "whole", "plan")
    run = made(with_spectrum(small_tree, wanted=2, tries=2, seeds=7), tmp_path / "run", "plan")
    assert run.path("plan.parquet").read_bytes() == whole.path("plan.parquet").read_bytes()
    cost = estimate_cost(run)
    assert (cost["images"], cost["further_images"]) == (40, 40)


def test_the_plan_says_what_a_budget_buys(
    small_tree: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(with_spectrum(small_tree, budget={"images": 25}, tries=2)))
    monkeypatch.setattr("sys.argv", ["discl", "plan", str(path), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        main()
    told, warned = capsys.readouterr()
    assert "25 images to generate" in told and "further" not in told
    assert "no method draws synthetic images, and 25 images are planned" in warned
    assert "the budget of 25 images buys 25 of the 40 images of the whole plan: 2 to 3" in told
    tree = with_spectrum(small_tree, budget={"images": 50}, tries=2)
    tree["methods"] = {"all": {"strategy": "all-levels"}}
    run = made(tree, tmp_path / "b", "plan")
    assert "no method" not in capsys.readouterr().err
    assert "buys the whole plan: 4 for each of 10 hard images in 2 classes" in describe_budget(run)
    assert estimate_cost(run)["further_images"] == 10


def test_hours_become_rows_once(small_tree: dict[str, Any], tmp_path: Path) -> None:
    tree = with_spectrum(small_tree, budget={"hours": 0.01})
    run = made(tree, tmp_path / "run", "plan")
    noted = json.loads(run.path("budget.json").read_text())
    assert noted["unet_rows"] == int(0.01 * 3600 * noted["rows_per_second"])
    noted["unet_rows"] = 50
    run.path("budget.json").write_text(json.dumps(noted))
    made(tree, tmp_path / "run", "plan")
    levels = pq.read_table(run.path("plan.parquet"))["level"].to_pylist()
    assert 50 - max(ROWS.values()) < sum(ROWS[level] for level in levels) <= 50
    assert "h at the measured speed" in describe_budget(run)
    noted["unet_rows"] = "many"
    run.path("budget.json").write_text("{")
    with pytest.raises(Exception, match=r"budget\.json"):
        made(tree, tmp_path / "run", "plan")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"budget": {}}, "spectrum.budget states nothing"),
        ({"budget": {"images": 3, "hours": 1}}, "spectrum.budget states images and hours"),
        ({"budget": {"images": -1}}, "spectrum.budget.images"),
        ({"budget": {"hours": 0}}, "spectrum.budget.hours"),
        ({"budget": {"hours": -1}}, "spectrum.budget.hours"),
        ({"budget": {"rows": 5}}, "spectrum.budget 'rows'"),
        ({"budget": 500}, "spectrum.budget"),
        ({"wanted": 0, "tries": 2}, "spectrum.wanted"),
        ({"wanted": 4}, "spectrum.wanted = 4"),
    ],
    ids=str,
)
def test_a_budget_of_nothing_is_an_error(
    values: dict[str, Any], named: str, small_tree: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as error:
        validate(with_spectrum(small_tree, **values))
    assert named in str(error.value)


def test_a_budget_that_is_too_small_is_an_error_before_anything_is_made(
    small_tree: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"spectrum\.budget: .* 3 UNet rows buys no image"):
        made(with_spectrum(small_tree, budget={"unet_rows": 3}), tmp_path / "none")
    tree = with_spectrum(small_tree, budget={"images": 1}) | {
        "methods": {"discl": {"strategy": "diverse-to-specific"}}
    }
    with pytest.raises(TrainingError, match=r"spectrum\.budget: .*buys 1 of 40 images"):
        made(tree, tmp_path / "few")
    assert not (tmp_path / "few" / "spectrum").exists()


@pytest.mark.slow
def test_a_budget_of_no_image_trains_on_real_ones_without_a_generator(
    small_tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = small_tree | {
        "spectrum": {"checkpoint": "no/generator", "levels": [0], "budget": {"images": 0}},
        "filter": {"checkpoint": "no/clip"},
        "methods": {"ce": {}, "repeat": {"strategy": "fixed", "level": 100, "mixture": "all"}},
        "train": {
            "batch_size": 4,
            "epochs": 1,
            "curriculum_epochs": 1,
            "steps_per_epoch": 2,
            "image_size": 16,
            "model": {"width": 4, "stem": "3x3"},
        },
    }
    run = open_run(load_recipe(tree), tmp_path / "run")
    check_models(run, "report")
    page = run_until(run, "report").read_text()
    assert {"ce", "repeat"} <= json.loads(run.path("results.json").read_text()).keys()
    assert "no spectrum is made" in describe_budget(run)
    assert estimate_cost(run)["images"] == 0 == len(read_plan(run.path("plan.parquet")))
    assert "Synthetic images" in page and 'id="filter"' not in page
    with pytest.raises(
        RecipeError, match=r"methods\.text trains on synthetic images .*images is 0"
    ):
        load_recipe(tree, {"methods": {"text": {"strategy": "text-only"}}})
