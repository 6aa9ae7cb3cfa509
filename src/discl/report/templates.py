"""The Jinja environment, with escaping on."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from . import charts
from . import text as words

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def make_environment() -> Environment:
    """The templates of this folder, with their filters. Each is compiled once."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("discl", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "percent": words.percent,
        "points": words.points,
        "number": words.number,
        "fraction": words.fraction,
        "sign": _sign,
        "cosine": words.cosine,
        "plain": words.plain,
        "level_colour": charts.level_colour,
    }
    pages.globals |= {"plural": words.plural}
    return pages


def _sign(value: float | None) -> str:
    """CSS class of a difference."""
    return "" if value is None or round(value, 1) == 0 else "up" if value > 0 else "down"
