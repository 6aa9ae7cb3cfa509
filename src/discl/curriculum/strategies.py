"""Which levels an epoch draws (arXiv 2410.13674, algorithms 1 and 2).

A strategy holds no state: it is a pure function of the epoch (from 0) and of the history of finished epochs, so a
resumed run takes the same path and a report can draw the curriculum. An empty tuple means real images only.

A strategy that follows learning progress says how it is measured; training then puts the plain numbers of
`progress.measure_progress` into the epoch's record, and the strategy reads them from the history.

A strategy of your own is a callable of `(levels, curriculum_epochs, level, seed)`, all by name, that gives a `Strategy` (`Planned` is a
base for those that measure nothing). It is named as `module:attribute` or by an entry point of the group `discl.strategies`, and has to be
pure in (epoch, history) like those here.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from ..errors import RecipeError
from ..levels import REAL, TEXT_ONLY, check_level, format_level
from ..utils.hashing import derive_seed
from ..utils.plugins import check_call, find_piece, named_parameters
from .progress import best_level

GROUP = "discl.strategies"
Levels = tuple[int, ...]
History = Sequence[Mapping[str, Any]]
Measured = Literal["never", "probe", "epoch"]
"""When progress is measured: around a probe on random real images before the epoch's levels are chosen, or around the whole epoch."""


class Strategy(Protocol):
    """What training asks, for each epoch from 0. One that measures does so from epoch 0 on.

    `history` holds one plain record for each finished epoch and, for a strategy that probes, one more: `{"progress": ...}` of the
    epoch that begins.
    """

    def measures(self, epoch: int) -> Measured: ...

    def levels(self, epoch: int, history: History) -> Levels: ...

    def class_levels(self, epoch: int, history: History) -> Mapping[int, Levels]:
        """Labels whose levels differ from those of `levels`."""
        ...


class Planned(ABC):
    """A strategy that is the same whatever was learned, so that `levels` may be asked beforehand, without a history."""

    @abstractmethod
    def levels(self, epoch: int, history: History) -> Levels:
        """As `Strategy.levels`."""

    def measures(self, epoch: int) -> Measured:
        return "never"

    def class_levels(self, epoch: int, history: History) -> Mapping[int, Levels]:
        return {}


@dataclass(frozen=True)
class RealOnly(Planned):
    """No synthetic image at all."""

    def levels(self, epoch: int, history: History) -> Levels:
        return ()


@dataclass(frozen=True)
class Staged(Planned):
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
class RandomLevels(Planned):
    """A level drawn anew for each of the first `curriculum_epochs`, evenly and with replacement;
    then real images only."""

    choices: Levels
    curriculum_epochs: int
    seed: int = 0

    def levels(self, epoch: int, history: History) -> Levels:
        if epoch >= self.curriculum_epochs:
            return ()
        draw = random.Random(derive_seed("random-strategy", self.seed, epoch))
        return (draw.choice(self.choices),)


