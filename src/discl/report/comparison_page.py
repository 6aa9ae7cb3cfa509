"""The page of `discl compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..evaluation.comparison import (
    DIFFERENCE,
    INTERVAL,
    MISSING,
    Entry,
    Interval,
    as_cells,
    mean_std,
)
from ..evaluation.controls import ABSENT
from ..run_folder import paths
from ..utils.stored import read_json, reading, write_text
from .charts import Axis, nice_axis

COMPARED_AGAIN = "Delete it and run `discl compare` again."


@dataclass(frozen=True)
class Comparison:
    """The results of `discl compare`.

    - `notes`: how settings were chosen.
    - `control_notes`, `control_lines`: which rows the controls are, and YAML of absent ones.
    """

    entries: Sequence[Entry]
    columns: Sequence[str]
    seeds: Sequence[int]
    baseline: str
    split: str
    notes: Sequence[str]
    control_notes: Sequence[str] = ()
    control_lines: str = ""

    @property
    def absent(self) -> str:
        """What `control_lines` are for."""
        return ABSENT


@dataclass(frozen=True)
class Spot:
    """A method in one column, in per cent of the width.

    - `band`: mean ± std, None for one seed.
    - `published`: the paper's figure, or None.
    """

    title: str
    mean: float
    band: tuple[float, float] | None
    seeds: tuple[float, ...]
    published: float | None


@dataclass(frozen=True)
class Column:
    """One metric of all methods, None where missing; `baseline` is the position of its mean."""

    name: str
    axis: Axis
    baseline: float | None
    spots: tuple[Spot | None, ...]


def read_comparison(folder: Path) -> Comparison | None:
    """The comparison in `comparison.json` of a folder; None if it does not exist."""
    path = folder / paths.COMPARISON_DATA
    if not path.is_file():
        return None
    keys = ("rows", "seeds", "baseline", "split", "notes")
    found = read_json(path, *keys, advice=COMPARED_AGAIN)
    with reading(path, COMPARED_AGAIN):
        entries = [
            Entry(
                name,
                row["figures"],
                {column: Interval(*interval) for column, interval in row["intervals"].items()},
                row["costs"],
                row["published"],
                {
                    heading: Interval(*interval) if interval else None
                    for heading, interval in row.get("controls", {}).items()
                },
            )
            for name, row in found["rows"].items()
        ]
        columns = list(dict.fromkeys(column for entry in entries for column in entry.figures))
        controls = found.get("controls", {"notes": [], "lines": ""})
        return Comparison(
            entries,
            columns,
            found["seeds"],
            found["baseline"],
            found["split"],
            found["notes"],
            list(controls["notes"]),
            str(controls["lines"]),
        )


def compare_values(found: Comparison) -> dict[str, Any]:
    """Values for the template of a comparison."""
    heading, rows = _stack(*as_cells(found.entries, found.columns))
    return {
        "compared": found,
        "compared_columns": [make_column(found, name) for name in found.columns],
        "heading": heading,
        "cells": rows,
    }


def _stack(
    heading: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """The table with intervals and differences below figures, so that the controls fit beside them.

    Cells are (figure, what is below it), which may be empty.
    """
    cells = [dict(zip(heading, row, strict=True)) for row in rows]
    kept = [name for name in heading if not name.endswith(DIFFERENCE)]
    names = [name.removesuffix(INTERVAL) for name in kept]
    return names, [[_split(row, name) for name in kept] for row in cells]


def _split(row: Mapping[str, str], name: str) -> tuple[str, str]:
    figure, _, interval = row[name].partition(" [")
    if name.endswith(INTERVAL) and interval:
        return figure, f"[{interval}"
    below = row.get(f"{name}{DIFFERENCE}", MISSING)
    return row[name], "" if below == MISSING else below


def make_column(found: Comparison, name: str) -> Column:
    """The drawing of one metric; its axis spans all seeds and the paper's figures."""
    measured = {
        entry.name: [100 * value for value in entry.figures[name]]
        for entry in found.entries
        if name in entry.figures
    }
    published = {
        entry.name: entry.published[name] for entry in found.entries if name in entry.published
    }
    values = [*(value for each in measured.values() for value in each), *published.values()]
    axis = nice_axis(min(values), max(values), 3)
    spots = tuple(
        _spot(entry, name, axis, published) if entry.name in measured else None
        for entry in found.entries
    )
    means = {
        entry.name: spot.mean for entry, spot in zip(found.entries, spots, strict=True) if spot
    }
    return Column(name, axis, means.get(found.baseline), spots)


def _spot(entry: Entry, name: str, axis: Axis, published: Mapping[str, float]) -> Spot:
    mean, std = mean_std(entry.figures[name])
    title = f"{entry.name}, {name}: {mean:.1f}" + (f" ± {std:.1f}" if std is not None else "")
    if entry.name in published:
        title += f"; the paper's {published[entry.name]:.1f}"
    band = None
    if std is not None:
        band = axis.place(max(mean - std, axis.low)), axis.place(min(mean + std, axis.high))
    seeds = tuple(axis.place(100 * value) for value in entry.figures[name])
    return Spot(
        title,
        axis.place(mean),
        band,
        seeds,
        axis.place(published[entry.name]) if entry.name in published else None,
    )


def write_comparison(folder: Path, name: str) -> Path:
    """Writes `comparison.html` from the `comparison.json` of a folder; returns its path.

    The page is written atomically. Raises RunError without a `comparison.json`.
    """
    from .templates import make_environment

    found = read_comparison(folder)
    if found is None:
        raise RunError(f"{folder} holds no {paths.COMPARISON_DATA}; run `discl compare` first.")
    path = folder / paths.COMPARISON_PAGE
    page = make_environment().get_template("comparison.html.j2")
    write_text(path, page.render(name=name, **compare_values(found)))
    return path
