"""The tables of `gap.py`, from its committed figures: gains, and what was expected."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from benchmarks.gap import RESULTS, SETTINGS, best_fixed


def read_results(results: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """`{setting: {draw: {"rows": ..., "gap": ...}}}` of the finished units, real rows included."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, setting in SETTINGS.items():
        for file in sorted(results.glob(f"{name}-[0-9]*.json")):
            draw = int(file.stem.rsplit("-", 1)[1])
            unit = json.loads(file.read_text())
            real = json.loads((results / f"real-{setting.domain}-{draw}.json").read_text())
            unit["rows"] = {**real["rows"], **unit["rows"]}
            found.setdefault(name, {})[draw] = unit
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % interval by Student's t over the draws)."""
    from discl.evaluation.comparison import STUDENT

    if len(values) < 2:
        return values[0], math.inf
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * spread


def difference(units: Mapping[int, Any], row: str, other: str, metric: str) -> list[float]:
    """Points of one row over another on test images, paired over the draws."""
    tests = [{name: rows["test"] for name, rows in unit["rows"].items()} for unit in units.values()]
    return [each[row][metric] - each[other][metric] for each in tests]


SHOWN = {
    "few": (
        "text-only",
        "all",
        "d2s",
        "s2d",
        "best-fixed",
        "text-only-filtered",
        "d2s-filtered",
        "ce-balanced",
        "oracle",
    ),
    "all": ("text-only-balanced", "all-balanced", "d2s-balanced", "oracle-balanced"),
}
"""Rows of the tables, by metric."""


def named_difference(
    units: Mapping[int, Any], row: str, other: str, metric: str
) -> list[float] | None:
    """`difference`, with `best-fixed` for the level of each draw; None where a row was not run."""
    names = {draw: best_fixed(unit) if row == "best-fixed" else row for draw, unit in units.items()}
    if not all({names[draw], other} <= unit["rows"].keys() for draw, unit in units.items()):
        return None
    return [difference({draw: units[draw]}, names[draw], other, metric)[0] for draw in units]


def tables(results: Path) -> str:
    """Rows against the same mixture without images, and what was expected, in Markdown."""
    found = read_results(results)
    referees = json.loads((RESULTS / "referees.json").read_text())
    lines = []
    for metric, rows in SHOWN.items():
        control = "ce-undersampled" if metric == "few" else "ce-balanced"
        differences = {
            (name, row): named_difference(units, row, control, metric)
            for name, units in found.items()
            for row in rows
        }
        rows = tuple(row for row in rows if any(differences[name, row] for name in found))
        if not rows:
            continue
        lines += [f"{metric}, row − {control}, points; mean ± half the 95 % interval", ""]
        lines.append("| setting (draws) | recognised at 0 % (real) | " + " | ".join(rows) + " |")
        lines.append("|---|---:|" + "---:|" * len(rows))
        for name, units in found.items():
            known = statistics.mean(unit["gap"]["0"]["recognised"] for unit in units.values())
            cells = []
            for row in rows:
                values = differences[name, row]
                cells.append(_in_points(values) if values else "–")
            real = referees[SETTINGS[name].domain]
            shown = f"{known:.2f} ({real:.2f})"
            lines.append(f"| {name} ({len(units)}) | {shown} | " + " | ".join(cells) + " |")
        lines.append("")
    fixed = [
        f"{name}: {', '.join(best_fixed(unit) for unit in units.values())}"
        for name, units in found.items()
    ]
    lines += ["Best fixed level on validation, by draw. " + "; ".join(fixed) + ".", ""]
    return "\n".join([*lines, *_expectations(found)])


def _expectations(found: Mapping[str, Mapping[int, Any]]) -> list[str]:
    """What was written down beforehand, and what came."""
    lines = ["| setting | difference | expected | measured | |", "|---|---|---|---|---|"]
    expected = yaml.safe_load((RESULTS / "expected.yaml").read_text())
    for name in SETTINGS:
        for each in expected.get(name, ()):
            if name not in found:
                continue
            values = named_difference(found[name], each["of"], each["minus"], each["metric"])
            what = f"{name} | {each['metric']}, {each['of']} − {each['minus']}"
            lines += verdict(what, values, each["sign"])
    for each in expected["adapted"]:
        name, tuned = each["setting"], f"{each['setting']}-{each.get('by', 'adapted')}"
        draws = sorted(found.get(name, {}).keys() & found.get(tuned, {}).keys())
        if draws:
            row, metric = each["of"], each["metric"]
            tests = [
                [found[setting][draw]["rows"][row]["test"][metric] for setting in (tuned, name)]
                for draw in draws
            ]
            what = f"{tuned} | {metric}, {row} − {row} of {name}"
            lines += verdict(what, [after - before for after, before in tests], each["sign"])
    return [*lines, "", *_rank_over_settings(found, expected["over the gap"][0])]


def _ranks(values: list[float]) -> list[float]:
    """Ranks from 0, the mean rank for equal values."""
    order = sorted(values)
    return [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation: Pearson's, of the ranks."""
    import numpy as np

    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def verdict(what: str, values: Sequence[float] | None, expected: str) -> list[str]:
    """One line of the table of expectations; none where a row was not run."""
    if not values:
        return []
    mean, half = interval(values)
    sign = "+" if mean - half > 0 else "-" if mean + half < 0 else "0"
    if len(values) == 1:
        outcome = "one draw: open"
    elif sign == expected:
        outcome = "as expected" if sign != "0" else "interval includes 0"
    else:
        outcome = "not shown" if sign == "0" else "otherwise"
    return [f"| {what} | {expected} | {_in_points(values)} | {outcome} |"]


def _in_points(values: Sequence[float]) -> str:
    """Mean ± half the interval; one value has none."""
    mean, half = interval(values)
    return f"{mean:+.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:+.1f}"


def _rank_over_settings(
    found: Mapping[str, Mapping[int, Any]], expected: Mapping[str, Any]
) -> list[str]:
    """Rank correlation over settings of the recognised fraction and the gain of a row.

    Settings with class tokens came later, and are left out.
    """
    row, control, metric = expected["against"]
    gains = {name: named_difference(units, row, control, metric) for name, units in found.items()}
    names = [
        name for name in found if gains[name] and SETTINGS[name].adapted not in ("tokens", "both")
    ]
    if len(names) < 4:
        return []
    known = [
        statistics.mean(unit["gap"]["0"][expected["rank"]] for unit in found[name].values())
        for name in names
    ]
    means = [statistics.mean(gains[name] or [math.nan]) for name in names]
    referees = json.loads((RESULTS / "referees.json").read_text())
    relative = [
        each / referees[SETTINGS[name].domain] for name, each in zip(names, known, strict=True)
    ]
    return [
        f"Spearman over {len(names)} settings of {expected['rank']} at 0 % and {row} − {control}, "
        f"{metric}: {spearman(known, means):.2f} (expected sign {expected['sign']}). With "
        f"{expected['rank']} ÷ that of real images, which was not written down beforehand: "
        f"{spearman(relative, means):.2f}."
    ]
