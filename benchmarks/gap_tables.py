"""The tables of `gap.py`, from its committed figures, as `docs/results.md` has them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from benchmarks.gap import LEVELS, RESULTS, SETTINGS, TRAININGS, best_fixed

Units = Mapping[int, Mapping[str, Any]]
"""`{draw: {"rows": ..., "gap": ...}}` of one setting."""

FEW = {
    "text-only": "text-only",
    "all": "all levels",
    "d2s": "diverse-to-specific",
    "s2d": "specific-to-diverse",
    "best-fixed": "best fixed level",
    "text-only-filtered": "text-only, filtered",
    "d2s-filtered": "diverse-to-specific, filtered",
    "oracle": "real images instead (oracle)",
}
"""Rows of the tables of few classes, the head undersampled, and their titles."""
OVERALL = {
    "text-only-balanced": "text-only",
    "all-balanced": "all levels",
    "d2s-balanced": "diverse-to-specific",
    "text-only-balanced-filtered": "text-only, filtered",
    "oracle-balanced": "real images instead (oracle)",
}
"""Rows of the table of all classes, drawn equally often."""
PAIRS = {
    "diverse-to-specific − text-only": ("d2s", "text-only"),
    "the same, filtered": ("d2s-filtered", "text-only-filtered"),
    "specific-to-diverse − diverse-to-specific": ("s2d", "d2s"),
    "diverse-to-specific − all levels": ("d2s", "all"),
}
"""Differences of two strategies."""
BEST = "best row with images − best row without"
"""The column of `best_difference`."""
GENERATORS = {"adapted": "low-rank weights", "tokens": "class tokens", "both": "both"}


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


# --------------------------------------------------------------------------------------- figures


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % interval by Student's t over the draws)."""
    from discl.evaluation.comparison import STUDENT

    if len(values) < 2:
        return values[0], math.inf
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * spread


def difference(units: Units, row: str, other: str, metric: str) -> list[float]:
    """Points of one row over another on test images, paired over the draws."""
    tests = [{name: rows["test"] for name, rows in unit["rows"].items()} for unit in units.values()]
    return [each[row][metric] - each[other][metric] for each in tests]


def named_difference(units: Units, row: str, other: str, metric: str) -> list[float] | None:
    """`difference`, with `best-fixed` for the level of each draw; None where a row was not run."""
    names = {draw: best_fixed(unit) if row == "best-fixed" else row for draw, unit in units.items()}
    if not all({names[draw], other} <= unit["rows"].keys() for draw, unit in units.items()):
        return None
    return [difference({draw: units[draw]}, names[draw], other, metric)[0] for draw in units]


def best_difference(units: Units) -> list[float]:
    """Points over all classes of the best row with synthetic images over the best without.

    Both are the best of a draw over all classes of the validation images, with or without logit
    adjustment. An oracle is neither.
    """
    real = {"ce", "ce-undersampled", "oversampled", "ce-balanced"}
    found = []
    for unit in units.values():
        rows = {
            (name, metric): (splits["validation"][metric], splits["test"][metric])
            for name, splits in unit["rows"].items()
            if not name.startswith("oracle")
            for metric in ("all", "all+la")
        }
        with_images, without = (
            max(
                (figures for (name, _), figures in rows.items() if (name in real) is alone),
                key=lambda figures: figures[0],  # not of test: of equal ones it is the first
            )
            for alone in (False, True)
        )
        found.append(with_images[1] - without[1])
    return found


def gap_of(units: Units, measure: str, level: int = 0) -> float:
    """Mean over the draws of what `gap.measure_gap` tells of the images of a level."""
    return statistics.mean(unit["gap"][str(level)][measure] for unit in units.values())


def real_recognised(name: str) -> float:
    """Fraction of a setting's real images that the classifier of its domain recognises."""
    known = json.loads((RESULTS / "referees.json").read_text())
    return float(known[SETTINGS[name].domain])


