"""`discl filter`: CLIP similarity; keep, or drop with the reason."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..audit.table import LEAKED
from ..recipe.filter import BAND
from ..recipe.loop import learner_of
from ..run_folder import paths
from ..run_folder.overrides import BY_HAND, DROP, KEEP, read_overrides
from ..run_folder.run import Run
from ..spectrum.clip_filter import Verdict, judge, judge_difficulty
from ..spectrum.plan import Request
from ..utils.counts import count_be, count_of
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_table
from .alia import alia_verdicts
from .difficulty import class_probabilities
from .leaks import find_leaks
from .pending import draws_so_far, filter_texts, known_scores, rejected_on_the_way, score_missing

logger = get_logger(__name__)


EMPTY = pa.schema(
    {
        **dict.fromkeys(("id", "source_id"), pa.string()),
        **dict.fromkeys(("label", "level", "seed", "attempt"), pa.int64()),
        "clip_similarity": pa.float32(),
        "keep": pa.bool_(),
        "reason": pa.string(),
    }
)
"""The columns of `filter.parquet` where no image is made."""


def filter_spectrum(run: Run) -> Path:
    """Writes keep, or drop with its reason, for each draw so far to `filter.parquet`.

    Images are scored while they are made. An image without a score by this CLIP and these texts is
    scored here. Images that `discl audit` found to copy a held-out image are dropped. What
    `overrides.csv` says about an image comes before the threshold. Returns the path.
    """
    path, settings, scores = run.path(paths.FILTER), run.recipe.filter, run.scores
    if run.recipe.spectrum.makes_none:
        write_table(EMPTY.empty_table(), path)
        return path
    texts, names = filter_texts(run), run.train.class_names
    settings.check_classes(names)
    scores.clear_unfinished()
    requests, missing = draws_so_far(run)
    while missing:
        score_missing(run, missing)
        requests, missing = draws_so_far(run)
    rejected = rejected_on_the_way(run)
    known = dict.fromkeys(rejected, math.nan) | known_scores(run)
    if settings.rule == "alia":
        verdicts, rule = alia_verdicts(run, requests, texts), "by ALIA's filters"
    else:
        verdicts = [
            Verdict(False, rejected[request.id])
            if math.isnan(known[request.id])
            else judge(
                known[request.id], settings.threshold_of(names[request.label], request.level)
            )
            for request in requests
        ]
        rule = f"at clip_similarity >= {settings.threshold:g}"
        if settings.has_own_thresholds:
            rule += ", with thresholds of single levels or classes"
        if settings.rule == "difficulty":
            verdicts = _within_band(run, requests, verdicts)
            low, high = settings.band or BAND
            rule += f" and with a probability of their class from {low:g} to {high:g}"
    if leaked := find_leaks(run):
        verdicts = [
            Verdict(False, leaked[request.id]) if request.id in leaked else verdict
            for request, verdict in zip(requests, verdicts, strict=True)
        ]
    verdicts = decide_by_hand(run, requests, verdicts, rejected)
    columns: dict[str, Any] = {
        name: [getattr(request, name) for request in requests]
        for name in ("id", "source_id", "label", "level", "seed", "attempt")
    }
    columns["clip_similarity"] = pa.array([known[name] for name in columns["id"]], pa.float32())
    columns["keep"] = [verdict.keep for verdict in verdicts]
    columns["reason"] = [verdict.reason for verdict in verdicts]
    if learner_of(run.recipe) is not None:
        columns |= _rounds_of(run, columns["id"])
    write_table(pa.table(columns), path)
    kept = sum(verdict.keep for verdict in verdicts)
    logger.info(f"filter: {kept} of {count_of(len(verdicts), 'image')} kept {rule}")
    return path


def _within_band(
    run: Run, requests: Sequence[Request], verdicts: Sequence[Verdict]
) -> list[Verdict]:
    """The verdicts, with those on kept images by their difficulty."""
    kept = [each for each, verdict in zip(requests, verdicts, strict=True) if verdict.keep]
    probabilities, band = class_probabilities(run, kept), run.recipe.filter.band or BAND
    return [
        judge_difficulty(probabilities[request.id], band) if verdict.keep else verdict
        for request, verdict in zip(requests, verdicts, strict=True)
    ]


def decide_by_hand(
    run: Run, requests: Sequence[Request], verdicts: Sequence[Verdict], rejected: Container[str]
) -> list[Verdict]:
    """The verdicts with those of `overrides.csv` in their place, with the reason `by hand`.

    - `rejected`: ids of images that were not finished.

    An image that copies a held-out one cannot be kept by hand, nor one that was not finished. Rows
    of other images are noted and stay in the file.
    """
    overrides = read_overrides(run.folder)
    places = {request.id: place for place, request in enumerate(requests)}
    decided, refused, others = list(verdicts), 0, 0
    for name, override in overrides.items():
        place = places.get(name)
        if place is None:
            others += 1
        elif override.verdict == DROP:
            decided[place] = Verdict(False, BY_HAND)
        elif override.verdict == KEEP:
            if name in rejected or verdicts[place].reason.startswith(LEAKED):
                refused += 1
            else:
                decided[place] = Verdict(True, BY_HAND)
    if others:
        logger.info(
            f"filter: {count_of(others, 'row')} of {paths.OVERRIDES} without an image in this run, "
            "kept in the file"
        )
    if refused:
        logger.warning(
            f"filter: {count_be(refused, 'image')} dropped although {paths.OVERRIDES} keeps them: "
            "they copy a held-out image (audit.leakage: keep allows that), or were never finished"
        )
    return decided


def _rounds_of(run: Run, ids: Sequence[str]) -> dict[str, list[Any]]:
    """The columns `round` and `why` of images of a loop."""
    plan = read_table(run.path(paths.PLAN), ["id", "round", "why"]).to_pylist()
    rows = {row["id"]: row for row in plan}
    return {name: [rows[each][name] for each in ids] for name in ("round", "why")}
