"""Checks the arguments of `Curriculum`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from ..curriculum.strategies import Strategy
from ..errors import TrainingError, unknown
from ..levels import REAL, check_level
from ..recipe import Method


def divide_epochs(
    make: Callable[..., Strategy], curriculum_epochs: int, probe_every: int
) -> tuple[Strategy, int, int]:
    """(strategy, curriculum epochs, epochs per block); a strategy that probes counts blocks.

    A last probe that no epoch would follow is left out. Raises TrainingError where none remains.
    """
    strategy = make(curriculum_epochs=curriculum_epochs)
    if strategy.measures(0) != "probe":
        return strategy, curriculum_epochs, 1
    if curriculum_epochs == 1:
        raise TrainingError(
            "got 1, which leaves no epoch for the level that a probe chooses; use 2 or more.",
            argument="curriculum_epochs",
        )
    guided = curriculum_epochs - (curriculum_epochs % probe_every == 1)
    return make(curriculum_epochs=-(-guided // probe_every)), guided, probe_every


def warn_if_fewer(wanted: int | None, held: int) -> None:
    if wanted and held < wanted:
        warnings.warn(
            f"guidance_images = {wanted}, but V holds {held}: no more hard images have a synthetic "
            "image at every level and can be spared by their class.",
            stacklevel=3,
        )


def check_choices(**values: str) -> None:
    """Raises TrainingError for a value that the methods of a recipe do not allow."""
    for name, value in values.items():
        allowed = get_args(Method.model_fields[name].annotation)
        if value not in allowed:
            raise TrainingError(unknown("value", str(value), allowed), argument=name)


def check_bounds(**values: tuple[float | None, int]) -> None:
    """Raises TrainingError for a number below its bound or not finite; None is the default."""
    for name, (value, least) in values.items():
        if value is not None and not least <= value < float("inf"):
            raise TrainingError(f"got {value}; use {least} or more.", argument=name)


def choose_levels(
    strategy: str, level: int | None, levels: Sequence[int] | None, present: np.ndarray
) -> tuple[int, ...]:
    """The levels of the curriculum. Raises TrainingError for one without an image."""
    if (strategy == "fixed") != (level is not None):
        raise TrainingError(
            f"got {level} with strategy '{strategy}'. It is for strategy 'fixed', which needs it, "
            "for example Curriculum(dataset, 'fixed', level=50, ...).",
            argument="level",
        )
    known = sorted(set(present.tolist()))
    named: dict[str, list[int]] = {"text-only": [0], "fixed": [level or 0], "real-only": []}
    wanted = named.get(strategy, list(known if levels is None else levels))
    absent = [percent for percent in wanted if percent not in known and percent != REAL]
    if absent or (not wanted and strategy != "real-only"):
        raise TrainingError(
            f"strategy '{strategy}' needs synthetic images at level "
            f"{', '.join(map(str, absent)) or '(none)'}; this data set has levels "
            f"{', '.join(map(str, known)) or '(none)'}.",
            argument="level" if strategy == "fixed" else "levels",
        )
    return tuple(check_level(int(percent)) for percent in wanted)
