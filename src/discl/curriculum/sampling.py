"""The rows of one epoch: real images and synthetic ones of its levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np

from ..errors import TrainingError
from ..levels import REAL, format_level
from ..utils.counts import count_have, list_some

MOST_NAMED = 12
"""Classes that an error names at most."""


@dataclass(frozen=True)
class Pool:
    """All samples that training may draw, one row each; a real image is a row at level 100.

    - `labels`: int64 `[rows]`.
    - `levels`: whole per cent, int64 `[rows]`.
    - `synthetic`: images beside the real training images, bool `[rows]`: synthetic ones, or
      retrieved ones at level 100.
    - `hard`: real images that have a spectrum, bool `[rows]`.
    - `class_names`: names of the labels, `[classes]`.
    - `held_out`: rows that are never drawn, bool `[rows]`; default none.
    - `sources`: which rows belong together, int64 `[rows]`. The source of a real image is its own
      row. The source of a synthetic image is the real image that it was made from, or -1 where that
      is unknown (default). Numbers from `rows` on are real images that the pool does not hold.
    - `since`: first epoch that may draw a row, int64 `[rows]`; default 0 for all. Rows that come
      later stand behind the others.

    ```python
    import numpy as np

    import discl

    pool = discl.Pool(
        labels=np.array([0, 1, 1]),
        levels=np.array([100, 100, 50]),
        synthetic=np.array([False, False, True]),
        hard=np.array([False, True, False]),
        class_names=("cat", "dog"),
    )
    assert pool.tail_share == 0.5
    ```
    """

    labels: np.ndarray
    levels: np.ndarray
    synthetic: np.ndarray
    hard: np.ndarray
    class_names: Sequence[str]
    _: KW_ONLY
    held_out: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    sources: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    since: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.sources):
            own = np.where(self.synthetic, -1, np.arange(len(self.labels)))
            object.__setattr__(self, "sources", own)
        if not len(self.held_out):
            object.__setattr__(self, "held_out", np.zeros(len(self.labels), bool))

    def at(self, epoch: int) -> Pool:
        """The pool in which rows of later epochs are held out."""
        late = self.since > epoch
        return replace(self, held_out=self.held_out | late) if late.any() else self

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def real_counts(self) -> np.ndarray:
        """Real images per class that may be drawn, int64 `[classes]`."""
        drawn = ~self.synthetic & ~self.held_out
        return np.bincount(self.labels[drawn], minlength=self.num_classes)

    @property
    def tail_share(self) -> float:
        """Fraction of classes that have hard images: 136 of 1,000 on ImageNet-LT."""
        return len(np.unique(self.labels[self.hard])) / self.num_classes

    @property
    def hard_by_class(self) -> bool:
        """Whether every real image of a class with hard images is hard, as in a long tail."""
        return not np.isin(
            self.labels[~self.synthetic & ~self.hard], np.unique(self.labels[self.hard])
        ).any()


@dataclass(frozen=True)
class SamplingConfig:
    """How real and synthetic images are mixed in an epoch.

    - `tail_share`: fraction of an epoch for hard and synthetic images, in (0, 1], kept by
      undersampling the other images. None takes all of them.
    - `synthetic_scale`: synthetic images per hard real image, 0 or more.
    - `shortage`: where fewer images were kept, `repeat` them or `cap` the class.
    - `missing`: a class without images at its levels is an `error`, or takes the images of its
      `nearest` level (none if it has none).
    - `with_hard`: whether epochs with synthetic images draw the hard real images too; false in
      arXiv 2410.13674, algorithm 2.
    - `class_power`: classes are drawn in proportion to n_c^`class_power`, where n_c counts their
      rows in the epoch. 1 changes nothing, 0 balances the classes.

    ```python
    import discl

    sampling = discl.SamplingConfig(None, 3.0, missing="nearest")
    assert sampling.shortage == "repeat"
    ```
    """

    tail_share: float | None
    synthetic_scale: float
    _: KW_ONLY
    shortage: str = "repeat"
    missing: str = "error"
    with_hard: bool = True
    class_power: float = 1.0


@dataclass(frozen=True)
class Pass:
    """One pass over hard, synthetic and other images: row numbers in random order."""

    rows: np.ndarray
    synthetic: int
    distinct_synthetic: int
    hard: int

    @property
    def effective_scale(self) -> float:
        """Distinct synthetic images per hard real image."""
        return self.distinct_synthetic / self.hard if self.hard else 0.0


def draw_pass(
    pool: Pool,
    levels: Sequence[int],
    sampling: SamplingConfig,
    rng: np.random.Generator,
    *,
    class_levels: Mapping[int, Sequence[int]] | None = None,
) -> Pass:
    """Draws the hard real images, synthetic ones of the levels class by class, and the others.

    - `class_levels`: levels of labels that do not take `levels`.

    Raises TrainingError that names every class with hard images and no synthetic image at its
    levels.
    """
    hard = np.flatnonzero(pool.hard & ~pool.held_out)
    others = np.flatnonzero(~pool.hard & ~pool.synthetic & ~pool.held_out)
    drawn = [np.empty(0, np.int64)]
    distinct = 0
    if levels and sampling.synthetic_scale > 0:
        counts = np.bincount(pool.labels[hard], minlength=pool.num_classes)
        available, missing = _find_synthetic(
            pool, np.flatnonzero(counts), levels, class_levels or {}, missing=sampling.missing
        )
        _raise_if_missing(missing)
        for label, rows in available.items():
            wanted = round(sampling.synthetic_scale * counts[label])
            part = _draw(rows, wanted, sampling.shortage, rng)
            drawn.append(part)
            distinct += len(np.unique(part))
    synthetic = np.concatenate(drawn)
    tail = np.concatenate([hard, synthetic]) if sampling.with_hard or not levels else synthetic
    if sampling.tail_share and len(tail):
        wanted = round(len(tail) * (1 - sampling.tail_share) / sampling.tail_share)
        if wanted < len(others):
            others = rng.choice(others, wanted, replace=False)
    rows = rng.permutation(np.concatenate([tail, others]))
    return Pass(rows, len(synthetic), distinct, len(hard))


def check_available(pool: Pool, sampling: SamplingConfig, choices: Sequence[Sequence[int]]) -> None:
    """Checks that every class with hard images has synthetic ones for each choice of levels.

    Raises TrainingError that names every class that has none.
    """
    labels = np.unique(pool.labels[pool.hard & ~pool.held_out])
    if sampling.synthetic_scale > 0 and sampling.missing == "error":
        missing: dict[str, list[str]] = {}
        for levels in filter(None, choices):
            _, absent = _find_synthetic(pool, labels, levels, {}, missing=sampling.missing)
            for name, at in absent.items():
                missing.setdefault(name, []).extend(at)
        _raise_if_missing(missing)


def _find_synthetic(
    pool: Pool,
    labels: np.ndarray,
    levels: Sequence[int],
    class_levels: Mapping[int, Sequence[int]],
    *,
    missing: str,
) -> tuple[dict[int, np.ndarray], dict[str, list[str]]]:
    """`{label: rows at its levels}`, and `{class name: levels}` of classes that have none.

    Level 100 repeats the hard real images (oversampling), unless the pool holds synthetic images at
    that level.
    """
    synthetic = np.flatnonzero(pool.synthetic & ~pool.held_out)
    synthetic = synthetic[np.argsort(pool.labels[synthetic], kind="stable")]
    starts = np.searchsorted(pool.labels[synthetic], np.arange(pool.num_classes + 1))
    available, absent = {}, {}
    for label in labels.tolist():
        rows = synthetic[starts[label] : starts[label + 1]]
        wanted = list(class_levels.get(label, levels))
        found = rows[np.isin(pool.levels[rows], wanted)]
        if not len(found) and REAL in wanted:
            found = np.flatnonzero(pool.hard & ~pool.held_out & (pool.labels == label))
        if not len(found) and missing == "nearest" and len(rows):
            distance = np.abs(pool.levels[rows][:, None] - np.asarray(wanted)[None]).min(1)
            found = rows[distance == distance.min()]
        if len(found):
            available[label] = found
        elif missing == "error":
            absent[pool.class_names[label]] = [", ".join(map(format_level, wanted))]
    return available, absent


def _raise_if_missing(absent: Mapping[str, Sequence[str]]) -> None:
    if not absent:
        return
    named = [f"'{name}' at {' and at '.join(levels)}" for name, levels in absent.items()]
    raise TrainingError(
        f"got 'error', but {count_have(len(absent), 'class', 'classes')} no kept synthetic image "
        f"at the levels of an epoch: {list_some(named, MOST_NAMED, '; ')}. Lower the filter "
        "threshold, generate more seeds per image, leave out the level, or use 'nearest'.",
        argument="missing",
    )


def _draw(rows: np.ndarray, wanted: int, shortage: str, rng: np.random.Generator) -> np.ndarray:
    """`wanted` random rows, their counts equal or one apart; with `cap` each at most once."""
    if wanted <= len(rows) or shortage == "cap":
        return rng.choice(rows, min(wanted, len(rows)), replace=False)
    whole = np.repeat(rows, wanted // len(rows))
    return np.concatenate([whole, rng.choice(rows, wanted % len(rows), replace=False)])


def draw_epoch(
    pool: Pool,
    levels: Sequence[int],
    sampling: SamplingConfig,
    samples: int,
    *,
    seed: int,
    class_levels: Mapping[int, Sequence[int]] | None = None,
) -> tuple[np.ndarray, Pass]:
    """Row numbers of an epoch, int64 `[samples]`, and its first pass.

    An epoch is a fixed number of samples, so that all methods take equally many updates. Passes
    follow one another, each undersampled and drawn independently. The last one is cut off.

    - `pool`: all samples, `[rows]`.
    - `levels`: the levels of the synthetic images; empty for real images only.
    - `sampling`: how real and synthetic images are mixed.
    - `samples`: rows of the epoch, 1 or more.
    - `seed`: seed of the draw.
    - `class_levels`: levels of labels that do not take `levels`.

    Raises TrainingError where the pool has no row to draw, or a class with hard images has no
    synthetic image at its levels.

    ```python
    import numpy as np

    import discl

    pool = discl.Pool(
        labels=np.array([0, 1, 1, 1]),
        levels=np.array([100, 100, 50, 50]),
        synthetic=np.array([False, False, True, True]),
        hard=np.array([False, True, False, False]),
        class_names=("cat", "dog"),
    )
    sampling = discl.SamplingConfig(None, 2.0)
    rows, first = discl.draw_epoch(pool, [50], sampling, 8, seed=0)
    assert len(rows) == 8 and first.effective_scale == 2.0
    ```
    """
    rng = np.random.default_rng(seed)
    passes = [draw_pass(pool, levels, sampling, rng, class_levels=class_levels)]
    if not len(passes[0].rows):
        raise TrainingError(
            "there is no sample to train on: the pool holds neither hard nor other real images."
        )
    while sum(len(each.rows) for each in passes) < samples:
        passes.append(draw_pass(pool, levels, sampling, rng, class_levels=class_levels))
    rows = np.concatenate([each.rows for each in passes])[:samples]
    if sampling.class_power != 1:
        rows = rng.permutation(
            balance_classes(rows, pool.labels[rows], samples, sampling.class_power, rng=rng)
        )
    return rows, passes[0]


def sample_weights(
    synthetic: np.ndarray, weight: float | Sequence[float], progress: float = 0.0
) -> np.ndarray:
    """Weights of samples in the loss, float64 `[samples]`: 1, and that of synthetic ones.

    Divide the weighted sum by the number of samples, not by the sum of the weights: parts of a
    batch then add up.

    - `synthetic`: which samples are synthetic, bool `[samples]`.
    - `weight`: one number, or two for a weight that goes linearly from the first to the second.
    - `progress`: of the training, in [0, 1].

    ```python
    import numpy as np

    import discl

    levels = np.array([100, 0, 50])
    assert discl.sample_weights(levels < 100, (1.0, 0.0), 0.75).tolist() == [1.0, 0.25, 0.25]
    ```
    """
    first, last = (weight, weight) if isinstance(weight, int | float) else weight
    return np.where(synthetic, first + (last - first) * progress, 1.0)


def balance_classes(
    rows: np.ndarray,
    labels: np.ndarray,
    samples: int,
    power: float,
    *,
    rng: np.random.Generator,
) -> np.ndarray:
    """`samples` of the rows, classes in proportion to n_c^power (arXiv 1910.09217, eq. 1).

    - `rows`, `labels`: row numbers and their labels, `[drawn]`; n_c counts the rows of class c.
    - `power`: 0 balances the classes, 1 keeps their proportions.
    """
    present, counts = np.unique(labels, return_counts=True)
    weights = counts.astype(float) ** power
    wanted = rng.multinomial(samples, weights / weights.sum())
    return np.concatenate(
        [
            _draw(rows[labels == label], count, "repeat", rng)
            for label, count in zip(present, wanted.tolist(), strict=True)
        ]
    )
