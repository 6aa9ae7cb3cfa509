"""Draws the figures of `docs/results.md` from the figures that are committed in `results/gap`.

    python -m benchmarks.gap_figures --out docs

- `gap_few.svg`: gain on few classes over the same mixture without synthetic images, over the
  fraction of text-only images that a classifier of the domain recognises, relative to that of real
  images.
- `gap_overall.svg`: the same for all classes, with classes drawn equally often.
- `gap_pilot.svg`: the pilot's estimate from 64 images and the gain after training.

The files are SVG with text, so that they stay small and sharp. A mean has its 95 % interval over
draws (Student's t). Nothing is random: the same figures give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.gap import RESULTS, best_fixed
from benchmarks.gap_tables import difference, gap_of, interval, read_results, real_recognised
from benchmarks.pilot import measured_arms, read_arms

from discl.report.charts import Axis, nice_axis

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, GAP = 820, 430, 46, 190, 58, 52, 24
INK, SOFT, GRID = "#202124", "#5f6368", "#e3e5e8"
ROWS = {
    "text-only": "#5e42c4",
    "text-only, filtered": "#2f7fd1",
    "all levels": "#ce4682",
    "diverse-to-specific": "#f0953c",
    "best fixed level": "#7a9a2e",
    "real images (oracle)": "#5f6368",
}
SETTING_COLOURS = (*ROWS.values(), "#7b4a1e")


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


PANELS = {
    "Fashion-MNIST-LT": ("vague", "half", "dim", "plain"),
    "CIFAR-10-LT": ("style-100", "style-50", "style-25"),
}
"""Settings of each task; a line joins settings of one task alone."""


def gap_points(results: Path, metric: str, settings: Sequence[str]) -> dict[str, list[Point]]:
    """`{row: points}` over the settings of one task that have at least three draws."""
    points: dict[str, list[Point]] = {}
    for name, units in read_results(results).items():
        if len(units) < 3 or name not in settings:
            continue
        known = gap_of(units, "recognised") / real_recognised(name)
        for row, values in gains(units, metric).items():
            mean, half = interval(values)
            title = f"{name}, {row}: {mean:+.1f} ± {half:.1f} ({len(values)} draws)"
            points.setdefault(row, []).append(Point(known, mean, half, title))
    for row in points.values():
        row.sort(key=lambda point: point.x)
    return points


def draw_gap(results: Path, metric: str) -> str:
    """The figure of one metric as SVG, a panel for each task."""
    tasks = {task: gap_points(results, metric, names) for task, names in PANELS.items()}
    tasks = {task: points for task, points in tasks.items() if points}
    every = [point for points in tasks.values() for row in points.values() for point in row]
    ends = [each.y + sign * each.half for each in every for sign in (-1, 1)]
    y, parts = nice_axis(min(ends), max(ends)), []
    width = (WIDTH - LEFT - RIGHT - GAP * (len(tasks) - 1)) / len(tasks)
    for number, (task, points) in enumerate(tasks.items()):
        panel = Panel(LEFT + number * (width + GAP), width)
        highest = max(each.x for row in points.values() for each in row)
        x = nice_axis(0.0, max(0.8, highest), 4)
        parts += panel.axes(x, y, "recognised ÷ that of real images", task, names=number == 0)
        for at, (row, places) in enumerate(points.items()):
            shift = 2.6 * (at - (len(points) - 1) / 2)
            parts += series(places, ROWS[row], x, y, panel=panel, shift=shift)
    parts += legend({row: ROWS[row] for row in ROWS if any(row in each for each in tasks.values())})
    mixture = "the head undersampled" if metric == "few" else "classes drawn equally often"
    heading = "few classes" if metric == "few" else "all classes"
    title = f"Points on {heading} over the same mixture of real images, {mixture}"
    return svg_file(parts, title)


def draw_pilot(results: Path) -> str:
    """Estimates and gains of the pilot's arms, one colour for each setting."""
    estimates = json.loads((results / "pilot.json").read_text())
    arms = measured_arms(estimates, "head", read_arms()["second"]["settings"])
    settings = list(dict.fromkeys(arm.setting for arm in arms))
    colours = dict(zip(settings, SETTING_COLOURS, strict=False))
    x = nice_axis(min(arm.few for arm in arms), max(arm.few for arm in arms))
    y = nice_axis(min(arm.gain for arm in arms), max(arm.gain for arm in arms))
    panel = Panel(LEFT, WIDTH - LEFT - RIGHT)
    names = "the pilot's estimate, points", "points after training"
    parts = panel.axes(x, y, names[0], names[1])
    for arm in arms:
        left, top = panel.x(x, arm.few), panel.y(y, arm.gain)
        title = f"{arm.setting}, {arm.level} %: {arm.few:+.1f}, after training {arm.gain:+.1f}"
        parts.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{colours[arm.setting]}">'
            f"<title>{escape(title)}</title></circle>"
        )
        parts.append(
            f'<text x="{left + 6:.1f}" y="{top + 3.5:.1f}" font-size="10" fill="{SOFT}">'
            f"{arm.level}</text>"
        )
    parts += legend(colours)
    title = f"Gain on few classes: estimate and truth of {len(arms)} arms (λ in per cent)"
    return svg_file(parts, title)


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−").replace("0.", ".") if value else "0"


