"""Levels as exact whole per cents, and t(λ) against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

from discl.errors import RecipeError
from discl.levels import REAL, TEXT_ONLY, GuidanceLevel, check_levels


@pytest.mark.parametrize("steps", [1, 20, 50, 100, 1000])
def test_start_step_is_the_floor_of_eq_3(steps: int) -> None:
    exact = [math.floor((1 - Fraction(percent, 100)) * steps) for percent in range(101)]
    assert [GuidanceLevel(percent).start_step(steps) for percent in range(101)] == exact


def test_start_step_written_out() -> None:
    levels = [0, 10, 30, 50, 70, 90, 98, 99, 100]
    assert [GuidanceLevel(percent).start_step(50) for percent in levels] == [
        50,
        45,
        35,
        25,
        15,
        5,
        1,
        0,
        0,
    ]
    assert int((1 - 0.9) * 50) == 4  # why it is done in integers


@pytest.mark.parametrize("wrong", [-1, 101, 0.3, 30.0, True, "30", None])
def test_what_is_no_whole_per_cent_is_refused(wrong: Any) -> None:
    with pytest.raises(
        RecipeError,
        match=r"is not a whole per cent from 0 \(text only\) to 100 \(the real image\)\.",
    ):
        GuidanceLevel(wrong)


@pytest.mark.parametrize(("share", "percent"), [(0.3, 30), (0.9, 90), (0.07, 7)])
def test_a_share_gets_its_per_cent_proposed(share: float, percent: int) -> None:
    with pytest.raises(RecipeError, match=rf"level {share} .* Write λ = {share} as {percent}\.$"):
        GuidanceLevel(share)


def test_levels_are_ordered_hashable_and_printable() -> None:
    assert sorted({GuidanceLevel(50), GuidanceLevel(0), GuidanceLevel(50)}) == [
        TEXT_ONLY,
        GuidanceLevel(50),
    ]
    assert [str(TEXT_ONLY), str(GuidanceLevel(7)), str(REAL)] == ["0 %", "7 %", "100 %"]


def test_a_level_without_a_step_is_refused_with_the_steps_it_needs() -> None:
    with pytest.raises(
        RecipeError,
        match=r"level 99 % leaves t\(λ\) = 0 .* at 50 .* at least 100 steps or a level of at most 98 %\.",
    ):
        check_levels([GuidanceLevel(0), GuidanceLevel(99)], 50)


def test_the_real_image_is_never_generated() -> None:
    with pytest.raises(
        RecipeError, match=r"level 100 is the real image .* take it out of spectrum\.levels"
    ):
        check_levels([REAL], 50)


def test_the_advice_of_check_levels_holds_for_all_steps() -> None:
    for steps in range(1, 101):
        largest = max(
            percent for percent in range(100) if GuidanceLevel(percent).start_step(steps) > 0
        )
        check_levels([GuidanceLevel(percent) for percent in range(largest + 1)], steps)
        if largest < 99:
            needed = next(
                more for more in range(1, 101) if GuidanceLevel(largest + 1).start_step(more) > 0
            )
            with pytest.raises(
                RecipeError, match=f"at least {needed} steps or a level of at most {largest} %"
            ):
                check_levels([GuidanceLevel(largest + 1)], steps)
