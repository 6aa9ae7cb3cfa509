"""Rounds of a loop: epochs, levels, budgets, and pools that grow."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from discl import Pool, make_strategy
from discl.curriculum.rounds import (
    drawn_levels,
    hold_out_sources,
    offered_levels,
    round_shares,
    round_starts,
)
from discl.curriculum.sampling import SamplingConfig
from discl.curriculum.schedule import EpochSchedule, hold_out_guidance
from discl.errors import TrainingError

LEVELS = (0, 30, 50)


@pytest.mark.parametrize(("rounds", "epochs"), [(1, 1), (1, 0), (3, 3), (3, 10), (4, 60), (7, 8)])
def test_every_round_has_an_epoch(rounds: int, epochs: int) -> None:
    starts = round_starts(rounds, epochs)
    assert starts[0] == 0 and len(starts) == rounds
    assert all(
        first < end for first, end in zip(starts, [*starts[1:], max(epochs, 1)], strict=True)
    )


@pytest.mark.parametrize("epochs", [3, 7, 10, 60])
def test_a_round_is_a_stage_of_the_curriculum(epochs: int) -> None:
    strategy = make_strategy("diverse-to-specific", levels=LEVELS, curriculum_epochs=epochs)
    planned = drawn_levels(strategy, round_starts(3, epochs), epochs, LEVELS)
    assert planned == [(0,), (30,), (50,)]
    shares = round_shares(planned, 3, {0: 20, 30: 14, 50: 10})
    assert shares == pytest.approx([20 / 44, 14 / 44, 10 / 44])
    assert offered_levels(strategy, planned, LEVELS, [{}]) == (30,)


def test_levels_that_the_learner_never_draws_come_last() -> None:
    strategy = make_strategy("text-only", levels=LEVELS, curriculum_epochs=8)
    assert drawn_levels(strategy, [0, 4], 8, LEVELS) == [(0,), (0, 30, 50)]
    assert drawn_levels(strategy, [0], 8, LEVELS) == [LEVELS]
    assert round_shares([(0,), LEVELS], 2, {0: 20, 30: 14, 50: 10}) == pytest.approx(
        [10 / 44, 34 / 44]
    )


@pytest.mark.parametrize("name", ["adaptive", "adaptive-per-class", "bandit"])
def test_after_its_first_round_an_adaptive_learner_gets_its_level(name: str) -> None:
    strategy = make_strategy(name, levels=LEVELS, curriculum_epochs=8)
    planned = drawn_levels(strategy, [0, 4], 8, LEVELS)
    gain = {"0": 0.1, "30": 0.3, "50": 0.2}
    history = [{"progress": {"gain": gain, "class_gain": {"2": {"0": 0.4, "50": 0.1}}}}]
    assert planned is None
    assert offered_levels(strategy, planned, LEVELS, []) == LEVELS
    wanted = {"adaptive": (30,), "adaptive-per-class": (0, 30), "bandit": LEVELS}[name]
    assert offered_levels(strategy, planned, LEVELS, history) == wanted


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5])
@pytest.mark.parametrize("counts", [{0: 13, 3: 8, 4: 5}, {0: 1}, {0: 2, 1: 1}, {5: 200}])
def test_classes_keep_half_of_their_hard_images(counts: dict[int, int], fraction: float) -> None:
    sources = [(f"{label}/{n}", label) for label, count in counts.items() for n in range(count)]
    chosen = hold_out_sources(sources, fraction)
    assert len(set(chosen)) == len(chosen) and set(chosen) <= {name for name, _ in sources}
    taken = Counter(int(name.split("/")[0]) for name in chosen)
    assert all(taken[label] <= max(fraction * count, 1) for label, count in counts.items())
    assert all(taken[label] <= count / 2 for label, count in counts.items())
    assert bool(chosen) == (max(counts.values()) > 1)


def pool(rounds: int, per_round: int = 12) -> Pool:
    """Eight real images, six of them hard, and images of each round at all levels."""
    count = rounds * per_round
    return Pool(
        labels=np.concatenate([[0, 0, 1, 1, 1, 2, 2, 2], np.tile([1, 1, 1, 2, 2, 2], count // 6)]),
        levels=np.concatenate([np.full(8, 100), np.tile(np.repeat(LEVELS[:2], 6), count // 12)]),
        synthetic=np.repeat([False, True], [8, count]),
        hard=np.concatenate([[False] * 2, [True] * 6, np.zeros(count, bool)]),
        class_names=("a", "b", "c"),
        sources=np.concatenate([np.arange(8), np.tile(np.arange(2, 8), count // 6)]),
        since=np.concatenate([np.zeros(8, int), np.repeat(4 * np.arange(rounds), per_round)]),
    )


def test_an_epoch_draws_the_same_whether_later_rounds_are_made_or_not() -> None:
    strategy = make_strategy("all-levels", levels=(0, 30), curriculum_epochs=12)
    schedules = [
        EpochSchedule(pool(rounds), strategy, SamplingConfig(None, 2.0), samples=40, seed=3)
        for rounds in (1, 2, 3)
    ]
    for epoch in range(12):
        drawn = [each.draw(epoch, 0, [])[0] for each in schedules[epoch // 4 :]]
        assert all((rows == drawn[0]).all() for rows in drawn)
        assert drawn[0].max() < 8 + 12 * (epoch // 4 + 1)
        assert drawn[0].max() >= 8 + 12 * (epoch // 4)


def test_a_guidance_set_is_the_same_in_all_rounds() -> None:
    found = [hold_out_guidance(pool(rounds), (0, 30), 1, 5)[1].rows for rounds in (1, 2, 3)]
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_a_round_needs_the_levels_of_its_own_epochs_only() -> None:
    strategy = make_strategy("diverse-to-specific", levels=LEVELS, curriculum_epochs=12)
    schedule = EpochSchedule(pool(1), strategy, SamplingConfig(None, 2.0), samples=40, seed=3)
    schedule.check(LEVELS, 8)
    with pytest.raises(TrainingError, match="50"):
        schedule.check(LEVELS, 12)
