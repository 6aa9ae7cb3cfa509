"""Learning progress on a guidance validation set V.

V is the guidance validation set of arXiv 2410.13674, algorithm 2. It holds one synthetic image of
every level of each of its sources. Training draws nothing from these sources: neither the hard real
images, which the images of V nearly copy, nor their other synthetic images. Progress is the change
of the model's true-class probability on V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import TrainingError
from .allocation import divide
from .sampling import Pool

SHRINKAGE = 10
"""Weight, in images, of the mean over all classes in the mean of one class."""


@dataclass(frozen=True)
class GuidanceSet:
    """V: rows of a pool on which progress is measured.

    - `rows`: row numbers in the pool, int64 `[images]`.
    - `labels`: their labels, int64 `[images]`.
    - `levels`: their levels in whole per cent, int64 `[images]`.

    ```python
    import numpy as np

    import discl

    guidance = discl.GuidanceSet(np.array([6, 9]), np.array([0, 1]), np.array([0, 50]))
    assert len(guidance) == 2
    ```
    """

    rows: np.ndarray
    labels: np.ndarray
    levels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def draw_guidance_set(pool: Pool, levels: Sequence[int], size: int, seed: int) -> GuidanceSet:
    """Draws V of at most `size` sources, each with one synthetic image at every level.

    Classes are in proportion to their sources. V is smaller where fewer sources have an image at
    every level or can be spared. A class keeps at least half of its sources for training, one hard
    real image, and one synthetic image at each level.

    - `pool`: all samples, `[rows]`.
    - `levels`: the levels that each source of V has to cover.
    - `size`: number of sources, 1 or more.
    - `seed`: seed of the draw.

    Raises TrainingError where no source is left for V, or where the sources of the synthetic images
    are unknown.
    """
    rng = np.random.default_rng(seed)
    percents = np.array(sorted(levels), np.int64)
    rows = np.flatnonzero(pool.synthetic & ~pool.held_out)
    _check_sources_known(pool, rows)
    rows = rng.permutation(rows[np.isin(pool.levels[rows], percents)])
    sources, of_row = np.unique(pool.sources[rows], return_inverse=True)
    counts = np.zeros((len(sources), len(percents)), np.int64)
    np.add.at(counts, (of_row, np.searchsorted(percents, pool.levels[rows])), 1)
    labels = np.zeros(len(sources), np.int64)
    labels[of_row] = pool.labels[rows]
    spare = _spare_sources(pool, sources, labels, counts, rng=rng)
    sizes = np.bincount(labels, minlength=pool.num_classes)
    limits = np.array([len(spare.get(label, ())) for label in range(pool.num_classes)])
    parts = allocate(size, sizes, rng, limits)
    if not parts.sum():
        raise _nothing_to_hold_out(percents, counts)
    chosen = np.concatenate([spare[label][:part] for label, part in enumerate(parts) if part])
    candidates = np.flatnonzero(np.isin(of_row, chosen))
    pairs = np.stack([of_row[candidates], pool.levels[rows[candidates]]])
    first = np.unique(pairs, axis=1, return_index=True)[1]  # rows are in random order
    drawn = np.sort(rows[candidates[first]])
    return GuidanceSet(drawn, pool.labels[drawn], pool.levels[drawn])


def _check_sources_known(pool: Pool, rows: np.ndarray) -> None:
    unknown = int((pool.sources[rows] < 0).sum())
    if unknown:
        raise TrainingError(
            f"the sources of {unknown} synthetic images are unknown, so the images of the guidance "
            "validation set cannot be held out of training. Name the sources in a column "
            "source_id, or use a strategy that measures no progress."
        )


def _nothing_to_hold_out(percents: np.ndarray, counts: np.ndarray) -> TrainingError:
    """The error for sources of which none can be spared; `counts` is `[sources, levels]`."""
    present = counts > 0
    by_level = zip(percents.tolist(), present.sum(0).tolist(), strict=True)
    return TrainingError(
        "no hard image can be held out for the guidance validation set. "
        f"{len(counts)} hard images have kept synthetic images "
        f"({', '.join(f'{count} at {percent} %' for percent, count in by_level)}), "
        f"{present.all(1).sum()} of them at all levels. Each class keeps half of its hard images "
        "and one image of each level for training. Lower the filter threshold, generate more seeds "
        "per image, leave out a level, or use a strategy that measures no progress."
    )


def _spare_sources(
    pool: Pool,
    sources: np.ndarray,
    labels: np.ndarray,
    counts: np.ndarray,
    *,
    rng: np.random.Generator,
) -> dict[int, np.ndarray]:
    """`{label: indices into sources}` in random order: sources that a class can spare.

    They have an image at every level. `labels` is `[sources]`, `counts` `[sources, levels]`.
    """
    left = np.zeros((pool.num_classes, counts.shape[1]), np.int64)
    np.add.at(left, labels, counts)
    hard = np.bincount(pool.labels[pool.hard & ~pool.held_out], minlength=pool.num_classes)
    known = np.bincount(labels, minlength=pool.num_classes)
    spare = np.maximum(hard, known) // 2
    in_pool = np.isin(sources, np.flatnonzero(pool.hard & ~pool.held_out))
    result: dict[int, list[int]] = {}
    for index in rng.permutation(np.flatnonzero((counts > 0).all(1))).tolist():
        label = int(labels[index])
        rest = left[label] - counts[index]
        if spare[label] and (rest > 0).all() and hard[label] > in_pool[index]:
            left[label] = rest
            spare[label] -= 1
            hard[label] -= in_pool[index]
            result.setdefault(label, []).append(index)
    return {label: np.array(indices) for label, indices in result.items()}


def count_sources(pool: Pool) -> int:
    """Number of hard images from which the pool holds synthetic images that may be drawn."""
    rows = pool.synthetic & ~pool.held_out & (pool.sources >= 0)
    return len(np.unique(pool.sources[rows]))


def allocate(
    total: int, sizes: np.ndarray, rng: np.random.Generator, limits: np.ndarray | None = None
) -> np.ndarray:
    """Divides `total` among parts in proportion to their sizes, int64 `[parts]`.

    What a part cannot give falls to the others. The largest remainders are rounded up, ties at
    random, so the sum is `total` or the sum of all limits, whichever is less.

    - `sizes`: size of each part, `[parts]`.
    - `limits`: most that a part can give, `[parts]`; default half of its size.
    """
    limits = sizes // 2 if limits is None else limits
    total = min(total, int(limits.sum()))
    exact = divide(total, np.ones(len(sizes)), sizes, limits)
    given = np.floor(exact + 1e-9).astype(np.int64)
    first = np.lexsort((rng.random(len(sizes)), np.round(given - exact, 9)))
    given[first[: total - given.sum()]] += 1
    return given


def hold_out(pool: Pool, guidance: GuidanceSet) -> Pool:
    """The pool with every row of V's sources held out: real and synthetic, all seeds and levels."""
    held_out = pool.held_out | np.isin(pool.sources, pool.sources[guidance.rows])
    held_out[guidance.rows] = True
    return replace(pool, held_out=held_out)


