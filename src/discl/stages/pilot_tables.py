"""What a pilot recommends, and its tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..escaping import for_markdown
from ..evaluation.worth import Gain, Worth
from ..recipe import Recipe

FEWEST = 8
"""Kept images below which a level is not judged."""


@dataclass(frozen=True)
class Outcome:
    """What one candidate brought at one level; `level` None is all its levels together."""

    candidate: str
    level: int | None
    images: int
    kept: float
    rows_per_kept: float | None
    precision: float | None = None
    coverage: float | None = None
    worth: Worth | None = None


Judged = Sequence[tuple[Outcome, Worth]]


def advise(
    recipe: Recipe,
    candidates: Mapping[str, Mapping[str, Any]],
    outcomes: Sequence[Outcome],
) -> dict[str, Any]:
    """What to do, with reasons, and the lines of the recipe.

    A level is recommended if the lower end of its gain on the classes with hard images is above 0,
    and the gain on all classes, where it was measured, is too. Otherwise a head that names those
    classes more often, right or wrong, would pass.

    - `candidates`: `{candidate: values by key}`.
    """
    judged = [(each, each.worth) for each in outcomes if each.worth is not None]
    useful = [(each, worth) for each, worth in judged if _helps(worth)]
    if not useful:
        return {"generate": False, "reasons": _reasons_against(judged), "recipe": {}}
    best, gain = max(useful, key=lambda pair: pair[1].few.low)
    mine = [(each, worth) for each, worth in judged if each.candidate == best.candidate]
    levels = sorted(
        each.level
        for each, _ in useful
        if each.candidate == best.candidate and each.level is not None
    )
    if not levels:  # only all of them together
        own = candidates[best.candidate].get("spectrum.levels", recipe.spectrum.levels)
        levels = sorted(own)
    kept = min((each.kept for each, _ in mine if each.level in levels), default=best.kept)
    scale = recipe.synthetic_scale
    seeds = min(10_000, max(1, math.ceil(scale / max(kept, 0.05))))
    strategy, reason = _strategy(mine, levels)
    return {
        "generate": True,
        "candidate": best.candidate,
        "strategy": strategy,
        "reasons": [
            f"candidate '{best.candidate}' brings {_interval(gain.few)} points on the classes with "
            "hard images over the same mixture of real images",
            f"{reason}: use strategy {strategy}",
            f"{kept:.0%} of the images are kept, so {seeds} seeds give {scale:g} images for each "
            "hard one",
        ],
        "recipe": {
            **candidates[best.candidate],
            "spectrum.levels": levels,
            "spectrum.seeds": seeds,
        },
    }


def _helps(worth: Worth) -> bool:
    return worth.few.low > 0 and (worth.overall is None or worth.overall.mean > 0)


def _strategy(judged: Judged, levels: Sequence[int]) -> tuple[str, str]:
    """(strategy, reason) from how the gain changes with the level."""
    if levels == [0]:
        return "text-only", "only the images made from text alone bring something"
    if len(levels) == 1:
        return "fixed", f"only level {levels[0]} brings something by itself"
    gains = {each.level: worth.few for each, worth in judged if each.level is not None}
    if len(gains) > 1:
        lowest = gains.pop(min(gains))
        highest = max(gain.mean for gain in gains.values())
        if lowest.low > highest:
            return "text-only", "images made from text alone bring most"
        if lowest.high < highest:
            return "diverse-to-specific", "the lowest level brings less than higher ones"
    return "all-levels", "no level is clearly ahead of the others"


def _reasons_against(judged: Judged) -> list[str]:
    if not judged:
        return [
            f"fewer than {FEWEST} images of each candidate pass the filter: lower the threshold"
        ]
    best, worth = max(judged, key=lambda pair: pair[1].few.mean)
    where = "all levels" if best.level is None else f"level {best.level}"
    reasons = [
        "re-balancing the real images gives as much: do not generate",
        f"the best, '{best.candidate}' at {where}, brings {_interval(worth.few)} points",
    ]
    if worth.recognised < 0.5:
        reasons.append(
            f"a classifier of the real images recognises {worth.recognised:.0%} of its images: the "
            "generator does not know these classes; try spectrum.adapt, other texts or another "
            "checkpoint"
        )
    return reasons


def _interval(gain: Gain) -> str:
    return f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"


COLUMNS = (
    "candidate",
    "level",
    "images",
    "kept",
    "rows_per_kept",
    "recognised",
    "precision",
    "coverage",
    "few",
    "few_low",
    "few_high",
    "overall",
)


def as_csv(result: Mapping[str, Any]) -> str:
    """One line for each candidate and level."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in result["outcomes"]:
        worth = each["worth"] or {}
        few, overall = worth.get("few") or {}, worth.get("overall") or {}
        values = {
            **each,
            "level": "all" if each["level"] is None else each["level"],
            "recognised": worth.get("recognised"),
            "few": few.get("mean"),
            "few_low": few.get("low"),
            "few_high": few.get("high"),
            "overall": overall.get("mean"),
        }
        writer.writerow(["" if values[name] is None else _short(values[name]) for name in COLUMNS])
    return text.getvalue()


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table, the recommendation with its reasons, and the lines to paste."""
    lines = [
        f"# {for_markdown(result['name'])}: pilot",
        "",
        "Expected gain in points over the same mixture of real images, by a linear head on frozen "
        f"features of {for_markdown(result['features'])}; 95 % interval.",
        "",
        "| candidate | λ, % | images | kept | UNet rows per kept image | recognised | precision "
        "| coverage | gain, classes with hard images | gain, all |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in result["outcomes"]:
        lines.append(_row(each))
    for name, message in result["failed"].items():
        lines += ["", f"Candidate {for_markdown(name)} was left out: {for_markdown(message)}"]
    advice = result["advice"]
    lines += ["", "## Recommendation", ""]
    lines += [f"- {for_markdown(reason)}" for reason in advice["reasons"]]
    if advice["recipe"]:
        lines += ["", "```yaml", snippet(result).rstrip(), "```"]
    return "\n".join([*lines, ""])


def _row(each: Mapping[str, Any]) -> str:
    worth = each["worth"]
    level = "all" if each["level"] is None else each["level"]
    cells = [
        for_markdown(each["candidate"]),
        level,
        each["images"],
        f"{each['kept']:.0%}",
        "–" if each["rows_per_kept"] is None else f"{each['rows_per_kept']:.0f}",
    ]
    if worth is None:
        cells += ["–"] * 5
    else:
        cells += [
            f"{worth['recognised']:.0%}",
            *(
                "–" if each[name] is None else f"{each[name]:.2f}"
                for name in ("precision", "coverage")
            ),
            *(
                "–" if worth[name] is None else _interval(Gain(**worth[name]))
                for name in ("few", "overall")
            ),
        ]
    return f"| {' | '.join(map(str, cells))} |"


def snippet(result: Mapping[str, Any]) -> str:
    """The recommendation as lines of a recipe."""
    tree: dict[str, Any] = {}
    for key, value in result["advice"]["recipe"].items():
        section, _, rest = key.partition(".")
        tree.setdefault(section, {})[rest] = value
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
