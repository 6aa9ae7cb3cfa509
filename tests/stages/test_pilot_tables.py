"""What a pilot recommends, from outcomes made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from discl import load_recipe
from discl.evaluation.worth import Gain, MixtureScore, Worth
from discl.stages.pilot_advice import (
    Outcome,
    Tried,
    advise,
    advise_mixture,
    choose_threshold,
    thresholds_to_try,
)
from discl.stages.pilot_tables import snippet

CANDIDATES = {"plain": {}, "adapted": {"spectrum.adapt": {"steps": 5}}}


def outcome(
    candidate: str, level: int | None, few: float, overall: float | None = 1.0, half: float = 1.0
) -> Outcome:
    gain = None if overall is None else Gain(overall, overall - 1, overall + 1)
    worth = Worth(Gain(few, few - half, few + half), gain, recognised=0.3, real=0.7)
    return Outcome(candidate, level, 0.6, 32, 0.5, 20.0, 0.9, 0.8, worth)


def advice(*outcomes: Outcome) -> dict:
    return advise(load_recipe("fashion-lt"), CANDIDATES, outcomes)


def test_a_gain_that_is_not_shown_is_undecided_and_none_is_advised_against():
    found = advice(outcome("plain", None, 0.5), outcome("plain", 50, -2.0))
    assert found["undecided"] and not found["generate"] and not found["recipe"]
    assert "not decided" in found["reasons"][0] and "+0.5 [-0.5, +1.5]" in found["reasons"][1]
    assert "recognises 30% of its images, and 70% of real ones" in found["reasons"][2]
    found = advice(outcome("plain", None, -0.5), outcome("plain", 50, 2.0, overall=-1.0))
    assert not found["undecided"] and "do not generate" in found["reasons"][0]


def test_levels_whose_gain_is_shown_are_recommended_with_the_keys_of_their_candidate():
    found = advice(
        outcome("plain", 0, 2.0),
        outcome("adapted", None, 4.0),
        outcome("adapted", 0, 0.5),
        outcome("adapted", 30, 5.0),
        outcome("adapted", 50, 6.0),
    )
    assert found["recipe"] == {
        "spectrum.adapt": {"steps": 5},
        "spectrum.levels": [30, 50],
        "spectrum.seeds": 6,  # three images for each hard one, half of them kept
        "filter.threshold": 0.6,
        "methods.discl.strategy": "diverse-to-specific",
    }
    assert found["strategy"] == "diverse-to-specific"


@pytest.mark.parametrize(
    ("gains", "strategy"),
    [
        ({0: 8.0, 50: 3.0}, "text-only"),
        ({0: 3.0, 50: 3.5}, "all-levels"),
        ({0: 2.0, 50: 5.0}, "diverse-to-specific"),
        ({0: 2.0, 50: 0.0}, "text-only"),
        ({0: 0.0, 50: 2.0}, "fixed"),
    ],
)
def test_the_strategy_follows_the_gain_over_the_levels(gains, strategy):
    rows = [outcome("plain", level, gain) for level, gain in gains.items()]
    assert advice(*rows)["strategy"] == strategy


@pytest.mark.parametrize(
    "rows",
    [
        [outcome("plain", 0, -9.0)],
        [outcome("plain", 0, 9.0, overall=-0.5)],
    ],
)
def test_what_brings_nothing_or_costs_the_other_classes_is_not_recommended(rows):
    found = advice(*rows)
    assert not found["generate"] and not found["recipe"]
    assert "do not generate" in found["reasons"][0]


def test_without_validation_images_the_gain_on_few_decides():
    assert advice(outcome("plain", 0, 9.0, overall=None))["generate"]


def test_nothing_that_passes_the_filter_is_no_verdict_on_the_images():
    found = advice(Outcome("plain", None, 0.6, 32, 0.1, 90.0))
    assert not found["generate"]
    assert "pilot.images" in found["reasons"][0]


def tried(threshold: float, few: float, kept: float = 0.5, overall: float = 1.0) -> Tried:
    gain = Gain(overall, overall - 1, overall + 1)
    return Tried("plain", threshold, kept, Worth(Gain(few, few - 1.96, few + 1.96), gain, 0.9, 0.9))


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([tried(0.3, 5.0), tried(0.2, 5.9), tried(0.1, 5.5)], 0.3),
        ([tried(0.3, 5.0), tried(0.2, 6.1), tried(0.1, 5.5)], 0.1),
        ([tried(0.3, 5.0), tried(0.2, 9.0), tried(0.1, 5.5)], 0.2),
        ([tried(0.3, 5.0), tried(0.2, 9.0, overall=-1.0)], 0.3),
        ([Tried("plain", 0.3, 0.01, None), tried(0.2, -4.0)], 0.2),
        ([Tried("plain", 0.3, 0.01, None)], 0.3),
    ],
)
def test_a_threshold_is_changed_only_for_more_than_a_standard_error(rows, chosen):
    """The standard error is 1 here; among equal ones the lowest threshold keeps the most."""
    assert choose_threshold(0.3, rows) == chosen


def test_the_thresholds_to_choose_from_keep_fractions_of_the_images():
    cosines = np.linspace(0.205, 0.605, 41)
    found = thresholds_to_try(0.9, cosines)
    assert [(cosines >= each).sum() for each in found] == [41, 31, 21, 11, 0]
    assert thresholds_to_try(-1, np.full(20, 0.4)) == [-1], "all keep the same images"


def test_the_recommended_threshold_is_told_with_what_it_keeps_and_brings():
    rows = [tried(0.6, 1.0, kept=0.1), tried(0.4, 5.0, kept=0.8)]
    chosen = [Outcome("plain", None, 0.4, 32, 0.8, 20.0, 0.9, 0.8, rows[1].worth)]
    found = advise(load_recipe("fashion-lt"), CANDIDATES, chosen, rows, hard=26)
    text = " ".join(found["reasons"])
    assert found["recipe"]["filter.threshold"] == found["threshold"] == 0.4
    assert "keeps 80% of the images" in text and "0.6 keeps 10%" in text
    assert "4 seeds" in text and "416 images" in text and "6,656 UNet rows" in text


def test_the_lines_to_paste_are_a_tree_that_the_recipe_takes():
    rows = [outcome("adapted", 0, 0.5), outcome("adapted", 30, 5.0)]
    recipe = load_recipe("fashion-lt", {"filter.rule": "alia"})
    candidates = {"adapted": {"spectrum.adapt.steps": 5}}
    found = advise(recipe, candidates, rows)
    tree = yaml.safe_load(snippet({"advice": found}))
    assert tree["spectrum"] == {"adapt": {"steps": 5}, "levels": [30], "seeds": 6}
    assert tree["filter"] == {"threshold": 0.6, "rule": "threshold"}
    assert tree["methods"] == {"discl": {"strategy": "fixed", "level": 30}}
    assert load_recipe(recipe, found["recipe"]).methods["discl"].level == 30


def test_another_method_that_the_lines_do_not_fit_is_named():
    methods = {
        "other": {"strategy": "fixed", "level": 50},
        "text": {"strategy": "text-only"},
    }
    recipe = load_recipe("fashion-lt", {"methods": methods, "baseline": None})
    found = advise(recipe, CANDIDATES, [outcome("plain", 10, 5.0), outcome("plain", 30, 5.0)])
    assert found["recipe"]["methods.other.level"] is None
    assert "methods.text" in found["reasons"][-1]


def test_a_recipe_that_draws_until_enough_are_kept_keeps_doing_so():
    recipe = load_recipe("fashion-lt", {"spectrum.wanted": 2, "spectrum.tries": 9})
    found = advise(recipe, CANDIDATES, [outcome("plain", 10, 5.0)])
    assert "spectrum.seeds" not in found["recipe"]
    adapted = load_recipe(recipe, found["recipe"]).spectrum
    assert (adapted.wanted, adapted.tries) == (3, 4), "half of the images are kept"


SCORES = [
    MixtureScore("class-balanced", 60.0, 65.0),
    MixtureScore("undersampled", 50.0, 70.0),
    MixtureScore("all", 61.0, 66.0),
]


def test_the_mixture_with_the_highest_score_is_in_the_lines_to_paste():
    recipe = load_recipe("fashion-lt", {"methods.discl": {"strategy": "all-levels"}})
    found = advise_mixture(recipe, advice(outcome("plain", 0, 8.0)), SCORES)
    assert found["mixture"] == found["recipe"]["methods.discl.mixture"] == "undersampled"
    assert "mixture undersampled" in found["reasons"][-1] and "all 66.0" in found["reasons"][-1]
    load_recipe(recipe, found["recipe"])
    assert yaml.safe_load(snippet({"advice": found}))["methods"]["discl"] == {
        "strategy": "text-only",
        "mixture": "undersampled",
    }
    pair = {"methods.discl.undersample": False, "methods.discl.sampling": "square-root"}
    pinned = load_recipe(recipe, pair)
    lines = advise_mixture(pinned, advice(outcome("plain", 0, 8.0)), SCORES)["recipe"]
    assert load_recipe(pinned, lines).methods["discl"].mixture == "undersampled"


def test_without_a_recommendation_the_mixture_of_real_images_is_named():
    found = advise_mixture(load_recipe("fashion-lt"), advice(outcome("plain", 0, -8.0)), SCORES)
    assert found["mixture"] == "all" and found["recipe"] == {}
    assert "the real images alone" in found["reasons"][-1]
    plain = advice(outcome("plain", 0, 8.0))
    assert advise_mixture(load_recipe("fashion-lt"), plain, []) == plain
