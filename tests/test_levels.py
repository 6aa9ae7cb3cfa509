"""Levels as exact whole per cents, and t(λ) against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from discl.errors import RecipeError
from discl.levels import REAL, check_level, check_levels, format_level, noise_fractions, start_step


@pytest.mark.parametrize("steps", [1, 20, 50, 100, 1000])
def test_start_step_is_the_floor_of_eq_3(steps: int) -> None:
    exact = [math.floor((1 - Fraction(level, 100)) * steps) for level in range(101)]
    assert [start_step(level, steps) for level in range(101)] == exact


def test_start_step_written_out() -> None:
    levels = [0, 10, 30, 50, 70, 90, 98, 99, 100]
    assert [start_step(level, 50) for level in levels] == [50, 45, 35, 25, 15, 5, 1, 0, 0]
    assert int((1 - 0.9) * 50) == 4  # why it is done in integers


@pytest.mark.parametrize("wrong", [-1, 101, 0.3, 30.0, True, "30", None, np.float64(30)])
def test_what_is_no_whole_per_cent_is_refused(wrong: Any) -> None:
    with pytest.raises(RecipeError, match="not a whole per cent"):
        check_level(wrong)


@pytest.mark.parametrize(("fraction", "level"), [(0.3, 30), (0.9, 90), (0.07, 7)])
def test_a_fraction_gets_its_per_cent_proposed(fraction: float, level: int) -> None:
    with pytest.raises(RecipeError, match=rf"{fraction} .* as {level}\.$"):
        check_level(fraction)


@pytest.mark.parametrize("given", [0, 7, 100, np.int64(30)])
def test_a_checked_level_is_a_plain_int(given: Any) -> None:
    level = check_level(given)
    assert type(level) is int
    assert level == given
    assert format_level(level) == f"{given} %"


def test_noise_fractions_are_the_last_steps_or_finer_ones_over_the_same_range() -> None:
    assert noise_fractions(50, 4) == (0.5, 0.25)
    assert noise_fractions(50, 4, fixed=True) == (0.5, 0.375, 0.25, 0.125)
    assert noise_fractions(0, 4) == noise_fractions(0, 4, fixed=True) == (1, 0.75, 0.5, 0.25)
    for level in range(100):
        assert len(noise_fractions(level, 50)) == start_step(level, 50)


def test_a_level_without_a_step_is_refused_with_the_steps_it_needs() -> None:
    with pytest.raises(RecipeError, match=r"99 % .* 100 steps or a level of at most 98 %") as info:
        check_levels([0, 99], 50)
    assert info.value.argument == "levels"


def test_the_real_image_is_never_generated() -> None:
    with pytest.raises(RecipeError, match="100") as info:
        check_levels([REAL], 50)
    assert info.value.argument == "levels"


def test_the_advice_of_check_levels_holds_for_all_steps() -> None:
    for steps in range(1, 101):
        largest = max(level for level in range(100) if start_step(level, steps) > 0)
        check_levels(range(largest + 1), steps)
        if largest < 99:
            needed = next(more for more in range(1, 101) if start_step(largest + 1, more) > 0)
            with pytest.raises(
                RecipeError, match=f"at least {needed} steps or a level of at most {largest} %"
            ):
                check_levels([largest + 1], steps)
