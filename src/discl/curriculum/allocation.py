"""Divides a budget or a number in proportion to weights, within limits."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .policies import Wish


def allocate(
    budget: float,
    prices: Sequence[float],
    wishes: Sequence[Wish],
    sources: Sequence[int],
    *,
    explore: float = 0.0,
    least: Sequence[int] = (),
) -> np.ndarray:
    """Images for each cell of a round of the loop, int64 `[cells]`, which cost `budget` at most.

    The fraction `explore` goes to all cells in proportion to their sources, the rest in proportion
    to the weights. What cells cannot take falls to the others, or is saved. Remainders are rounded
    up while the budget lasts, the largest first.

    - `prices`: of an image of each cell, greater than 0, `[cells]`.
    - `least`: images that each cell gets first, `[cells]`; default none.
    """
    costs, first = np.asarray(prices, np.float64), np.zeros(len(prices), np.int64)
    if len(least):
        first = np.asarray(least, np.int64)
    left = max(budget - float(first @ costs), 0.0)
    weights = np.asarray([each.weight for each in wishes], np.float64)
    limits = np.asarray([each.most for each in wishes], np.float64)
    evenly = divide(
        explore * left, costs, np.asarray(sources, np.float64), np.full(len(costs), inf)
    )
    exact = evenly + divide((1 - explore) * left, costs, weights, limits)
    given = np.floor(exact + 1e-9).astype(np.int64)
    spare, rest = left - float(given @ costs), np.round(exact - given, 9)
    more = int(np.ceil(rest.sum() - 1e-6))
    for cell in np.argsort(-rest, kind="stable").tolist():
        if more and rest[cell] > 0 and costs[cell] <= spare + 1e-9:
            given[cell] += 1
            spare -= costs[cell]
            more -= 1
    return first + given


def divide(budget: float, costs: np.ndarray, weights: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Amounts in proportion to weights that cost `budget`, float64 `[parts]`.

    What a part cannot take falls to the others.

    - `costs`: of one of each part, greater than 0, `[parts]`.
    - `weights`: 0 or more, `[parts]`; `limits`: the most of each part, `[parts]`.
    """
    result, bounded = np.zeros(len(costs)), weights <= 0
    while not bounded.all():
        rest = budget - float((result * costs)[bounded].sum())
        exact = rest * weights / float((weights * costs)[~bounded].sum())
        over = ~bounded & (exact > limits)
        if not over.any():
            return np.where(bounded, result, exact)
        result[over] = limits[over]
        bounded |= over
    return result
