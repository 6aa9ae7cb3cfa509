"""The contract of every strategy in `STRATEGIES`."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from discl.curriculum.strategies import STRATEGIES, Strategy, make_strategy
from discl.levels import REAL

SPECTRA = {"one level": (0,), "four levels": (0, 10, 30, 50), "in disorder": (70, 0, 50)}
CURRICULUM_EPOCHS = (4, 5, 12, 60)


def history_of(epochs: int) -> list[dict[str, Any]]:
    """Records of finished epochs, as training writes them."""
    return [
        {
            "epoch": epoch,
            "levels": [0],
            "loss": 2.0 / (epoch + 1),
            "samples": 64,
            "validation_accuracy": 0.1,
            "seconds": 1.0,
            "progress": {"gain": {"0": 0.02 * (epoch % 3)}, "class_gain": {"1": {"0": 0.1}}},
        }
        for epoch in range(epochs)
    ]


def known_at(strategy: Strategy, epoch: int, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The history for an epoch: the finished ones, and its probe if the strategy probes."""
    return history[:epoch] + (
        [{"progress": history[epoch]["progress"]}] if strategy.measures(epoch) == "probe" else []
    )


@pytest.fixture(params=sorted(STRATEGIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SPECTRA.values(), ids=SPECTRA.keys())
def levels(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return tuple(request.param)


def build(name: str, levels: tuple[int, ...], curriculum_epochs: int = 12) -> Strategy:
    return make_strategy(
        name,
        levels=levels,
        curriculum_epochs=curriculum_epochs,
        level=levels[-1] if name == "fixed" else None,
        seed=3,
    )


def by_epochs(name: str, levels: tuple[int, ...]) -> dict[int, Strategy]:
    """The strategy by the number of its curriculum epochs."""
    return {epochs: build(name, levels, epochs) for epochs in CURRICULUM_EPOCHS}


def test_only_levels_that_it_was_given_and_none_twice(name: str, levels: tuple[int, ...]) -> None:
    for curriculum_epochs, strategy in by_epochs(name, levels).items():
        for epoch in range(curriculum_epochs):
            chosen = strategy.levels(epoch, known_at(strategy, epoch, history_of(epoch + 1)))
            assert isinstance(chosen, tuple)
            assert set(chosen) <= set(levels)
            assert len(set(chosen)) == len(chosen)
            assert REAL not in chosen


def test_real_images_only_once_the_curriculum_is_over(name: str, levels: tuple[int, ...]) -> None:
    for curriculum_epochs, strategy in by_epochs(name, levels).items():
        for epoch in range(curriculum_epochs, curriculum_epochs + 20):
            known = known_at(strategy, epoch, history_of(epoch + 1))
            assert strategy.levels(epoch, known) == ()


def test_every_curriculum_epoch_has_a_level_or_none_has(name: str, levels: tuple[int, ...]) -> None:
    for curriculum_epochs, strategy in by_epochs(name, levels).items():
        chosen = [
            strategy.levels(epoch, known_at(strategy, epoch, history_of(epoch + 1)))
            for epoch in range(curriculum_epochs)
        ]
        assert all(chosen) or not any(chosen)


def test_pure_in_epoch_and_history(name: str, levels: tuple[int, ...]) -> None:
    """The same levels in any order, twice, and from a second instance; the history is unchanged."""
    strategy = build(name, levels)
    history = history_of(20)
    kept = copy.deepcopy(history)
    forwards = [strategy.levels(epoch, known_at(strategy, epoch, history)) for epoch in range(20)]
    backwards = [
        strategy.levels(epoch, known_at(strategy, epoch, history)) for epoch in reversed(range(20))
    ]
    second = [
        build(name, levels).levels(epoch, known_at(strategy, epoch, history)) for epoch in range(20)
    ]
    assert forwards == backwards[::-1] == second
    assert history == kept


def test_no_epoch_is_too_late(name: str, levels: tuple[int, ...]) -> None:
    strategy = build(name, levels)
    for epoch in (0, 11, 12, 13, 1_000, 10**9):
        strategy.levels(
            epoch, known_at(strategy, epoch, history_of(20)) if epoch < 20 else history_of(20)
        )


def test_class_levels_are_levels_of_the_spectrum(name: str, levels: tuple[int, ...]) -> None:
    strategy = build(name, levels)
    offered = {str(level): 0.1 for level in levels}
    progress = {"gain": offered, "class_gain": {"2": offered, "5": dict(list(offered.items())[:1])}}
    for epoch in (0, 11, 12, 30):
        history = [
            {"epoch": place, "levels": [levels[0]], "progress": progress}
            for place in range(epoch + 1)
        ]
        own = strategy.class_levels(epoch, history)
        assert {level for chosen in own.values() for level in chosen} <= set(levels)
        assert not own or epoch < 12
