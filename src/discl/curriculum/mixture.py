"""Which samples an epoch draws: real images and synthetic ones of the epoch's levels (arXiv 2410.13674, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import TrainingError
from ..levels import GuidanceLevel


@dataclass(frozen=True)
class Pool:
    """All samples that training may draw, one row each; a real image is a row at level 100.

    `labels` int64 `[rows]`, `levels` whole per cents `[rows]`, `synthetic` and `hard` bool `[rows]`; `hard` marks the
    real images that have a spectrum.
    """

    labels: np.ndarray
    levels: np.ndarray
    synthetic: np.ndarray
    hard: np.ndarray
    class_names: Sequence[str]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def real_counts(self) -> np.ndarray:
        """Real images per class, int64 `[classes]`."""
        return np.bincount(self.labels[~self.synthetic], minlength=self.num_classes)

    @property
    def tail_share(self) -> float:
        """Share of the classes that have hard images among all classes: 136 of 1,000 on ImageNet-LT."""
        return len(np.unique(self.labels[self.hard])) / self.num_classes


@dataclass(frozen=True)
class Mixing:
    """How an epoch is mixed. `tail_share` is kept by undersampling the other images; None takes them all.

    `synthetic_scale` is synthetic images per real hard image; where fewer were kept they `repeat` or the class is `cap`ped.
    """

    tail_share: float | None
    synthetic_scale: float
    shortage: str = "repeat"


@dataclass(frozen=True)
class Round:
    """One pass over the hard images with their synthetic ones and the others: row numbers in random order."""

    rows: np.ndarray
    synthetic: int
    distinct_synthetic: int
    hard: int

    @property
    def effective_scale(self) -> float:
        """Distinct synthetic images per real hard image."""
        return self.distinct_synthetic / self.hard if self.hard else 0.0


def mix_round(pool: Pool, levels: Sequence[GuidanceLevel], mixing: Mixing, rng: np.random.Generator) -> Round:
    """All hard real images, `synthetic_scale` times as many synthetic ones of the levels, class by class, and the others.

    Raises TrainingError for a class that has hard images but no synthetic image at these levels.
    """
    hard = np.flatnonzero(pool.hard)
    others = np.flatnonzero(~pool.hard & ~pool.synthetic)
    drawn = [np.empty(0, np.int64)]
    distinct = 0
    if levels and mixing.synthetic_scale > 0:
        offered = pool.synthetic & np.isin(pool.levels, [level.percent for level in levels])
        for label, count in enumerate(np.bincount(pool.labels[hard], minlength=pool.num_classes)):
            if count:
                rows = np.flatnonzero(offered & (pool.labels == label))
                if not len(rows):
                    raise TrainingError(
                        f"class '{pool.class_names[label]}' has no kept synthetic image at level {', '.join(map(str, levels))}; "
                        "lower filter.threshold, raise spectrum.seeds, or leave this level out of spectrum.levels."
                    )
                taken = _draw(rows, round(mixing.synthetic_scale * count), mixing.shortage, rng)
                drawn.append(taken)
                distinct += len(np.unique(taken))
    synthetic = np.concatenate(drawn)
    tail = np.concatenate([hard, synthetic])
    if mixing.tail_share and len(tail):
        wanted = round(len(tail) * (1 - mixing.tail_share) / mixing.tail_share)
        if wanted < len(others):
            others = rng.choice(others, wanted, replace=False)
    rows = rng.permutation(np.concatenate([tail, others]))
    return Round(rows, len(synthetic), distinct, len(hard))


def _draw(rows: np.ndarray, wanted: int, shortage: str, rng: np.random.Generator) -> np.ndarray:
    """`wanted` of the rows at random, each as often as the others or once more; with `cap` each at most once."""
    if wanted <= len(rows) or shortage == "cap":
        return rng.choice(rows, min(wanted, len(rows)), replace=False)
    whole = np.repeat(rows, wanted // len(rows))
    return np.concatenate([whole, rng.choice(rows, wanted % len(rows), replace=False)])


def mix_epoch(pool: Pool, levels: Sequence[GuidanceLevel], mixing: Mixing, samples: int, seed: int) -> tuple[np.ndarray, Round]:
    """Row numbers `[samples]` of an epoch, and its first round.

    An epoch is a fixed number of samples, so all methods take equally many updates: rounds follow one another, each
    undersampled and drawn anew, and the last one is cut off.
    """
    rng = np.random.default_rng(seed)
    rounds = [mix_round(pool, levels, mixing, rng)]
    if not len(rounds[0].rows):
        raise TrainingError("there is no sample to train on: the pool holds neither hard nor other real images.")
    while sum(len(each.rows) for each in rounds) < samples:
        rounds.append(mix_round(pool, levels, mixing, rng))
    return np.concatenate([each.rows for each in rounds])[:samples], rounds[0]
