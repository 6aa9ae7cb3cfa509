"""Times of several arms that take turns in one process, and ratios of them with intervals."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A median of paired ratios, its interval, and how many pairs there were."""

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of at least 95 % from order statistics; the extremes below six values."""
        ordered = sorted(values)
        count = len(ordered)
        rank = 0
        while sum(math.comb(count, k) for k in range(rank + 2)) / 2**count <= 0.025:
            rank += 1
        return cls(statistics.median(ordered), ordered[rank], ordered[-1 - rank], count)


@dataclass(frozen=True)
class Times:
    """Seconds of one arm in every repetition, by the wall and of the processor."""

    wall: list[float]
    processor: list[float]

    def typical(self, clock: str) -> float:
        return statistics.median(getattr(self, clock))


def take_turns(
    arms: dict[str, Callable[[], object]],
    seconds: float,
    least: int = 5,
    most: int = 41,
    warm: bool = False,
) -> dict[str, Times]:
    """Times of every arm. They take turns in alternating order.

    Rounds are added until `seconds` have passed, at least `least` and at most `most`. Unless all
    arms are `warm`, because each has run with these shapes before, one more round goes first and
    does not count.
    """
    times = {name: Times([], []) for name in arms}
    order, started = list(arms), time.perf_counter()
    for repetition in range(0 if warm else -1, most):
        if repetition >= least and time.perf_counter() - started > seconds:
            break
        for name in order:
            wall, processor = time.perf_counter(), time.process_time()
            arms[name]()
            if repetition >= 0:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].processor.append(time.process_time() - processor)
        order.reverse()
    return times


def typical_seconds(
    arms: dict[str, Callable[[], object]], repetitions: int, clock: str
) -> dict[str, float]:
    """Median seconds of every arm by `clock` ("wall" or "processor"), after a warm-up round."""
    times = take_turns(arms, 0.0, least=repetitions, most=repetitions)
    return {name: each.typical(clock) for name, each in times.items()}


def paired(slow: list[float], fast: list[float]) -> Interval:
    """One arm's time ÷ the other's, repetition by repetition."""
    return Interval.of([one / other for one, other in zip(slow, fast, strict=True)])
