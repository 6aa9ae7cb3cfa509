"""Figures of the benchmarks: a value, its interval and its goal, as a table and as JSON rows.

It needs the standard library alone, because the GPU script runs where few packages are installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured figure, its interval if it has one, its goal, and how the two must compare."""

    name: str
    value: float
    comparison: str = ""
    goal: float | None = None
    detail: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal, or if only a part of the interval does."""
        if self.goal is None:
            return None
        ends = {self._compare(self.value if end is None else end) for end in (self.low, self.high)}
        return ends.pop() if len(ends) == 1 else None

    @property
    def verdict(self) -> str:
        return "" if self.goal is None else {True: "met", False: "NOT MET", None: "open"}[self.met]

    def _compare(self, value: float) -> bool:
        assert self.goal is not None
        return {">=": value >= self.goal, "<=": value <= self.goal, "==": value == self.goal}[
            self.comparison
        ]


def table(figures: Sequence[Figure]) -> str:
    """The figures with their goals, one a line."""
    width = max(len(figure.name) for figure in figures)
    lines = []
    for figure in figures:
        value = f"{figure.value:.1e}" if 0 < abs(figure.value) < 1e-3 else f"{figure.value:,.3f}"
        goal = "" if figure.goal is None else f"{figure.comparison} {figure.goal:g}"
        spread = "" if figure.low is None else f"[{figure.low:.3f}, {figure.high:.3f}]"
        told = f"{spread:<15} {goal:<8}  {figure.verdict:<7}  {figure.detail}"
        lines.append(f"{figure.name:{width}}  {value:>10}  {told}".rstrip())
    return "\n".join(lines)


def from_rows(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The figures of a JSON file that `as_rows` has made."""
    return [Figure(**{key: row[key] for key in row if key != "met"}) for row in rows]


def as_rows(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The figures for a JSON file, each with its verdict."""
    return [{**asdict(figure), "met": figure.met} for figure in figures]
