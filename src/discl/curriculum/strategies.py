"""Which levels an epoch draws (arXiv 2410.13674, algorithms 1 and 2).

A strategy holds no state. It is a pure function of the epoch (from 0) and of the records of
finished epochs. So a resumed run takes the same path, and a report can draw the curriculum. An
empty tuple of levels means real images only.

A strategy that follows learning progress says when it is measured. Training then writes the result
of `measure_progress` into the epoch's record, and the strategy reads it from the history.

A custom strategy is a callable with the keyword arguments `levels`, `curriculum_epochs`, `level`
and `seed` that returns a `Strategy`. It is named as `module:attribute` or by an entry point of the
group `discl.strategies`. `Planned` is a base class for those that measure nothing.
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
from .bandit import detrend_gains, ucb_indices
from .progress import best_level

GROUP = "discl.strategies"
Levels = tuple[int, ...]
History = Sequence[Mapping[str, Any]]
Measured = Literal["never", "probe", "epoch"]
"""When progress is measured.

`probe`: before and after steps on random real images, from which the levels are chosen. `epoch` is
around the whole epoch.
"""


class Strategy(Protocol):
    """Chooses the levels of each epoch; pure in (epoch, history).

    A strategy that measures progress does so from epoch 0 on. In all methods:

    - `epoch`: number of the epoch, from 0.
    - `history`: one record of plain values for each finished epoch. For a strategy that probes
      there is one more, `{"progress": ...}` of the current epoch.

    ```python
    import discl


    class EveryOther:  # text-only images in even epochs, real images only in odd ones
        def measures(self, epoch):
            return "never"

        def levels(self, epoch, history):
            return () if epoch % 2 else (0,)

        def class_levels(self, epoch, history):
            return {}


    strategy: discl.Strategy = EveryOther()
    assert strategy.levels(1, []) == ()
    ```
    """

    def measures(self, epoch: int) -> Measured: ...

    def levels(self, epoch: int, history: History) -> Levels: ...

    def class_levels(self, epoch: int, history: History) -> Mapping[int, Levels]:
        """Levels of the labels that do not take those of `levels`."""
        ...


class Planned(ABC):
    """A strategy that does not depend on the history, so that its levels are known beforehand."""

    @abstractmethod
    def levels(self, epoch: int, history: History) -> Levels:
        """As `Strategy.levels`."""

    def measures(self, epoch: int) -> Measured:
        return "never"

    def class_levels(self, epoch: int, history: History) -> Mapping[int, Levels]:
        return {}


@dataclass(frozen=True)
class RealOnly(Planned):
    """No synthetic image in any epoch."""

    def levels(self, epoch: int, history: History) -> Levels:
        return ()


@dataclass(frozen=True)
class Staged(Planned):
    """One stage after the other, then real images only (arXiv 2410.13674, algorithm 1, linear G).

    - `stages`: levels of each stage. Stages take equal numbers of epochs, or differ by one.
    - `curriculum_epochs`: epochs of all stages together.
    """

    stages: tuple[Levels, ...]
    curriculum_epochs: int

    def levels(self, epoch: int, history: History) -> Levels:
        if epoch >= self.curriculum_epochs:
            return ()
        return self.stages[epoch * len(self.stages) // self.curriculum_epochs]


@dataclass(frozen=True)
class RandomLevels(Planned):
    """A random level for each of the first epochs, uniform with replacement; then real only."""

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
    """The level with the greatest progress in a probe on random real images, then real only.

    This is arXiv 2410.13674, algorithm 2: λ_e = argmax over λ of the mean gain on V at λ.

    - `curriculum_epochs`: epochs with synthetic images.
    - `per_class`: each class takes the level with its own greatest gain, and the common level where
      V holds no image of the class.
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
    """Discounted UCB over the levels (Garivier and Moulines, arXiv 0805.3415, section 3).

    The reward of a level is the mean gain over V in its epoch, compared with the trend of all gains
    (`detrend_gains`), because gains shrink during training. Every level has one epoch first, in
    random order. An index is a mean over the epochs of a level, so no single measurement decides.

    - `arms`: the levels.
    - `curriculum_epochs`: epochs with synthetic images.
    - `discount`: weight of an epoch relative to the next one, in (0, 1].
    - `exploration`: ξ of the confidence bound, 0 or more.
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
            drawn,
            detrend_gains(gains),
            len(self.arms),
            discount=self.discount,
            exploration=self.exploration,
        )
        return (self.arms[max(order.tolist(), key=lambda arm: indices[arm])],)


def _stage_per_level(levels: Levels, curriculum_epochs: int) -> Staged:
    if curriculum_epochs < len(levels):
        raise RecipeError(
            f"got {curriculum_epochs}, too short for a stage of each of the {len(levels)} levels; "
            f"use at least {len(levels)} epochs or fewer levels.",
            argument="curriculum_epochs",
        )
    return Staged(tuple((level,) for level in levels), curriculum_epochs)


def diverse_to_specific(levels: Levels, curriculum_epochs: int, **_: Any) -> Strategy:
    """λ rises stage by stage, from text-only to near-real images (algorithm 1)."""
    return _stage_per_level(tuple(sorted(levels)), curriculum_epochs)


def specific_to_diverse(levels: Levels, curriculum_epochs: int, **_: Any) -> Strategy:
    """λ falls stage by stage, the reverse of algorithm 1."""
    return _stage_per_level(tuple(sorted(levels, reverse=True)), curriculum_epochs)


def random_levels(levels: Levels, curriculum_epochs: int, seed: int, **_: Any) -> Strategy:
    """A random λ in each epoch."""
    return RandomLevels(tuple(sorted(levels)), curriculum_epochs, seed)


def all_levels(levels: Levels, curriculum_epochs: int, **_: Any) -> Strategy:
    """Images of all λ in each epoch."""
    return Staged((tuple(sorted(levels)),), curriculum_epochs)


def text_only(curriculum_epochs: int, **_: Any) -> Strategy:
    """λ = 0 in each epoch."""
    return Staged(((TEXT_ONLY,),), curriculum_epochs)


def fixed_level(level: int | None, curriculum_epochs: int, **_: Any) -> Strategy:
    """One λ in each epoch."""
    if level is None:
        raise RecipeError(
            "strategy 'fixed' needs a level, for example level=50; got none.", argument="level"
        )
    return Staged(((level,),), curriculum_epochs)


def real_only(**_: Any) -> Strategy:
    """No synthetic image."""
    return RealOnly()


def adaptive(curriculum_epochs: int, **_: Any) -> Strategy:
    """The λ with the greatest progress on V (algorithm 2)."""
    return Adaptive(curriculum_epochs)


def adaptive_per_class(curriculum_epochs: int, **_: Any) -> Strategy:
    """Algorithm 2 with the λ of greatest progress for each class."""
    return Adaptive(curriculum_epochs, per_class=True)


def bandit(levels: Levels, curriculum_epochs: int, seed: int, **_: Any) -> Strategy:
    """Discounted UCB over λ."""
    return Bandit(tuple(sorted(levels)), curriculum_epochs, seed)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "real-only": real_only,
    "diverse-to-specific": diverse_to_specific,
    "easy-to-hard": diverse_to_specific,  # the paper's name for λ upwards on low-quality data
    "specific-to-diverse": specific_to_diverse,
    "text-only": text_only,
    "fixed": fixed_level,
    "all-levels": all_levels,
    "random": random_levels,
    "adaptive": adaptive,
    "adaptive-per-class": adaptive_per_class,
    "bandit": bandit,
}

METHODS = ("measures", "levels", "class_levels")
"""Methods of a strategy."""

MEASURING = frozenset({"adaptive", "adaptive-per-class", "bandit"})
"""Built-in strategies that need a guidance validation set; see also `follows_progress`."""

WITHOUT_HARD = frozenset({"adaptive", "adaptive-per-class"})
"""Strategies whose epochs draw the hard real images in the probe only (algorithm 2: S_λ ∪ D_nh)."""


def make_strategy(
    name: str,
    *,
    levels: Sequence[int],
    curriculum_epochs: int,
    level: int | None = None,
    seed: int = 0,
    allow_plugins: bool = False,
) -> Strategy:
    """The strategy of a name.

    - `name`: a built-in strategy, that of an installed package, or `module:attribute`.
    - `levels`: the levels of the spectrum.
    - `curriculum_epochs`: epochs with synthetic images, 0 or more.
    - `level`: the level of the strategy `fixed`.
    - `seed`: seed of strategies that draw at random.
    - `allow_plugins`: whether `module:attribute` may be imported.

    Raises RecipeError for an unknown name, for `module:attribute` without `allow_plugins`, for
    `fixed` without a level, for too few curriculum epochs, and for a custom piece that is not a
    strategy.

    ```python
    import discl

    levels = [0, 50]
    strategy = discl.make_strategy("diverse-to-specific", levels=levels, curriculum_epochs=4)
    assert strategy.levels(0, []) == (0,)
    assert strategy.levels(4, []) == ()
    ```
    """
    arguments: dict[str, Any] = {
        "levels": tuple(map(check_level, levels)),
        "curriculum_epochs": curriculum_epochs,
        "level": None if level is None else check_level(level),
        "seed": seed,
    }
    found = find_strategy(name, allow_plugins)
    if name in STRATEGIES:
        return found(**arguments)
    check_call("strategy", name, found, **arguments)
    _check_callable(name, found, arguments)
    return check_strategy(name, found(**arguments), levels)


def find_strategy(name: str, allow_plugins: bool = False) -> Callable[..., Strategy]:
    """The callable that makes the strategy of a name.

    Raises RecipeError for an unknown one, and for `module:attribute` without `allow_plugins`.
    """
    return find_piece("strategy", name, STRATEGIES, GROUP, allow_plugins)


def _check_callable(name: str, found: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises RecipeError, before the call, for a callable that cannot make a strategy.

    A class needs the methods of a strategy. A function has to name one of the arguments.
    """
    if isinstance(found, type):
        for method in METHODS:
            if not callable(getattr(found, method, None)):
                raise RecipeError(
                    f"strategy '{name}' is a class without a method {method}(epoch, ...), and was "
                    "not called."
                )
    elif not {each.name for each in named_parameters(found)} & set(arguments):
        raise RecipeError(
            f"strategy '{name}' names none of the arguments {', '.join(arguments)}, and was not "
            "called; name those that it uses."
        )


def check_strategy(name: str, strategy: Any, levels: Sequence[int]) -> Strategy:
    """The strategy, if it has the methods of one and answers alike twice for epoch 0.

    Later epochs are not checked, because their history is unknown. Raises RecipeError.
    """
    for method in METHODS:
        if not callable(getattr(strategy, method, None)):
            raise RecipeError(
                f"strategy '{name}' gives a {type(strategy).__name__}, which has no method "
                f"{method}(epoch, ...)."
            )
    measured = strategy.measures(0)
    if measured not in get_args(Measured):
        raise RecipeError(
            f"strategy '{name}': measures(0) is {measured!r}; "
            f"allowed: {', '.join(get_args(Measured))}."
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
            f"strategy '{name}': levels(0, ...) is {first!r}; it has to be a tuple of the levels "
            f"{known or '(none)'}."
        )
    if first != again:
        raise RecipeError(
            f"strategy '{name}' answers {first!r} and then {again!r} for epoch 0; it has to be "
            "pure in (epoch, history)."
        )
    return strategy


def follows_progress(name: str, strategy: Strategy) -> bool:
    """Whether a strategy needs a guidance validation set."""
    return name in MEASURING or strategy.measures(0) != "never"
