"""Geometry and colours of the charts.

Positions are per cent of the drawing area, x from the left and y from the top. The charts are HTML
and SVG without a script, so a report is one file of a few hundred kilobytes, which opens anywhere,
offline, under a strict content policy. Chart libraries need a script or draw bitmaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

LEVEL_STOPS = ((0, (94, 66, 196)), (50, (206, 70, 130)), (100, (243, 168, 60)))
"""Colours of λ from text only (violet) to the real image (amber)."""

LINE_COLOURS = (
    "#2f7fd1",
    "#d9822b",
    "#8a5bc9",
    "#c9457a",
    "#7a9a2e",
    "#b5651d",
    "#2aa1b8",
    "#a34cb0",
    "#5d7f99",
    "#c4a000",
    "#d1605e",
)


@dataclass(frozen=True)
class Axis:
    """A linear axis with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Position of a value in per cent of the axis, from its low end."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)


def nice_axis(low: float, high: float, ticks: int = 5, snap: bool = True) -> Axis:
    """An axis over [low, high] with about `ticks` round ticks; with `snap` its ends are ticks."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    exact = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.75 * exact)
    inward = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    outward = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    first, last = outward if snap else inward
    marks = tuple(round(index * step, 10) for index in range(first, last + 1))
    return Axis(marks[0], marks[-1], marks) if snap else Axis(low, high, marks)


def epoch_axis(epochs: int) -> Axis:
    """An axis from 0 to the last epoch, with integer ticks."""
    axis = nice_axis(0, epochs, 6, snap=False)
    return Axis(0, epochs, tuple(tick for tick in axis.ticks if tick == int(tick)))


def level_colour(percent: float) -> str:
    """Colour of λ as #rrggbb."""
    for (start, left), (end, right) in pairwise(LEVEL_STOPS):
        if percent <= end:
            fraction = (percent - start) / (end - start)
            return "#" + "".join(
                f"{round(a + fraction * (b - a)):02x}" for a, b in zip(left, right, strict=True)
            )
    raise ValueError(f"level {percent} is above 100 per cent")


def method_colours(methods: Sequence[str], baseline: str, featured: str | None) -> dict[str, str]:
    """`{method: CSS colour}`: grey baseline, featured method in accent colour, others distinct."""
    others = iter(range(len(methods)))
    fixed = {baseline: "var(--base)", featured: "var(--accent)"}
    return {
        name: fixed.get(name) or LINE_COLOURS[next(others) % len(LINE_COLOURS)] for name in methods
    }


@dataclass(frozen=True)
class Ridge:
    """A smoothed distribution: outlines above and below the threshold, quartiles on the axis."""

    kept: str
    dropped: str
    quartiles: tuple[float, float, float]


def similarity_axis(values: np.ndarray, threshold: float) -> Axis:
    """An axis over all values, and over the threshold if it is within one range of the values."""
    low, high = float(values.min()), float(values.max())
    spread = max(high - low, 0.01)
    if low - spread <= threshold <= high + spread:
        low, high = min(low, threshold), max(high, threshold)
    margin = 0.1 * spread
    return nice_axis(low - margin, high + margin, 6, snap=False)


def ridge(values: np.ndarray, axis: Axis, threshold: float, points: int = 96) -> Ridge:
    """The Gaussian kernel density of some values, scaled to the drawing area.

    The bandwidth is Silverman's, 0.9 min(σ, IQR / 1.34) n^(−1/5), and at least 1 % of the axis.
    """
    quartiles = np.percentile(values, [25, 50, 75])
    spread = min(values.std(), (quartiles[2] - quartiles[0]) / 1.34) or values.std()
    width = max(0.9 * spread * len(values) ** -0.2, (axis.high - axis.low) / 100)
    places = np.unique(
        np.append(np.linspace(axis.low, axis.high, points), np.clip(threshold, axis.low, axis.high))
    )
    counts, edges = np.histogram(values, bins=400, range=(axis.low, axis.high))
    centres = (edges[1:] + edges[:-1]) / 2
    density = np.exp(-0.5 * ((places[:, None] - centres) / width) ** 2) @ counts
    heights = density / density.max()
    below = places <= threshold
    above = places >= threshold
    return Ridge(
        kept=_area(places[above], heights[above], axis),
        dropped=_area(places[below], heights[below], axis),
        quartiles=(axis.place(quartiles[0]), axis.place(quartiles[1]), axis.place(quartiles[2])),
    )


def _area(places: np.ndarray, heights: np.ndarray, axis: Axis) -> str:
    if len(places) < 2:
        return ""
    outline = " ".join(
        f"L{axis.place(x):.2f} {100 - 96 * y:.2f}" for x, y in zip(places, heights, strict=True)
    )
    return f"M{axis.place(places[0]):.2f} 100 {outline} L{axis.place(places[-1]):.2f} 100Z"


@dataclass(frozen=True)
class Segment:
    """Epochs `first` … `last` (from 1) with the same levels; no level means real images only."""

    first: int
    last: int
    levels: tuple[int, ...]

    @property
    def epochs(self) -> int:
        return self.last - self.first + 1

    @property
    def text(self) -> str:
        """Label of the bar."""
        if not self.levels:
            return "real only"
        return (
            " · ".join(f"{level} %" for level in self.levels)
            if len(self.levels) <= 4
            else f"{len(self.levels)} levels"
        )

    @property
    def background(self) -> str:
        """CSS background: one stripe per level."""
        stripes = [level_colour(level) for level in sorted(self.levels, reverse=True)]
        width = 100 / max(len(stripes), 1)
        return (
            "linear-gradient("
            + ", ".join(
                f"{colour} {width * i:.1f}% {width * (i + 1):.1f}%"
                for i, colour in enumerate(stripes)
            )
            + ")"
        )


def segments(history: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """The curriculum of a method as runs of epochs with equal levels."""
    result, first = [], 1
    for levels, epochs in groupby(tuple(record["levels"]) for record in history):
        last = first + len(list(epochs)) - 1
        result.append(Segment(first, last, levels))
        first = last + 1
    return result


@dataclass(frozen=True)
class Line:
    """A line of a chart as SVG path, and its points as dots (empty if there are too many)."""

    name: str
    colour: str
    path: str
    dots: str
    last: float


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes."""

    title: str
    unit: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]


def line_chart(
    title: str,
    unit: str,
    x: Axis,
    series: Mapping[str, Sequence[tuple[float, float]]],
    colours: Mapping[str, str],
) -> Chart | None:
    """The chart of `{name: points}`; None without points. The y axis need not start at 0."""
    values = [value for points in series.values() for _, value in points if math.isfinite(value)]
    if not values:
        return None
    y = nice_axis(min(values), max(values), 4)
    lines = []
    for name, points in series.items():
        spots = [
            (x.place(at), 100 - y.place(value)) for at, value in points if math.isfinite(value)
        ]
        if spots:
            path = "M" + " L".join(f"{left:.2f} {top:.2f}" for left, top in spots)
            dots = (
                "".join(f"M{left:.2f} {top:.2f}h0" for left, top in spots)
                if len(spots) <= 30
                else ""
            )
            lines.append(Line(name, colours[name], path, dots, points[-1][1]))
    return Chart(title, unit, x, y, tuple(lines))
