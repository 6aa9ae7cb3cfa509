"""The rule for levels and threshold, step by step, on values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from discl.spectrum.level_selection import Measured, propose, spread_levels

REAL = np.array([0.20, 0.30, 0.40])
"""Median 0.30."""


def level(image: float, *text: float) -> Measured:
    """A level of mean image similarity `image` whose images have these cosines with their text."""
    return Measured(np.full(len(text), image), np.asarray(text))


GOOD = (0.31, 0.33, 0.35, 0.37, 0.39, 0.25, 0.26, 0.27)
"""Five of eight at or above 0.30."""


def test_levels_that_are_their_source_once_more_are_left_out() -> None:
    measured = {
        0: level(0.6, *GOOD),
        30: level(0.7, *GOOD),
        60: level(0.85, *GOOD),
        90: level(0.95, *GOOD),
    }
    found = propose(measured, REAL, 0.6, scale=3, seeds=8)
    assert (found.levels, found.threshold, found.bound) == ((0, 30, 60), 0.30, 0.85)
    assert (
        "level 90 is left out: the mean image similarity exceeds 0.85 (the paper's bound)"
        in found.reasons[0]
    )
    assert (
        found.reasons[-1]
        == "threshold 0.30: the median clip_similarity of the real hard images themselves (0.300)."
    )


def test_where_real_images_of_a_class_are_alike_the_bound_lies_halfway_to_the_same_image() -> None:
    measured = {0: level(0.84, *GOOD), 50: level(0.92, *GOOD), 90: level(0.97, *GOOD)}
    found = propose(measured, REAL, 0.9, scale=3, seeds=8)
    assert found.bound == pytest.approx(0.95)
    assert found.levels == (0, 50)
    assert "halfway between two real images of one class, 0.90" in found.reasons[0]


def test_a_level_that_the_filter_would_nearly_empty_is_left_out() -> None:
    measured = {0: level(0.4, *[0.1] * 20), 30: level(0.5, *GOOD), 60: level(0.6, *GOOD)}
    found = propose(measured, REAL, None, scale=3, seeds=8)
    assert found.levels == (30, 60)
    assert "level 0 is left out: fewer than a tenth" in found.reasons[1]


def test_a_threshold_that_leaves_too_few_is_lowered() -> None:
    scarce = (0.22, 0.23, 0.24, 0.25, 0.26, 0.27, 0.28, 0.35)
    found = propose({0: level(0.4, *scarce), 30: level(0.6, *GOOD)}, REAL, None, scale=3, seeds=8)
    # 3 / 8 of level 0 are needed: the quantile at 5/8 of eight values is 0.26 + 0.375 · 0.01
    assert found.threshold == 0.26
    assert (np.asarray(scarce) >= found.threshold).mean() >= 3 / 8
    assert (
        "would keep only 12% of level 0; it is lowered until that level keeps 38%"
        in found.reasons[-1]
    )


def test_more_is_never_asked_of_the_filter_than_half_and_the_shortage_is_told() -> None:
    text = tuple(0.20 + 0.01 * step for step in range(9))  # median 0.24
    found = propose({0: level(0.4, *text)}, REAL, None, scale=4, seeds=4)
    assert found.threshold == 0.24
    assert (
        "training needs 4 kept images per hard image and level, of 4 tries: raise the number of "
        "seeds to 8" in found.reasons[-1]
    )


def test_images_that_are_drawn_again_may_be_scarcer() -> None:
    """3 of 4 images are needed. With two tries one in two must pass: 1 − (1 − 1/2)² = 3/4."""
    text = tuple(0.20 + 0.01 * step for step in range(9))
    once, twice, often = (
        propose({0: level(0.4, *text)}, np.full(9, 0.9), None, scale=3, seeds=4, tries=tries)
        for tries in (1, 2, 20)
    )
    assert once.threshold == twice.threshold == 0.24 and often.threshold > 0.26
    assert "raise the number of seeds" in once.reasons[-1] and not any(
        "raise the number of seeds" in each for each in (*twice.reasons, *often.reasons)
    )


def test_a_generator_that_changes_nothing_is_told() -> None:
    found = propose({0: level(0.93, *GOOD), 50: level(0.99, *GOOD)}, REAL, 0.5, scale=3, seeds=8)
    assert found.levels == (0,)
    assert found.reasons[0].startswith(
        "even level 0, the least similar, has a mean image similarity of 0.93, above 0.85"
    )


def test_images_of_something_else_at_every_level_are_told() -> None:
    found = propose(
        {0: level(0.4, *[0.1] * 20), 50: level(0.5, *[0.12] * 20)}, REAL, None, scale=3, seeds=8
    )
    assert found.levels == (0, 50)
    assert found.threshold == 0.10
    assert any("look at the images" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("similarity", "count", "taken"),
    [
        (
            {0: 0.5, 10: 0.52, 20: 0.54, 30: 0.6, 40: 0.7, 50: 0.8},
            4,
            [0, 30, 40, 50],
        ),  # wanted: 0.5, 0.6, 0.7, 0.8
        ({0: 0.5, 10: 0.6, 20: 0.7, 30: 0.8}, 4, [0, 10, 20, 30]),
        ({0: 0.5, 50: 0.8}, 4, [0, 50]),
        ({0: 0.5, 10: 0.505, 20: 0.7}, 3, [0, 20]),
        ({30: 0.5}, 4, [30]),
        ({0: 0.5, 30: 0.7}, 1, [0]),
    ],
)
def test_levels_are_spread_over_the_similarity(
    similarity: dict[int, float], count: int, taken: list[int]
) -> None:
    assert spread_levels(similarity, count) == taken
