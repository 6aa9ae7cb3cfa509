"""What a pilot recommends, from outcomes made by hand."""

from __future__ import annotations

import pytest

from discl import load_recipe
from discl.evaluation.worth import Gain, Worth
from discl.stages.pilot_tables import Outcome, advise

CANDIDATES = {"plain": {}, "adapted": {"spectrum.adapt": {"steps": 5}}}


def outcome(
    candidate: str, level: int | None, few: float, overall: float | None = 1.0, half: float = 1.0
) -> Outcome:
    gain = None if overall is None else Gain(overall, overall - 1, overall + 1)
    worth = Worth(Gain(few, few - half, few + half), gain, recognised=0.3)
    return Outcome(candidate, level, 32, 0.5, 20.0, 0.9, 0.8, worth)


def advice(*outcomes: Outcome) -> dict:
    return advise(load_recipe("fashion-lt"), CANDIDATES, outcomes)


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
        [outcome("plain", 0, 0.5)],
        [outcome("plain", 0, -9.0)],
        [outcome("plain", 0, 9.0, overall=-0.5)],
    ],
)
def test_what_is_not_shown_or_costs_the_other_classes_is_not_recommended(rows):
    found = advice(*rows)
    assert not found["generate"] and not found["recipe"]
    assert "do not generate" in found["reasons"][0]


def test_without_validation_images_the_gain_on_few_decides():
    assert advice(outcome("plain", 0, 9.0, overall=None))["generate"]


def test_nothing_that_passes_the_filter_is_no_verdict_on_the_images():
    found = advice(Outcome("plain", None, 32, 0.1, 90.0))
    assert not found["generate"]
    assert "threshold" in found["reasons"][0]
