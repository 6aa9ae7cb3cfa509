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

SHRINKAGE = 10
"""A class's gain at a level is its own images' and, with the weight of this many images, that of all classes."""


@dataclass(frozen=True)
class GuidanceSet:
    """V: row numbers of a pool, their labels and levels (whole per cents), int64 `[images]` each."""

    rows: np.ndarray
    labels: np.ndarray
    levels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def draw_guidance_set(
    pool: Pool, levels: Sequence[GuidanceLevel], size: int, seed: int
) -> GuidanceSet:
    """About `size` synthetic images, in equal parts of each level and, within a level, of each class in proportion to what was kept.

    A class keeps at least half of its images of a level, and the last one, for training. Parts are rounded so that their sum is the
    level's. Raises TrainingError where a level has none to give.
    """
    rng = np.random.default_rng(seed)
    share = round(size / max(len(levels), 1))
    chosen: list[np.ndarray] = []
    for level in sorted(levels):
        offered = np.flatnonzero(pool.synthetic & (pool.levels == level.percent))
        of_class = list(_by_label(rng.permutation(offered), pool.labels).values())
        parts = allot(share, np.array([len(rows) for rows in of_class], np.int64), rng)
        if not parts.sum():
            raise TrainingError(
                f"level {level} has {len(offered)} kept synthetic images, too few for a guidance validation set; lower filter.threshold, "
                "raise spectrum.seeds or methods.*.guidance_images, or leave this level out of spectrum.levels."
            )
        chosen += [rows[:part] for rows, part in zip(of_class, parts.tolist(), strict=True)]
    rows = np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)
    return GuidanceSet(rows, pool.labels[rows], pool.levels[rows])


def allot(total: int, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many of `total` each part gives, int64 like `sizes`: in proportion, at most half of its size, ties at random.

    What a part cannot give falls to the others, and the largest remainders are rounded up, so the sum is `total` or, if that is less, that
    of all halves.
    """
    limits = sizes // 2
    total = min(total, int(limits.sum()))
    exact, bounded = np.zeros(len(sizes)), limits == 0
    while not bounded.all():
        exact = np.where(
            bounded, limits, (total - limits[bounded].sum()) * sizes / sizes[~bounded].sum()
        )
        if not (exact > limits).any():
            break
        bounded |= exact > limits
    given = np.floor(exact + 1e-9).astype(np.int64)
    first = np.lexsort((rng.random(len(sizes)), np.round(given - exact, 9)))
    given[first[: total - given.sum()]] += 1
    return given


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
    return torch.softmax(logits.double(), 1)[
        torch.arange(len(labels)), torch.from_numpy(labels)
    ].numpy()


def without_outliers(values: np.ndarray) -> np.ndarray:
    """The values within 1.5 interquartile ranges of the quartiles (linear interpolation), ends included."""
    low, high = np.quantile(values, [0.25, 0.75])
    reach = 1.5 * (high - low)
    return values[(values >= low - reach) & (values <= high + reach)]


def measure_progress(
    guidance: GuidanceSet, before: np.ndarray, after: np.ndarray
) -> dict[str, Any]:
    """Plain numbers for the history: `{"gain": {level: mean}, "class_gain": {label: {level: mean}}}`, keys as texts as JSON has them.

    `before` and `after` are true-class probabilities `[images]`; outliers are dropped before averaging. A class that V has n images of
    at a level has there the gain (n · its own mean + `SHRINKAGE` · the level's gain) / (n + `SHRINKAGE`): V holds few images of a class,
    and the largest of a few noisy means would be noise.
    """
    change = after - before
    gain: dict[str, float] = {}
    own: dict[str, dict[str, tuple[int, float]]] = {
        str(label): {} for label in np.unique(guidance.labels).tolist()
    }
    for level in np.unique(guidance.levels).tolist():
        there = guidance.levels == level
        gain[str(level)] = float(without_outliers(change[there]).mean())
        for label, rows in _by_label(np.flatnonzero(there), guidance.labels).items():
            own[str(label)][str(level)] = len(rows), float(without_outliers(change[rows]).mean())
    class_gain = {
        label: {
            level: _shrunk(*means.get(level, (0, 0.0)), common) for level, common in gain.items()
        }
        for label, means in own.items()
    }
    return {"gain": gain, "class_gain": class_gain}


def _shrunk(images: int, mean: float, common: float) -> float:
    return (images * mean + SHRINKAGE * common) / (images + SHRINKAGE)


def best_level(gain: Mapping[str, float]) -> GuidanceLevel:
    """λ = argmax of the gain; the lower, more diverse level where two are equal."""
    return GuidanceLevel(int(min(gain, key=lambda level: (-gain[level], int(level)))))


def _by_label(rows: np.ndarray, labels: np.ndarray) -> dict[int, np.ndarray]:
    """`{label: rows}`, in the order in which the rows are given."""
    order = rows[np.argsort(labels[rows], kind="stable")]
    present, starts = np.unique(labels[order], return_index=True)
    return (
        dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}
    )
