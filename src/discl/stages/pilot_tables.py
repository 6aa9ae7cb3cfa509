"""The tables of a pilot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..escaping import for_csv, for_markdown
from ..evaluation.worth import Gain
from ..recipe.merge import set_value
from .levels import proposal_lines
from .pilot_advice import interval

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
    "threshold",
    "image_similarity",
    "text_similarity",
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
            "candidate": for_csv(each["candidate"]),
            "level": "all" if each["level"] is None else each["level"],
            "recognised": worth.get("recognised"),
            "few": few.get("mean"),
            "few_low": few.get("low"),
            "few_high": few.get("high"),
            "overall": overall.get("mean"),
            **_similarity(result, each),
        }
        writer.writerow(["" if values[name] is None else _short(values[name]) for name in COLUMNS])
    return text.getvalue()


def _similarity(result: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Mean cosines of the images of an outcome, kept or not."""
    found = result["levels"][outcome["candidate"]]["levels"]
    rows = [row for row in found if outcome["level"] in (None, row["level"])]
    images = sum(row["images"] for row in rows)
    return {
        name: sum(row["images"] * row[name]["mean"] for row in rows) / images
        for name in ("image_similarity", "text_similarity")
    }


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def as_markdown(result: Mapping[str, Any]) -> str:
    """The tables, the recommendation with its reasons, and the lines to paste."""
    lines = [
        f"# {for_markdown(result['name'])}: pilot",
        "",
        "Expected gain in points over the same mixture of real images, by "
        f"{for_markdown(result['judge'])}; 95 % interval.",
        "",
        "| candidate | λ, % | images | kept | UNet rows per kept image | recognised | precision "
        "| coverage | gain, classes with hard images | gain, all |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(each) for each in result["outcomes"]),
    ]
    for name, message in result["failed"].items():
        lines += ["", f"Candidate {for_markdown(name)} was left out: {for_markdown(message)}"]
    advice = result["advice"]
    lines += ["", "## Recommendation", ""]
    lines += [f"- {for_markdown(reason)}" for reason in advice["reasons"]]
    if advice["recipe"]:
        lines += ["", "```yaml", snippet(result).rstrip(), "```"]
    lines += _mixture_lines(result)
    lines += ["", "## Threshold", "", *_threshold_lines(result), "", "## Similarity", ""]
    lines += ["What similarities alone propose, as `discl levels` does. The gains above decide."]
    for name, found in result["levels"].items():
        lines += ["", f"### {for_markdown(name)}", "", *proposal_lines(found)]
    return "\n".join([*lines, ""])


def _mixture_lines(result: Mapping[str, Any]) -> list[str]:
    """Balanced accuracy of each mixture; nothing where one alone was measured."""
    if not result["mixtures"]:
        return []
    lines = [
        "",
        "## Mixture",
        "",
        "Balanced accuracy on validation images, of a head on all real training images, and with "
        "the recommended synthetic images.",
        "",
        "| mixture | real images alone | with synthetic images | |",
        "|---|---:|---:|---|",
    ]
    for each in result["mixtures"]:
        mixed = "–" if each["mixed"] is None else f"{each['mixed']:.1f}"
        note = "recommended" if each["mixture"] == result["advice"]["mixture"] else ""
        lines.append(f"| {each['mixture']} | {each['real']:.1f} | {mixed} | {note} |")
    return lines


def _threshold_lines(result: Mapping[str, Any]) -> list[str]:
    """All levels of a candidate together, at each threshold."""
    chosen = {each["candidate"]: each["threshold"] for each in result["outcomes"]}
    lines = [
        "All levels together. The table above is at the chosen threshold.",
        "",
        "| candidate | threshold | kept | gain, classes with hard images | gain, all | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for each in result["thresholds"]:
        notes = ["the recipe's"] if each["threshold"] == result["threshold"] else []
        notes += ["chosen"] if each["threshold"] == chosen[each["candidate"]] else []
        cells = [for_markdown(each["candidate"]), f"{each['threshold']:g}", f"{each['kept']:.0%}"]
        cells += [*_gains(each["worth"]), ", ".join(notes)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gains(worth: Mapping[str, Any] | None) -> list[str]:
    """Gain on the classes with hard images and on all, as text."""
    found: Sequence[Any] = [None] * 2 if worth is None else [worth["few"], worth["overall"]]
    return ["–" if each is None else interval(Gain(**each)) for each in found]


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
            *_gains(worth),
        ]
    return f"| {' | '.join(map(str, cells))} |"


def snippet(result: Mapping[str, Any]) -> str:
    """The recommendation as lines of a recipe."""
    tree: dict[str, Any] = {}
    for key, value in result["advice"]["recipe"].items():
        tree = set_value(tree, key, value)
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=True)
