"""Which level(s) of the spectrum an epoch trains on: the curriculum G(e) of algorithm 1 (arXiv 2410.13674).

A strategy holds no state: it is a pure function of the epoch (from 0) and of the history of finished epochs, so a
resumed run takes the same path and a report can draw the curriculum. An empty tuple means real images only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..digests import derive_seed
from ..errors import RecipeError, unknown
from ..levels import TEXT_ONLY, GuidanceLevel

Levels = tuple[GuidanceLevel, ...]
History = Sequence[Mapping[str, Any]]


class Strategy(Protocol):
    """Levels of an epoch, from 0; `history` holds one plain record for each finished epoch."""

    def levels(self, epoch: int, history: History) -> Levels: ...


@dataclass(frozen=True)
class RealOnly:
    """No synthetic image at all."""

    def levels(self, epoch: int, history: History) -> Levels:
        return ()


@dataclass(frozen=True)
class Staged:
    """`stages` one after the other, each for an equal number of the first `curriculum_epochs`; then real images only.

    Where the epochs do not divide evenly, stages differ by at most one epoch (linear G, algorithm 1).
    """

    stages: tuple[Levels, ...]
    curriculum_epochs: int

    def levels(self, epoch: int, history: History) -> Levels:
        if epoch >= self.curriculum_epochs:
            return ()
        return self.stages[epoch * len(self.stages) // self.curriculum_epochs]


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


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "real-only": _real_only,
    "diverse-to-specific": _diverse_to_specific,
    "easy-to-hard": _diverse_to_specific,  # the paper's name for λ upwards on low-quality data
    "specific-to-diverse": _specific_to_diverse,
    "text-only": _text_only,
    "fixed": _fixed,
    "all-levels": _all_levels,
    "random": _random,
}


def make_strategy(
    name: str, *, levels: Sequence[GuidanceLevel], curriculum_epochs: int, level: GuidanceLevel | None = None, seed: int = 0
) -> Strategy:
    """The strategy of that name over `levels`. Raises RecipeError for an unknown name or too few curriculum epochs."""
    if name not in STRATEGIES:
        raise RecipeError(unknown("strategy", name, STRATEGIES))
    return STRATEGIES[name](levels=tuple(levels), curriculum_epochs=curriculum_epochs, level=level, seed=seed)
