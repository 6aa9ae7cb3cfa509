"""Every schedule in full: 13 epochs, 12 of them with synthetic images, four levels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest

from discl.curriculum.bandit import detrend_gains, ucb_indices
from discl.curriculum.strategies import (
    MEASURING,
    STRATEGIES,
    Strategy,
    make_strategy,
)
from discl.errors import RecipeError

LEVELS = (0, 10, 30, 50)

SCHEDULES = {
    "real-only": [()] * 13,
    "diverse-to-specific": [(0,)] * 3 + [(10,)] * 3 + [(30,)] * 3 + [(50,)] * 3 + [()],
    "easy-to-hard": [(0,)] * 3 + [(10,)] * 3 + [(30,)] * 3 + [(50,)] * 3 + [()],
    "specific-to-diverse": [(50,)] * 3 + [(30,)] * 3 + [(10,)] * 3 + [(0,)] * 3 + [()],
    "text-only": [(0,)] * 12 + [()],
    "fixed": [(30,)] * 12 + [()],
    "all-levels": [(0, 10, 30, 50)] * 12 + [()],
    "random": [
        *[(0,), (10,), (30,), (0,), (50,), (30,), (30,), (10,), (50,), (0,), (0,), (30,)],
        (),
    ],  # seed 0
}


def strategy_of(
    name: str,
    curriculum_epochs: int = 12,
    levels: tuple[int, ...] = LEVELS,
    seed: int = 0,
) -> Strategy:
    level = 30 if name == "fixed" else None
    return make_strategy(
        name, levels=levels, curriculum_epochs=curriculum_epochs, level=level, seed=seed
    )


def schedule(strategy: Strategy, epochs: int) -> list[tuple[int, ...]]:
    """The per cents of every epoch."""
    return [strategy.levels(epoch, []) for epoch in range(epochs)]


def test_every_strategy_has_a_schedule_here() -> None:
    assert set(SCHEDULES) | MEASURING == set(STRATEGIES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_whole_schedule(name: str) -> None:
    assert schedule(strategy_of(name), 13) == SCHEDULES[name]


@pytest.mark.parametrize("name", ["diverse-to-specific", "specific-to-diverse"])
def test_sixty_epochs_are_four_stages_of_fifteen(name: str) -> None:
    stages = [
        (level, len(list(run))) for level, run in groupby(schedule(strategy_of(name, 60), 65))
    ]
    order = [0, 10, 30, 50] if name == "diverse-to-specific" else [50, 30, 10, 0]
    assert stages == [((percent,), 15) for percent in order] + [((), 5)]


@pytest.mark.parametrize("curriculum_epochs", range(4, 64))
def test_uneven_stages_differ_by_one_epoch_at_most(curriculum_epochs: int) -> None:
    lengths = Counter(
        schedule(strategy_of("diverse-to-specific", curriculum_epochs), curriculum_epochs)
    )
    assert len(lengths) == 4
    assert sum(lengths.values()) == curriculum_epochs
    assert max(lengths.values()) - min(lengths.values()) == (curriculum_epochs % 4 > 0)


def test_order_in_which_levels_are_listed_does_not_matter() -> None:
    shuffled = (LEVELS[2], LEVELS[0], LEVELS[3], LEVELS[1])
    for name in SCHEDULES:
        assert schedule(strategy_of(name, levels=shuffled), 13) == SCHEDULES[name]


def test_random_draws_a_level_for_each_epoch() -> None:
    drawn = [schedule(strategy_of("random", 60, seed=seed), 61) for seed in range(40)]
    assert len(set(map(tuple, drawn))) == 40
    for levels in drawn:
        assert levels[60] == () and {level for (level,) in levels[:60]} == {0, 10, 30, 50}
        changes = sum(before != after for before, after in pairwise(levels[:60]))
        assert changes > 30, "an independent draw of four levels changes in three epochs of four"
    counts = Counter(level for levels in drawn for level in levels[:60])
    assert all(abs(count / 2400 - 0.25) < 0.03 for count in counts.values())
    assert schedule(strategy_of("random", 2), 3)[:2] == SCHEDULES["random"][:2]


@pytest.mark.parametrize("name", ["diverse-to-specific", "easy-to-hard", "specific-to-diverse"])
def test_too_few_epochs_for_a_stage_of_each_level(name: str) -> None:
    with pytest.raises(RecipeError, match=r"got 3, .* 4 levels; use at least 4 epochs") as raised:
        strategy_of(name, 3)
    assert raised.value.argument == "curriculum_epochs"


@pytest.mark.parametrize("name", ["text-only", "fixed", "all-levels", "real-only"])
def test_no_curriculum_epoch_is_real_only(name: str) -> None:
    assert schedule(strategy_of(name, 0), 3) == [()] * 3


def test_unknown_name_lists_the_known_and_proposes_only_what_is_near() -> None:
    with pytest.raises(RecipeError) as near:
        strategy_of("all-levls")
    assert str(near.value).startswith("unknown strategy 'all-levls'; known: adaptive, ")
    assert str(near.value).endswith(
        "Did you mean 'all-levels'? Write a plugin as module:attribute."
    )
    with pytest.raises(RecipeError) as far:
        strategy_of("boosting")
    assert "known: " in str(far.value)
    assert "Did you mean" not in str(far.value)


# ---------------------------------------------------------------- strategies that follow progress


def progress(*gains: float, **of_class: tuple[float, ...]) -> dict[str, Any]:
    """Gains at 0, 10, 30, 50 %; those of a class as `c3=(…)`."""
    names = [str(level) for level in LEVELS]
    own = {label[1:]: dict(zip(names, values, strict=False)) for label, values in of_class.items()}
    return {"progress": {"gain": dict(zip(names, gains, strict=True)), "class_gain": own}}


def test_adaptive_takes_the_greatest_gain_of_its_own_probe() -> None:
    adaptive = strategy_of("adaptive", 3)
    probes = [
        progress(0.1, 0.3, 0.2, 0.0),
        progress(-0.4, -0.2, -0.1, -0.3),
        progress(0.2, 0.1, 0.2, 0.2),
    ]
    assert [adaptive.levels(epoch, probes[: epoch + 1]) for epoch in range(3)] == [
        (LEVELS[1],),
        (LEVELS[2],),
        (LEVELS[0],),
    ]
    assert adaptive.levels(3, probes) == ()
    assert [adaptive.measures(epoch) for epoch in (0, 2, 3)] == ["probe", "probe", "never"]
    assert adaptive.class_levels(0, probes) == {}


def test_per_class_takes_each_class_where_it_gains_most() -> None:
    strategy = strategy_of("adaptive-per-class", 2)
    probe = progress(0.1, 0.3, 0.2, 0.0, c4=(0.5, 0.1), c7=(0.0, 0.0, 0.2, 0.1))
    assert strategy.levels(0, [probe]) == (LEVELS[1],)
    assert strategy.class_levels(0, [probe]) == {4: (LEVELS[0],), 7: (LEVELS[2],)}
    assert strategy.class_levels(2, [probe] * 3) == {}


def test_ucb_by_hand() -> None:
    """Three draws, discount ½: arm 0 weighs ¼ and 1, arm 1 ½; arm 2 was never drawn."""
    n = math.log(1.75)
    found = ucb_indices([0, 1, 0], [1.0, 0.5, -1.0], 3, discount=0.5, exploration=0.2)
    assert found[:2] == pytest.approx(
        [-0.75 / 1.25 + 2 * math.sqrt(0.2 * n / 1.25), 0.5 + 2 * math.sqrt(0.2 * n / 0.5)]
    )
    assert found[2] == math.inf
    assert ucb_indices([0], [1.0], 2, discount=0.9, exploration=0.05).tolist() == [1.0, math.inf]


def test_rewards_are_distances_from_the_trend() -> None:
    """Gains that fall with the logarithm of the epoch have none; three median distances are 1."""
    falling = [1 - 0.2 * math.log1p(epoch) for epoch in range(9)]
    off = [0, 0.01, -0.01, 0.01, 0.5, 0.01, -0.01, 0.02, -0.01]
    rewards = detrend_gains([each + more for each, more in zip(falling, off, strict=True)])
    assert rewards[4] == 1 and set(rewards.argsort()[-2:].tolist()) == {4, 7}
    assert np.median(np.abs(rewards)) == pytest.approx(1 / 3)
    assert (
        detrend_gains([0.3, 0.1]).tolist() == [0, 0]
        and detrend_gains([0.2] * 5).tolist() == [0] * 5
    )


def played(
    epochs: int, seed: int, worth: Mapping[int, float], wild: int | None = None
) -> list[int]:
    """The levels that the bandit draws where gains shrink and `worth` is added to their gain."""
    strategy, noise, history = (
        strategy_of("bandit", epochs, seed=seed),
        np.random.default_rng(seed),
        [],
    )
    for epoch in range(epochs):
        (level,) = strategy.levels(epoch, history)
        gain = (1 + worth[level] + 0.05 * noise.normal()) * 0.1 / (1 + 0.2 * epoch)
        history.append({"levels": [level], **progress(*[0.9 if epoch == wild else gain] * 4)})
    return [record["levels"][0] for record in history]


def test_the_bandit_finds_the_better_level_while_all_gains_shrink() -> None:
    worth = {0: 0.0, 10: 0.0, 30: 0.3, 50: -0.2}
    for epochs, least in ((8, 0.35), (40, 0.6)):
        shares = [played(epochs, seed, worth).count(30) / epochs for seed in range(40)]
        assert np.mean(shares) > least
    assert all(set(played(8, seed, worth)[:4]) == {0, 10, 30, 50} for seed in range(10))


def test_one_bad_probe_cannot_steer_the_bandit() -> None:
    """A wild gain in one epoch, whichever level has it, leaves the better level in front."""
    worth = {0: 0.0, 10: 0.0, 30: 0.3, 50: -0.2}
    shares = [played(40, seed, worth, wild=12).count(30) / 40 for seed in range(40)]
    assert np.mean(shares) > 0.5


def test_a_fixed_level_is_needed() -> None:
    with pytest.raises(RecipeError, match="needs a level") as raised:
        make_strategy("fixed", levels=LEVELS, curriculum_epochs=12)
    assert raised.value.argument == "level"


def test_the_bandit_follows_its_seed() -> None:
    history = [{"levels": [level], **progress(0.1, 0.1, 0.1, 0.1)} for level in (0, 10, 30)]
    drawn = [
        [strategy_of("bandit", 12, seed=seed).levels(epoch, history[:epoch]) for epoch in range(4)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert strategy_of("bandit", 3).levels(3, history) == ()
