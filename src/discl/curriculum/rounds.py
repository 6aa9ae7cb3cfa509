"""The rounds of a loop: their epochs, their levels, and what part of the budget is theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .policies import History
from .progress import best_level
from .strategies import Adaptive, Planned, RandomLevels, Strategy


def round_starts(rounds: int, curriculum_epochs: int) -> list[int]:
    """First epoch of each round. The curriculum is divided evenly; the last round has the rest.

    ```python
    from discl.curriculum.rounds import round_starts

    assert round_starts(3, 10) == [0, 4, 7]
    ```
    """
    return [-(-number * curriculum_epochs // rounds) for number in range(rounds)]


def drawn_levels(
    strategy: Strategy, starts: Sequence[int], curriculum_epochs: int, levels: Sequence[int]
) -> list[tuple[int, ...]] | None:
    """Levels that the epochs of each round draw; None if they depend on the history.

    Levels that no epoch draws are left to the last round, for other methods. A random strategy may
    draw any level, because another training seed draws others.
    """
    if isinstance(strategy, RandomLevels):
        return [tuple(sorted(levels)) for _ in starts]
    if not isinstance(strategy, Planned):
        return None
    ends = [*starts[1:], curriculum_epochs]
    drawn = [
        {level for epoch in range(first, end) for level in strategy.levels(epoch, ())}
        for first, end in zip(starts, ends, strict=True)
    ]
    never = set(levels) - set().union(*drawn)
    return [
        tuple(sorted((each | never if number + 1 == len(drawn) else each) & set(levels)))
        for number, each in enumerate(drawn)
    ]


def offered_levels(
    strategy: Strategy,
    planned: Sequence[tuple[int, ...]] | None,
    levels: Sequence[int],
    history: History,
) -> tuple[int, ...]:
    """The levels that the next round may ask for.

    After its first round an adaptive strategy gets the levels that gained most in the last probe.
    Other strategies that follow progress may draw any level.
    """
    number = len(history)
    if planned is not None:
        return planned[number]
    if number and isinstance(strategy, Adaptive):
        progress = history[-1]["progress"]
        gains = [progress["gain"]]
        if strategy.per_class:
            gains += progress["class_gain"].values()
        return tuple(sorted({best_level(gain) for gain in gains}))
    return tuple(sorted(levels))


def round_shares(
    planned: Sequence[tuple[int, ...]] | None, rounds: int, prices: Mapping[int, float]
) -> np.ndarray:
    """Fraction of the budget of each round, float64 `[rounds]`, with the sum 1.

    Each level has the fraction that it has in the plan of a run without a loop, divided evenly
    among the rounds that draw it.
    """
    if planned is None:
        return np.full(rounds, 1 / rounds)
    times = {level: sum(level in each for each in planned) for level in prices}
    shares = np.array(
        [sum(prices[level] / times[level] for level in each) for each in planned], np.float64
    )
    return shares / shares.sum()


def hold_out_sources(sources: Sequence[tuple[str, int]], fraction: float) -> list[str]:
    """Ids of hard images to hold out, evenly spread over the list of each class.

    A class keeps at least half of its hard images. Small classes round down, but the largest class
    gives one where it can.

    - `sources`: (id, label) of each hard image.
    - `fraction`: in (0, 0.5].
    """
    classes: dict[int, list[str]] = {}
    for name, label in sources:
        classes.setdefault(label, []).append(name)
    counts = {label: int(fraction * len(names) + 1e-9) for label, names in classes.items()}
    largest = max(classes, key=lambda label: (len(classes[label]), -label), default=None)
    if largest is not None and not any(counts.values()) and len(classes[largest]) > 1:
        counts[largest] = 1
    return [
        names[(2 * turn + 1) * len(names) // (2 * counts[label])]
        for label, names in sorted(classes.items())
        for turn in range(counts[label])
    ]
