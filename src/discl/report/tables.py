"""Results, differences, classes and filter counts as rows of tables."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.controls import (
    BEST_HEADING,
    MIXTURE_HEADING,
    Controls,
    make_controls,
    split_variant,
)
from .run_summary import RunSummary

GROUPS = ("many", "medium", "few")
MAX_CLASSES = 30
OOD = (
    ("ood_accuracy", "OOD all"),
    ("ood_macro_f1", "OOD macro F1"),
    ("ood_worst_domain_accuracy", "OOD worst domain"),
)
LOWER_IS_BETTER = frozenset({"calibration_error"})
PRIORS = {"real": "real class counts", "effective": "class counts as trained on"}
"""Class prior of logit adjustment, by its name in `results.json`."""
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A figure in [0, 1], or None, and whether it is the best of its column."""

    value: float | None
    best: bool = False


@dataclass(frozen=True)
class ResultRow:
    """A row of the results table: a method, or its adjusted variant."""

    name: str
    method: str
    adjustment: str
    cells: tuple[Cell, ...]


def result_columns(figures: Mapping[str, Figures]) -> list[tuple[str, str]]:
    """`[(metric, heading)]` of the results table.

    First all, the three groups and macro F1; then, if measured, OOD figures, worst-k, the worst
    domain and the calibration error (ECE).
    """
    measured = {name for row in figures.values() for name in row}
    worst = sorted(
        (name for name in measured if re.fullmatch(r"worst_\d+", name)),
        key=lambda name: int(name[6:]),
    )
    groups = [(name, name) for name in GROUPS]
    worst_k = [
        (name, "worst class" if name == "worst_1" else f"worst {name[6:]} classes")
        for name in worst
    ]
    last = [
        each
        for each in (("worst_domain_accuracy", "worst domain"), ("calibration_error", "ECE"))
        if each[0] in measured
    ]
    return [
        ("accuracy", "all"),
        *groups,
        ("macro_f1", "macro F1"),
        *(each for each in OOD if each[0] in measured),
        *worst_k,
        *last,
    ]


def result_rows(
    figures: Mapping[str, Figures], columns: Sequence[tuple[str, str]]
) -> list[ResultRow]:
    """One row per entry of `results.json`.

    Equal printed figures are marked as best together, unless all figures of a column are equal.
    """
    best = {}
    for metric, _ in columns:
        printed = {round(100 * row[metric], 1) for row in figures.values() if metric in row}
        best[metric] = (
            (min if metric in LOWER_IS_BETTER else max)(printed) if len(printed) > 1 else None
        )
    rows = []
    for name, row in figures.items():
        cells = [
            Cell(row.get(metric), metric in row and round(100 * row[metric], 1) == best[metric])
            for metric, _ in columns
        ]
        adjustment = (
            f"logit adjustment: {PRIORS[row['prior']]}, τ = {row['tau']:g}" if "tau" in row else ""
        )
        if "tau_normalisation" in row:
            adjustment = f"class vectors ÷ ‖w‖^τ: τ = {row['tau_normalisation']:g}"
        if "alpha" in row:
            adjustment = f"weight ensembling: α = {row['alpha']:g}"
        rows.append(ResultRow(name, split_variant(name)[0], adjustment, tuple(cells)))
    return rows


@dataclass(frozen=True)
class Difference:
    """A row against the baseline; `points` are percentage points, None for an absent group."""

    name: str
    against: str
    points: tuple[float | None, ...]


def differences(summary: RunSummary) -> list[Difference]:
    """Every other method against the baseline on all, many, medium and few.

    Rows that are computed after training are compared with the same row of the baseline.
    """
    rows = []
    for name, figures in summary.figures.items():
        method, variant = split_variant(name)
        against = summary.baseline + variant
        if method != summary.baseline and against in summary.figures:
            base = summary.figures[against]
            change = (difference(figures, base, key) for key in ("accuracy", *GROUPS))
            rows.append(Difference(name, against, tuple(change)))
    return rows


@dataclass(frozen=True)
class ControlTable:
    """Methods with synthetic images against the two controls, in percentage points.

    - `headings`: of the two columns.
    - `rows`: (name, its row of the same mixture or None, the two differences).
    - `controls`: names of the rows, notes, and lines that add absent ones.
    """

    headings: tuple[str, str]
    rows: Sequence[tuple[str, str | None, tuple[float | None, float | None]]]
    controls: Controls


def control_table(summary: RunSummary) -> ControlTable | None:
    """The differences from the same mixture and from the best row without synthetic images.

    The first is on few, the second overall; both are the OOD macro F1 if that is measured. None if
    no method takes synthetic images.
    """
    figures = summary.figures
    few = "few" if any("few" in row for row in figures.values()) else "accuracy"
    names = {"few": "few", "accuracy": "overall", "ood_macro_f1": "OOD macro F1"}
    metrics, shown, key = (few, "accuracy"), summary.split, "accuracy"
    if summary.ood:
        metrics, shown, key = ("ood_macro_f1", "ood_macro_f1"), summary.ood, "macro_f1"
    chosen_on = shown.replace("test", "validation")
    if not all(chosen_on in splits for splits in summary.results.values()):
        chosen_on = shown
    controls = make_controls(
        summary.recipe,
        list(figures),
        {row: splits[chosen_on][key] for row, splits in summary.results.items()},
        metric="top-1" if key == "accuracy" else names[metrics[1]],
        chosen_on=chosen_on,
        shown=shown,
    )
    if controls is None:
        return None

    def against(row: str, other: str | None, metric: str) -> float | None:
        return None if other is None else difference(figures[row], figures[other], metric)

    return ControlTable(
        (MIXTURE_HEADING.format(names[metrics[0]]), BEST_HEADING.format(names[metrics[1]])),
        [
            (row, other, (against(row, other, metrics[0]), against(row, controls.best, metrics[1])))
            for row, other in controls.same_mixture.items()
        ],
        controls,
    )


