"""What a pilot recommends: threshold, levels, strategy and how many images, with reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..evaluation.worth import Gain, MixtureScore, Worth
from ..mixtures import LONG_FORM
from ..recipe import Recipe, load_recipe
from ..utils.counts import count_of

FEWEST = 8
"""Kept images below which a level or threshold is not judged."""
FRACTIONS = (1.0, 0.75, 0.5, 0.25)
"""Fractions of the images that the thresholds to choose from keep, besides the recipe's own."""
ERRORS = 2 * 1.96
"""Standard errors in a 95 % interval."""


@dataclass(frozen=True)
class Outcome:
    """What one candidate brought at one level; `level` None is all its levels together."""

    candidate: str
    level: int | None
    threshold: float
    images: int
    kept: float
    rows_per_kept: float | None
    precision: float | None = None
    coverage: float | None = None
    worth: Worth | None = None


@dataclass(frozen=True)
class Tried:
    """A threshold of the filter: the fraction that it keeps, and what these images are worth.

    - `worth`: None where too few images pass to tell.
    """

    candidate: str
    threshold: float
    kept: float
    worth: Worth | None


Judged = Sequence[tuple[Outcome, Worth]]


def thresholds_to_try(own: float, cosines: np.ndarray) -> list[float]:
    """A few thresholds, ascending: the recipe's, and those that keep certain fractions.

    - `own`: the recipe's threshold.
    - `cosines`: clip_similarity of all images of a candidate, `[images]`.

    Of thresholds that keep the same images only one remains, the recipe's first.
    """
    found = {int((cosines >= own).sum()): own}
    for fraction in FRACTIONS:
        lowest = np.quantile(cosines, 1 - fraction, method="lower")
        threshold = max(-1.0, math.floor(100 * float(lowest)) / 100)
        found.setdefault(int((cosines >= threshold).sum()), threshold)
    return sorted(found.values())


def choose_threshold(own: float, tried: Sequence[Tried]) -> float:
    """The threshold with the largest gain on the classes with hard images, cross-validated.

    Gains within one standard error of the largest count as equal. Among these the recipe's own
    threshold `own` comes first, then the lowest, which keeps the most images. Thresholds that cost
    the other classes are considered last.
    """
    judged = [(each.threshold, each.worth) for each in tried if each.worth is not None]
    if not judged:
        return own
    judged = [pair for pair in judged if _overall(pair[1]) > 0] or judged
    best = max((worth.few for _, worth in judged), key=lambda gain: gain.mean)
    least = best.mean - (best.high - best.low) / ERRORS
    equal = [threshold for threshold, worth in judged if worth.few.mean >= least]
    return own if own in equal else min(equal)


def advise(
    recipe: Recipe,
    candidates: Mapping[str, Mapping[str, Any]],
    outcomes: Sequence[Outcome],
    tried: Sequence[Tried] = (),
    hard: int = 0,
) -> dict[str, Any]:
    """What to do, with reasons, and the lines of the recipe.

    A level is recommended if the lower end of its gain on the classes with hard images is above 0,
    and the gain on all classes, where it was measured, is too. Otherwise a classifier that names
    those classes more often, right or wrong, would pass. Where no level is, and the mean of a gain
    is above 0, the pilot is undecided.

    - `candidates`: `{candidate: values by key}`.
    - `tried`: thresholds of all candidates.
    - `hard`: number of hard images of the run.
    """
    judged = [(each, each.worth) for each in outcomes if each.worth is not None]
    useful = [(each, worth) for each, worth in judged if _helps(worth)]
    if not useful:
        undecided = any(worth.few.mean > 0 and _overall(worth) > 0 for _, worth in judged)
        reasons = _reasons_against(judged, undecided)
        return {"generate": False, "undecided": undecided, "reasons": reasons, "recipe": {}}
    best, gain = max(useful, key=lambda pair: pair[1].few.low)
    changes = candidates[best.candidate]
    mine = [(each, worth) for each, worth in judged if each.candidate == best.candidate]
    levels = sorted(
        each.level
        for each, _ in useful
        if each.candidate == best.candidate and each.level is not None
    )
    if not levels:  # only all of them together
        levels = sorted(changes.get("spectrum.levels", recipe.spectrum.levels))
    rows = [each for each in outcomes if each.candidate == best.candidate and each.level in levels]
    many, why_many = _how_many(recipe, rows or [best], len(levels), hard)
    strategy, why_strategy = _strategy(mine, levels)
    mine_tried = [each for each in tried if each.candidate == best.candidate]
    lines = {
        **changes,
        "spectrum.levels": levels,
        **many,
        "filter.threshold": best.threshold,
        **({"filter.rule": "threshold"} if recipe.filter.rule == "alia" else {}),
        **_method(recipe, strategy, levels),
    }
    reasons = [
        f"candidate '{best.candidate}' brings {interval(gain.few)} points on the classes with "
        "hard images over the same mixture of real images",
        _why_levels(mine, levels),
        _why_threshold(recipe.filter.threshold, best, mine_tried),
        f"{why_strategy}: use strategy {strategy}",
        why_many,
    ]
    return {
        "generate": True,
        "undecided": False,
        "candidate": best.candidate,
        "levels": levels,
        "threshold": best.threshold,
        "strategy": strategy,
        "reasons": [*reasons, *_misfits(recipe, lines)],
        "recipe": lines,
    }


