"""Describes the run and its results in words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..evaluation.controls import ADJUSTED, NORMALISED, takes_retrieved_images
from ..recipe.paths import FOREIGN, PATHS, map_paths
from ..run_folder import paths
from .run_summary import RunSummary
from .tables import GROUPS, PRIORS, ControlTable, difference, standard_errors

OF_THIS_MACHINE = ("~", "file:", "local:")
"""Beginnings of paths, other than absolute ones, that name folders of one machine."""


def share_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with absolute paths reduced to their last name, so that it can be shared."""
    return map_paths(recipe, lambda text, keys: shorten_path(text), (*PATHS, *FOREIGN))


def shorten_path(text: str) -> str:
    """An absolute path reduced to its last name; any other text as it is."""
    if PurePosixPath(text).is_absolute() or text.startswith(OF_THIS_MACHINE):
        return f"…/{PurePosixPath(text).name}"
    return f"…/{PureWindowsPath(text).name}" if PureWindowsPath(text).is_absolute() else text


def number(value: float) -> str:
    """A count with thousands separators."""
    return f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A fraction in [0, 1] in per cent with one decimal; None as a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def plain(value: float) -> str:
    """A number in its shortest form, with a true minus sign."""
    return f"{value:g}".replace("-", "−")


def cosine(value: float) -> str:
    """A clip_similarity with three decimals, never minus zero; NaN as a dash."""
    if math.isnan(value):
        return "–"
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def fraction(pair: tuple[int, int]) -> str:
    """(part, whole) in whole per cent; 0 % and 100 % are exact, never rounded."""
    part, whole = pair
    rounded = round(100 * part / whole)
    return f"{rounded if part in (0, whole) else min(max(rounded, 1), 99)} %"


def points(value: float | None) -> str:
    """A difference in points with its sign; None as a dash."""
    if value is None:
        return "–"
    rounded = round(value, 1)
    return "±0.0" if rounded == 0 else f"{rounded:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, one: str, many: str = "") -> str:
    """A count and its noun: 1 class, 1,236 images."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def group_bounds(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Describes which classes a group holds."""
    many, few = recipe["groups"]["many"], recipe["groups"]["few"]
    return {
        "many": f"more than {many} training images",
        "medium": f"{few} to {many}",
        "few": f"fewer than {few}",
    }


def describe_settings(summary: RunSummary) -> list[tuple[str, str]]:
    """The main settings of a run as `[(title, text)]`."""
    recipe = share_recipe(summary.recipe)
    return [
        ("Data", _data(summary, recipe)),
        ("Groups", _groups(summary, recipe)),
        *_making(summary),
        *_retrieval(summary, recipe),
        ("Classifier", _classifier(recipe)),
        ("Machine", _machine(summary.environment)),
    ]


def _data(summary: RunSummary, recipe: Mapping[str, Any]) -> str:
    counts, data = summary.class_counts, recipe["data"]
    classes = plural(len(counts), "class", "classes")
    text = f"{data['root']}: {plural(int(counts.sum()), 'training image')} in {classes}"
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
        if split in summary.split_counts
    ]
    others = [f"{number(summary.split_counts[split].sum())} {split}" for split in listed]
    others = [", ".join(others[:-1]), others[-1]] if len(others) > 2 else others
    return f"{text}. {' and '.join(others)} images; accuracies on this page are on {summary.split}."


def _groups(summary: RunSummary, recipe: Mapping[str, Any]) -> str:
    bounds = group_bounds(recipe)
    parts = [
        f"{name} ({bounds[name]}): {plural(len(summary.groups[name]), 'class', 'classes')}"
        for name in GROUPS
        if name in summary.groups
    ]
    absent = [name for name in GROUPS if name not in summary.groups]
    return "; ".join(parts) + (f". No class is in {' or '.join(absent)}." if absent else ".")


def _making(summary: RunSummary) -> list[tuple[str, str]]:
    """The lines of `summary.making`, with the numbers of hard images and of kept ones."""
    if "filter" not in summary.making:  # no image was to be made
        return [(what[0].upper() + what[1:], f"{text}.") for what, text in summary.making.items()]
    hard = f"{number(len(summary.hard))} of {number(summary.class_counts.sum())}"
    classes = plural(len({row["label"] for row in summary.hard}), "class", "classes")
    kept, made = (
        int(np.count_nonzero(summary.verdicts["keep"].to_numpy(zero_copy_only=False))),
        summary.verdicts.num_rows,
    )
    lines = {
        **summary.making,
        "hard images": f"{hard}, in {classes}: {summary.making['hard images']}",
        "filter": f"{summary.making['filter']}; {number(kept)} of "
        f"{plural(made, 'synthetic image')} kept ({fraction((kept, made))})",
    }
    return [(what[0].upper() + what[1:], f"{text}.") for what, text in lines.items()]


