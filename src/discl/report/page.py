"""Gathers the values of a run and renders the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..data import ImageTable
from ..evaluation.controls import ABSENT, ADJUSTED, takes_retrieved_images
from ..mixtures import describe_mixture
from ..run_folder import paths
from ..utils.stored import write_text
from . import charts, tables
from . import text as words
from .audit_section import AuditRow
from .comparison_page import Comparison, compare_values, read_comparison
from .gallery import Gallery, make_gallery
from .pilot_section import read_adaptation, read_pilot
from .rounds import round_rows
from .run_summary import RunSummary, read_run
from .templates import make_environment


def write_report(
    folder: Path,
    train: ImageTable,
    groups: dict[str, list[int]],
    making: Mapping[str, str],
    store: Path | str | None = None,
    *,
    audited: Sequence[AuditRow] | None = None,
    prices: Mapping[int, int] | None = None,
) -> Path:
    """Writes `report.html` into a finished run folder; returns its path.

    - `train`: the real training images.
    - `groups`: labels of many, medium and few.
    - `making`: how the images are made, `{title: text}`.
    - `store`: folder of the synthetic images; default `spectrum` in the run folder.
    - `audited`: what `discl audit` found, from `audit_rows`; None without an audit.
    - `prices`: UNet rows of an image by its level, for the rounds of a loop.

    The page needs no network and no script. It is written atomically. Raises RunError with the name
    of a missing file.
    """
    folder = Path(folder)
    summary = read_run(folder, train.class_names, groups, making, prices)
    path = folder / paths.REPORT
    gallery = make_gallery(summary, train, store or folder / paths.SPECTRUM)
    compared = {
        "Several seeds": read_comparison(folder),
        "Several seeds, every method tuned": read_comparison(folder / paths.TUNED),
    }
    sections = {
        "pilot": read_pilot(folder),
        "adaptation": read_adaptation(folder, summary.recipe),
        "audited": audited,
    }
    found = {title: each for title, each in compared.items() if each}
    write_text(path, render(summary, gallery, found, sections))
    return path


def render(
    summary: RunSummary,
    gallery: Gallery,
    comparisons: Mapping[str, Comparison] | None = None,
    sections: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML; every name, prompt and value from the run is escaped.

    - `comparisons`: tables of `discl compare` by their titles.
    - `sections`: `pilot`, `adaptation` and `audited` of a run that has them.
    """
    further = {"pilot": None, "adaptation": None, "audited": None, **(sections or {})}
    drawn = {title: compare_values(each) for title, each in (comparisons or {}).items()}
    return (
        make_environment()
        .get_template("page.html.j2")
        .render(summary=summary, gallery=gallery, comparisons=drawn, **further, **_values(summary))
    )


def _values(summary: RunSummary) -> dict[str, Any]:
    columns = tables.result_columns(summary.figures)
    splits = ("test", "test-ood", "validation", "validation-ood")
    others = [
        split
        for split in splits
        if split != summary.split and all(split in each for each in summary.results.values())
    ]
    other_figures = {
        split: {row: splits[split] for row, splits in summary.results.items()} for split in others
    }
    other_columns = {
        split: tables.result_columns(figures) for split, figures in other_figures.items()
    }
    colours = charts.method_colours(summary.methods, summary.baseline, summary.featured)
    recipe = words.share_recipe(summary.recipe)
    controlled = tables.control_table(summary)
    return {
        "recipe": recipe,
        "recipe_text": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110),
        "settings": words.describe_settings(summary),
        "headline": words.headline(summary, controlled),
        "caution": words.caution(summary),
        "tiles": tiles(summary, summary.baseline, summary.featured),
        "adjusted": _adjusted_tiles(summary),
        "columns": columns,
        "rows": tables.result_rows(summary.figures, columns),
        "other_rows": {
            split: tables.result_rows(figures, other_columns[split])
            for split, figures in other_figures.items()
        },
        "other_columns": other_columns,
        "domains": tables.domain_table(summary),
        "bounds": words.group_bounds(summary.recipe),
        "adjustment_note": words.adjustment_note(summary),
        "adjusts": any(name.endswith(ADJUSTED) for name in summary.figures),
        "normalisation_note": words.normalisation_note(summary),
        "similarity": similarity(summary) if summary.verdicts.num_rows else None,
        "kept": tables.kept_table(summary),
        "rounds": round_rows(summary),
        "listed": tables.MAX_CLASSES,
        "curricula": curricula(summary, colours),
        "epochs": _epoch_axis(summary),
        "curves": curves(summary, colours),
        "colours": colours,
        "differences": tables.differences(summary),
        "controlled": controlled,
        "absent": ABSENT,
        "classes": classes(summary),
        "commands": words.commands(summary),
    }


@dataclass(frozen=True)
class Tile:
    """A figure of the headline: of the method, of the baseline, and the difference in points."""

    name: str
    value: float | None
    before: float | None
    points: float | None


def tiles(summary: RunSummary, baseline: str, method: str | None) -> list[Tile]:
    """all, many, medium and few of a method and the baseline, or of the baseline alone."""
    before, after = summary.figures[baseline], summary.figures[method or baseline]
    names = {"accuracy": "all", **{group: group for group in tables.GROUPS}}
    change = {key: tables.difference(after, before, key) if method else None for key in names}
    return [
        Tile(name, after.get(key), before.get(key) if method else None, change[key])
        for key, name in names.items()
    ]