def advise_mixture(
    recipe: Recipe, advice: Mapping[str, Any], scores: Sequence[MixtureScore]
) -> dict[str, Any]:
    """The advice with the mixture of the highest score, the earlier of equal ones.

    - `scores`: of the recommended images, or of real images alone; none: the advice as it is.
    """
    if not scores:
        return dict(advice)
    generate = advice["generate"]
    figures = {
        each.mixture: each.mixed if generate and each.mixed is not None else each.real
        for each in scores
    }
    best = max(figures, key=lambda mixture: figures[mixture])
    others = ", ".join(f"{name} {figure:.1f}" for name, figure in figures.items() if name != best)
    what = "these images" if generate else "the real images alone"
    reason = (
        f"mixture {best}: with {what} it has the highest balanced accuracy on validation "
        f"({figures[best]:.1f}; {others})"
    )
    lines, reasons = dict(advice["recipe"]), [*advice["reasons"], reason]
    if generate:
        name = _spectral_name(recipe)
        lines[f"methods.{name}.mixture"] = best
        stated = recipe.methods[name].model_dump() if name in recipe.methods else {}
        for key in LONG_FORM:
            if stated.get(key) not in (None, "instance"):
                lines[f"methods.{name}.{key}"] = None
        reasons += [each for each in _misfits(recipe, lines) if each not in reasons]
    return {**advice, "mixture": best, "reasons": reasons, "recipe": lines}


def _overall(worth: Worth) -> float:
    """The gain on all classes; infinite where it was not measured."""
    return math.inf if worth.overall is None else worth.overall.mean


def _helps(worth: Worth) -> bool:
    return worth.few.low > 0 and _overall(worth) > 0


def _why_levels(judged: Judged, levels: Sequence[int]) -> str:
    """`judged` are the rows of the recommended candidate."""
    by_level = {each.level: worth for each, worth in judged if each.level is not None}
    listed = ", ".join(map(str, levels))
    if not by_level:
        return f"level {listed} alone was measured"
    if not any(_helps(worth) for worth in by_level.values()):
        return f"levels {listed}: they bring something together, none of them by itself"
    rest = [level for level in sorted(by_level) if level not in levels]
    name = "level" if len(levels) == 1 else "levels"
    text = f"{name} {listed}: the whole interval of the gain is above 0"
    return text + (f", unlike at {', '.join(map(str, rest))}" if rest else "")


def _why_threshold(own: float, best: Outcome, tried: Sequence[Tried]) -> str:
    chosen = f"threshold {best.threshold:g}"
    kept = {each.threshold: each for each in tried}
    share = f"{kept[best.threshold].kept if best.threshold in kept else best.kept:.0%}"
    if best.threshold == own:
        reason = f"{chosen}, the recipe's, keeps {share} of the images"
        others = [each for each in tried if each.threshold != own and each.worth is not None]
        if not others:
            return reason
        return f"{reason}; none of {len(others)} others brings more by over a standard error"
    before = kept.get(own)
    if before is None:
        return f"{chosen} keeps {share} of the images"
    if before.worth is None:
        problem = "too few to judge"
    else:
        problem = f"which bring {interval(before.worth.few)} points"
    return (
        f"{chosen} keeps {share} of the images; the recipe's {own:g} keeps {before.kept:.0%}, "
        f"{problem}"
    )


