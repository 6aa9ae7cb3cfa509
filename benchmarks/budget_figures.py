"""Draws the figure of `docs/results.md` from the figures that are committed in `results/budget`.

    python -m benchmarks.budget_figures --out docs

`budget_few.svg`: gain on few classes over the same mixture without synthetic images, over the
fraction of the one-shot plan's UNet rows, a panel for each setting and a line for each policy. A
mean has its 95 % interval over draws (Student's t). The same figures give the same bytes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.budget import PARTS, RESULTS, curves, read_results
from benchmarks.gap_figures import (
    GAP,
    LEFT,
    RIGHT,
    WIDTH,
    Panel,
    Point,
    legend,
    series,
    svg_file,
)
from benchmarks.gap_tables import interval

from discl.report.charts import Axis, nice_axis

COLOURS = {"uniform": "#5f6368", "deficit": "#2f7fd1", "entropy": "#f0953c", "progress": "#ce4682"}


def points_of(setting: str, units: Mapping[int, Any]) -> dict[str, list[Point]]:
    """`{policy: points}` over the binary logarithm of the budget, for at least three draws."""
    found: dict[str, list[Point]] = {}
    for policy, cells in curves(units).items():
        for fraction, values in cells:
            if len(values) > 2:
                mean, half = interval(values)
                title = f"{setting}, {policy} at {fraction:g}: {mean:+.1f} ± {half:.1f} "
                title += f"({len(values)} draws)"
                found.setdefault(policy, []).append(Point(math.log2(fraction), mean, half, title))
    return found


def draw(results: Path) -> str:
    """The figure as SVG."""
    panels = {name: points_of(name, units) for name, units in read_results(results).items()}
    panels = {name: points for name, points in panels.items() if points}
    every = [each for points in panels.values() for row in points.values() for each in row]
    ends = [each.y + sign * each.half for each in every for sign in (-1, 1)]
    y, parts = nice_axis(min(ends), max(ends)), []
    ticks = tuple(-math.log2(each) for each in PARTS)
    x = Axis(ticks[0] - 0.3, ticks[-1] + 0.3, ticks)
    width = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)
    for number, (name, points) in enumerate(panels.items()):
        panel = Panel(LEFT + number * (width + GAP), width)
        parts += panel.axes(x, y, "of the UNet rows", name, names=number == 0, number=_fraction)
        for at, (policy, places) in enumerate(points.items()):
            shift = 4.0 * (at - (len(points) - 1) / 2)
            parts += series(places, COLOURS[policy], x, y, panel=panel, shift=shift)
    used = {policy for points in panels.values() for policy in points}
    parts += legend({policy: colour for policy, colour in COLOURS.items() if policy in used})
    return svg_file(parts, "Points on few classes over the same mixture without synthetic images")


def _fraction(exponent: float) -> str:
    return f"1/{2 ** round(-exponent)}" if exponent else "1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "budget_few.svg").write_text(draw(arguments.results))


if __name__ == "__main__":
    main()
