"""A search over `mixture`: equal for every row that leaves it open, and the controls follow it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import discl
from discl.errors import RecipeError
from discl.evaluation.controls import find_control, make_controls
from discl.pipeline import compare
from discl.recipe import Recipe, load_recipe
from discl.run_folder import paths
from discl.run_folder.open import open_run
from discl.stages.tune import describe_tuning, keep_mixtures, plan_trials, with_methods

METHODS: dict[str, Any] = {
    "ce": {"strategy": "real-only"},
    "ce-balanced": {"strategy": "real-only", "mixture": "class-balanced"},
    "under": {"strategy": "real-only", "undersample": True},
    "discl": {"strategy": "diverse-to-specific"},
}
NAMES = ["undersampled", "class-balanced", "square-root", "all"]


def recipe_with(**tune: Any) -> Recipe:
    return load_recipe(
        {
            "name": "small",
            "data": {"root": "images"},
            "spectrum": {"checkpoint": "sd", "levels": [0, 50]},
            "filter": {"checkpoint": "clip", "threshold": 0.2},
            "methods": METHODS,
            "compare": {"tune": {"trials": 12, "space": {"mixture": NAMES}, **tune}},
        }
    )


def test_rows_that_state_no_mixture_are_searched_alike() -> None:
    """The unchanged method is the first trial, and its own mixture is not tried twice."""
    recipe = recipe_with()
    tried = {name: [each.get("mixture") for each in plan_trials(recipe, name)] for name in METHODS}
    assert tried == {
        "ce": [None, "undersampled", "class-balanced", "square-root"],
        "ce-balanced": [None],
        "under": [None],
        "discl": [None, "class-balanced", "square-root", "all"],
    }


def test_a_control_is_searched_over_all_else_and_where_its_own_space_says_so() -> None:
    space = {"mixture": NAMES, "train.optimizer.lr": [1e-3, 1e-2]}
    recipe = recipe_with(space=space, methods={"under": {"mixture": ["all"]}})
    assert plan_trials(recipe, "ce-balanced") == [{}, {"train.optimizer.lr": 1e-2}]
    assert len(plan_trials(recipe, "ce")) == len(plan_trials(recipe, "discl")) == 8
    trials = plan_trials(recipe, "under")
    assert {each.get("mixture") for each in trials[1:]} == {"all"}
    method = with_methods(recipe, {"u": ("under", trials[1])}).methods["u"]
    assert (method.mixture, method.undersample) == ("all", None)


def test_an_unknown_mixture_is_told_before_any_trial() -> None:
    with pytest.raises(RecipeError, match=r"mixture 'even'.*class-balanced"):
        plan_trials(recipe_with(space={"mixture": ["even"]}), "ce")


def test_controls_have_the_chosen_mixture() -> None:
    recipe = recipe_with()
    rate = {"train.optimizer.lr": 1e-2}
    tuned = with_methods(
        recipe,
        {name: (name, {}) for name in METHODS}
        | {"discl": ("discl", {"mixture": "class-balanced", **rate})},
    )
    kept = keep_mixtures(recipe, tuned).plain()
    assert kept["methods"]["discl"]["train"] == {} and "mixture" not in kept["methods"]["ce"]
    assert find_control(recipe.plain()["methods"], "discl", by_tail=True) == "under"
    assert find_control(kept["methods"], "discl", by_tail=True) == "ce-balanced"
    other = keep_mixtures(recipe, with_methods(recipe, {"ce": ("ce", {}), "discl": (
        "discl", {"mixture": "square-root"})})).plain()  # fmt: skip
    controls = make_controls(
        other, ["ce", "discl"], {"ce": 0.5}, metric="top-1", chosen_on="test", shown="test"
    )
    assert controls is not None and controls.same_mixture == {"discl": None}
    assert "{strategy: fixed, level: 100, mixture: square-root}" in controls.lines


def test_every_row_is_described_with_its_mixture(tmp_path: Path) -> None:
    each = {"chosen": {}, "trials": [{"settings": {}, "figure": 0.5}]}
    record: dict[str, Any] = {
        "metric": "accuracy",
        "judged_on": "the validation split",
        "methods": dict.fromkeys(METHODS, each),
    }
    run: Any = SimpleNamespace(folder=tmp_path)
    path = tmp_path / paths.TRIALS_DATA
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    assert len(describe_tuning(run)) == 1 + len(METHODS)
    record["mixtures"] = {"ce": "all", "ce-balanced": "class-balanced", "discl": "class-balanced"}
    path.write_text(json.dumps(record))
    assert describe_tuning(run)[-1] == "mixtures: all (ce); class-balanced (ce-balanced, discl)"


@pytest.mark.slow
def test_compare_chooses_mixtures_on_validation(filtered_run: Path, tmp_path: Path) -> None:
    """The chosen mixture is trained, named and controlled; nothing is trained twice."""
    folder = shutil.copytree(filtered_run, tmp_path / "run")
    values = {
        "train.batch_size": 8,
        "train.steps_per_epoch": 2,
        "train.epochs": 3,
        "train.curriculum_epochs": 2,
        "train.image_size": 16,
        "train.model": {"architecture": "resnet10", "width": 4, "stem": "3x3"},
        "methods": {"ce": METHODS["ce"], "discl": {"strategy": "all-levels", "missing": "nearest"}},
        "baseline": "ce",
        "compare.tune": {"trials": 4, "space": {"mixture": NAMES}, "hold_out": 0.3},
        "runtime.threads": 1,
    }
    run = open_run(discl.load_recipe(folder / "recipe.yaml", values), folder, amend=True)
    path = compare(run, [0], tune=True)
    record = json.loads((folder / paths.TUNED / paths.TRIALS_DATA).read_text())
    assert [len(each["trials"]) for each in record["methods"].values()] == [4, 4]
    for name, each in record["methods"].items():
        best = max(each["trials"], key=lambda trial: trial["figure"])
        default = {"ce": "all", "discl": "undersampled"}[name]
        assert record["mixtures"][name] == best["settings"].get("mixture", default)
        method = json.loads((path.parent / "train" / name / "method.json").read_text())
        assert method.get("mixture") == best["settings"].get("mixture")
    table = path.read_text()
    assert "- mixtures: " in table and "never on test images" in table
    stamps = {each: each.stat().st_mtime_ns for each in folder.rglob("model.safetensors")}
    compare(run, [0], tune=True)
    assert stamps == {each: each.stat().st_mtime_ns for each in folder.rglob("model.safetensors")}
