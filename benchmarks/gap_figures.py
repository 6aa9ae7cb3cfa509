"""Draws the figures of `docs/results.md` from the figures that are committed in `results/gap`.

    python -m benchmarks.gap_figures --out docs

- `gap_few.svg`: gain on few classes over the same mixture without synthetic images, over the
  fraction of text-only images that a classifier of the domain recognises.
- `gap_overall.svg`: the same for all classes, with classes drawn equally often.
- `gap_pilot.svg`: the pilot's estimate from 64 images and the gain after training.

The files are SVG with text, so that they stay small and sharp. A mean has its 95 % interval over
draws (Student's t). Nothing is random: the same figures give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.gap import RESULTS, best_fixed, difference, interval, read_results
from benchmarks.pilot import measured_arms

from discl.report.charts import Axis, nice_axis

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 430, 62, 200, 34, 58
INK, SOFT, GRID = "#202124", "#5f6368", "#e3e5e8"
ROWS = {
    "text-only": "#5e42c4",
    "text-only, filtered": "#2f7fd1",
    "all levels": "#ce4682",
    "diverse-to-specific": "#f0953c",
    "best fixed level": "#7a9a2e",
    "real images (oracle)": "#5f6368",
}


@dataclass(frozen=True)
class Point:
    """One mark: position, half the height of its interval, and what it is."""

    x: float
    y: float
    half: float
    title: str


def gains(units: Mapping[int, Any], metric: str) -> dict[str, list[float]]:
    """`{row: points over the same mixture}`, one for each draw, undersampled or drawn evenly."""
    end, control = ("", "ce-undersampled") if metric == "few" else ("-balanced", "ce-balanced")
    names = {
        "text-only": f"text-only{end}",
        "text-only, filtered": f"text-only{end}-filtered",
        "all levels": f"all{end}",
        "diverse-to-specific": f"d2s{end}",
        "real images (oracle)": f"oracle{end}",
    }
    found = {row: difference(units, name, control, metric) for row, name in names.items()}
    if metric == "few":
        tests = [(unit, unit["rows"]) for unit in units.values()]
        found["best fixed level"] = [
            rows[best_fixed(unit)]["test"]["few"] - rows[control]["test"]["few"]
            for unit, rows in tests
        ]
    return {row: found[row] for row in ROWS if row in found}


def gap_points(results: Path, metric: str) -> tuple[dict[str, list[Point]], dict[str, float]]:
    """`{row: points}` over the settings, and the measured gap `{setting: recognised}`."""
    points: dict[str, list[Point]] = {}
    known: dict[str, float] = {}
    for name, units in read_results(results).items():
        if len(units) < 2:
            continue
        known[name] = statistics.mean(unit["gap"]["0"]["recognised"] for unit in units.values())
        for row, values in gains(units, metric).items():
            mean, half = interval(values)
            title = f"{name}, {row}: {mean:+.1f} ± {half:.1f} ({len(values)} draws)"
            points.setdefault(row, []).append(Point(known[name], mean, half, title))
    for row in points.values():
        row.sort(key=lambda point: point.x)
    return points, known


def draw_gap(results: Path, metric: str) -> str:
    """The figure of one metric as SVG."""
    points, known = gap_points(results, metric)
    every = [point for row in points.values() for point in row]
    x = Axis(0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    y = nice_axis(
        min(each.y - each.half for each in every), max(each.y + each.half for each in every)
    )
    parts = []
    for name, at in sorted(known.items(), key=lambda item: item[1]):
        left = _x(x, at)
        parts.append(f'<path d="M{left:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
        parts.append(
            f'<text transform="translate({left + 3:.1f} {TOP + 4}) rotate(90)" font-size="10" '
            f'fill="{SOFT}">{escape(name)}</text>'
        )
    for number, (row, places) in enumerate(points.items()):
        shift = 2.6 * (number - (len(points) - 1) / 2)
        parts += _series(places, ROWS[row], x, y, shift)
    parts += _legend({row: ROWS[row] for row in points})
    mixture = "the head undersampled" if metric == "few" else "classes drawn equally often"
    heading = "few classes" if metric == "few" else "all classes"
    return _frame(
        parts,
        x,
        y,
        f"Gain on {heading} over the same mixture without synthetic images ({mixture})",
        "text-only images that a classifier of the domain recognises",
        "points",
    )


def draw_pilot(results: Path) -> str:
    """Estimates and gains of the pilot's arms, one colour for each setting."""
    arms = measured_arms(json.loads((results / "pilot.json").read_text()))
    settings = list(dict.fromkeys(arm.setting for arm in arms))
    colours = dict(zip(settings, ROWS.values(), strict=False))
    x = nice_axis(min(arm.few for arm in arms), max(arm.few for arm in arms))
    y = nice_axis(min(arm.gain for arm in arms), max(arm.gain for arm in arms))
    parts = []
    for arm in arms:
        left, top = _x(x, arm.few), _y(y, arm.gain)
        title = f"{arm.setting}, {arm.level} %: {arm.few:+.1f}, after training {arm.gain:+.1f}"
        parts.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{colours[arm.setting]}">'
            f"<title>{escape(title)}</title></circle>"
        )
        parts.append(
            f'<text x="{left + 6:.1f}" y="{top + 3.5:.1f}" font-size="10" fill="{SOFT}">'
            f"{arm.level}</text>"
        )
    parts += _legend(colours)
    title = f"The pilot's estimate and the gain after training, {len(arms)} arms (λ in per cent)"
    names = "the pilot's estimate on few classes, points", "gain on few after training, points"
    return _frame(parts, x, y, title, *names)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) / 100 * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) / 100 * (HEIGHT - TOP - BOTTOM)


