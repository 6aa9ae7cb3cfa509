"""What a run folder has measured besides its images, for the pages of `discl browse`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..audit.findings import KINDS, SYNTHETIC, Finding
from ..audit.table import key_of_real, read_findings
from ..errors import BrokenFileError
from ..run_folder import paths
from ..utils.stored import read_json, read_table
from .run_view import RunView, name_of


def levels_page(view: RunView) -> dict[str, Any]:
    """What `discl levels` measured. Raises BrokenFileError."""
    path = view.folder / paths.LEVELS / paths.LEVELS_DATA
    return read_json(path, "levels") if path.is_file() else _missing(view, "levels")


def comparison_page(view: RunView) -> dict[str, Any]:
    """What `discl compare` measured, or the results of the run. Raises BrokenFileError."""
    path = view.folder / paths.COMPARISON_DATA
    if path.is_file():
        return read_json(path)
    results = view.folder / paths.RESULTS
    if results.is_file():
        return {"results": read_json(results)}
    return _missing(view, "compare")


def audit_page(view: RunView) -> dict[str, Any]:
    """What `discl audit` found. Raises BrokenFileError."""
    path = view.folder / paths.AUDIT
    if not path.is_file():
        return _missing(view, "audit")
    findings = read_findings(path)
    listed = read_table(view.folder / paths.DATA, ["split", "id", "digest"])
    outdated = False
    try:
        read_findings(path, key_of_real(view.folder / paths.DATA))
    except BrokenFileError:
        outdated = True
    digests = _digests(listed, findings)
    classes = view.class_names(view.rows())
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.kind] = counts.get(finding.kind, 0) + 1
    return {
        "findings": [_describe(each, classes, digests) for each in findings],
        "counts": {kind: counts[kind] for kind in KINDS if kind in counts},
        "kinds": KINDS,
        "outdated": outdated,
    }


def neighbours(view: RunView, name: str, count: int) -> dict[str, Any]:
    """The real and the synthetic images nearest to one."""
    rows = view.rows()
    real = _listed_images(view)
    found = view.neighbours.nearest(name, {*real} - {name}, count)
    if found is None:
        return _missing(view, "audit")
    made = view.neighbours.nearest(name, rows.row_of, count) or []
    classes = view.class_names(rows)
    return {
        "real": [{**real[key], "digest": key, "similarity": cosine} for key, cosine in found],
        "synthetic": [
            {
                "id": key,
                "class": name_of(classes, int(rows.columns["class"][rows.row_of[key]])),
                "level": int(rows.columns["level"][rows.row_of[key]]),
                "similarity": cosine,
            }
            for key, cosine in made
        ],
    }


PAGES = {"levels": levels_page, "audit": audit_page, "comparison": comparison_page}


def _listed_images(view: RunView) -> dict[str, dict[str, Any]]:
    """id, class and split of each real image, by the digest of its pixels."""
    try:
        columns = ["split", "id", "digest", "label"]
        listed = read_table(view.folder / paths.DATA, columns).to_pydict()
    except BrokenFileError:
        return {}
    classes = view.class_names(view.rows())
    return {
        content: {"id": name, "class": name_of(classes, label), "split": split}
        for split, name, content, label in zip(*listed.values(), strict=True)
    }


def _missing(view: RunView, command: str) -> dict[str, Any]:
    return {"missing": view.command(command)}


def _digests(listed: pa.Table, findings: list[Finding]) -> Mapping[tuple[str, str], str]:
    """Digest of the real images that findings name, by (split, id)."""
    pairs = {(each.split, each.id) for each in findings}
    pairs |= {(each.other_split, each.other) for each in findings if each.other}
    ids = [name for split, name in pairs if split != SYNTHETIC]
    chosen = listed.filter(pc.is_in(listed["id"], pa.array(ids, pa.string()))).to_pylist()
    return {(row["split"], row["id"]): row["digest"] for row in chosen}


def _describe(
    finding: Finding, classes: list[str], digests: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "text": KINDS.get(finding.kind, finding.kind),
        "split": finding.split,
        "id": finding.id,
        "class": name_of(classes, finding.label),
        "level": finding.level,
        "value": finding.value,
        "other_split": finding.other_split,
        "other": finding.other,
        "digest": digests.get((finding.split, finding.id)),
        "other_digest": digests.get((finding.other_split, finding.other)),
    }
