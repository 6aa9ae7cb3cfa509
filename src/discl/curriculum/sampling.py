"""The rows of one epoch: real images and synthetic ones of its levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import TrainingError
from ..levels import REAL, format_level


@dataclass(frozen=True)
class Pool:
    """All samples that training may draw, one row each; a real image is a row at level 100.

    `labels` int64 `[rows]`, `levels` whole per cents `[rows]`, `synthetic` and `hard` bool
    `[rows]`; `hard` marks the real images that have a spectrum, `held_out` rows that are never
    drawn (default none). `sources` int64 `[rows]` says which rows belong together: a real image is
    its own source, its row number, and a synthetic image has the source that it was made from; -1
    where that is not known (default for synthetic images), numbers from `rows` on for real images
    that the pool does not hold.
    """

    labels: np.ndarray
    levels: np.ndarray
    synthetic: np.ndarray
    hard: np.ndarray
    class_names: Sequence[str]
    held_out: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    sources: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.sources):
            own = np.where(self.synthetic, -1, np.arange(len(self.labels)))
            object.__setattr__(self, "sources", own)
        if not len(self.held_out):
            object.__setattr__(self, "held_out", np.zeros(len(self.labels), bool))

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
        """Share of the classes that have hard images among all classes: 136 of 1,000 on ImageNet-LT."""
        return len(np.unique(self.labels[self.hard])) / self.num_classes

    @property
    def hard_by_class(self) -> bool:
        """Whether a class with a hard image has no real image that is not hard: the long tail's rule, seen from its outcome."""
        return not np.isin(
            self.labels[~self.synthetic & ~self.hard], np.unique(self.labels[self.hard])
        ).any()


@dataclass(frozen=True)
class SamplingConfig:
    """How an epoch is mixed. `tail_share` is kept by undersampling the other images; None takes them all.

    `synthetic_scale` is synthetic images per real hard image; where fewer were kept they `repeat` or the class is `cap`ped.
    A class that has none at all at its levels is an `error`, or takes those of its `nearest` level (none if it has none anywhere).
    Classes are drawn ∝ their images to the power `class_power`: 1 leaves an epoch as it is, 0 balances the classes, ½ lies between.
    `with_hard` false leaves the hard real images out of epochs that have levels (algorithm 2).
    """

    tail_share: float | None
    synthetic_scale: float
    shortage: str = "repeat"
    missing: str = "error"
    with_hard: bool = True
    class_power: float = 1.0


@dataclass(frozen=True)
class Pass:
    """One pass over the hard images with their synthetic ones and the others: row numbers in random order."""

    rows: np.ndarray
    synthetic: int
    distinct_synthetic: int
    hard: int

    @property
    def effective_scale(self) -> float:
        """Distinct synthetic images per real hard image."""
        return self.distinct_synthetic / self.hard if self.hard else 0.0


def draw_pass(
    pool: Pool, levels: Sequence[int], mixing: SamplingConfig, rng: np.random.Generator,
    class_levels: Mapping[int, Sequence[int]] | None = None,
) -> Pass:  # fmt: skip
    """All hard real images, `synthetic_scale` times as many synthetic ones of the levels, class by class, and the others.

    `class_levels` names the labels that take other levels than `levels`. Raises TrainingError that names every class which has hard
    images but no synthetic image at its levels.
    """
    hard = np.flatnonzero(pool.hard & ~pool.held_out)
    others = np.flatnonzero(~pool.hard & ~pool.synthetic & ~pool.held_out)
    drawn = [np.empty(0, np.int64)]
    distinct = 0
    if levels and mixing.synthetic_scale > 0:
        counts = np.bincount(pool.labels[hard], minlength=pool.num_classes)
        for label, rows in _offered(
            pool, np.flatnonzero(counts), levels, class_levels or {}, mixing.missing
        ).items():
            taken = _draw(rows, round(mixing.synthetic_scale * counts[label]), mixing.shortage, rng)
            drawn.append(taken)
            distinct += len(np.unique(taken))
    synthetic = np.concatenate(drawn)
    tail = np.concatenate([hard, synthetic]) if mixing.with_hard or not levels else synthetic
    if mixing.tail_share and len(tail):
        wanted = round(len(tail) * (1 - mixing.tail_share) / mixing.tail_share)
        if wanted < len(others):
            others = rng.choice(others, wanted, replace=False)
    rows = rng.permutation(np.concatenate([tail, others]))
    return Pass(rows, len(synthetic), distinct, len(hard))


def check_offered(pool: Pool, mixing: SamplingConfig, levels: Sequence[Sequence[int]]) -> None:
    """Raises TrainingError that names every class with hard images which one of these choices of levels leaves without a synthetic one."""
    labels = np.unique(pool.labels[pool.hard & ~pool.held_out])
    if mixing.synthetic_scale > 0 and mixing.missing == "error":
        lacking: dict[str, list[str]] = {}
        for each in filter(None, levels):
            for name, at in _lookup(pool, labels, each, {}, mixing.missing)[1].items():
                lacking.setdefault(name, []).extend(at)
        _refuse_lacking(lacking)


