"""A mixture by name is its pair of `undersample` and `sampling`, and has one digest with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from discl.errors import RecipeError, TrainingError
from discl.mixtures import MIXTURES, in_long_form, name_mixture, read_mixture
from discl.recipe import load_recipe
from discl.run_folder.run import Run
from discl.stages import method_plan, sample_pool
from discl.stages import trained as trained_stage
from discl.stages.sample_pool import kept_images

D2S = {"strategy": "diverse-to-specific"}
REAL = {"strategy": "real-only"}


def run_with(folder: Path, methods: dict[str, Any], **values: Any) -> Run:
    recipe = load_recipe(folder / "recipe.yaml", {"methods": methods, "baseline": None, **values})
    return Run(recipe, folder)


@pytest.mark.parametrize("strategy", [D2S, REAL])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_name_and_its_pair_train_on_the_same(
    filtered_run: Path, name: Any, strategy: dict[str, Any]
) -> None:
    """They draw the same epochs, and one is not trained again where the recipe states the other."""
    undersample, sampling = MIXTURES[name]
    pair = {"undersample": undersample, "sampling": sampling}
    default = undersample == (strategy is D2S)  # hard.rule is tail
    as_usual = {"sampling": sampling} if default else pair
    run = run_with(
        filtered_run,
        {"a": strategy | {"mixture": name}, "b": strategy | as_usual, "c": strategy | pair},
    )
    assert run.recipe.hard.rule == "tail"
    plans = [
        method_plan._plan_real(run, key, method, sample_pool.make_pool(run.train, *_parts(run)))
        for key, method in run.recipe.methods.items()
    ]
    assert plans[0].sampling == plans[1].sampling == plans[2].sampling
    kept = kept_images(run)
    prints = [trained_stage.fingerprint(run, key, run.recipe.methods[key], kept) for key in "ab"]
    assert prints[0] == prints[1]


def _parts(run: Run) -> tuple[Any, Any]:
    return sample_pool.hard_rows(run), sample_pool.no_images()


def test_names_of_pairs() -> None:
    assert [name_mixture(*pair) for pair in MIXTURES.values()] == list(MIXTURES)
    assert name_mixture(True, "class-balanced") is None
    assert read_mixture(D2S, by_tail=True) == (True, "instance")
    assert read_mixture(D2S, by_tail=False) == read_mixture(REAL, by_tail=True)
    assert in_long_form(REAL, by_tail=True) == REAL


def small(**method: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "data": {"root": "images"},
        "spectrum": {"checkpoint": "sd", "levels": [0, 50]},
        "filter": {"checkpoint": "clip", "threshold": 0.2},
        "methods": {"discl": D2S | method},
    }


@pytest.mark.parametrize("other", [{"undersample": False}, {"sampling": "square-root"}])
def test_both_forms_in_one_method_are_an_error(other: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"^methods\.discl: .*all.*'{next(iter(other))}'"):
        load_recipe(small(mixture="all", **other))
    recipe = load_recipe(small(mixture="all", **other), {"methods.discl.mixture": None})
    assert recipe.methods["discl"].mixture is None
    plain = load_recipe(small())  # a written recipe states the defaults of both
    assert load_recipe(plain, {"methods.discl.mixture": "all"}).methods["discl"].mixture == "all"
    with pytest.raises(RecipeError, match=r"value of methods\.discl\.mixture 'balanced'"):
        load_recipe(small(mixture="balanced"))


def test_a_recipe_holds_the_form_that_it_was_given() -> None:
    named, long, plain = (
        load_recipe(load_recipe(small(**method)).plain())
        for method in ({"mixture": "all"}, {"undersample": False}, {})
    )
    assert named.plain()["methods"]["discl"]["mixture"] == "all"
    assert not {"undersample", "sampling"} & set(named.plain()["methods"]["discl"])
    assert "mixture" not in long.plain()["methods"]["discl"]
    assert [each.methods["discl"].states_mixture for each in (named, long, plain)] == [
        True, True, False,
    ]  # fmt: skip


def test_undersampled_needs_a_class_without_hard_images(filtered_run: Path) -> None:
    run = run_with(filtered_run, {"discl": D2S | {"mixture": "undersampled"}})
    pool = sample_pool.make_pool(run.train, *_parts(run))
    hard = pool.hard.copy()
    for label in range(pool.num_classes):  # one image of each class, not all
        rows = (pool.labels == label).nonzero()[0]
        hard[rows] = False
        hard[rows[:1]] = True
    object.__setattr__(pool, "hard", hard)
    with pytest.raises(TrainingError) as raised, method_plan.named_by_method("discl"):
        method_plan._plan_real(run, "discl", run.recipe.methods["discl"], pool)
    assert raised.value.argument == "methods.discl.mixture"


def test_a_pilot_takes_one_mixture_or_several() -> None:
    one, several = (
        load_recipe(small() | {"pilot": {"mixture": value}})
        for value in ("all", ["all", "undersampled", "all"])
    )
    assert one.pilot.mixture == ["all"] and several.pilot.mixture == ["all", "undersampled"]
    assert one.plain()["pilot"]["mixture"] == "all" and load_recipe(one.plain()) == one
    assert load_recipe(small()).plain()["pilot"]["mixture"] == "class-balanced"
    for wrong in ("even", ["even"], [], 3):
        with pytest.raises(RecipeError, match=r"pilot\.mixture"):
            load_recipe(small() | {"pilot": {"mixture": wrong}})
