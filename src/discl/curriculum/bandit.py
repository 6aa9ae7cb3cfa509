"""Discounted UCB: how much each level has gained, and which to try next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def detrend_gains(gains: Sequence[float]) -> np.ndarray:
    """Distance of each gain from the trend of all, float64 `[epochs]` in [-1, 1].

    The trend is the Theil-Sen line over the logarithm of the epoch, through the medians. Three
    median distances count as 1. So one outlier moves neither the line nor the scale.
    """
    values, times = np.asarray(gains, np.float64), np.log1p(np.arange(len(gains)))
    if len(gains) < 3:
        return np.zeros(len(gains))
    first, second = np.triu_indices(len(gains), 1)
    slope = np.median((values[second] - values[first]) / (times[second] - times[first]))
    rest = values - slope * times
    rest -= np.median(rest)
    scale = 3 * np.median(np.abs(rest))
    return np.clip(rest / scale, -1, 1) if scale > 0 else np.sign(rest)


def ucb_indices(
    drawn: Sequence[int],
    rewards: Sequence[float] | np.ndarray,
    arms: int,
    *,
    discount: float,
    exploration: float,
) -> np.ndarray:
    """Upper confidence bound of each arm, float64 `[arms]` (arXiv 0805.3415, section 3).

    It is X + 2 √(ξ log n / N): X the discounted mean reward of the arm, N its discounted number of
    draws, n that of all arms. It is infinite for an arm without a draw. Of t draws the s-th (from
    1) has the weight discount^(t − s).

    - `drawn`: the arm of each draw, `[draws]`.
    - `rewards`: the reward of each draw, `[draws]`.
    - `discount`: in (0, 1].
    - `exploration`: ξ, 0 or more.
    """
    weights = discount ** np.arange(len(drawn) - 1, -1, -1.0)
    counts = np.bincount(np.asarray(drawn, np.int64), weights, arms)
    sums = np.bincount(np.asarray(drawn, np.int64), weights * np.asarray(rewards), arms)
    spread = exploration * max(np.log(max(counts.sum(), 1)), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, sums / counts + 2 * np.sqrt(spread / counts), np.inf)
