"""What a pilot recommends, and its tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..escaping import for_markdown
from ..evaluation.worth import Gain, Worth
from ..run_folder.run import Run

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


def synthetic_scale(run: Run) -> float:
    scales = [
        method.synthetic_scale
        for method in run.recipe.methods.values()
        if method.strategy != "real-only"
    ]
    return max(scales, default=3.0)


def advise(run: Run, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What to do, with reasons, and the lines of the recipe.

    A level is recommended if the lower end of its gain on the classes with hard images is above 0,
    and the gain on all classes, where it was measured, is too. Otherwise a head that names those
    classes more often, right or wrong, would pass.
    """
    judged = [each for each in outcomes if each.worth is not None]
    useful = [each for each in judged if each.worth is not None and _helps(each.worth)]
    if not useful:
        return {
            "generate": False,
            "reasons": _reasons_against(judged),
            "recipe": {},
        }
    best = max(useful, key=_lower_end)
    levels = sorted(
        each.level for each in useful if each.candidate == best.candidate and each.level is not None
    )
    mine = [each for each in judged if each.candidate == best.candidate]
    levels = levels or sorted(run.recipe.spectrum.levels)
    overrides = run.recipe.pilot.candidates.get(best.candidate, {})
    if best.candidate == "not adapted":
        overrides = {"spectrum.adapt": None}
    kept = min((each.kept for each in mine if each.level in levels), default=best.kept)
    seeds = min(10_000, max(1, round(synthetic_scale(run) / max(kept, 0.05) + 0.49)))
    tree: dict[str, Any] = {**overrides, "spectrum.levels": levels, "spectrum.seeds": seeds}
    strategy = _strategy(mine, levels)
    reasons = [
        f"candidate '{best.candidate}' brings {_interval(best.worth.few)} points on the classes "
        "with hard images over the same mixture of real images"
        if best.worth is not None
        else "",
        f"{strategy[1]}: use strategy {strategy[0]}",
        f"{kept:.0%} of the images are kept, so {seeds} seeds give {synthetic_scale(run):g} images "
        "for each hard one",
    ]
    return {
        "generate": True,
        "candidate": best.candidate,
        "strategy": strategy[0],
        "reasons": reasons,
        "recipe": tree,
    }


def _helps(worth: Worth) -> bool:
    return worth.few.low > 0 and (worth.overall is None or worth.overall.mean > 0)


def _lower_end(outcome: Outcome) -> float:
    return outcome.worth.few.low if outcome.worth is not None else float("-inf")


def _strategy(outcomes: Sequence[Outcome], levels: Sequence[int]) -> tuple[str, str]:
    """(strategy, reason) from how the gain changes with the level."""
    gains = {
        each.level: each.worth.few
        for each in outcomes
        if each.level is not None and each.worth is not None
    }
    if levels == [0]:
        return "text-only", "only the images made from text alone bring something"
    if len(levels) == 1:
        return "fixed", f"only level {levels[0]} brings something by itself"
    lowest = gains.get(min(gains, default=0))
    others = [gain.mean for level, gain in gains.items() if level != min(gains)]
    if lowest is not None and others and lowest.low > max(others):
        return "text-only", "images made from text alone bring most"
    if lowest is not None and others and lowest.high < max(others):
        return "diverse-to-specific", "the lowest level brings less than higher ones"
    return "all-levels", "no level is clearly ahead of the others"


def _reasons_against(judged: Sequence[Outcome]) -> list[str]:
    reasons = ["re-balancing the real images gives as much: do not generate"]
    if not judged:
        return [
            f"fewer than {FEWEST} images of each candidate pass the filter: lower the threshold"
        ]
    best = max(judged, key=lambda each: each.worth.few.mean if each.worth else float("-inf"))
    if best.worth is not None:
        where = "all levels" if best.level is None else f"level {best.level}"
        reasons.append(
            f"the best, '{best.candidate}' at {where}, brings {_interval(best.worth.few)} points"
        )
        if best.worth.recognised < 0.5:
            reasons.append(
                f"a classifier of the real images recognises {best.worth.recognised:.0%} of its "
                "images: the generator does not know these classes; try spectrum.adapt, other "
                "texts or another checkpoint"
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
