"""Learning progress on a guidance validation set V.

V holds one synthetic image of every level of each of its sources, and training draws nothing of
those sources: not the hard real images that V's images nearly copy, nor their other synthetic
images. Progress is the change of the model's true-class probability on V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainingError
from .sampling import Pool

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


def draw_guidance_set(pool: Pool, levels: Sequence[int], size: int, seed: int) -> GuidanceSet:
    """V of at most `size` sources, each with one synthetic image at every level, classes in
    proportion to their sources.

    Where fewer sources have an image at every level, or can be spared, V is smaller. A class keeps
    at least half of its sources for training, one hard real image and one synthetic image at each
    level. Raises TrainingError where no source is left for V, or where the sources of the synthetic
    images are not known.
    """
    rng = np.random.default_rng(seed)
    percents = np.array(sorted(levels), np.int64)
    rows = np.flatnonzero(pool.synthetic & ~pool.held_out)
    if (pool.sources[rows] < 0).any():
        raise TrainingError(
            f"the sources of {(pool.sources[rows] < 0).sum()} synthetic images are not known, so "
            "what their progress is measured on "
            "cannot be held out of training; name them in a column source_id, or use a strategy "
            "that measures nothing."
        )
    rows = rng.permutation(rows[np.isin(pool.levels[rows], percents)])
    sources, of_row = np.unique(pool.sources[rows], return_inverse=True)
    counts = np.zeros((len(sources), len(percents)), np.int64)
    np.add.at(counts, (of_row, np.searchsorted(percents, pool.levels[rows])), 1)
    labels = np.zeros(len(sources), np.int64)
    labels[of_row] = pool.labels[rows]
    sparable = _sparable(pool, sources, labels, counts, rng)
    sizes = np.bincount(labels, minlength=pool.num_classes)
    limits = np.array([len(sparable.get(label, ())) for label in range(pool.num_classes)])
    parts = allot(size, sizes, rng, limits)
    if not parts.sum():
        there = ", ".join(
            f"{count} at {percent} %"
            for percent, count in zip(percents.tolist(), (counts > 0).sum(0).tolist(), strict=True)
        )
        raise TrainingError(
            f"no hard image can be held out for the guidance validation set: of {len(sources)} "
            f"with kept synthetic images {there}, "
            f"{(counts > 0).all(1).sum()} at all levels, and each class keeps half of its hard "
            "images and an image of each level for "
            "training; lower filter.threshold, raise spectrum.seeds, leave a level out of "
            "spectrum.levels, or use a strategy that "
            "measures nothing."
        )
    chosen = np.concatenate([sparable[label][:part] for label, part in enumerate(parts) if part])
    mine = np.flatnonzero(np.isin(of_row, chosen))
    pairs = np.stack([of_row[mine], pool.levels[rows[mine]]])
    first = np.unique(pairs, axis=1, return_index=True)[1]  # rows are in random order
    drawn = np.sort(rows[mine[first]])
    return GuidanceSet(drawn, pool.labels[drawn], pool.levels[drawn])


def _sparable(
    pool: Pool,
    sources: np.ndarray,
    labels: np.ndarray,
    counts: np.ndarray,
    rng: np.random.Generator,
) -> dict[int, np.ndarray]:
    """`{label: places in sources}`, in random order: those with an image at every level that the
    class can spare, one after another.

    `labels` `[sources]`, `counts` of images `[sources, levels]`.
    """
    left = np.zeros((pool.num_classes, counts.shape[1]), np.int64)
    np.add.at(left, labels, counts)
    hard = np.bincount(pool.labels[pool.hard & ~pool.held_out], minlength=pool.num_classes)
    known = np.bincount(labels, minlength=pool.num_classes)
    spare = np.maximum(hard, known) // 2
    own = np.isin(sources, np.flatnonzero(pool.hard & ~pool.held_out))
    result: dict[int, list[int]] = {}
    for place in rng.permutation(np.flatnonzero((counts > 0).all(1))).tolist():
        label = int(labels[place])
        rest = left[label] - counts[place]
        if spare[label] and (rest > 0).all() and hard[label] > own[place]:
            left[label] = rest
            spare[label] -= 1
            hard[label] -= own[place]
            result.setdefault(label, []).append(place)
    return {label: np.array(places) for label, places in result.items()}


def count_sources(pool: Pool) -> int:
    """Hard images from which the pool holds synthetic images."""
    return len(np.unique(pool.sources[pool.synthetic & (pool.sources >= 0)]))


def allot(
    total: int, sizes: np.ndarray, rng: np.random.Generator, limits: np.ndarray | None = None
) -> np.ndarray:
    """How many of `total` each part gives, int64 like `sizes`: in proportion, at most its limit
    (default half of its size), ties at random.

    What a part cannot give falls to the others, and the largest remainders are rounded up, so the sum is `total` or, if that is less, that
    of all limits.
    """
    limits = sizes // 2 if limits is None else limits
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


def hold_out(pool: Pool, guidance: GuidanceSet) -> Pool:
    """The pool without V: every row of V's sources, real and synthetic, at all seeds and levels, is
    held out."""
    held_out = pool.held_out | np.isin(pool.sources, pool.sources[guidance.rows])
    held_out[guidance.rows] = True
    return replace(pool, held_out=held_out)


def check_disjoint(pool: Pool, guidance: GuidanceSet) -> None:
    """Raises TrainingError where training could draw an image of V, or another image of its
    sources."""
    sources = pool.sources[guidance.rows]
    trained = np.isin(pool.sources, sources[sources >= 0])
    trained[guidance.rows] = True
    trained &= ~pool.held_out
    if trained.any():
        raise TrainingError(
            f"{trained.sum()} images of the sources of the guidance validation set may also be "
            "trained on "
            f"(row {np.flatnonzero(trained)[0]}); progress on it would be memory. Mark them in "
            "Pool.held_out."
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


def best_level(gain: Mapping[str, float]) -> int:
    """λ = argmax of the gain; the lower, more diverse level where two are equal."""
    return int(min(gain, key=lambda level: (-gain[level], int(level))))


def _by_label(rows: np.ndarray, labels: np.ndarray) -> dict[int, np.ndarray]:
    """`{label: rows}`, in the order in which the rows are given."""
    order = rows[np.argsort(labels[rows], kind="stable")]
    present, starts = np.unique(labels[order], return_index=True)
    return (
        dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}
    )