def _series(places: Sequence[Point], colour: str, x: Axis, y: Axis, shift: float) -> list[str]:
    """A line through the means, the intervals, and dots that show their figures when pointed at."""
    path = " L".join(f"{_x(x, each.x) + shift:.1f} {_y(y, each.y):.1f}" for each in places)
    parts = [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-opacity=".45"/>']
    for each in places:
        left = _x(x, each.x) + shift
        low, high = _y(y, each.y - each.half), _y(y, each.y + each.half)
        parts.append(f'<path d="M{left:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
        parts.append(
            f'<circle cx="{left:.1f}" cy="{_y(y, each.y):.1f}" r="3.6" fill="{colour}">'
            f"<title>{escape(each.title)}</title></circle>"
        )
    return parts


def _legend(colours: Mapping[str, str]) -> list[str]:
    parts, left = [], WIDTH - RIGHT + 18
    for number, (name, colour) in enumerate(colours.items()):
        top = TOP + 14 + 22 * number
        parts.append(f'<circle cx="{left}" cy="{top - 4}" r="4.5" fill="{colour}"/>')
        parts.append(f'<text x="{left + 12}" y="{top}" fill="{INK}">{escape(name)}</text>')
    return parts


def _frame(parts: Sequence[str], x: Axis, y: Axis, title: str, x_name: str, y_name: str) -> str:
    """A whole SVG file: background, axes, zero line, then the parts."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-size="13" font-weight="600" fill="{INK}">'
        f"{escape(title)}</text>",
    ]
    for tick in y.ticks:
        top = _y(y, tick)
        stroke = SOFT if tick == 0 else GRID
        lines.append(f'<path d="M{LEFT} {top:.1f}H{right}" stroke="{stroke}"/>')
        lines.append(
            f'<text x="{LEFT - 8}" y="{top + 4:.1f}" text-anchor="end" fill="{SOFT}">'
            f"{_number(tick)}</text>"
        )
    for tick in x.ticks:
        lines.append(
            f'<text x="{_x(x, tick):.1f}" y="{bottom + 18}" text-anchor="middle" fill="{SOFT}">'
            f"{_number(tick)}</text>"
        )
    lines.append(
        f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 14}" text-anchor="middle" '
        f'fill="{INK}">{escape(x_name)}</text>'
    )
    lines.append(
        f'<text transform="translate(16 {(TOP + bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle" fill="{INK}">{escape(y_name)}</text>'
    )
    return "\n".join([*lines, *parts, "</svg>"]) + "\n"


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−").replace("0.", ".") if value else "0"


def figures(results: Path) -> dict[str, str]:
    """`{file name: SVG}` of all figures."""
    return {
        "gap_few.svg": draw_gap(results, "few"),
        "gap_overall.svg": draw_gap(results, "all"),
        "gap_pilot.svg": draw_pilot(results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    for name, text in figures(arguments.results).items():
        (arguments.out / name).write_text(text)


if __name__ == "__main__":
    main()