def difference(figures: Figures, baseline: Figures, metric: str) -> float | None:
    """Difference of a metric in percentage points; None if one of the two is missing."""
    return (
        100 * (figures[metric] - baseline[metric])
        if metric in figures and metric in baseline
        else None
    )


def standard_errors(
    figures: Figures,
    class_names: Sequence[str],
    images: Sequence[int],
    groups: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Standard errors, in points, of `accuracy` and of the groups' class means.

    - `images`: number of images per class.

    They reflect the finite number of images only. The formulas are √(p(1 − p)/n) for an accuracy p
    over n images, and √(Σ p_c(1 − p_c)/n_c) / K for a mean over K classes.
    """
    share, total = figures["accuracy"], figures["images"]
    errors = {"accuracy": 100 * math.sqrt(share * (1 - share) / total)}
    for group, labels in groups.items():
        accuracies = {label: figures["per_class"].get(class_names[label]) for label in labels}
        members = [
            (accuracy, images[label])
            for label, accuracy in accuracies.items()
            if accuracy is not None
        ]
        if members:
            errors[group] = 100 * math.sqrt(sum(p * (1 - p) / n for p, n in members)) / len(members)
    return errors


@dataclass(frozen=True)
class ClassRow:
    """A class: its accuracy in per cent with the baseline and with the method."""

    name: str
    count: int
    group: str
    before: float
    after: float

    @property
    def points(self) -> float:
        return self.after - self.before


def class_rows(summary: RunSummary, method: str) -> tuple[list[ClassRow], int]:
    """(classes by falling number of training images, number of all classes).

    Of more than 30 classes, those with the largest change are listed.
    """
    before, after = (
        summary.figures[summary.baseline]["per_class"],
        summary.figures[method]["per_class"],
    )
    group_of = {label: group for group, labels in summary.groups.items() for label in labels}
    rows = [
        ClassRow(
            name,
            int(summary.class_counts[label]),
            group_of[label],
            100 * before[name],
            100 * after[name],
        )
        for label, name in enumerate(summary.class_names)
        if name in before and name in after
    ]
    chosen = sorted(rows, key=lambda row: -abs(row.points))[:MAX_CLASSES]
    return sorted(chosen, key=lambda row: -row.count), len(rows)


@dataclass(frozen=True)
class DomainRow:
    """A domain: its images, then accuracy and macro F1 of each shown method."""

    name: str
    images: int
    cells: tuple[float, ...]


def domain_table(summary: RunSummary) -> tuple[str, list[str], list[DomainRow], int] | None:
    """(split, shown methods, rows, number of domains) of the OOD split, else of the page's split.

    At most 30 domains are listed, from the worst on (accuracy of the last shown method). None
    without domains.
    """
    split = next(
        (
            name
            for name in (summary.ood, summary.split)
            if name and "per_domain" in summary.results[summary.baseline][name]
        ),
        None,
    )
    if split is None:
        return None
    shown = [name for name in dict.fromkeys((summary.baseline, summary.featured)) if name]
    measured = [summary.results[name][split]["per_domain"] for name in shown]
    names = sorted(measured[-1], key=lambda name: (measured[-1][name]["accuracy"], name))
    rows = [
        DomainRow(
            name,
            measured[0][name]["images"],
            tuple(each[name][metric] for each in measured for metric in ("accuracy", "macro_f1")),
        )
        for name in names[:MAX_CLASSES]
    ]
    return split, shown, rows, len(names)


@dataclass(frozen=True)
class KeptRow:
    """A class, or all: (kept, planned) images per level, then over all levels; None if none."""

    name: str
    cells: tuple[tuple[int, int] | None, ...]


def kept_table(summary: RunSummary) -> tuple[list[int], list[KeptRow], int]:
    """(levels from high to low, kept images per class and of all, classes with a spectrum).

    Of more than 30 classes, those that lost the largest fraction are listed.
    """
    labels, levels = (summary.verdicts[name].to_numpy() for name in ("label", "level"))
    keep = summary.verdicts["keep"].to_numpy(zero_copy_only=False)
    columns = sorted(np.unique(levels).tolist(), reverse=True)
    place = {level: index for index, level in enumerate(columns)}
    shape = (len(summary.class_names), len(columns))
    where = (labels, np.asarray([place[level] for level in levels.tolist()], int))
    planned, kept = np.zeros(shape, int), np.zeros(shape, int)
    np.add.at(planned, where, 1)
    np.add.at(kept, where, keep.astype(int))

    def row(name: str, kept: np.ndarray, planned: np.ndarray) -> KeptRow:
        pairs = [
            *zip(kept.tolist(), planned.tolist(), strict=True),
            (int(kept.sum()), int(planned.sum())),
        ]
        return KeptRow(name, tuple(pair if pair[1] else None for pair in pairs))

    present = np.flatnonzero(planned.sum(1))
    listed = present
    if len(present) > MAX_CLASSES:
        share = kept[present].sum(1) / planned[present].sum(1)
        listed = present[np.argsort(share, kind="stable")[:MAX_CLASSES]]
    ordered = sorted(listed.tolist(), key=lambda label: (-summary.class_counts[label], label))
    rows = [row(summary.class_names[label], kept[label], planned[label]) for label in ordered]
    return columns, [*rows, row("all classes", kept.sum(0), planned.sum(0))], len(present)
