"""Describes the run and its results in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..recipe.paths import FOREIGN, PATHS, map_paths
from ..run_folder import paths
from .run_summary import ADJUSTED, RunSummary
from .tables import GROUPS, PRIORS, difference, standard_errors

OF_THIS_MACHINE = ("~", "file:", "local:")
"""How a path begins, beside absolute ones, that leads to a folder of the machine that ran the recipe."""


def share_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with absolute paths cut down to their last name, fit to be handed on."""
    return map_paths(recipe, lambda text, keys: _shorten(text), (*PATHS, *FOREIGN))


def _shorten(text: str) -> str:
    if PurePosixPath(text).is_absolute() or text.startswith(OF_THIS_MACHINE):
        return f"…/{PurePosixPath(text).name}"
    return f"…/{PureWindowsPath(text).name}" if PureWindowsPath(text).is_absolute() else text


def number(value: float) -> str:
    """A count with thousands separators."""
    return f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share in [0, 1] in per cent with one decimal, an absent one as a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def plain(value: float) -> str:
    """A number as short as it goes, with a true minus."""
    return f"{value:g}".replace("-", "−")


def cosine(value: float) -> str:
    """A clip_similarity with three decimals; never minus zero."""
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def share(pair: tuple[int, int]) -> str:
    """A part of a whole in whole per cent; 100 % is all of it and 0 % nothing, never a rounded figure."""
    part, whole = pair
    rounded = round(100 * part / whole)
    return f"{rounded if part in (0, whole) else min(max(rounded, 1), 99)} %"


def points(value: float | None) -> str:
    """A difference in points with its sign, an absent one as a dash."""
    if value is None:
        return "–"
    rounded = round(value, 1)
    return "±0.0" if rounded == 0 else f"{rounded:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, one: str, many: str = "") -> str:
    """A count and its noun: 1 class, 1,236 images."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def group_bounds(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Which classes a group holds, in words."""
    many, few = recipe["groups"]["many"], recipe["groups"]["few"]
    return {
        "many": f"more than {many} training images",
        "medium": f"{few} to {many}",
        "few": f"fewer than {few}",
    }


def describe_settings(story: RunSummary) -> list[tuple[str, str]]:
    """`[(what, in words)]`: the main settings of a run."""
    recipe = share_recipe(story.recipe)
    return [
        ("Data", _data(story, recipe)),
        ("Groups", _groups(story, recipe)),
        *_making(story),
        ("Classifier", _classifier(recipe)),
        ("Machine", _machine(story.environment)),
    ]


def _data(story: RunSummary, recipe: Mapping[str, Any]) -> str:
    counts, data = story.class_counts, recipe["data"]
    text = f"{data['root']}: {plural(int(counts.sum()), 'training image')} in {plural(len(counts), 'class', 'classes')}"
    spread = (
        f"{number(counts.max())} down to {number(counts.min())}"
        if counts.max() > counts.min()
        else number(counts.max())
    )
    text += f", {spread} per class"
    if data["long_tail"]:
        text += (
            f" (exponential long tail, imbalance ratio {data['long_tail']['imbalance_ratio']:g})"
        )
    listed = [
        split
        for split in ("validation", "validation-ood", "test", "test-ood")
        if split in story.split_counts
    ]
    others = [f"{number(story.split_counts[split].sum())} {split}" for split in listed]
    others = [", ".join(others[:-1]), others[-1]] if len(others) > 2 else others
    return f"{text}. {' and '.join(others)} images; accuracies on this page are on {story.split}."


def _groups(story: RunSummary, recipe: Mapping[str, Any]) -> str:
    bounds = group_bounds(recipe)
    parts = [
        f"{name} ({bounds[name]}): {plural(len(story.groups[name]), 'class', 'classes')}"
        for name in GROUPS
        if name in story.groups
    ]
    absent = [name for name in GROUPS if name not in story.groups]
    return "; ".join(parts) + (f". No class falls into {' or '.join(absent)}." if absent else ".")


def _making(story: RunSummary) -> list[tuple[str, str]]:
    """The lines of `story.making`; beside the rules stand the numbers of hard images and of kept ones."""
    hard = f"{number(len(story.hard))} of {number(story.class_counts.sum())}"
    classes = plural(len({row["label"] for row in story.hard}), "class", "classes")
    kept, made = (
        int(np.count_nonzero(story.verdicts["keep"].to_numpy(zero_copy_only=False))),
        story.verdicts.num_rows,
    )
    lines = {
        **story.making,
        "hard images": f"{hard}, in {classes}: {story.making['hard images']}",
        "filter": f"{story.making['filter']}; {number(kept)} of {plural(made, 'synthetic image')} kept ({share((kept, made))})",
    }
    return [(what[0].upper() + what[1:], f"{text}.") for what, text in lines.items()]


def _classifier(recipe: Mapping[str, Any]) -> str:
    asked, optimizer = recipe["train"], recipe["train"]["optimizer"]
    what = (
        f"{asked['model']['architecture']} at {asked['image_size']} × {asked['image_size']} pixels"
    )
    epochs = f"{plural(asked['epochs'], 'epoch')}, of which the first {asked['curriculum_epochs']} may use synthetic images"
    how = f"{optimizer['name']}, learning rate {optimizer['lr']:g} ({optimizer['schedule']}), batches of {asked['batch_size']}"
    return f"{what}; {epochs}; {how}; training seed {asked['seed']}."


