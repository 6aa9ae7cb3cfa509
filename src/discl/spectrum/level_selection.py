"""Proposes levels and a threshold from what `discl levels` measured.

The paper chose both by eye from such curves (arXiv 2410.13674, figures 6 and 7). `propose` has the
rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_SIMILARITY = 0.85
"""The paper's bound: images more similar to their source than this add no diversity."""
MIN_KEPT = 0.1
"""A level of which the filter would keep a smaller fraction is not worth generating."""
MAX_KEPT = 0.5
"""Largest fraction to keep: the filter may always drop half of the images."""
MIN_STEP = 0.01
"""Levels with a smaller difference of mean similarity show the same images."""


@dataclass(frozen=True)
class Measured:
    """Raw CLIP cosines of the images of one level, float `[images]`.

    - `image_similarity`: with their source.
    - `text_similarity`: with the plain text of their class.
    """

    image_similarity: np.ndarray
    text_similarity: np.ndarray

    def kept(self, threshold: float) -> float:
        """Fraction at or above the threshold, in [0, 1]."""
        return float((self.text_similarity >= threshold).mean())


@dataclass(frozen=True)
class Proposal:
    """Levels in per cent, a threshold, and the reasons for them.

    - `bound`: the image similarity above which levels were left out.
    """

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
    """Levels and threshold for training, chosen among the levels `measured`.

    - `measured`: cosines by level.
    - `real_text`: cosines of the real hard images with the text of their class, float `[images]`.
    - `pair`: mean cosine of two real images of one class; None where no class has two.
    - `scale`: kept images that training needs per hard image and level.
    - `seeds`: images drawn per hard image and level, each up to `tries` times until one is kept.
    - `count`: maximum number of levels.

    1. Levels with a mean image similarity above 0.85 (the paper's bound) are left out. Where `pair`
       is high, the bound is halfway between `pair` and 1. Such images repeat their source.
    2. Levels are left out if less than a tenth of their images are as similar to their text as the
       median real image.
    3. Of the rest at most `count` remain, both ends among them. They are spread evenly over the
       image similarity, not over λ, so each stage of a curriculum is an equal step.
    4. The threshold is the median of `real_text`. Where a level would keep too few images, the
       threshold is lowered until it keeps the fraction `scale` / `seeds`. With `tries` a smaller
       fraction is enough. The fraction is at most a half.
    """
    reasons: list[str] = []
    bound = MAX_SIMILARITY if pair is None else max(MAX_SIMILARITY, (1 + pair) / 2)
    typical = float(np.median(real_text))
    usable = _not_too_alike(measured, bound, pair, reasons)
    usable = _worth_it(measured, usable, typical, reasons)
    levels = spread_levels(
        {level: float(measured[level].image_similarity.mean()) for level in usable}, count
    )
    if len(levels) < len(usable):
        reasons.append(
            f"of the {len(usable)} levels left, {_listed(levels)} are spread evenly over the image "
            "similarity."
        )
    threshold = _threshold(
        {level: measured[level] for level in levels},
        typical,
        reasons,
        scale=scale,
        seeds=seeds,
        tries=tries,
    )
    return Proposal(tuple(levels), threshold, bound, tuple(reasons))


def spread_levels(similarity: Mapping[int, float], count: int) -> list[int]:
    """At most `count` (≥ 1) levels, ascending: both ends, and those nearest to even steps between.

    Levels closer together than 0.01 count once.

    - `similarity`: mean image similarity by level.
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
        if abs(similarity[near] - similarity[taken[-1]]) >= MIN_STEP:
            taken.append(near)
    return taken


def _not_too_alike(
    measured: Mapping[int, Measured], bound: float, pair: float | None, reasons: list[str]
) -> list[int]:
    means = {level: float(each.image_similarity.mean()) for level, each in sorted(measured.items())}
    alike = [level for level, mean in means.items() if mean > bound]
    origin = "the paper's bound"
    if pair is not None and bound > MAX_SIMILARITY:
        origin = f"halfway between two real images of one class, {pair:.2f}, and the same image, 1"
    if len(alike) == len(means):
        least = min(means, key=lambda level: means[level])
        reasons.append(
            f"even level {least}, the least similar, has a mean image similarity of "
            f"{means[least]:.2f}, above {bound:.2f} ({origin}): this generator hardly changes the "
            "images; it is proposed alone."
        )
        return [least]
    if alike:
        reasons.append(
            f"{_named(alike)} left out: the mean image similarity exceeds {bound:.2f} ({origin}), "
            "so they would add no diversity."
        )
    else:
        reasons.append(
            f"no level is too similar to its source: all mean image similarities are at most "
            f"{bound:.2f} ({origin})."
        )
    return [level for level in means if level not in alike]


def _worth_it(
    measured: Mapping[int, Measured], levels: Sequence[int], typical: float, reasons: list[str]
) -> list[int]:
    poor = [level for level in levels if measured[level].kept(typical) < MIN_KEPT]
    if len(poor) == len(levels):
        reasons.append(
            "at every level fewer than a tenth of the images are as similar to their class text as "
            f"the median real hard image ({typical:.3f}): look at the images, the prompts and the "
            "generator before you go on."
        )
        return list(levels)
    if poor:
        reasons.append(
            f"{_named(poor)} left out: fewer than a tenth of the images are as similar to their "
            f"class text as the median real hard image ({typical:.3f})."
        )
    return [level for level in levels if level not in poor]


def _threshold(
    measured: Mapping[int, Measured],
    typical: float,
    reasons: list[str],
    *,
    scale: float,
    seeds: int,
    tries: int,
) -> float:
    """The median of the real images, lowered until every level keeps enough images."""
    # one of n tries is kept with probability 1 − (1 − p)^n, where p is the fraction kept
    needed = 1 - (1 - min(scale / seeds, 1)) ** (1 / tries)
    fraction = min(needed, MAX_KEPT)
    supply = {
        level: float(np.quantile(each.text_similarity, 1 - fraction))
        for level, each in measured.items()
    }
    scarce = min(supply, key=lambda level: supply[level])
    threshold = math.floor(100 * min(typical, supply[scarce]) + 1e-6) / 100
    if supply[scarce] >= typical:
        reasons.append(
            f"threshold {threshold:.2f}: the median clip_similarity of the real hard images "
            f"themselves ({typical:.3f})."
        )
    else:
        reasons.append(
            f"threshold {threshold:.2f}: the median of the real hard images ({typical:.3f}) would "
            f"keep only {measured[scarce].kept(typical):.0%} of level {scarce}; it is lowered "
            f"until that level keeps {fraction:.0%}."
        )
    if needed > MAX_KEPT:
        kept = 1 - (1 - min(each.kept(threshold) for each in measured.values())) ** tries
        drawn = f"images drawn up to {tries} times" if tries > 1 else "tries"
        reasons.append(
            f"training needs {scale:g} kept images per hard image and level, of {seeds} {drawn}: "
            f"raise the number of seeds to {math.ceil(scale / kept)}, or images will be repeated."
        )
    return threshold


def _named(levels: Sequence[int]) -> str:
    return f"level {levels[0]} is" if len(levels) == 1 else f"levels {_listed(levels)} are"


def _listed(levels: Sequence[int]) -> str:
    return ", ".join(map(str, levels))
