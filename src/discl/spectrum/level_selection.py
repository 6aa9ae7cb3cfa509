"""Proposes levels and a threshold from what `discl levels` measured.

The paper chose both by eye from such curves (arXiv 2410.13674, figures 6 and 7); the rule here is written down in `propose`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TOO_ALIKE = 0.85
"""The paper's bound: images more like their source than this add no diversity."""
LEAST_KEPT = 0.1
"""A level of which the filter would keep less is not worth generating."""
MOST_ASKED = 0.5
"""The filter may always throw away half, whatever the synthetic scale asks for."""
SAME = 0.01
"""Levels whose mean similarity differs by less show the same pictures."""


@dataclass(frozen=True)
class Measured:
    """Raw CLIP cosines of the images of one level, float `[images]`: with their source, and with the plain text of their class."""

    image_similarity: np.ndarray
    text_similarity: np.ndarray

    def kept(self, threshold: float) -> float:
        """Share at or above the threshold, in [0, 1]."""
        return float((self.text_similarity >= threshold).mean())


@dataclass(frozen=True)
class Proposal:
    """Levels in per cent, threshold, and why; `bound` is the image similarity above which levels were left out."""

    levels: tuple[int, ...]
    threshold: float
    bound: float
    reasons: tuple[str, ...]


def propose(
    measured: Mapping[int, Measured],
    real_text: np.ndarray,
    pair: float | None,
    *,
    scale: float,
    seeds: int,
    tries: int = 1,
    count: int = 4,
) -> Proposal:
    """Levels and threshold for training, of the levels `measured`.

    `real_text` are the cosines of the real hard images with the text of their class, `pair` the mean cosine of two real images of
    one class (None where no class has two). Training wants `scale` kept images per hard image at each level, of `seeds`
    that are drawn up to `tries` times each until one is kept.

    1. A level is left out if its mean image similarity exceeds 0.85 (the paper's bound), or lies closer to 1 than to `pair` where that is
       the higher bound: such images are their source once more.
    2. A level is left out if fewer than a tenth of its images are as like their text as the median real image.
    3. Of the rest at most `count` are taken, both ends among them, spread evenly over the image similarity, not over λ, so that each
       stage of a curriculum comes closer to the real images by an equal step.
    4. The threshold is the median of `real_text`: kept is what is as typical of its class as a typical real image. Where too few would be
       left at some level it is lowered until that level keeps `scale` / `seeds` of its images, or the smaller share that is enough where
       they are drawn several times (at most half).
    """
    reasons: list[str] = []
    bound = TOO_ALIKE if pair is None else max(TOO_ALIKE, (1 + pair) / 2)
    typical = float(np.median(real_text))
    usable = _not_too_alike(measured, bound, pair, reasons)
    usable = _worth_it(measured, usable, typical, reasons)
    levels = spread_levels(
        {level: float(measured[level].image_similarity.mean()) for level in usable}, count
    )
    if len(levels) < len(usable):
        reasons.append(
            f"of the {len(usable)} levels left, {_listed(levels)} are spread evenly over the image similarity."
        )
    threshold = _threshold(
        {level: measured[level] for level in levels}, typical, scale, seeds, tries, reasons
    )
    return Proposal(tuple(levels), threshold, bound, tuple(reasons))


def spread_levels(similarity: Mapping[int, float], count: int) -> list[int]:
    """At most `count` (≥ 1) levels, ascending: both ends, and between them those nearest to even steps of mean similarity.

    Levels that lie closer together than 0.01 count once.
    """
    levels = sorted(similarity)
    if count == 1 or len(levels) == 1:
        return levels[:1]
    low, high = similarity[levels[0]], similarity[levels[-1]]
    taken = [levels[0]]
    for step in range(1, min(count, len(levels))):
        wanted = low + (high - low) * step / (min(count, len(levels)) - 1)
        rest = [level for level in levels if level > taken[-1]]
        if not rest:
            break
        near = min(rest, key=lambda level: (abs(similarity[level] - wanted), level))
        if abs(similarity[near] - similarity[taken[-1]]) >= SAME:
            taken.append(near)
    return taken


def _not_too_alike(
    measured: Mapping[int, Measured], bound: float, pair: float | None, reasons: list[str]
) -> list[int]:
    means = {level: float(each.image_similarity.mean()) for level, each in sorted(measured.items())}
    alike = [level for level, mean in means.items() if mean > bound]
    origin = "the paper's bound"
    if pair is not None and bound > TOO_ALIKE:
        origin = f"halfway between two real images of one class, {pair:.2f}, and the same image, 1"
    if len(alike) == len(means):
        least = min(means, key=lambda level: means[level])
        reasons.append(
            f"even level {least}, the least alike, has a mean image similarity of {means[least]:.2f}, above {bound:.2f} ({origin}): "
            "this generator hardly changes the images; it is proposed alone."
        )
        return [least]
    if alike:
        reasons.append(
            f"{_named(alike)} left out: the mean image similarity exceeds {bound:.2f} ({origin}), so they would add no diversity."
        )
    else:
        reasons.append(
            f"no level is too like its source: all mean image similarities are at most {bound:.2f} ({origin})."
        )
    return [level for level in means if level not in alike]


def _worth_it(
    measured: Mapping[int, Measured], levels: Sequence[int], typical: float, reasons: list[str]
) -> list[int]:
    poor = [level for level in levels if measured[level].kept(typical) < LEAST_KEPT]
    if len(poor) == len(levels):
        reasons.append(
            f"at every level fewer than a tenth of the images are as like their class text as the median real hard image ({typical:.3f}): "
            "look at the pictures, the prompts and the generator before you go on."
        )
        return list(levels)
    if poor:
        reasons.append(
            f"{_named(poor)} left out: fewer than a tenth of the images are as like their class text as the median real "
            f"hard image ({typical:.3f})."
        )
    return [level for level in levels if level not in poor]


def _threshold(
    measured: Mapping[int, Measured],
    typical: float,
    scale: float,
    seeds: int,
    tries: int,
    reasons: list[str],
) -> float:
    needed = 1 - (1 - min(scale / seeds, 1)) ** (
        1 / tries
    )  # of n tries at a share p one is kept with 1 − (1 − p)^n
    share = min(needed, MOST_ASKED)
    supply = {
        level: float(np.quantile(each.text_similarity, 1 - share))
        for level, each in measured.items()
    }
    scarce = min(supply, key=lambda level: supply[level])
    threshold = math.floor(100 * min(typical, supply[scarce]) + 1e-6) / 100
    if supply[scarce] >= typical:
        reasons.append(
            f"threshold {threshold:.2f}: the median clip_similarity of the real hard images themselves ({typical:.3f})."
        )
    else:
        reasons.append(
            f"threshold {threshold:.2f}: the median of the real hard images ({typical:.3f}) would keep only "
            f"{measured[scarce].kept(typical):.0%} of level {scarce}; it is lowered until that level keeps {share:.0%}."
        )
    if needed > MOST_ASKED:
        gained = 1 - (1 - min(each.kept(threshold) for each in measured.values())) ** tries
        drawn = f"images drawn up to {tries} times" if tries > 1 else "tries"
        reasons.append(
            f"training asks for {scale:g} kept images per hard image and level, of {seeds} {drawn}: raise spectrum.seeds to "
            f"{math.ceil(scale / gained)}, or images will be repeated."
        )
    return threshold


def _named(levels: Sequence[int]) -> str:
    return f"level {levels[0]} is" if len(levels) == 1 else f"levels {_listed(levels)} are"


def _listed(levels: Sequence[int]) -> str:
    return ", ".join(map(str, levels))
