"""Which level(s) of the spectrum an epoch trains on: the curriculum G(e) of algorithm 1 (arXiv 2410.13674).

A strategy holds no state: it is a pure function of the epoch (from 0) and of the history of finished epochs, so a
resumed run takes the same path and a report can draw the curriculum. An empty tuple means real images only.

A strategy that follows learning progress says how it is measured; training then puts the plain numbers of
`progress.measure_progress` into the epoch's record, and the strategy reads them from the history.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ..digests import derive_seed
from ..errors import RecipeError, unknown
from ..levels import TEXT_ONLY, GuidanceLevel
from .progress import best_level

Levels = tuple[GuidanceLevel, ...]
History = Sequence[Mapping[str, Any]]
Measured = Literal["never", "probe", "epoch"]
"""When progress is measured: around a probe on random real images before the epoch's levels are chosen, or around the whole epoch."""


class Strategy(Protocol):
    """What training asks, for each epoch from 0.

    `history` holds one plain record for each finished epoch and, for a strategy that probes, one more: `{"progress": ...}` of the
    epoch that begins.
    """

    def measures(self, epoch: int) -> Measured: ...

    def levels(self, epoch: int, history: History) -> Levels: ...

    def class_levels(self, epoch: int, history: History) -> Mapping[int, Levels]:
        """Labels whose levels differ from those of `levels`."""
        ...


class _Planned:
    """A strategy that is the same whatever was learned."""

    def measures(self, epoch: int) -> Measured:
        return "never"

    def class_levels(self, epoch: int, history: History) -> Mapping[int, Levels]:
        return {}


@dataclass(frozen=True)
class RealOnly(_Planned):
    """No synthetic image at all."""

    def levels(self, epoch: int, history: History) -> Levels:
        return ()