def _retrieval(summary: RunSummary, recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was taken from an archive, and for which methods; nothing without one."""
    if summary.retrieved is None:
        return []
    users = [name for name, each in recipe["methods"].items() if takes_retrieved_images(each)]
    classes = plural(len(np.unique(summary.retrieved)), "class", "classes")
    return [
        (
            "Retrieved images",
            f"{plural(len(summary.retrieved), 'real image')} of {recipe['retrieval']['archive']}, "
            f"in {classes}, chosen by CLIP without labels; {' and '.join(users)} train on them in "
            "the place of synthetic ones.",
        )
    ]


def _classifier(recipe: Mapping[str, Any]) -> str:
    config, optimizer = recipe["train"], recipe["train"]["optimizer"]
    what = (
        f"{config['model']['architecture']} at {config['image_size']} × {config['image_size']} "
        "pixels"
    )
    epochs = (
        f"{plural(config['epochs'], 'epoch')}, synthetic images in the first "
        f"{config['curriculum_epochs']} at most"
    )
    how = (
        f"{optimizer['name']}, learning rate {optimizer['lr']:g} ({optimizer['schedule']}), "
        f"batches of {config['batch_size']}"
    )
    return f"{what}; {epochs}; {how}; training seed {config['seed']}."


def _machine(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages", {})
    named = [
        f"{name} {packages[name]}"
        for name in ("discl", "torch", "diffusers", "transformers")
        if name in packages
    ]
    system = str(environment.get("platform", "")).split("-")[0]
    named.append(f"Python {environment.get('python')}")
    device = environment.get("device", "unknown device")
    return f"{device}, {system} {environment.get('processor', '')}; {', '.join(named)}."


def headline(summary: RunSummary, controlled: ControlTable | None) -> str:
    """Describes the result in two or three sentences, without an opinion.

    - `controlled`: differences from rows without synthetic images, if a method takes such images.
    """
    base = summary.figures[summary.baseline]
    if summary.featured is None:
        text = f"{summary.baseline} reaches {percent(base['accuracy'])} % top-1 on {summary.split}"
        return f"{text}. The recipe names no second method to compare it with."
    new = summary.figures[summary.featured]
    compared = _against(difference(new, base, "accuracy"), summary.baseline)
    reached = f"{percent(new['accuracy'])} % top-1 on {summary.split}"
    text = f"{summary.featured} reaches {reached}, {compared}"
    rare = next((name for name in ("few", "medium") if name in new and name in base), None)
    if rare is not None:
        change = _against(difference(new, base, rare), "")
        text += f"; on the {rare} classes {percent(new[rare])} %, {change}"
    return f"{text}.{_over_control(summary.featured, controlled)}"


def _over_control(method: str, controlled: ControlTable | None) -> str:
    """What of the difference is not re-balancing; empty for a method without synthetic images."""
    row = next((row for row in controlled.rows if row[0] == method), None) if controlled else None
    if controlled is None or row is None:
        return ""
    _, other, (change, _) = row
    if other is None or change is None:
        return (
            " What the synthetic images add to re-balancing is not known: no row has the same "
            "mixture without them."
        )
    metric = controlled.headings[0].partition(" −")[0]
    return (
        f" Over the same mixture without synthetic images ({other}), the difference in "
        f"{metric} is {points(change)} points."
    )


def _against(change: float | None, baseline: str) -> str:
    if change is None or round(change, 1) == 0:
        return f"the same as {baseline}" if baseline else "no change"
    amount = f"{abs(change):.1f} points {'more' if change > 0 else 'fewer'}"
    return f"{amount} than {baseline}" if baseline else amount


def caution(summary: RunSummary) -> str:
    """Describes how uncertain the headline is."""
    text = "This is one run with one training seed, so there are no error bars."
    if summary.split == "validation" and summary.recipe["train"].get("select") == "validation":
        text += " The weights were chosen on the same images, which makes every figure optimistic."
    if summary.featured is None:
        return text
    images = summary.split_counts[summary.split].tolist()
    errors = [
        standard_errors(summary.figures[name], summary.class_names, images, summary.groups)
        for name in (summary.baseline, summary.featured)
    ]
    shown = [
        ("accuracy", "all"),
        *[(name, name) for name in ("few",) if all(name in error for error in errors)],
    ]
    sizes = " and ".join(
        f"{np.hypot(errors[0][key], errors[1][key]):.1f} points on {name}" for key, name in shown
    )
    return (
        f"{text} With {number(sum(images))} {summary.split} images, the standard error of a "
        f"difference is about {sizes}, if the two classifiers are independent. The variation "
        "between training seeds is not measured here; discl compare measures it."
    )


def adjustment_note(summary: RunSummary) -> str:
    """Describes where prior and τ of the adjusted rows come from."""
    return _describe_origins(summary, ADJUSTED, _origin_of_adjustment)


def normalisation_note(summary: RunSummary) -> str:
    """Describes where τ of the rows with a τ-normalised head comes from."""
    return _describe_origins(summary, NORMALISED, _origin_of_tau)


def _describe_origins(
    summary: RunSummary, suffix: str, origin_of: Callable[[RunSummary, str], str]
) -> str:
    """The origins of the settings of all rows with a suffix; rows are named if they differ."""
    rows_of: dict[str, list[str]] = {}
    for row in summary.figures:
        if row.endswith(suffix):
            rows_of.setdefault(origin_of(summary, row), []).append(row)
    if len(rows_of) < 2:
        return "".join(rows_of)
    return "; ".join(f"for {' and '.join(rows)} {origin}" for origin, rows in rows_of.items())


def _origin_of_adjustment(summary: RunSummary, row: str) -> str:
    if summary.recipe["methods"][row.removesuffix(ADJUSTED)]["adjustment"] is not None:
        return "prior and τ are those of the method in the recipe"
    offered = summary.recipe["evaluate"]["logit_adjustment"]
    if "validation" not in summary.results[row]:
        prior, tau = PRIORS[summary.figures[row]["prior"]], f"{summary.figures[row]['tau']:g}"
        of = ", the value in the recipe that is closest to 1" if len(offered) > 1 else ""
        return (
            "there is no validation split to choose prior and τ on, so they are "
            f"{prior} and τ = {tau}{of}"
        )
    chosen = "prior and τ were chosen" if len(offered) > 1 else "the prior was chosen"
    return _chosen_on(summary, chosen)


def _origin_of_tau(summary: RunSummary, row: str) -> str:
    method = summary.recipe["methods"][row.removesuffix(NORMALISED)]
    if method.get("tau_normalisation") is not None:
        return "τ is that of the method in the recipe"
    if len(summary.recipe["evaluate"]["tau_normalisation"]) == 1:
        return "τ is the only value in the recipe"
    if "validation" not in summary.results[row]:
        return (
            "there is no validation split to choose τ on, so it is "
            f"{summary.figures[row]['tau_normalisation']:g}, the value in the recipe that is "
            "closest to 0.5"
        )
    return _chosen_on(summary, "τ was chosen")


def _chosen_on(summary: RunSummary, chosen: str) -> str:
    if summary.split == "validation":
        return f"{chosen} on the same images, which makes the figures optimistic"
    return f"{chosen} on validation"


def adjusted_pair(summary: RunSummary) -> tuple[str, str] | None:
    """The adjusted rows of the baseline and of the featured method, if both exist."""
    pair = (summary.baseline + ADJUSTED, f"{summary.featured}{ADJUSTED}")
    return pair if all(name in summary.figures for name in pair) else None


def commands(summary: RunSummary) -> dict[str, str]:
    """The next commands, for the parent of the run folder; "filter" only with a threshold."""
    folder = summary.name
    best = summary.featured or summary.baseline
    quoted = shlex.quote(folder)
    again = f"discl run {shlex.quote(f'{folder}/{paths.RECIPE}')} --out {quoted}"
    found = {
        "run": again,
        "predict": f"discl predict {quoted} photos --method {shlex.quote(best)} "
        "--out predictions.csv",
        "classifier": f"{folder}/{paths.TRAIN}/{best}/{paths.WEIGHTS}",
    }
    if filters_by_threshold(summary) and summary.verdicts.num_rows:
        cosines = summary.verdicts["clip_similarity"].to_numpy()
        stricter = round(float(np.nanpercentile(cosines, 25)), 2) + 0.0  # drops about a quarter
        found["filter"] = f"{again} --set filter.threshold={stricter:g} --amend"
    return found


def filters_by_threshold(summary: RunSummary) -> bool:
    """Whether the filter drops images below `filter.threshold`."""
    return bool(summary.recipe["filter"]["rule"] != "alia")