def _adjusted_tiles(summary: RunSummary) -> tuple[str, str, list[Tile]] | None:
    pair = words.adjusted_pair(summary)
    return (*pair, tiles(summary, *pair)) if pair else None


@dataclass(frozen=True)
class LevelRow:
    """The distribution of one level, and how many of its images were kept."""

    level: int
    ridge: charts.Ridge
    kept: int
    planned: int
    median: float


@dataclass(frozen=True)
class Similarity:
    """clip_similarity per level over one axis.

    - `threshold`: None where the filter uses none.
    - `threshold_at`: its position, None also where it is outside the axis.
    """

    axis: charts.Axis
    threshold: float | None
    threshold_at: float | None
    levels: tuple[LevelRow, ...]


def similarity(summary: RunSummary) -> Similarity:
    """Similarity of the synthetic images to their class text, from the highest level down."""
    values, levels = (summary.verdicts[name].to_numpy() for name in ("clip_similarity", "level"))
    keep = summary.verdicts["keep"].to_numpy(zero_copy_only=False)
    finished = np.isfinite(values)  # the others were rejected on the way
    bounded = words.filters_by_threshold(summary)
    threshold = float(summary.recipe["filter"]["threshold"]) if bounded else -math.inf
    axis = charts.similarity_axis(values[finished], threshold)
    rows = []
    for level in sorted(np.unique(levels).tolist(), reverse=True):
        here = levels == level
        made = values[here & finished]
        if not len(made):
            continue
        own = summary.recipe["filter"].get("level_thresholds", {}).get(str(level), threshold)
        shape = charts.ridge(made, axis, own if bounded else threshold)
        rows.append(
            LevelRow(level, shape, int(keep[here].sum()), int(here.sum()), float(np.median(made)))
        )
    place = axis.place(threshold) if axis.low <= threshold <= axis.high else None
    return Similarity(axis, threshold if bounded else None, place, tuple(rows))


@dataclass(frozen=True)
class Curriculum:
    """What a method trained on in each epoch, and its settings in words."""

    method: str
    colour: str
    note: str
    segments: tuple[charts.Segment, ...]


def curricula(summary: RunSummary, colours: Mapping[str, str]) -> list[Curriculum]:
    """The curriculum of every method."""
    result = []
    for name, history in summary.histories.items():
        method = summary.recipe["methods"][name]
        objective = method["objective"]
        retrieved = takes_retrieved_images(method)
        facts = ["retrieved images" if retrieved else method["strategy"]]
        facts += [objective if isinstance(objective, str) else objective["name"]]
        facts += [method["fine_tune"]] if method.get("fine_tune", "full") != "full" else []
        facts += (
            [f"clip_similarity ≥ {words.plain(method['threshold'])}"]
            if method["threshold"] is not None
            else []
        )
        by_tail = summary.recipe["hard"]["rule"] == "tail"
        facts.append(f"mixture {describe_mixture(method, by_tail)}")
        mixed = [record["synthetic_share"] for record in history if record["levels"]]
        if mixed:
            kind = "retrieved" if retrieved else "synthetic"
            facts.append(f"{100 * np.mean(mixed):.0f} % of the samples {kind}")
        apart = [record["classes_apart"] for record in history if "classes_apart" in record]
        if apart:
            facts.append(
                f"{min(apart)} to {max(apart)} classes used another level than the one shown"
            )
        if method.get("fine_tune") == "light" and history and "parameters" in history[0]:
            facts.append(_footprint(history[0]))
        facts.append(words.duration(sum(record["seconds"] for record in history)))
        result.append(
            Curriculum(name, colours[name], " · ".join(facts), tuple(charts.segments(history)))
        )
    return result


def _footprint(record: Mapping[str, Any]) -> str:
    """What light tuning trained, and what it kept in memory."""
    trained, parameters = record["trained_parameters"], record["parameters"]
    return (
        f"trains {words.number(trained)} of {words.number(parameters)} parameters "
        f"({100 * trained / parameters:.2g} %) in {record['training_bytes'] / 1e6:.3g} MB"
    )


def _epoch_axis(summary: RunSummary) -> charts.Axis:
    return charts.epoch_axis(max([1, *map(len, summary.histories.values())]))


def curves(summary: RunSummary, colours: Mapping[str, str]) -> list[charts.Chart]:
    """Training loss (at mid-epoch) and validation accuracy (at the epoch's end), if measured."""
    axis = _epoch_axis(summary)
    loss = {
        name: [(record["epoch"] + 0.5, record["loss"]) for record in history]
        for name, history in summary.histories.items()
    }
    accuracy = {
        name: [
            (record["epoch"] + 1, 100 * record["validation_accuracy"])
            for record in history
            if "validation_accuracy" in record
        ]
        for name, history in summary.histories.items()
    }
    drawn = [("Training loss", "", loss), ("Validation accuracy", "%", accuracy)]
    found = [charts.line_chart(title, unit, axis, series, colours) for title, unit, series in drawn]
    return [chart for chart in found if chart is not None]


@dataclass(frozen=True)
class ClassPanel:
    """Accuracy per class of a method against the baseline; `rows` lists some of `total` classes."""

    method: str
    rows: list[tables.ClassRow]
    total: int


def classes(summary: RunSummary) -> list[ClassPanel]:
    """One panel per method other than the baseline, the featured one first."""
    others = sorted(
        (name for name in summary.methods if name != summary.baseline),
        key=lambda name: name != summary.featured,
    )
    return [
        ClassPanel(name, *tables.class_rows(summary, name)) for name in others or [summary.baseline]
    ]
