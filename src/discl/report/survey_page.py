"""The page of `discl levels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data import ImageTable
from ..run_folder import paths
from ..utils.stored import read_json, write_text
from .charts import Axis, nice_axis
from .gallery import Trials, make_gallery
from .templates import make_environment

LAMBDA = Axis(0, 100, tuple(range(0, 101, 10)))


@dataclass(frozen=True)
class Curve:
    """A mean over λ, with the band between the quartiles (may be empty) and points.

    - `dots`, `chosen`: points of other levels and of proposed levels.
    """

    name: str
    colour: str
    path: str
    band: str
    dots: str
    chosen: str


@dataclass(frozen=True)
class Mark:
    """A horizontal line with its name above it, or below for the lower of two."""

    name: str
    at: float
    colour: str
    below: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over λ with their marks; `note` says how to read them."""

    title: str
    note: str
    y: Axis
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...]


def write_survey(
    folder: Path, train: ImageTable, snippet: str, store: Path | str | None = None
) -> Path:
    """Writes `levels.html` from the `levels.json` of a survey; returns its path.

    - `train`: the real training images.
    - `snippet`: the proposed lines of a recipe.
    - `store`: folder of the synthetic images; default `spectrum` in the folder.

    The page is written atomically.
    """
    found = read_json(folder / paths.LEVELS_DATA, "levels", "proposal", "real", "threshold")
    gallery = make_gallery(
        Trials([folder], train.class_names, train.class_counts),
        train,
        store or folder / paths.SPECTRUM,
    )
    page = make_environment().get_template("survey.html.j2")
    panels, path = make_panels(found), folder / paths.LEVELS_PAGE
    values = {"panels": panels, "axis": LAMBDA, "gallery": gallery, "snippet": snippet}
    write_text(path, page.render(found=found, **values))
    return path


def make_panels(found: Mapping[str, Any]) -> list[Panel]:
    """Image–image and image–text cosine (figures 6 and 7 of the paper) and kept images, over λ."""
    proposal, real = found["proposal"], found["real"]
    pair = real["pair_similarity"]
    bounds = [Mark(f"too alike above {proposal['bound']:.2f}", proposal["bound"], "var(--mark)")]
    bounds += (
        [Mark(f"two real images of a class {pair:.2f}", pair, "var(--soft)")]
        if pair is not None
        else []
    )
    texts = [
        Mark(
            f"real images, median {real['text_similarity']['median']:.3f}",
            real["text_similarity"]["median"],
            "var(--soft)",
        ),
        Mark(
            f"threshold proposed {proposal['threshold']:.2f}", proposal["threshold"], "var(--mark)"
        ),
    ]
    shares = {
        f"at {found['threshold']:g}, the recipe's": ("kept", "var(--base)"),
        f"at {proposal['threshold']:g}, proposed": ("kept_at_proposal", "var(--accent)"),
    }
    return [
        _panel(
            "Image–image",
            "cosine with the source; the lower, the more diverse",
            found,
            {"cosine": ("image_similarity", "var(--accent)")},
            bounds,
        ),
        _panel(
            "Image–text",
            "cosine with the plain text of the class",
            found,
            {"cosine": ("text_similarity", "var(--accent)")},
            texts,
        ),
        _panel("Kept", "per cent of the images that pass the filter", found, shares, []),
    ]


def _panel(
    title: str,
    note: str,
    found: Mapping[str, Any],
    drawn: Mapping[str, tuple[str, str]],
    marks: Sequence[Mark],
) -> Panel:
    rows, chosen = found["levels"], set(found["proposal"]["levels"])
    values = [mark.at for mark in marks]
    for key, _ in drawn.values():
        values += [value for row in rows for value in _ends(row[key])]
    y = nice_axis(min(values), max(values), 4)
    curves = []
    for name, (key, colour) in drawn.items():
        spots = {
            row["level"]: (LAMBDA.place(row["level"]), 100 - y.place(_middle(row[key])))
            for row in rows
        }
        low, high = (
            [(LAMBDA.place(row["level"]), 100 - y.place(_ends(row[key])[end])) for row in rows]
            for end in (0, 1)
        )
        band = _path([*low, *reversed(high)]) + "Z" if low != high else ""
        dots = [
            "".join(
                f"M{left:.2f} {top:.2f}h0"
                for level, (left, top) in spots.items()
                if (level in chosen) == wanted
            )
            for wanted in (False, True)
        ]
        curves.append(Curve(name, colour, _path(list(spots.values())), band, dots[0], dots[1]))
    lowest = min((mark.at for mark in marks), default=0.0)
    placed = [replace(mark, below=len(marks) > 1 and mark.at == lowest) for mark in marks]
    return Panel(title, note, y, tuple(curves), tuple(placed))


def _middle(value: Any) -> float:
    return value["mean"] if isinstance(value, Mapping) else 100 * value


def _ends(value: Any) -> tuple[float, float]:
    """Lower and upper end of the band at a level."""
    return (
        (value["quarter"], value["three_quarters"])
        if isinstance(value, Mapping)
        else (100 * value, 100 * value)
    )


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{left:.2f} {top:.2f}" for left, top in spots)
