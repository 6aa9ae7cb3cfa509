"""Thresholds of single levels and classes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from discl.errors import RecipeError
from discl.recipe import Recipe, load_recipe
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.stages.filter import filter_spectrum
from discl.stages.plan import make_plan
from discl.stages.provenance import describe_making


@pytest.fixture
def recipe(filtered_run: Path) -> Callable[..., Recipe]:
    """The recipe of the filtered run with other values of its filter."""

    def load(other: dict[str, Any] | None = None, **values: object) -> Recipe:
        tree = yaml.safe_load((filtered_run / "recipe.yaml").read_text())
        own = {f"filter.{key}": value for key, value in values.items()}
        return load_recipe(tree, own | (other or {}))

    return load


@pytest.fixture
def run_of(filtered_run: Path, tmp_path: Path) -> Callable[[Recipe], Run]:
    shutil.copytree(filtered_run, tmp_path / "run")
    return lambda recipe: open_run(recipe, tmp_path / "run", amend=True)


def test_an_image_is_judged_by_its_class_then_its_level(
    recipe: Callable[..., Recipe], run_of: Callable[[Recipe], Run]
) -> None:
    plain = run_of(recipe())
    rows = pq.read_table(filter_spectrum(plain)).to_pylist()
    name = plain.train.class_names[rows[0]["label"]]
    chosen = recipe(threshold=1.0, level_thresholds={50: -1.0}, class_thresholds={name: 0.9})
    again = load_recipe(yaml.safe_load(chosen.to_yaml()))
    assert again == chosen and again.filter.level_thresholds == {50: -1.0}
    run = run_of(chosen)
    verdicts = pq.read_table(filter_spectrum(run)).to_pylist()
    assert len({row["level"] for row in verdicts}) > 1
    for row in verdicts:
        common = -1.0 if row["level"] == 50 else 1.0
        least = 0.9 if row["label"] == rows[0]["label"] else common
        assert row["keep"] == (row["clip_similarity"] >= least)
    words = str(describe_making(run.recipe, run.generator, run.size))
    assert f"-1 for level 50 %, 0.9 for class {name}" in words


def test_without_them_a_recipe_is_as_before(recipe: Callable[..., Recipe]) -> None:
    assert not {"level_thresholds", "class_thresholds"} & recipe().plain()["filter"].keys()


@pytest.mark.parametrize(
    ("values", "other", "message"),
    [
        ({"level_thresholds": {35: 0.2}}, {}, "level 35 %.*spectrum.levels"),
        ({"level_thresholds": {"x": 0.2}}, {}, "level_thresholds"),
        ({"level_thresholds": {50: 2}}, {}, r"level_thresholds.*2"),
        ({"level_thresholds": {50: 0.2}, "rule": "alia"}, {}, "filter.rule: alia"),
        ({"class_thresholds": {"a": 0.2}}, {"spectrum.tries": 2}, "spectrum.tries"),
        ({"class_thresholds": {"a": 0.2}}, {"loop": {"rounds": 2}}, "loop.rounds = 2"),
    ],
)
def test_thresholds_that_have_no_effect_are_refused(
    recipe: Callable[..., Recipe], values: dict[str, Any], other: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(other, **values)


def test_an_unknown_class_is_refused_before_images_are_made(
    recipe: Callable[..., Recipe], run_of: Callable[[Recipe], Run]
) -> None:
    with pytest.raises(RecipeError, match=r"filter\.class_thresholds 'unicorn'"):
        make_plan(run_of(recipe(class_thresholds={"unicorn": 0.2})))