@dataclass(frozen=True)
class Adaptive:
    """The level with the greatest progress in a probe on random real images (algorithm 2); then real images only.

    With `per_class` each class takes the level from which it gains most by `progress.measure_progress`, the common one where V has no
    image of it.
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
        return {
            int(label): (best_level(gain),)
            for label, gain in history[epoch]["progress"]["class_gain"].items()
        }


@dataclass(frozen=True)
class Bandit:
    """Discounted UCB over the levels (Garivier and Moulines, arXiv 0805.3415, section 3); a level's reward is what its epoch brings.

    That is the mean gain over all of V, measured against the course of the gains so far (`rewards_of`), for gains shrink as training goes
    on whatever is drawn. Every level has an epoch first, in an order drawn by the seed. An index is a mean over the epochs of a level, so
    no single measurement decides.
    """

    arms: Levels
    curriculum_epochs: int
    seed: int = 0
    discount: float = 0.9
    exploration: float = 0.05

    def measures(self, epoch: int) -> Measured:
        return "epoch" if epoch < self.curriculum_epochs else "never"

    def class_levels(self, epoch: int, history: History) -> Mapping[int, Levels]:
        return {}

    def levels(self, epoch: int, history: History) -> Levels:
        if epoch >= self.curriculum_epochs:
            return ()
        order = np.random.default_rng(derive_seed("bandit", self.seed)).permutation(len(self.arms))
        finished = [record for record in history[:epoch] if "progress" in record]
        drawn = [self.arms.index(record["levels"][0]) for record in finished]
        gains = [float(np.mean(list(record["progress"]["gain"].values()))) for record in finished]
        indices = ucb_indices(
            drawn, rewards_of(gains), len(self.arms), self.discount, self.exploration
        )
        return (self.arms[max(order.tolist(), key=lambda arm: indices[arm])],)


def rewards_of(gains: Sequence[float]) -> np.ndarray:
    """How far each gain lies above the course of all, float64 in [-1, 1].

    The course is the Theil-Sen line over the logarithm of the epoch, through the medians; three median distances from it count as 1. So
    one wild measurement moves neither the line nor the scale.
    """
    values, places = np.asarray(gains, np.float64), np.log1p(np.arange(len(gains)))
    if len(gains) < 3:
        return np.zeros(len(gains))
    first, second = np.triu_indices(len(gains), 1)
    rest = (
        values
        - np.median((values[second] - values[first]) / (places[second] - places[first])) * places
    )
    rest -= np.median(rest)
    scale = 3 * np.median(np.abs(rest))
    return np.clip(rest / scale, -1, 1) if scale > 0 else np.sign(rest)


def ucb_indices(
    drawn: Sequence[int],
    rewards: Sequence[float] | np.ndarray,
    arms: int,
    discount: float,
    exploration: float,
) -> np.ndarray:
    """Index of each arm after these draws, float64 `[arms]`: its discounted mean reward X plus 2 √(ξ log n / N); infinite without a draw.

    N is the arm's discounted number of draws and n that of all; with t draws, the s-th from 1 has the weight discount^(t − s).
    """
    weights = discount ** np.arange(len(drawn) - 1, -1, -1.0)
    counts = np.bincount(np.asarray(drawn, np.int64), weights, arms)
    sums = np.bincount(np.asarray(drawn, np.int64), weights * np.asarray(rewards), arms)
    spread = exploration * max(np.log(max(counts.sum(), 1)), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, sums / counts + 2 * np.sqrt(spread / counts), np.inf)


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
    return RandomLevels(tuple(sorted(levels)), curriculum_epochs, seed)


def _all_levels(levels: Levels, curriculum_epochs: int, **_: Any) -> Strategy:
    return Staged((tuple(sorted(levels)),), curriculum_epochs)


def _text_only(curriculum_epochs: int, **_: Any) -> Strategy:
    return Staged(((TEXT_ONLY,),), curriculum_epochs)


def _fixed(level: int, curriculum_epochs: int, **_: Any) -> Strategy:
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

METHODS = ("measures", "levels", "class_levels")
"""What a strategy is asked for."""

MEASURING = frozenset({"adaptive", "adaptive-per-class", "bandit"})
"""Strategies here that need a guidance validation set; `follows_progress` answers for your own too."""

WITHOUT_HARD = frozenset({"adaptive", "adaptive-per-class"})
"""Those of them whose curriculum epochs draw the hard real images in the probe, not beside synthetic ones (algorithm 2: S_λ ∪ D_nh)."""


def make_strategy(
    name: str,
    *,
    levels: Sequence[int],
    curriculum_epochs: int,
    level: int | None = None,
    seed: int = 0,
    allow_plugins: bool = False,
) -> Strategy:
    """The strategy of that name over `levels`; with `allow_plugins` also that of `module:attribute`.

    Raises RecipeError for an unknown name, an address without leave, too few curriculum epochs, or something
    of your own that is no strategy.
    """
    given: dict[str, Any] = {
        "levels": tuple(map(check_level, levels)),
        "curriculum_epochs": curriculum_epochs,
        "level": None if level is None else check_level(level),
        "seed": seed,
    }
    found = find_strategy(name, allow_plugins)
    if name in STRATEGIES:
        return found(**given)
    check_call("strategy", name, found, **given)
    _check_kind(name, found, given)
    return check_strategy(name, found(**given), levels)


def find_strategy(name: str, allow_plugins: bool = False) -> Callable[..., Strategy]:
    """What makes the strategy of that name.

    Raises RecipeError for an unknown one, and for an address without leave.
    """
    return find_piece("strategy", name, STRATEGIES, GROUP, allow_plugins)


def _check_kind(name: str, found: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises RecipeError for what makes no strategy, as far as can be told before it is called.

    A class has to have the methods of one; a function has to name one of the arguments that it is given.
    """
    if isinstance(found, type):
        for method in METHODS:
            if not callable(getattr(found, method, None)):
                raise RecipeError(
                    f"strategy '{name}' is a class that has no method {method}(epoch, ...), and was not "
                    "called."
                )
    elif not {each.name for each in named_parameters(found)} & set(given):
        raise RecipeError(
            f"strategy '{name}' names none of the arguments {', '.join(given)}, and was not called; name "
            "those that it uses."
        )


def check_strategy(name: str, strategy: Any, levels: Sequence[int]) -> Strategy:
    """The strategy itself, if it can be asked as `Strategy` says and answers alike twice. Raises RecipeError otherwise.

    Only epoch 0 is asked for, whose history is known beforehand.
    """
    for asked in METHODS:
        if not callable(getattr(strategy, asked, None)):
            raise RecipeError(
                f"strategy '{name}' gives a {type(strategy).__name__}, which has no method {asked}(epoch, ...)."
            )
    measured = strategy.measures(0)
    if measured not in get_args(Measured):
        raise RecipeError(
            f"strategy '{name}': measures(0) is {measured!r}; allowed: {', '.join(get_args(Measured))}."
        )
    if measured == "probe" and not levels:
        return strategy
    gain = {str(level): 0.0 for level in levels}
    history = [{"progress": {"gain": gain, "class_gain": {}}}] if measured == "probe" else []
    first, again = strategy.levels(0, history), strategy.levels(0, history)
    if (
        not isinstance(first, tuple)
        or any(type(level) is not int for level in first)
        or not set(first) <= {*levels, REAL}
    ):
        known = ", ".join(map(format_level, levels))
        raise RecipeError(
            f"strategy '{name}': levels(0, ...) is {first!r}; it has to be a tuple of the levels {known or '(none)'}."
        )
    if first != again:
        raise RecipeError(
            f"strategy '{name}' answers {first!r} and then {again!r} for epoch 0; it has to be pure in (epoch, history)."
        )
    return strategy


def follows_progress(name: str, strategy: Strategy) -> bool:
    """Whether a strategy needs a guidance validation set."""
    return name in MEASURING or strategy.measures(0) != "never"