def _how_many(
    recipe: Recipe, rows: Sequence[Outcome], levels: int, hard: int
) -> tuple[dict[str, int], str]:
    """(lines, reason): enough kept images for what training asks for.

    - `rows`: outcomes of the recommended levels.
    """
    kept = max(min(each.kept for each in rows), 0.05)
    wanted, spectrum = recipe.synthetic_scale, recipe.spectrum
    if spectrum.wanted is None:
        seeds = max(1, math.ceil(wanted / (1 - (1 - kept) ** spectrum.tries)))
        lines, drawn = {"spectrum.seeds": min(10_000, seeds)}, float(seeds)
        means = f"{count_of(seeds, 'seed')} {'gives' if seeds == 1 else 'give'}"
    else:
        tries = max(2, math.ceil(2 / kept))
        lines = {"spectrum.wanted": max(1, math.ceil(wanted)), "spectrum.tries": tries}
        drawn = wanted / kept
        means = f"about {drawn:.1f} seeds give"
    text = (
        f"at least {kept:.0%} of the images of a level are kept, so {means} the {wanted:g} images "
        "for each hard one that training asks for"
    )
    if hard:
        images = round(hard * levels * drawn)
        text += f": {images:,} images"
        made = sum(each.images for each in rows)
        cost = sum(each.images * each.kept * (each.rows_per_kept or 0) for each in rows)
        if cost:
            text += f", about {round(images * cost / made):,} UNet rows"
    return lines, text


def _strategy(judged: Judged, levels: Sequence[int]) -> tuple[str, str]:
    """(strategy, reason) from how the gain changes with the level."""
    if levels == [0]:
        return "text-only", "only the images made from text alone bring something"
    if len(levels) == 1:
        return "fixed", f"only level {levels[0]} brings something by itself"
    gains = {each.level: worth.few for each, worth in judged if each.level is not None}
    if len(gains) > 1:
        lowest = gains.pop(min(gains))
        highest = max(gain.mean for gain in gains.values())
        if lowest.low > highest:
            return "text-only", "images made from text alone bring most"
        if lowest.high < highest:
            return "diverse-to-specific", "the lowest level brings less than higher ones"
    return "all-levels", "no level is clearly ahead of the others"


def _spectral_name(recipe: Recipe) -> str:
    """`discl`, else the first with synthetic images; a new one `discl` if there is none."""
    spectral = [name for name, method in recipe.methods.items() if method.takes_synthetic]
    return min(spectral, key=lambda name: name != "discl", default="discl")


def _method(recipe: Recipe, strategy: str, levels: Sequence[int]) -> dict[str, Any]:
    """The lines that give the strategy to the recipe's method with synthetic images."""
    name = _spectral_name(recipe)
    lines: dict[str, Any] = {f"methods.{name}.strategy": strategy}
    if strategy == "fixed":
        lines[f"methods.{name}.level"] = levels[0]
    elif name in recipe.methods and recipe.methods[name].level is not None:
        lines[f"methods.{name}.level"] = None
    return lines


def _misfits(recipe: Recipe, lines: Mapping[str, Any]) -> list[str]:
    """What else in the recipe has to change with these lines, as a reason."""
    try:
        load_recipe(recipe, dict(lines))
    except RecipeError as error:
        return [f"with these lines the recipe needs another change: {error}"]
    return []


def _reasons_against(judged: Judged, undecided: bool) -> list[str]:
    if not judged:
        return [
            f"fewer than {FEWEST} images of each candidate pass the filter at any threshold: "
            "raise pilot.images"
        ]
    open_ones = [(each, worth) for each, worth in judged if _overall(worth) > 0]
    best, worth = max(open_ones if undecided else judged, key=lambda pair: pair[1].few.mean)
    where = "all levels" if best.level is None else f"level {best.level}"
    reasons = [
        "not decided: the images may bring something, or re-balancing the real images gives as "
        "much; raise pilot.images before you pay"
        if undecided
        else "re-balancing the real images gives as much: do not generate",
        f"the best, '{best.candidate}' at {where} and threshold {best.threshold:g}, brings "
        f"{interval(worth.few)} points",
    ]
    if worth.recognised < worth.real / 2:
        reasons.append(
            f"a classifier of the real images recognises {worth.recognised:.0%} of its images, and "
            f"{worth.real:.0%} of real ones: the generator does not know these classes; try "
            "spectrum.adapt, other texts or another checkpoint"
        )
    return reasons


def interval(gain: Gain) -> str:
    """A gain with its interval, in points."""
    return f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"