def _offered(
    pool: Pool,
    labels: np.ndarray,
    levels: Sequence[int],
    class_levels: Mapping[int, Sequence[int]],
    missing: str,
) -> dict[int, np.ndarray]:
    """`{label: rows of synthetic images at its levels}`, in one pass over the synthetic rows.

    Raises TrainingError that names every class without one, unless `missing` says otherwise.
    """
    result, lacking = _lookup(pool, labels, levels, class_levels, missing)
    _refuse_lacking(lacking)
    return result


def _lookup(
    pool: Pool,
    labels: np.ndarray,
    levels: Sequence[int],
    class_levels: Mapping[int, Sequence[int]],
    missing: str,
) -> tuple[dict[int, np.ndarray], dict[str, list[str]]]:
    """What `_offered` gives, and the names of classes that lack images, with their levels.

    Level 100 is the hard real images once more, which is plain oversampling; unless the pool holds extra ones at that level.
    """
    synthetic = np.flatnonzero(pool.synthetic & ~pool.held_out)
    synthetic = synthetic[np.argsort(pool.labels[synthetic], kind="stable")]
    starts = np.searchsorted(pool.labels[synthetic], np.arange(pool.num_classes + 1))
    result, lacking = {}, {}
    for label in labels.tolist():
        rows = synthetic[starts[label] : starts[label + 1]]
        wanted = list(class_levels.get(label, levels))
        there = rows[np.isin(pool.levels[rows], wanted)]
        if not len(there) and REAL in wanted:
            there = np.flatnonzero(pool.hard & ~pool.held_out & (pool.labels == label))
        if not len(there) and missing == "nearest" and len(rows):
            distance = np.abs(pool.levels[rows][:, None] - np.asarray(wanted)[None]).min(1)
            there = rows[distance == distance.min()]
        if len(there):
            result[label] = there
        elif missing == "error":
            lacking[pool.class_names[label]] = [", ".join(map(format_level, wanted))]
    return result, lacking


def _refuse_lacking(lacking: Mapping[str, Sequence[str]]) -> None:
    if lacking:
        first = list(lacking.items())[:12]
        told = "; ".join(f"'{name}' at {' and at '.join(levels)}" for name, levels in first) + (
            f"; and {len(lacking) - 12} more" if len(lacking) > 12 else ""
        )
        raise TrainingError(
            f"{len(lacking)} class{'es' * (len(lacking) > 1)} without a kept synthetic image at the levels of an epoch: {told}. "
            "Lower filter.threshold, raise spectrum.seeds, leave the level out of spectrum.levels, or set missing: nearest in the method."
        )


def _draw(rows: np.ndarray, wanted: int, shortage: str, rng: np.random.Generator) -> np.ndarray:
    """`wanted` of the rows at random, each as often as the others or once more; with `cap` each at most once."""
    if wanted <= len(rows) or shortage == "cap":
        return rng.choice(rows, min(wanted, len(rows)), replace=False)
    whole = np.repeat(rows, wanted // len(rows))
    return np.concatenate([whole, rng.choice(rows, wanted % len(rows), replace=False)])


def draw_epoch(
    pool: Pool, levels: Sequence[int], mixing: SamplingConfig, samples: int, seed: int,
    class_levels: Mapping[int, Sequence[int]] | None = None,
) -> tuple[np.ndarray, Pass]:  # fmt: skip
    """Row numbers `[samples]` of an epoch, and its first round, of which a short epoch is only a part.

    An epoch is a fixed number of samples, so all methods take equally many updates: rounds follow one another, each
    undersampled and drawn anew, and the last one is cut off.
    """
    rng = np.random.default_rng(seed)
    rounds = [draw_pass(pool, levels, mixing, rng, class_levels)]
    if not len(rounds[0].rows):
        raise TrainingError(
            "there is no sample to train on: the pool holds neither hard nor other real images."
        )
    while sum(len(each.rows) for each in rounds) < samples:
        rounds.append(draw_pass(pool, levels, mixing, rng, class_levels))
    rows = np.concatenate([each.rows for each in rounds])[:samples]
    if mixing.class_power != 1:
        rows = rng.permutation(
            balance_classes(rows, pool.labels[rows], samples, mixing.class_power, rng)
        )
    return rows, rounds[0]


def balance_classes(
    rows: np.ndarray, labels: np.ndarray, samples: int, power: float, rng: np.random.Generator
) -> np.ndarray:
    """`samples` of the rows, classes ∝ n_c^power of these rows (arXiv 1910.09217, eq. 1), evenly within a class."""
    present, counts = np.unique(labels, return_counts=True)
    shares = counts.astype(float) ** power
    wanted = rng.multinomial(samples, shares / shares.sum())
    return np.concatenate(
        [
            _draw(rows[labels == label], count, "repeat", rng)
            for label, count in zip(present, wanted.tolist(), strict=True)
        ]
    )
