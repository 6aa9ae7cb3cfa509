"""Learning progress on a guidance validation set V (arXiv 2410.13674, algorithm 2): which level of the spectrum teaches most now.

V holds synthetic images of every level that training never draws. Progress is the change of the model's true-class probability on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainingError
from ..levels import GuidanceLevel
from .mixture import Pool

FEWEST_OF_A_CLASS = 3
"""A class's own gain at a level is stated from this many images of V on."""


@dataclass(frozen=True)
class GuidanceSet:
    """V: row numbers of a pool, their labels and levels (whole per cents), int64 `[images]` each."""

    rows: np.ndarray
    labels: np.ndarray
    levels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def draw_guidance_set(pool: Pool, levels: Sequence[GuidanceLevel], size: int, seed: int) -> GuidanceSet:
    """About `size` synthetic images, in equal parts of each level and, within a level, of each class in proportion to what was kept.

    A class keeps at least half of its images of a level, and the last one, for training. Raises TrainingError where a level has
    none to give.
    """
    rng = np.random.default_rng(seed)
    share = size / max(len(levels), 1)
    chosen: list[np.ndarray] = []
    for level in sorted(levels):
        offered = np.flatnonzero(pool.synthetic & (pool.levels == level.percent))
        offered = rng.permutation(offered)
        part = min(share / len(offered), 0.5) if len(offered) else 0.0
        taken = [rows[: round(part * len(rows))] for rows in _by_label(offered, pool.labels).values() if len(rows) > 1]
        if not sum(map(len, taken)):
            raise TrainingError(
                f"level {level} has {len(offered)} kept synthetic images, too few for a guidance validation set; lower filter.threshold, "
                "raise spectrum.seeds or methods.*.guidance_images, or leave this level out of spectrum.levels."
            )
        chosen += taken
    rows = np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)
    return GuidanceSet(rows, pool.labels[rows], pool.levels[rows])


def check_disjoint(pool: Pool, guidance: GuidanceSet) -> None:
    """Raises TrainingError where training could draw an image of V."""
    shared = np.flatnonzero(~pool.held_out[guidance.rows])
    if len(shared):
        raise TrainingError(
            f"{len(shared)} of {len(guidance)} images of the guidance validation set may also be trained on "
            f"(row {guidance.rows[shared[0]]}); progress on them would be memory. Mark them in Pool.held_out."
        )


def true_class_probability(logits: Tensor, labels: np.ndarray) -> np.ndarray:
    """float64 `[images]` in [0, 1], from logits `[images, classes]`."""
    return torch.softmax(logits.double(), 1)[torch.arange(len(labels)), torch.from_numpy(labels)].numpy()


def without_outliers(values: np.ndarray) -> np.ndarray:
    """The values within 1.5 interquartile ranges of the quartiles (linear interpolation), ends included."""
    low, high = np.quantile(values, [0.25, 0.75])
    reach = 1.5 * (high - low)
    return values[(values >= low - reach) & (values <= high + reach)]


def measure_progress(guidance: GuidanceSet, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Plain numbers for the history: `{"gain": {level: mean}, "class_gain": {label: {level: mean}}}`, keys as texts as JSON has them.

    `before` and `after` are true-class probabilities `[images]`; outliers are dropped before averaging. A class has a gain
    at a level where V holds at least three of its images there.
    """
    change = after - before
    gain: dict[str, float] = {}
    class_gain: dict[str, dict[str, float]] = {}
    for level in np.unique(guidance.levels).tolist():
        there = guidance.levels == level
        gain[str(level)] = float(without_outliers(change[there]).mean())
        for label, rows in _by_label(np.flatnonzero(there), guidance.labels).items():
            if len(rows) >= FEWEST_OF_A_CLASS:
                class_gain.setdefault(str(label), {})[str(level)] = float(without_outliers(change[rows]).mean())
    return {"gain": gain, "class_gain": class_gain}


def best_level(gain: Mapping[str, float]) -> GuidanceLevel:
    """λ = argmax of the gain; the lower, more diverse level where two are equal."""
    return GuidanceLevel(int(min(gain, key=lambda level: (-gain[level], int(level)))))


def _by_label(rows: np.ndarray, labels: np.ndarray) -> dict[int, np.ndarray]:
    """`{label: rows}`, in the order in which the rows are given."""
    order = rows[np.argsort(labels[rows], kind="stable")]
    present, starts = np.unique(labels[order], return_index=True)
    return dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}
