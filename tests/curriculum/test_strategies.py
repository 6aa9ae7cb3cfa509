"""Every schedule written out in full: E = 13 epochs, E_CL = 12 of them with synthetic images, four levels."""

from __future__ import annotations

import math
from collections import Counter
from itertools import groupby
from typing import Any

import pytest

from discl.curriculum.strategies import MEASURING, STRATEGIES, Strategy, exp3_probabilities, make_strategy, scale_reward
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
    assert set(SCHEDULES) | MEASURING == set(STRATEGIES)


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
    assert str(near.value).startswith("unknown strategy 'all-levls'; known: adaptive, ")
    assert str(near.value).endswith("Did you mean 'all-levels'?")
    with pytest.raises(RecipeError) as far:
        strategy_of("boosting")
    assert "known: " in str(far.value)
    assert "Did you mean" not in str(far.value)


# ---------------------------------------------------------------- strategies that follow progress


def progress(*gains: float, **of_class: tuple[float, ...]) -> dict[str, Any]:
    """Gains at 0, 10, 30, 50 %; those of a class as `c3=(…)`."""
    names = [str(level.percent) for level in LEVELS]
    own = {label[1:]: dict(zip(names, values, strict=False)) for label, values in of_class.items()}
    return {"progress": {"gain": dict(zip(names, gains, strict=True)), "class_gain": own}}


def test_adaptive_takes_the_greatest_gain_of_its_own_probe() -> None:
    adaptive = strategy_of("adaptive", 3)
    probes = [progress(0.1, 0.3, 0.2, 0.0), progress(-0.4, -0.2, -0.1, -0.3), progress(0.2, 0.1, 0.2, 0.2)]
    assert [adaptive.levels(epoch, probes[: epoch + 1]) for epoch in range(3)] == [(LEVELS[1],), (LEVELS[2],), (LEVELS[0],)]
    assert adaptive.levels(3, probes) == ()
    assert [adaptive.measures(epoch) for epoch in (0, 2, 3)] == ["probe", "probe", "never"]
    assert adaptive.class_levels(0, probes) == {}


def test_per_class_takes_each_class_where_it_gains_most() -> None:
    strategy = strategy_of("adaptive-per-class", 2)
    probe = progress(0.1, 0.3, 0.2, 0.0, c4=(0.5, 0.1), c7=(0.0, 0.0, 0.2, 0.1))
    assert strategy.levels(0, [probe]) == (LEVELS[1],)
    assert strategy.class_levels(0, [probe]) == {4: (LEVELS[0],), 7: (LEVELS[2],)}
    assert strategy.class_levels(2, [probe] * 3) == {}


def test_exp3_by_hand() -> None:
    """Two arms, γ = .2: the first is drawn and rewarded fully, then the second by half."""
    first = math.exp(0.2 * 1 / (0.5 * 2))
    p = [0.8 * first / (first + 1) + 0.1, 0.8 * 1 / (first + 1) + 0.1]
    assert exp3_probabilities([0], [1.0], 2, 0.2) == pytest.approx(p)
    second = math.exp(0.2 * 0.5 / (p[1] * 2))
    assert exp3_probabilities([0, 1], [1.0, 0.5], 2, 0.2) == pytest.approx(
        [0.8 * first / (first + second) + 0.1, 0.8 * second / (first + second) + 0.1]
    )
    assert exp3_probabilities([], [], 4, 0.2).tolist() == [0.25] * 4


def test_exp3_stays_finite_and_explores() -> None:
    probabilities = exp3_probabilities([2] * 5000, [1.0] * 5000, 4, 0.2)
    assert probabilities == pytest.approx([0.05, 0.05, 0.85, 0.05])


def test_rewards_lie_between_the_20th_and_the_80th_percentile() -> None:
    assert scale_reward([3.0]) == 0.5
    assert [scale_reward([0.0, 1.0, 2.0, 3.0, 4.0, last]) for last in (4.0, 2.0, 0.0)] == [1.0, 0.5, 0.0]


def test_one_bad_probe_cannot_steer_the_bandit() -> None:
    """After a long run in favour of one level, a single wild gain elsewhere leaves it the most probable."""
    good = [{"levels": [30], **progress(*[0.02 + 0.001 * epoch] * 4)} for epoch in range(30)]
    others = [{"levels": [level], **progress(*[-0.01] * 4)} for level in (0, 10, 50) for _ in range(5)]
    wild = [{"levels": [0], **progress(*[0.9] * 4)}]
    drawn = Counter(strategy_of("bandit", 100, seed=seed).levels(46, [*others, *good, *wild])[0].percent for seed in range(300))
    assert drawn.most_common(1)[0][0] == 30
    assert set(drawn) == {0, 10, 30, 50}


def test_the_bandit_follows_its_seed() -> None:
    history = [{"levels": [level], **progress(0.1, 0.1, 0.1, 0.1)} for level in (0, 10, 30)]
    drawn = [[strategy_of("bandit", 12, seed=seed).levels(epoch, history[:epoch]) for epoch in range(4)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert strategy_of("bandit", 3).levels(3, history) == ()
