"""Gathers the values of a run and renders the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..data import ImageTable
from ..run_folder import paths
from ..utils.atomic import whole
from . import charts, tables
from . import text as words
from .comparison_page import Comparison, compare_values, read_comparison
from .gallery import Gallery, make_gallery
from .run_summary import ADJUSTED, RunSummary, read_run
from .templates import make_environment


def write_report(
    folder: Path,
    train: ImageTable,
    groups: dict[str, list[int]],
    making: Mapping[str, str],
    store: Path | str | None = None,
) -> Path:
    """Writes `report.html` into a finished run folder and returns its path; the page appears whole or not at all.

    `train` holds the real training images, `groups` the labels of many / medium / few; the synthetic ones lie in `store`, by default
    `spectrum` in the run folder, and `making` says line by line how they are made. The page needs no network and no script. Raises
    RunError that names the file which an unfinished run lacks.
    """
    folder = Path(folder)
    story = read_run(folder, train.class_names, groups, making)
    path = folder / paths.REPORT
    gallery = make_gallery(story, train, store or folder / paths.SPECTRUM)
    compared = {
        "Several seeds": read_comparison(folder),
        "Several seeds, every method tuned": read_comparison(folder / paths.TUNED),
    }
    with whole(path) as unfinished:
        unfinished.write_text(
            render(story, gallery, {title: each for title, each in compared.items() if each}),
            encoding="utf-8",
        )
    return path


def render(
    story: RunSummary, gallery: Gallery, comparisons: Mapping[str, Comparison] | None = None
) -> str:
    """The page as HTML text; every name, prompt and value from the run is escaped. `comparisons` are drawn under their titles."""
    drawn = {title: compare_values(each) for title, each in (comparisons or {}).items()}
    return (
        make_environment()
        .get_template("page.html.j2")
        .render(story=story, gallery=gallery, comparisons=drawn, **_values(story))
    )


def _values(story: RunSummary) -> dict[str, Any]:
    columns = tables.result_columns(story.figures)
    splits = ("test", "test-ood", "validation", "validation-ood")
    others = [
        split
        for split in splits
        if split != story.split and all(split in each for each in story.results.values())
    ]
    other_figures = {
        split: {row: splits[split] for row, splits in story.results.items()} for split in others
    }
    other_columns = {
        split: tables.result_columns(figures) for split, figures in other_figures.items()
    }
    colours = charts.method_colours(story.methods, story.baseline, story.featured)
    return {
        "recipe": words.share_recipe(story.recipe),
        "recipe_text": yaml.safe_dump(words.share_recipe(story.recipe), sort_keys=False, allow_unicode=True, width=110),
        "settings": words.describe_settings(story), "headline": words.headline(story), "caution": words.caution(story),
        "tiles": tiles(story, story.baseline, story.featured), "adjusted": _adjusted_tiles(story),
        "columns": columns, "rows": tables.result_rows(story.figures, columns),
        "other_rows": {split: tables.result_rows(figures, other_columns[split]) for split, figures in other_figures.items()},
        "other_columns": other_columns, "domains": tables.domain_table(story),
        "bounds": words.group_bounds(story.recipe), "adjustment_note": words.adjustment_note(story),
        "adjusts": any(name.endswith(ADJUSTED) for name in story.figures),
        "similarity": similarity(story), "kept": tables.kept_table(story), "listed": tables.MAX_CLASSES,
        "curricula": curricula(story, colours), "epochs": _epoch_axis(story), "curves": curves(story, colours), "colours": colours,
        "differences": tables.differences(story), "classes": classes(story), "commands": words.commands(story),
    }  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A figure of the headline: with the method, with the baseline, and the difference in points; None where absent."""

    name: str
    value: float | None
    before: float | None
    points: float | None


def tiles(story: RunSummary, baseline: str, method: str | None) -> list[Tile]:
    """all, many, medium and few of a method beside the baseline, or of the baseline alone."""
    before, after = story.figures[baseline], story.figures[method or baseline]
    names = {"accuracy": "all", **{group: group for group in tables.GROUPS}}
    change = {key: tables.difference(after, before, key) if method else None for key in names}
    return [
        Tile(name, after.get(key), before.get(key) if method else None, change[key])
        for key, name in names.items()
    ]


def _adjusted_tiles(story: RunSummary) -> tuple[str, str, list[Tile]] | None:
    pair = words.adjusted_pair(story)
    return (*pair, tiles(story, *pair)) if pair else None


