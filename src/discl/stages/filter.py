"""`discl filter`: CLIP similarity; keep, or drop with the reason."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.clip_filter import describe_scorer, judge
from ..utils.logging import get_logger
from ..utils.stored import write_table
from .alia import alia_verdicts
from .pending import filter_texts, score_missing, scores_by, tries_so_far

logger = get_logger(__name__)


def filter_spectrum(run: Run) -> Path:
    """Writes keep, or drop with its reason, for each image of the plan and each further try to `filter.parquet`.

    Images were scored while they were made; what has no score of this CLIP and these texts is read again and scored here.
    """
    asked, scores = run.recipe.filter, run.scores
    scores.clear_unfinished()
    requests, missing = tries_so_far(run)
    while missing:
        score_missing(run, missing)
        requests, missing = tries_so_far(run)
    known = scores_by(scores, describe_scorer(asked.checkpoint, filter_texts(run)))
    if asked.rule == "alia":
        verdicts, told = alia_verdicts(run, requests, filter_texts(run)), "by ALIA's filters"
    else:
        verdicts, told = (
            [judge(known[request.id], asked.threshold) for request in requests],
            f"at clip_similarity >= {asked.threshold:g}",
        )
    table = pa.table(
        {
            "id": [request.id for request in requests], "source_id": [request.source_id for request in requests],
            "label": [request.label for request in requests], "level": [request.level for request in requests],
            "seed": [request.seed for request in requests], "attempt": [request.attempt for request in requests],
            "clip_similarity": pa.array([known[request.id] for request in requests], pa.float32()),
            "keep": [verdict.keep for verdict in verdicts], "reason": [verdict.reason for verdict in verdicts],
        }
    )  # fmt: skip
    write_table(table, run.path(paths.FILTER))
    logger.info(
        f"filter: {sum(verdict.keep for verdict in verdicts)} of {len(verdicts)} images kept {told}"
    )
    return run.path(paths.FILTER)
