"""The parts of an epoch, and when progress is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
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
from .sampling import Pool, SamplingConfig, check_available, draw_epoch
from .strategies import WITHOUT_HARD, Adaptive, Bandit, History, Planned, Strategy

Record = dict[str, Any]
Measure = Callable[[], np.ndarray]
"""Measures the true-class probability of every image of V, float64 `[images]`."""


@dataclass(frozen=True)
class Finish:
    """The last epochs of a training, on real images only.

    - `start`: the first of them.
    - `head_only`: only the head is trained, and every class is drawn equally often.
    - `new_head`: the head begins again as at the start of training.
    """

    start: int
    head_only: bool = False
    new_head: bool = False

    def of_head(self, epoch: int) -> bool:
        """Whether an epoch trains the head only."""
        return self.head_only and epoch >= self.start


@dataclass(frozen=True)
class EpochSchedule:
    """What each epoch draws from a pool, and when progress is measured.

    Every draw is a function of the seed, the epoch and its levels.

    - `pool`: all samples, `[rows]`.
    - `strategy`: chooses the levels of each epoch.
    - `sampling`: how real and synthetic images are mixed.
    - `samples`: rows of an epoch.
    - `seed`: seed of all draws.
    - `guidance`: V, for strategies that measure progress.
    - `probe_samples`: how many of the `samples` a probe takes, where the strategy probes.
    - `finish`: last epochs with real images only, whatever the strategy says; default none.

    Raises TrainingError where the pool could draw an image of V or of its sources.
    """

    pool: Pool
    strategy: Strategy
    sampling: SamplingConfig
    _: KW_ONLY
    samples: int
    seed: int
    guidance: GuidanceSet | None = None
    probe_samples: int = 0
    finish: Finish | None = None

    def __post_init__(self) -> None:
        if self.guidance is not None:
            check_disjoint(self.pool, self.guidance)

    def parts(self, epoch: int) -> int:
        """Parts of an epoch: 2 for a probe and the level that it chooses, otherwise 1."""
        return 2 if self._measures(epoch) == "probe" else 1

    def _finishes(self, epoch: int) -> bool:
        return self.finish is not None and epoch >= self.finish.start

    def _measures(self, epoch: int) -> str:
        return "never" if self._finishes(epoch) else self.strategy.measures(epoch)

    def check(self, levels: Sequence[int], epochs: int) -> None:
        """Checks that every class with hard images has synthetic ones whatever an epoch draws.

        A built-in strategy that follows progress may draw any single level. The levels of a custom
        one are unknown before training and are not checked. Raises TrainingError.
        """
        starts = sorted({0, *np.unique(self.pool.since).tolist()})
        if isinstance(self.strategy, Planned):
            for first, end in zip(starts, [*starts[1:], epochs], strict=True):
                planned = {self.strategy.levels(epoch, ()) for epoch in range(first, end)}
                check_available(self.pool.at(first), self.sampling, sorted(planned))
        elif isinstance(self.strategy, (Adaptive, Bandit)) and self.strategy.curriculum_epochs:
            choices = [(level,) for level in sorted(levels)]
            check_available(self.pool.at(0), self.sampling, choices)

    def draw(self, epoch: int, part: int, history: History) -> tuple[np.ndarray, Record]:
        """The rows of a part of an epoch, and its choice as plain values (empty for a probe).

        - `history`: the records of all earlier epochs. After a probe there is one more, which holds
          its progress.
        """
        probes, sampling = self._measures(epoch) == "probe", self.sampling
        if probes and part == 0:
            return self.draw_probe(epoch), {}
        levels: Sequence[int] = ()
        class_levels = None
        if not self._finishes(epoch):
            levels = self.strategy.levels(epoch, history)
            class_levels = self.strategy.class_levels(epoch, history)
        elif self.finish is not None and self.finish.head_only:
            sampling = SamplingConfig(None, 0.0, class_power=0.0)
        rows, first = draw_epoch(
            self.pool.at(epoch),
            levels,
            sampling,
            self.samples - (self.probe_samples if probes else 0),
            seed=derive_seed("mix", self.seed, epoch),
            class_levels=class_levels,
        )
        chosen: Record = {
            "levels": list(levels),
            "effective_scale": first.effective_scale,
        }
        if class_levels:
            chosen["classes_apart"] = sum(own != levels for own in class_levels.values())
            chosen["class_levels"] = {str(label): list(own) for label, own in class_levels.items()}
        return rows, chosen

    def draw_probe(self, epoch: int) -> np.ndarray:
        """Random real rows, hard ones among them, int64 `[probe_samples]`.

        This is D of arXiv 2410.13674, algorithm 2. No row repeats before all have been drawn.
        """
        real = np.flatnonzero(~self.pool.synthetic & ~self.pool.held_out)
        rng = np.random.default_rng(derive_seed("probe", self.seed, epoch))
        passes = [rng.permutation(real) for _ in range(-(-self.probe_samples // len(real)))]
        return np.concatenate(passes)[: self.probe_samples]

    def measure_before(self, epoch: int, part: int, measure: Measure | None) -> np.ndarray | None:
        """Probabilities on V before the first part of an epoch, None where none are needed.

        Raises TrainingError where the strategy measures progress and there is no V or `measure`.
        """
        if part or self._measures(epoch) == "never":
            return None
        if measure is None or self.guidance is None:
            raise TrainingError(
                "this strategy follows learning progress, and there is no guidance validation set "
                "to measure it on."
            )
        return measure()

    def measure_after(self, before: np.ndarray | None, measure: Measure | None) -> Record:
        """The progress of a part for its record; empty where `before` is None."""
        if before is None or measure is None or self.guidance is None:
            return {}
        return {"progress": measure_progress(self.guidance, before, measure())}


def hold_out_guidance(
    pool: Pool, levels: Sequence[int], images: int | None, seed: int
) -> tuple[Pool, GuidanceSet]:
    """The pool without V's sources, and V.

    - `images`: hard images of V at most. Default 2,000, or a fifth of those with a spectrum if that
      is less.

    Raises TrainingError where none can be held out.
    """
    first = pool.at(0)  # V is the same in all rounds of a loop
    size = images or max(1, min(2000, count_sources(first) // 5))
    guidance = draw_guidance_set(first, levels, size, derive_seed("guidance", seed))
    return hold_out(pool, guidance), guidance


def make_sampling(
    pool: Pool,
    strategy: str | Strategy,
    *,
    undersample: bool,
    synthetic_scale: float,
    shortage: str,
    missing: str,
    class_power: float = 1.0,
) -> SamplingConfig:
    """The mixture for a strategy, which a built-in one may be given by name.

    Strategies that probe draw the hard real images in the probe only. `undersample` gives hard and
    synthetic images the fraction `pool.tail_share` of an epoch. The other arguments are those of
    `SamplingConfig`.

    Raises TrainingError where undersampling would leave none of the images that are not hard,
    because every class has hard ones.
    """
    easy = ~pool.hard & ~pool.synthetic & ~pool.held_out
    if undersample and pool.tail_share == 1 and easy.any():
        raise TrainingError(
            f"every one of the {pool.num_classes} classes has hard images, so undersampling the "
            "others would drop them all. Take all real images.",
            argument="undersample",
        )
    return SamplingConfig(
        pool.tail_share if undersample else None,
        synthetic_scale,
        shortage=shortage,
        missing=missing,
        with_hard=(
            strategy not in WITHOUT_HARD
            if isinstance(strategy, str)
            else strategy.measures(0) != "probe"
        ),
        class_power=class_power,
    )