@dataclass(frozen=True)
class Panel:
    """A part of the drawing with its own axes: left edge and width in pixels."""

    left: float
    width: float

    def x(self, axis: Axis, value: float) -> float:
        return self.left + axis.place(value) / 100 * self.width

    @staticmethod
    def y(axis: Axis, value: float) -> float:
        return HEIGHT - BOTTOM - axis.place(value) / 100 * (HEIGHT - TOP - BOTTOM)

    def axes(
        self,
        x: Axis,
        y: Axis,
        x_name: str,
        title: str,
        names: bool = True,
        number: Callable[[float], str] = _number,
    ) -> list[str]:
        """Grid, ticks and names; `names` also writes the ticks of the y axis.

        - `number`: writes a tick of the x axis.
        """
        bottom, right, middle = HEIGHT - BOTTOM, self.left + self.width, self.left + self.width / 2
        lines = []
        for tick in y.ticks:
            top, stroke = self.y(y, tick), SOFT if tick == 0 else GRID
            lines.append(f'<path d="M{self.left:.1f} {top:.1f}H{right:.1f}" stroke="{stroke}"/>')
            if names:
                lines.append(
                    f'<text x="{self.left - 8:.1f}" y="{top + 4:.1f}" text-anchor="end" '
                    f'fill="{SOFT}">{_number(tick)}</text>'
                )
        lines += [
            f'<text x="{self.x(x, tick):.1f}" y="{bottom + 18}" text-anchor="middle" '
            f'fill="{SOFT}">{number(tick)}</text>'
            for tick in x.ticks
        ]
        lines += [
            f'<text x="{middle:.1f}" y="{top}" text-anchor="middle" fill="{INK}">'
            f"{escape(text)}</text>"
            for top, text in ((HEIGHT - 14, x_name), (TOP - 6, title))
        ]
        return lines


def series(
    places: Sequence[Point], colour: str, x: Axis, y: Axis, *, panel: Panel, shift: float
) -> list[str]:
    """A line through the means, the intervals, and dots that show their figures when pointed at."""
    spots = [(panel.x(x, each.x) + shift, panel.y(y, each.y)) for each in places]
    path = " L".join(f"{left:.1f} {top:.1f}" for left, top in spots)
    parts = [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-opacity=".45"/>']
    for each, (left, top) in zip(places, spots, strict=True):
        low, high = panel.y(y, each.y - each.half), panel.y(y, each.y + each.half)
        parts.append(f'<path d="M{left:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
        parts.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.6" fill="{colour}">'
            f"<title>{escape(each.title)}</title></circle>"
        )
    return parts


def legend(colours: Mapping[str, str]) -> list[str]:
    parts, left = [], WIDTH - RIGHT + 18
    for number, (name, colour) in enumerate(colours.items()):
        top = TOP + 14 + 22 * number
        parts.append(f'<circle cx="{left}" cy="{top - 4}" r="4.5" fill="{colour}"/>')
        parts.append(f'<text x="{left + 12}" y="{top}" fill="{INK}">{escape(name)}</text>')
    return parts


def svg_file(parts: Sequence[str], title: str) -> str:
    """A whole SVG file: background and title, then the parts."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="12" y="22" font-size="13" font-weight="600" fill="{INK}">{escape(title)}</text>',
    ]
    return "\n".join([*lines, *parts, "</svg>"]) + "\n"


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
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in figures(arguments.results).items():
        (arguments.out / name).write_text(text)


if __name__ == "__main__":
    main()
