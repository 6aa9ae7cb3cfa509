"""What the page asks about a run and about one image, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..data.long_tail import class_groups
from ..errors import BrokenFileError, DisclError
from ..run_folder import paths
from ..run_folder.overrides import Override
from ..utils.counts import count_be, count_of
from ..utils.stored import read_table
from .rows import HAND, KEPT, KEPT_BY_HAND, UNJUDGED, VERDICTS, MethodRule, Rows, hand_columns
from .run_view import PAGE_FILES, RunView, name_of

NOT_SHOWN = {"id", "image", "label", "prompt", "negative_prompt", "image_digest", "width", "height"}
"""Columns of the store that the answer about a row gives elsewhere."""


def about_run(view: RunView) -> dict[str, Any]:
    """What `/api/run` answers."""
    stamps, rows, tree = view.stamps(), view.rows(), view.tree
    classes = view.class_names(rows)
    counts = _class_counts(view, len(classes))
    verdict, groups, chosen = rows.columns["verdict"], tree["groups"], tree["filter"]
    hand, _, _ = hand_columns(rows, view.known_overrides()[0])
    return {
        "name": str(tree.get("name", "")),
        "folder": view.folder.resolve().name,
        **stamps,
        "classes": classes,
        "class_counts": counts.tolist(),
        "hard_counts": _count(rows.source_labels, len(classes)).tolist(),
        "groups": class_groups(counts.tolist(), groups["many"], groups["few"]),
        "levels": sorted(tree["spectrum"]["levels"]),
        "rule": chosen.get("rule", "threshold"),
        "threshold": chosen["threshold"],
        "level_thresholds": chosen.get("level_thresholds") or {},
        "class_thresholds": chosen.get("class_thresholds") or {},
        "methods": [vars(rule) for rule in view.methods()],
        "verdicts": list(VERDICTS),
        "hand": list(HAND),
        "counts": {
            "planned": len(rows.planned),
            "stored": len(rows),
            "judged": int((verdict != UNJUDGED).sum()),
            "kept": int(np.isin(verdict, (KEPT, KEPT_BY_HAND)).sum()),
            "by_hand": int((hand > 0).sum()),
        },
        "pages": {name: view.has_page(name) for name in PAGE_FILES},
        "neighbours": (view.folder / paths.PILOT / paths.CACHED_EMBEDDINGS).is_dir(),
        "generating": view.is_generating(),
        "notes": _notes(view, rows),
    }


def about_row(view: RunView, name: str) -> dict[str, Any] | None:
    """What `/api/row/{id}` answers; None for an image that is not in the rows."""
    rows = view.rows()
    row = rows.row_of.get(name)
    if row is None:
        return None
    classes = view.class_names(rows)
    numbers = {key: column[row].item() for key, column in rows.columns.items()}
    override = view.known_overrides()[0].get(name, Override())
    stored, problem = _read_stored(view, name)
    image = stored.get("image") or {}
    return {
        "id": name,
        "class": name_of(classes, numbers["class"]),
        **{key: numbers[key] for key in ("level", "seed", "try")},
        "prompt": rows.prompts[numbers["prompt"]],
        "negative_prompt": stored.get("negative_prompt") or "",
        "score": numbers["score"],
        "verdict": VERDICTS[numbers["verdict"]],
        "reason": rows.reasons[row],
        "hand": override.verdict,
        "tag": override.tag,
        "note": override.reason,
        "methods": [rule.name for rule in view.methods() if _draws(rule, rows, row)],
        "round": _rounds(view).get(name),
        "width": stored.get("width"),
        "height": stored.get("height"),
        "bytes": len(image.get("bytes") or b""),
        "image_digest": stored.get("image_digest"),
        "made": {key: stored[key] for key in sorted(stored) if key not in NOT_SHOWN},
        "problem": problem,
        "source": _about_source(rows, numbers["source"], classes),
        "siblings": [
            {"id": rows.ids[other]}
            | {key: rows.columns[key][other].item() for key in ("level", "seed", "try")}
            for other in rows.siblings(row)
            if other != row
        ],
    }


def _about_source(rows: Rows, source: int, classes: list[str]) -> dict[str, Any]:
    label, content = int(rows.source_labels[source]), rows.source_digests[source]
    return {
        "id": rows.source_ids[source],
        "digest": content,
        "class": name_of(classes, label) if label >= 0 else None,
        "found": bool(content),
    }


def _read_stored(view: RunView, name: str) -> tuple[dict[str, Any], str | None]:
    """(all columns of an image in the store, why its picture cannot be shown)."""
    stored: dict[str, Any] = {}
    try:
        stored = view.lookup.find(name) or {}
        view.picture(name, thumb=True)
    except DisclError as error:
        return stored, str(error)
    return stored, None


def _draws(rule: MethodRule, rows: Rows, row: int) -> bool:
    chosen = (rows.columns[key][row : row + 1] for key in ("level", "score", "verdict"))
    return bool(rule.draws(*chosen)[0])


def _rounds(view: RunView) -> Mapping[str, int]:
    """Round of each image of a loop; empty without one."""
    if not view.tree.get("loop"):
        return {}
    try:
        plan = read_table(view.folder / paths.PLAN, ["id", "round"])
    except BrokenFileError:
        return {}
    return dict(zip(plan["id"].to_pylist(), plan["round"].to_pylist(), strict=True))


def _class_counts(view: RunView, classes: int) -> np.ndarray:
    """Training images of each class; zeros before the data was read."""
    try:
        listed = read_table(view.folder / paths.DATA, ["split", "label"])
    except BrokenFileError:
        return np.zeros(classes, np.int64)
    train = np.asarray(listed["split"].to_pylist()) == "train"
    return _count(listed["label"].to_numpy()[train], classes)


def _count(labels: np.ndarray, classes: int) -> np.ndarray:
    labels = np.asarray(labels, np.int64)
    return np.bincount(labels[(labels >= 0) & (labels < classes)], minlength=classes)


def _notes(view: RunView, rows: Rows) -> list[str]:
    """What the page says above the images."""
    overrides, problem = view.known_overrides()
    notes = [*rows.problems, *view.lookup.problems.values()]
    notes += [text for text in (view.store_problem, problem) if text]
    if view.real_problem is not None:
        notes.append(f"real images cannot be shown: {view.real_problem}")
    if not rows.planned:
        notes.append(f"there is no plan yet; run {view.command('generate')}")
    elif not len(rows):
        notes.append(f"no image is made yet; run {view.command('generate')}")
    if rows.others and rows.planned:
        notes.append(
            f"{count_be(rows.others, 'image')} in the store that neither plan nor filter names: of "
            "another plan, or further draws until the next filter; not shown"
        )
    unknown = sum(name not in rows.planned for name in overrides)
    if unknown:
        notes.append(
            f"{count_of(unknown, 'override')} without an image in this run, kept in "
            f"{paths.OVERRIDES}"
        )
    return notes