@dataclass(frozen=True)
class LevelRow:
    """Distribution of one level, and how many of its images were kept."""

    level: int
    ridge: charts.Ridge
    kept: int
    planned: int
    median: float


@dataclass(frozen=True)
class Similarity:
    """clip_similarity per level over one axis.

    `threshold` is None where the filter goes by none, `threshold_at` also where it lies outside the axis.
    """

    axis: charts.Axis
    threshold: float | None
    threshold_at: float | None
    levels: tuple[LevelRow, ...]


def similarity(story: RunSummary) -> Similarity:
    """How alike the synthetic images are to their class text, level by level from high to low."""
    values, levels = (story.verdicts[name].to_numpy() for name in ("clip_similarity", "level"))
    keep = story.verdicts["keep"].to_numpy(zero_copy_only=False)
    bounded = words.filters_by_threshold(story)
    threshold = (
        float(story.recipe["filter"]["threshold"]) if bounded else -math.inf
    )  # below which nothing lies
    axis = charts.similarity_axis(values, threshold)
    rows = []
    for level in sorted(np.unique(levels).tolist(), reverse=True):
        here = levels == level
        shape = charts.ridge(values[here], axis, threshold)
        rows.append(
            LevelRow(
                level, shape, int(keep[here].sum()), int(here.sum()), float(np.median(values[here]))
            )
        )
    place = axis.place(threshold) if axis.low <= threshold <= axis.high else None
    return Similarity(axis, threshold if bounded else None, place, tuple(rows))


@dataclass(frozen=True)
class Curriculum:
    """What a method trained on, epoch by epoch, and its settings in words."""

    method: str
    colour: str
    note: str
    segments: tuple[charts.Segment, ...]


def curricula(story: RunSummary, colours: Mapping[str, str]) -> list[Curriculum]:
    """The curriculum of every method."""
    result = []
    for name, history in story.histories.items():
        method = story.recipe["methods"][name]
        objective = method["objective"]
        facts = [method["strategy"], objective if isinstance(objective, str) else objective["name"]]
        facts += [method["fine_tune"]] if method.get("fine_tune", "full") != "full" else []
        facts += (
            [f"clip_similarity ≥ {words.plain(method['threshold'])}"]
            if method["threshold"] is not None
            else []
        )
        mixed = [record["synthetic_share"] for record in history if record["levels"]]
        if mixed:
            facts.append(f"{100 * np.mean(mixed):.0f} % of the samples synthetic")
        apart = [record["classes_apart"] for record in history if "classes_apart" in record]
        if apart:
            facts.append(
                f"{min(apart)} to {max(apart)} classes took another level than the one shown"
            )
        facts.append(words.duration(sum(record["seconds"] for record in history)))
        result.append(
            Curriculum(name, colours[name], " · ".join(facts), tuple(charts.segments(history)))
        )
    return result


def _epoch_axis(story: RunSummary) -> charts.Axis:
    return charts.epoch_axis(max([1, *map(len, story.histories.values())]))


def curves(story: RunSummary, colours: Mapping[str, str]) -> list[charts.Chart]:
    """Training loss (at the middle of its epoch) and validation accuracy (at its end), as far as there is any."""
    axis = _epoch_axis(story)
    loss = {
        name: [(record["epoch"] + 0.5, record["loss"]) for record in history]
        for name, history in story.histories.items()
    }
    accuracy = {
        name: [
            (record["epoch"] + 1, 100 * record["validation_accuracy"])
            for record in history
            if "validation_accuracy" in record
        ]
        for name, history in story.histories.items()
    }
    drawn = [("Training loss", "", loss), ("Validation accuracy", "%", accuracy)]
    found = [charts.line_chart(title, unit, axis, series, colours) for title, unit, series in drawn]
    return [chart for chart in found if chart is not None]


@dataclass(frozen=True)
class ClassPanel:
    """Accuracy per class of a method against the baseline; `total` classes of which `rows` are listed."""

    method: str
    rows: list[tables.ClassRow]
    total: int


def classes(story: RunSummary) -> list[ClassPanel]:
    """One panel per method other than the baseline, the featured one first; the baseline's own where it is alone."""
    others = sorted(
        (name for name in story.methods if name != story.baseline),
        key=lambda name: name != story.featured,
    )
    return [
        ClassPanel(name, *tables.class_rows(story, name)) for name in others or [story.baseline]
    ]