def _machine(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages", {})
    named = [
        f"{name} {packages[name]}"
        for name in ("discl", "torch", "diffusers", "transformers")
        if name in packages
    ]
    system = str(environment.get("platform", "")).split("-")[0]
    named.append(f"Python {environment.get('python')}")
    return f"{environment.get('device', 'unknown device')}, {system} {environment.get('processor', '')}; {', '.join(named)}."


def headline(story: RunSummary) -> str:
    """The result in one or two sentences, without judging it."""
    base = story.figures[story.baseline]
    if story.featured is None:
        text = f"{story.baseline} reaches {percent(base['accuracy'])} % top-1 on {story.split}"
        return f"{text}. The recipe names no second method to compare it with."
    new = story.figures[story.featured]
    compared = _against(difference(new, base, "accuracy"), story.baseline)
    text = (
        f"{story.featured} reaches {percent(new['accuracy'])} % top-1 on {story.split}, {compared}"
    )
    rare = next((name for name in ("few", "medium") if name in new and name in base), None)
    if rare is None:
        return text + "."
    return f"{text}; on the {rare} classes {percent(new[rare])} %, {_against(difference(new, base, rare), '')}."


def _against(change: float | None, baseline: str) -> str:
    if change is None or round(change, 1) == 0:
        return f"as {baseline} does" if baseline else "no change"
    amount = f"{abs(change):.1f} points {'more' if change > 0 else 'fewer'}"
    return f"{amount} than {baseline}" if baseline else amount


def caution(story: RunSummary) -> str:
    """How far the headline can be trusted."""
    text = "One run with one training seed, so there are no error bars."
    if story.split == "validation" and story.recipe["train"].get("select") == "validation":
        text += " The weights were chosen on these very images, which flatters every figure."
    if story.featured is None:
        return text
    images = story.split_counts[story.split].tolist()
    errors = [
        standard_errors(story.figures[name], story.class_names, images, story.groups)
        for name in (story.baseline, story.featured)
    ]
    shown = [
        ("accuracy", "all"),
        *[(name, name) for name in ("few",) if all(name in error for error in errors)],
    ]
    sizes = " and ".join(
        f"{np.hypot(errors[0][key], errors[1][key]):.1f} points on {name}" for key, name in shown
    )
    return (
        f"{text} The {number(sum(images))} {story.split} images alone leave a difference uncertain by about {sizes} "
        "(standard error, taking the two classifiers as independent); "
        "how much the figures move from one training seed to the next is not measured here."
    )


def adjustment_note(story: RunSummary) -> str:
    """Where prior and τ of the adjusted rows come from; where that differs from row to row, of each."""
    rows_of: dict[str, list[str]] = {}
    for row in story.figures:
        if row.endswith(ADJUSTED):
            rows_of.setdefault(_origin_of_adjustment(story, row), []).append(row)
    if len(rows_of) < 2:
        return "".join(rows_of)
    return "; ".join(f"for {' and '.join(rows)} {origin}" for origin, rows in rows_of.items())


def _origin_of_adjustment(story: RunSummary, row: str) -> str:
    if story.recipe["methods"][row.removesuffix(ADJUSTED)]["adjustment"] is not None:
        return "prior and τ are those that the recipe gives the method"
    offered = story.recipe["evaluate"]["logit_adjustment"]
    if "validation" not in story.results[row]:
        prior, tau = PRIORS[story.figures[row]["prior"]], f"{story.figures[row]['tau']:g}"
        of = ", of those that the recipe offers the nearest to 1" if len(offered) > 1 else ""
        return f"there is no validation split to choose prior and τ on, so they are {prior} and τ = {tau}{of}"
    chosen = "prior and τ were chosen" if len(offered) > 1 else "the prior was chosen"
    if story.split == "validation":
        return f"{chosen} on these very images, which flatters the figures"
    return f"{chosen} on validation"


def adjusted_pair(story: RunSummary) -> tuple[str, str] | None:
    """The adjusted rows of the baseline and the featured method, where both exist."""
    pair = (story.baseline + ADJUSTED, f"{story.featured}{ADJUSTED}")
    return pair if all(name in story.figures for name in pair) else None


def commands(story: RunSummary) -> dict[str, str]:
    """The commands that go on from here, to be typed beside the run folder; "filter" only where the filter goes by a threshold."""
    folder = story.name
    best = story.featured or story.baseline
    quoted = shlex.quote(folder)
    again = f"discl run {shlex.quote(f'{folder}/{paths.RECIPE}')} --out {quoted}"
    found = {
        "run": again,
        "predict": f"discl predict {quoted} photos --method {shlex.quote(best)} --out predictions.csv",
        "classifier": f"{folder}/{paths.TRAIN}/{best}/{paths.WEIGHTS}",
    }
    if filters_by_threshold(story):
        stricter = (
            round(float(np.percentile(story.verdicts["clip_similarity"].to_numpy(), 25)), 2) + 0.0
        )  # drops about a quarter
        found["filter"] = f"{again} --set filter.threshold={stricter:g} --amend"
    return found


def filters_by_threshold(story: RunSummary) -> bool:
    """Whether filter.threshold decides what is kept; under another rule it has no effect."""
    return bool(story.recipe["filter"]["rule"] == "threshold")