def check_disjoint(pool: Pool, guidance: GuidanceSet) -> None:
    """Raises TrainingError where training could draw an image of V or of its sources."""
    sources = pool.sources[guidance.rows]
    trained = np.isin(pool.sources, sources[sources >= 0])
    trained[guidance.rows] = True
    trained &= ~pool.held_out
    if trained.any():
        raise TrainingError(
            f"{trained.sum()} images of the sources of the guidance validation set can also be "
            f"drawn for training, the first is row {np.flatnonzero(trained)[0]}. Progress on them "
            "would measure memory. Mark them in Pool.held_out."
        )


def drop_outliers(values: np.ndarray) -> np.ndarray:
    """The values within 1.5 interquartile ranges of the quartiles, ends included.

    Quartiles are interpolated linearly.
    """
    low, high = np.quantile(values, [0.25, 0.75])
    reach = 1.5 * (high - low)
    return values[(values >= low - reach) & (values <= high + reach)]


def measure_progress(
    guidance: GuidanceSet, before: np.ndarray, after: np.ndarray
) -> dict[str, Any]:
    """Mean gain of the true-class probability at every level, over all classes and for each class.

    Returns `{"gain": {level: mean}, "class_gain": {label: {level: mean}}}` with keys as strings, as
    in JSON. Outliers are dropped before averaging (arXiv 2410.13674, algorithm 2). The gain of a
    class with n images of V at a level is (n · mean of the class + 10 · gain of the level) /
    (n + 10), because V holds few images of a class and their mean is noisy.

    - `guidance`: V.
    - `before`: true-class probabilities before training, in [0, 1], `[images]`.
    - `after`: the same after training, `[images]`.

    ```python
    import numpy as np

    import discl

    guidance = discl.GuidanceSet(np.arange(4), np.zeros(4, int), np.array([0, 0, 50, 50]))
    progress = discl.measure_progress(
        guidance, before=np.full(4, 0.25), after=np.array([0.25, 0.25, 0.5, 0.5])
    )
    assert progress["gain"] == {"0": 0.0, "50": 0.25}
    ```
    """
    change = after - before
    gain: dict[str, float] = {}
    own: dict[str, dict[str, tuple[float, int]]] = {
        str(label): {} for label in np.unique(guidance.labels).tolist()
    }
    for level in np.unique(guidance.levels).tolist():
        at_level = guidance.levels == level
        gain[str(level)] = float(drop_outliers(change[at_level]).mean())
        for label, rows in _by_label(np.flatnonzero(at_level), guidance.labels).items():
            mean = float(drop_outliers(change[rows]).mean())
            own[str(label)][str(level)] = len(rows) * mean, len(rows)
    class_gain = {
        label: {
            level: shrunk_mean(*means.get(level, (0.0, 0)), common)
            for level, common in gain.items()
        }
        for label, means in own.items()
    }
    return {"gain": gain, "class_gain": class_gain}


def shrunk_mean(total: float, images: int, common: float) -> float:
    """The mean of a class, drawn towards that of all: (total + 10 · common) / (images + 10).

    - `total`: sum over the images of the class; `common`: mean over all classes.
    """
    return (total + SHRINKAGE * common) / (images + SHRINKAGE)


def best_level(gain: Mapping[str, float]) -> int:
    """argmax of the gain over λ (arXiv 2410.13674, algorithm 2); of equals the lowest level."""
    return int(min(gain, key=lambda level: (-gain[level], int(level))))


def _by_label(rows: np.ndarray, labels: np.ndarray) -> dict[int, np.ndarray]:
    """`{label: rows}`, rows in the given order."""
    order = rows[np.argsort(labels[rows], kind="stable")]
    present, starts = np.unique(labels[order], return_index=True)
    return (
        dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}
    )