def _ranks(values: list[float]) -> list[float]:
    """Ranks from 0, the mean rank for equal values."""
    order = sorted(values)
    return [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation: Pearson's, of the ranks."""
    import numpy as np

    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


# ---------------------------------------------------------------------------------------- tables


def tables(results: Path) -> str:
    """All tables in Markdown: gains, tuned generators, and what was expected."""
    found, deep = read_results(results), read_results(results / "resnet10")
    plain = {name: units for name, units in found.items() if not SETTINGS[name].adapted}
    parts = [
        measured_gap(plain),
        gains(plain, FEW, "few, over the same mixture without synthetic images"),
        strategy_differences(plain, "few, one strategy over another"),
        overall_gains(plain),
        tuned_gains(found),
        f"Best fixed level on validation, by draw. {_fixed_levels(plain)}.",
        *expectations(found),
    ]
    if deep:
        rows = {row: title for row, title in FEW.items() if row in TRAININGS["resnet10"].rows}
        title = "ResNet-10, few, over the same mixture without synthetic images"
        parts += [gains(deep, rows, title)]
        parts += [
            strategy_differences(deep, "ResNet-10, few, one strategy over another"),
            expectations(deep)[0],
        ]
    return "\n\n".join(parts)


def measured_gap(found: Mapping[str, Units]) -> str:
    """What the images of each level are, by a classifier of the domain and its features."""
    measures = {
        "recognised": "recognised",
        "precision": "precision",
        "coverage": "coverage",
        "frechet": "Fréchet distance",
        "kept": "kept",
    }
    body = [
        [
            title_of(name),
            number(real_recognised(name)),
            f"{level}",
            *(number(gap_of(units, each, level)) for each in measures),
        ]
        for name, units in found.items()
        for level in LEVELS
    ]
    return markdown(["the gap", "real images, recognised", "λ, %", *measures.values()], body)


def gains(
    found: Mapping[str, Units], rows: Mapping[str, str], title: str, overall: bool = False
) -> str:
    """Each row over the same mixture without synthetic images on few, the head undersampled.

    - `overall`: add the column `BEST`, over all classes.
    """
    titles = ["samples", "recognised ÷ real", *rows.values()]
    titles += [f"all: {BEST}"] if overall else []
    body = []
    for name, units in found.items():
        known = gap_of(units, "recognised") / real_recognised(name)
        cells = [named_difference(units, row, "ce-undersampled", "few") for row in rows]
        cells += [best_difference(units)] if overall else []
        body.append([title_of(name), f"{len(units)}", number(known), *map(in_points, cells)])
    return markdown([title, *titles], body)


def strategy_differences(found: Mapping[str, Units], title: str) -> str:
    """The `PAIRS` of strategies that were run, on few, the head undersampled."""
    known = {name for units in found.values() for unit in units.values() for name in unit["rows"]}
    pairs = {name: pair for name, pair in PAIRS.items() if known.issuperset(pair)}
    body = [
        [
            title_of(name),
            *(in_points(named_difference(units, *pair, "few")) for pair in pairs.values()),
        ]
        for name, units in found.items()
    ]
    return markdown([title, *pairs], body)


def overall_gains(found: Mapping[str, Units]) -> str:
    """Each row over all classes, and the best rows with and without synthetic images."""
    head = "all, classes drawn equally, over the same without synthetic images"
    titles = ["samples", *OVERALL.values(), BEST]
    body = [
        [
            title_of(name),
            f"{len(units)}",
            *(in_points(named_difference(units, row, "ce-balanced", "all")) for row in OVERALL),
            in_points(best_difference(units)),
        ]
        for name, units in found.items()
    ]
    return markdown([head, *titles], body)


def tuned_gains(found: Mapping[str, Units]) -> str:
    """Text-only images of a tuned generator against those of the same one as it is."""
    titles = [
        "few, text-only images of a tuned generator",
        "tuned",
        "samples",
        "tuned − as it is",
        "tuned − same mixture of real images",
        "tuned and filtered − same mixture",
        "recognised ÷ real, as it is → tuned",
        "coverage, as it is → tuned",
    ]
    body = []
    for name in found:
        how, (tuned, before) = SETTINGS[name].adapted, paired_units(found, name)
        if how and tuned:
            real = real_recognised(name)
            both = (before, tuned)
            known = " → ".join(number(gap_of(each, "recognised") / real) for each in both)
            covered = " → ".join(number(gap_of(each, "coverage")) for each in both)
            cells = [
                tuned_difference(found, name, "text-only", "few"),
                *(
                    named_difference(tuned, row, "ce-undersampled", "few")
                    for row in ("text-only", "text-only-filtered")
                ),
            ]
            base = title_of(name.removesuffix(f"-{how}"))
            body.append([base, GENERATORS[how], f"{len(tuned)}", *map(in_points, cells)])
            body[-1] += [known, covered]
    return markdown(titles, body)


def paired_units(found: Mapping[str, Units], name: str) -> tuple[Units, Units]:
    """Units of a tuned generator and of the same one as it is, of the draws that both have."""
    before = found.get(name.removesuffix(f"-{SETTINGS[name].adapted}"), {})
    draws = sorted(found[name].keys() & before.keys())
    tuned, as_it_is = ({draw: each[draw] for draw in draws} for each in (found[name], before))
    return tuned, as_it_is


def tuned_difference(found: Mapping[str, Units], name: str, row: str, metric: str) -> list[float]:
    """Points of a row with a tuned generator over the same row without, paired over the draws."""
    tuned, before = paired_units(found, name)
    tests = [
        [each[draw]["rows"][row]["test"][metric] for each in (tuned, before)] for draw in tuned
    ]
    return [after - first for after, first in tests]


def _fixed_levels(found: Mapping[str, Units]) -> str:
    return "; ".join(
        f"{title_of(name)}: "
        + ", ".join(best_fixed(unit).removeprefix("fixed-") for unit in units.values())
        for name, units in found.items()
    )


def expectations(found: Mapping[str, Units]) -> list[str]:
    """What was written down beforehand, and what came; then ranks over the settings."""
    expected = yaml.safe_load((RESULTS / "expected.yaml").read_text())
    body = []
    for name, units in found.items():
        for each in expected.get(name, ()):
            values = named_difference(units, each["of"], each["minus"], each["metric"])
            title = f"{each['metric']}: {each['of']} − {each['minus']}"
            body.append([title_of(name), title, *verdict(values, each["sign"])])
    for each in expected["adapted"]:
        name = f"{each['setting']}-{each.get('by', 'adapted')}"
        if name in found:
            values = tuned_difference(found, name, each["of"], each["metric"])
            how = GENERATORS[SETTINGS[name].adapted]
            title = f"{each['metric']}: {each['of']}, {how} − as it is"
            body.append([title_of(each["setting"]), title, *verdict(values, each["sign"])])
    shown = [line for line in body if line[-1]]
    table = markdown(["setting", "difference", "expected", "measured", "outcome"], shown)
    return [table, *_rank_over_settings(found, expected["over the gap"][0])]


def verdict(values: Sequence[float] | None, expected: str) -> list[str]:
    """Expected sign, measured difference, outcome; all empty where a row was not run."""
    if not values:
        return ["", "", ""]
    mean, half = interval(values)
    sign = "+" if mean - half > 0 else "-" if mean + half < 0 else "0"
    if len(values) == 1:
        outcome = "one sample: open"
    elif sign == expected:
        outcome = "as expected" if sign != "0" else "interval includes 0"
    else:
        outcome = "not shown" if sign == "0" else "otherwise"
    return [expected.replace("-", "−"), in_points(values), outcome]


def _rank_over_settings(found: Mapping[str, Units], expected: Mapping[str, Any]) -> list[str]:
    """Rank correlation over settings of the recognised fraction and the gain of a row.

    Settings with class tokens, and the adapted style .25, came later and are left out.
    """
    row, control, metric = expected["against"]
    later = {name for name in SETTINGS if SETTINGS[name].adapted in ("tokens", "both")}
    gain = {name: named_difference(units, row, control, metric) for name, units in found.items()}
    names = [name for name in found if gain[name] and name not in {*later, "style-25-adapted"}]
    if len(names) < 4:
        return []
    known = [gap_of(found[name], "recognised") for name in names]
    means = [statistics.mean(gain[name] or [math.nan]) for name in names]
    relative = [each / real_recognised(name) for name, each in zip(names, known, strict=True)]
    return [
        f"Rank correlation over {len(names)} settings of {expected['rank']} at 0 % and "
        f"{row} − {control} on {metric}: {number(spearman(known, means))} (expected "
        f"{expected['sign']}). With {expected['rank']} ÷ that of real images, which was not "
        f"written down beforehand: {number(spearman(relative, means))}."
    ]


# ------------------------------------------------------------------------------------------ text


def title_of(name: str) -> str:
    """Name of a setting as the page has it: `style-25` is style .25."""
    style = SETTINGS[name].style
    return f"style {style / 100:g}".replace(" 0.", " .") if style else name


def number(value: float, sign: str = "", digits: int = 2) -> str:
    """A figure without the 0 before its point: `.16`, `+1.2`, `−.3`; `sign` is that of a gain."""
    value = round(value, digits)
    lead = "−" if value < 0 else sign if value else ""
    return lead + f"{abs(value):.{digits}f}".removeprefix("0")


def in_points(values: Sequence[float] | None) -> str:
    """Mean ± half the 95 % interval; one value has none, and a row that was not run is a dash."""
    if not values:
        return "–"
    mean, half = interval(values)
    text = number(mean, "+", 1)
    return text if math.isinf(half) else f"{text} ± {number(half, digits=1)}"


def markdown(titles: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; its columns of figures are aligned to the right."""
    figures = [
        all(line[at][:1] in "+−–.0123456789" for line in body if line[at])
        for at in range(len(titles))
    ]
    rule = ["---:" if each else "---" for each in figures]
    return "\n".join("| " + " | ".join(line) + " |" for line in (titles, rule, *body))
