"""The parts of an epoch, and when progress is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TrainingError
from ..utils.hashing import derive_seed
from .progress import (
    GuidanceSet,
    check_disjoint,
    count_sources,
    draw_guidance_set,
    hold_out,
    measure_progress,
)
from .sampling import Pool, SamplingConfig, check_offered, draw_epoch
from .strategies import WITHOUT_HARD, Adaptive, Bandit, History, Planned, Strategy

Record = dict[str, Any]
Judge = Callable[[], np.ndarray]
"""Measures the true-class probability of every image of V: float64 `[images]`."""


@dataclass(frozen=True)
class EpochSchedule:
    """Strategy and mixture over a pool. An epoch has `samples`; where the strategy probes, the first `probe_samples` are the probe's.

    `guidance` is V, for strategies that measure progress. Every draw is a function of (`seed`, epoch, levels).
    """

    pool: Pool
    strategy: Strategy
    mixing: SamplingConfig
    samples: int
    seed: int
    guidance: GuidanceSet | None = None
    probe_samples: int = 0

    def __post_init__(self) -> None:
        if self.guidance is not None:
            check_disjoint(self.pool, self.guidance)

    def parts(self, epoch: int) -> int:
        """Parts that an epoch is drawn in: a probe and then the level that it chooses, or everything at once."""
        return 2 if self.strategy.measures(epoch) == "probe" else 1

    def check(self, levels: Sequence[int], epochs: int) -> None:
        """Raises TrainingError where an epoch could come to levels at which a class with hard images has none to give.

        Those here that follow progress may come to each of `levels`, by itself; what one of your own may come to is not known beforehand.
        """
        if isinstance(self.strategy, Planned):
            check_offered(
                self.pool,
                self.mixing,
                sorted({self.strategy.levels(epoch, ()) for epoch in range(epochs)}),
            )
        elif isinstance(self.strategy, (Adaptive, Bandit)) and self.strategy.curriculum_epochs:
            check_offered(self.pool, self.mixing, [(level,) for level in sorted(levels)])

    def draw(self, epoch: int, part: int, history: History) -> tuple[np.ndarray, Record]:
        """The rows of a part of an epoch, and what was chosen as plain values for the epoch's record (nothing for a probe).

        `history` holds the records of all epochs before, and for the part after a probe one more with its progress.
        """
        probes = self.strategy.measures(epoch) == "probe"
        if probes and part == 0:
            return self.probe(epoch), {}
        levels, class_levels = (
            self.strategy.levels(epoch, history),
            self.strategy.class_levels(epoch, history),
        )
        left = self.samples - (self.probe_samples if probes else 0)
        rows, first = draw_epoch(
            self.pool, levels, self.mixing, left, derive_seed("mix", self.seed, epoch), class_levels
        )
        chosen: Record = {
            "levels": list(levels),
            "effective_scale": first.effective_scale,
        }
        if class_levels:
            chosen["classes_apart"] = sum(own != levels for own in class_levels.values())
            chosen["class_levels"] = {str(label): list(own) for label, own in class_levels.items()}
        return rows, chosen

    def probe(self, epoch: int) -> np.ndarray:
        """D of algorithm 2: random real rows `[probe_samples]`, hard ones among them; none twice before all had their turn."""
        real = np.flatnonzero(~self.pool.synthetic & ~self.pool.held_out)
        rng = np.random.default_rng(derive_seed("probe", self.seed, epoch))
        passes = [rng.permutation(real) for _ in range(-(-self.probe_samples // len(real)))]
        return np.concatenate(passes)[: self.probe_samples]

    def before(self, epoch: int, part: int, judge: Judge | None) -> np.ndarray | None:
        """What `judge` finds before a part around which progress is measured, the first one; None where it is not.

        Raises TrainingError where there is nothing to measure on.
        """
        if part or self.strategy.measures(epoch) == "never":
            return None
        if judge is None or self.guidance is None:
            raise TrainingError(
                "this strategy follows learning progress, but there is no guidance validation set to measure it on."
            )
        return judge()

    def progress(self, before: np.ndarray | None, judge: Judge | None) -> Record:
        """For the record: the progress that a part has brought, measured after it; nothing where `before` is None."""
        if before is None or judge is None or self.guidance is None:
            return {}
        return {"progress": measure_progress(self.guidance, before, judge())}


def hold_out_guidance(
    pool: Pool, levels: Sequence[int], images: int | None, seed: int
) -> tuple[Pool, GuidanceSet]:
    """V of at most `images` hard images (default 2,000, or a fifth of those with a spectrum if that
    is less), and the pool without them.

    Raises TrainingError where none can be held out.
    """
    size = images or max(1, min(2000, count_sources(pool) // 5))
    guidance = draw_guidance_set(pool, levels, size, derive_seed("guidance", seed))
    return hold_out(pool, guidance), guidance


def make_sampling(
    pool: Pool,
    strategy: str | Strategy,
    undersample: bool,
    synthetic_scale: float,
    shortage: str,
    missing: str,
    class_power: float = 1.0,
) -> SamplingConfig:
    """The mixture that goes with a strategy (one that ships may be named): those that probe leave the hard real images to the probe.

    Raises TrainingError where undersampling would leave none of the images that are not hard, since every class has hard ones.
    """
    if (
        undersample
        and pool.tail_share == 1
        and (~pool.hard & ~pool.synthetic & ~pool.held_out).any()
    ):
        raise TrainingError(
            "every class has hard images, so undersampling would leave out all others; use undersample: false."
        )
    with_hard = (
        strategy not in WITHOUT_HARD
        if isinstance(strategy, str)
        else strategy.measures(0) != "probe"
    )
    return SamplingConfig(
        pool.tail_share if undersample else None,
        synthetic_scale,
        shortage,
        missing,
        with_hard,
        class_power,
    )