@dataclass(frozen=True)
class Staged(_Planned):
    """`stages` one after the other, each for an equal number of the first `curriculum_epochs`; then real images only.

    Where the epochs do not divide evenly, stages differ by at most one epoch (linear G, algorithm 1).
    """

    stages: tuple[Levels, ...]
    curriculum_epochs: int

    def levels(self, epoch: int, history: History) -> Levels:
        if epoch >= self.curriculum_epochs:
            return ()
        return self.stages[epoch * len(self.stages) // self.curriculum_epochs]


@dataclass(frozen=True)
class Adaptive:
    """The level with the greatest progress in a probe on random real images (algorithm 2); then real images only.

    With `per_class` each class takes the level from which it gains most itself, and the common one where V says too little of it.
    """

    curriculum_epochs: int
    per_class: bool = False

    def measures(self, epoch: int) -> Measured:
        return "probe" if epoch < self.curriculum_epochs else "never"

    def levels(self, epoch: int, history: History) -> Levels:
        if epoch >= self.curriculum_epochs:
            return ()
        return (best_level(history[epoch]["progress"]["gain"]),)

    def class_levels(self, epoch: int, history: History) -> Mapping[int, Levels]:
        if not self.per_class or epoch >= self.curriculum_epochs:
            return {}
        return {int(label): (best_level(gain),) for label, gain in history[epoch]["progress"]["class_gain"].items()}


@dataclass(frozen=True)
class Bandit:
    """EXP3 over the levels (Auer et al. 2002, fig. 1): a level is drawn, and rewarded by the mean gain over all of V in its epoch.

    Gains are scaled to [0, 1] between the 20th and the 80th percentile of those seen so far (arXiv 1704.03003, section 3.3). Every
    level keeps a probability of at least γ / K, so no single measurement decides an epoch.
    """

    arms: Levels
    curriculum_epochs: int
    seed: int = 0
    exploration: float = 0.2

    def measures(self, epoch: int) -> Measured:
        return "epoch" if epoch < self.curriculum_epochs else "never"

    def class_levels(self, epoch: int, history: History) -> Mapping[int, Levels]:
        return {}

    def levels(self, epoch: int, history: History) -> Levels:
        if epoch >= self.curriculum_epochs:
            return ()
        finished = [record for record in history[:epoch] if "progress" in record]
        drawn = [self.arms.index(GuidanceLevel(record["levels"][0])) for record in finished]
        gains = [float(np.mean(list(record["progress"]["gain"].values()))) for record in finished]
        rewards = [scale_reward(gains[: turn + 1]) for turn in range(len(gains))]
        probabilities = exp3_probabilities(drawn, rewards, len(self.arms), self.exploration)
        rng = np.random.default_rng(derive_seed("bandit", self.seed, epoch))
        return (self.arms[int(rng.choice(len(self.arms), p=probabilities))],)


def scale_reward(gains: Sequence[float]) -> float:
    """The last of the gains, in [0, 1]: their 20th percentile is 0, the 80th 1, and what lies beyond is cut off; ½ where both are equal."""
    low, high = np.quantile(gains, [0.2, 0.8])
    return 0.5 if high == low else float(np.clip((gains[-1] - low) / (high - low), 0, 1))


def exp3_probabilities(drawn: Sequence[int], rewards: Sequence[float], arms: int, exploration: float) -> np.ndarray:
    """Probability of each arm, float64 `[arms]`, after these draws and their rewards in [0, 1].

    p_i = (1 − γ) w_i / Σ w + γ / K, and after a draw of i with reward x: w_i ← w_i · exp(γ x / (p_i K)).
    """
    weights = np.zeros(arms)  # logarithms
    probabilities = np.full(arms, 1 / arms)
    for arm, reward in zip(drawn, rewards, strict=True):
        weights[arm] += exploration * reward / (probabilities[arm] * arms)
        shares = np.exp(weights - weights.max())
        probabilities = (1 - exploration) * shares / shares.sum() + exploration / arms
    return probabilities


def _in_stages(levels: Levels, curriculum_epochs: int) -> Staged:
    if curriculum_epochs < len(levels):
        raise RecipeError(
            f"train.curriculum_epochs = {curriculum_epochs} is too short for a stage of each of the {len(levels)} levels; "
            f"use at least {len(levels)} epochs or fewer levels."
        )
    return Staged(tuple((level,) for level in levels), curriculum_epochs)


def _diverse_to_specific(levels: Levels, curriculum_epochs: int, **_: Any) -> Strategy:
    return _in_stages(tuple(sorted(levels)), curriculum_epochs)


def _specific_to_diverse(levels: Levels, curriculum_epochs: int, **_: Any) -> Strategy:
    return _in_stages(tuple(sorted(levels, reverse=True)), curriculum_epochs)


def _random(levels: Levels, curriculum_epochs: int, seed: int, **_: Any) -> Strategy:
    """As many stages as levels, each with a level drawn at random, with replacement."""
    draw = random.Random(derive_seed("random-strategy", seed))
    return _in_stages(tuple(draw.choice(sorted(levels)) for _ in levels), curriculum_epochs)


def _all_levels(levels: Levels, curriculum_epochs: int, **_: Any) -> Strategy:
    return Staged((tuple(sorted(levels)),), curriculum_epochs)


def _text_only(curriculum_epochs: int, **_: Any) -> Strategy:
    return Staged(((TEXT_ONLY,),), curriculum_epochs)


def _fixed(level: GuidanceLevel, curriculum_epochs: int, **_: Any) -> Strategy:
    return Staged(((level,),), curriculum_epochs)


def _real_only(**_: Any) -> Strategy:
    return RealOnly()


def _adaptive(curriculum_epochs: int, **_: Any) -> Strategy:
    return Adaptive(curriculum_epochs)


def _adaptive_per_class(curriculum_epochs: int, **_: Any) -> Strategy:
    return Adaptive(curriculum_epochs, per_class=True)


def _bandit(levels: Levels, curriculum_epochs: int, seed: int, **_: Any) -> Strategy:
    return Bandit(tuple(sorted(levels)), curriculum_epochs, seed)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "real-only": _real_only,
    "diverse-to-specific": _diverse_to_specific,
    "easy-to-hard": _diverse_to_specific,  # the paper's name for λ upwards on low-quality data
    "specific-to-diverse": _specific_to_diverse,
    "text-only": _text_only,
    "fixed": _fixed,
    "all-levels": _all_levels,
    "random": _random,
    "adaptive": _adaptive,
    "adaptive-per-class": _adaptive_per_class,
    "bandit": _bandit,
}

MEASURING = frozenset({"adaptive", "adaptive-per-class", "bandit"})
"""Strategies that need a guidance validation set."""

WITHOUT_HARD = frozenset({"adaptive", "adaptive-per-class"})
"""Strategies whose curriculum epochs draw the hard real images in the probe and not beside the synthetic ones (algorithm 2: S_λ ∪ D_nh)."""


def make_strategy(
    name: str, *, levels: Sequence[GuidanceLevel], curriculum_epochs: int, level: GuidanceLevel | None = None, seed: int = 0
) -> Strategy:
    """The strategy of that name over `levels`. Raises RecipeError for an unknown name or too few curriculum epochs."""
    if name not in STRATEGIES:
        raise RecipeError(unknown("strategy", name, STRATEGIES))
    return STRATEGIES[name](levels=tuple(levels), curriculum_epochs=curriculum_epochs, level=level, seed=seed)
