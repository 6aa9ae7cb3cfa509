"""Every schedule written out in full: E = 13 epochs, E_CL = 12 of them with synthetic images, four levels."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest

from discl.curriculum.strategies import STRATEGIES, Strategy, make_strategy
from discl.errors import RecipeError
from discl.levels import GuidanceLevel

LEVELS = tuple(GuidanceLevel(percent) for percent in (0, 10, 30, 50))

SCHEDULES = {
    "real-only": [()] * 13,
    "diverse-to-specific": [(0,), (0,), (0,), (10,), (10,), (10,), (30,), (30,), (30,), (50,), (50,), (50,), ()],
    "easy-to-hard": [(0,), (0,), (0,), (10,), (10,), (10,), (30,), (30,), (30,), (50,), (50,), (50,), ()],
    "specific-to-diverse": [(50,), (50,), (50,), (30,), (30,), (30,), (10,), (10,), (10,), (0,), (0,), (0,), ()],
    "text-only": [(0,)] * 12 + [()],
    "fixed": [(30,)] * 12 + [()],
    "all-levels": [(0, 10, 30, 50)] * 12 + [()],
    "random": [(30,), (30,), (30,), (0,), (0,), (0,), (0,), (0,), (0,), (50,), (50,), (50,), ()],  # seed 0
}


def strategy_of(name: str, curriculum_epochs: int = 12, levels: tuple[GuidanceLevel, ...] = LEVELS, seed: int = 0) -> Strategy:
    level = GuidanceLevel(30) if name == "fixed" else None
    return make_strategy(name, levels=levels, curriculum_epochs=curriculum_epochs, level=level, seed=seed)


def schedule(strategy: Strategy, epochs: int) -> list[tuple[int, ...]]:
    """The per cents of every epoch."""
    return [tuple(level.percent for level in strategy.levels(epoch, [])) for epoch in range(epochs)]


def test_every_strategy_has_a_schedule_here() -> None:
    assert set(SCHEDULES) == set(STRATEGIES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_whole_schedule(name: str) -> None:
    assert schedule(strategy_of(name), 13) == SCHEDULES[name]


@pytest.mark.parametrize("name", ["diverse-to-specific", "specific-to-diverse"])
def test_sixty_epochs_are_four_stages_of_fifteen(name: str) -> None:
    stages = [(level, len(list(run))) for level, run in groupby(schedule(strategy_of(name, 60), 65))]
    order = [0, 10, 30, 50] if name == "diverse-to-specific" else [50, 30, 10, 0]
    assert stages == [((percent,), 15) for percent in order] + [((), 5)]


@pytest.mark.parametrize("curriculum_epochs", range(4, 64))
def test_uneven_stages_differ_by_one_epoch_at_most(curriculum_epochs: int) -> None:
    lengths = Counter(schedule(strategy_of("diverse-to-specific", curriculum_epochs), curriculum_epochs))
    assert len(lengths) == 4
    assert sum(lengths.values()) == curriculum_epochs
    assert max(lengths.values()) - min(lengths.values()) == (curriculum_epochs % 4 > 0)


def test_order_in_which_levels_are_listed_does_not_matter() -> None:
    shuffled = (LEVELS[2], LEVELS[0], LEVELS[3], LEVELS[1])
    for name in SCHEDULES:
        assert schedule(strategy_of(name, levels=shuffled), 13) == SCHEDULES[name]


def test_random_draws_with_replacement_and_depends_on_its_seed() -> None:
    drawn = {tuple(schedule(strategy_of("random", 4, seed=seed), 4)) for seed in range(40)}
    assert len(drawn) > 20
    assert any(len(set(stages)) < 4 for stages in drawn)
    assert {level for stages in drawn for (level,) in stages} == {0, 10, 30, 50}


@pytest.mark.parametrize("name", ["diverse-to-specific", "easy-to-hard", "specific-to-diverse", "random"])
def test_too_few_epochs_for_a_stage_of_each_level(name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"curriculum_epochs = 3 is too short .* each of the 4 levels; use at least 4 epochs or fewer levels"
    ):
        strategy_of(name, 3)


@pytest.mark.parametrize("name", ["text-only", "fixed", "all-levels", "real-only"])
def test_no_curriculum_epoch_is_real_only(name: str) -> None:
    assert schedule(strategy_of(name, 0), 3) == [()] * 3


def test_unknown_name_lists_the_known_and_proposes_only_what_is_near() -> None:
    with pytest.raises(RecipeError) as near:
        strategy_of("all-levls")
    assert str(near.value).startswith("unknown strategy 'all-levls'; known: all-levels, ")
    assert str(near.value).endswith("Did you mean 'all-levels'?")
    with pytest.raises(RecipeError) as far:
        strategy_of("boosting")
    assert "known: " in str(far.value)
    assert "Did you mean" not in str(far.value)
