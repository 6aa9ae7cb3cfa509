"""ALIA's filters on a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from ..baselines.alia import confidence_drop, mean_self_confidence, semantic_drop
from ..data import decode_image
from ..run_folder import paths
from ..run_folder.earlier import restore_table
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer, Verdict, describe_scorer
from ..spectrum.plan import Request
from ..utils.console import progress
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_table
from .sample_pool import aspects_for, join_tables
from .train import fit_classifier

logger = get_logger(__name__)

REASONS = {
    0: "",
    1: "too easy: the classifier is surer of it than of real images of its class",
    2: "looks mislabelled",
}


def alia_verdicts(run: Run, requests: Sequence[Request], texts: Mapping[int, str]) -> list[Verdict]:
    """Keep, or drop with the reason, for each image of the plan (arXiv 2305.16289).

    - `requests`: images of the plan.
    - `texts`: the plain prompt of each label; `filter.positive` replaces them.

    The classifier is trained on the training images. The mean self-confidence of a class is over
    validation, or over training without a validation split. Results of both models are kept in
    `alia.parquet`.
    """
    labels = np.asarray([request.label for request in requests])
    config = run.recipe.filter
    if config.positive is not None:
        texts = dict.fromkeys(texts, config.positive)
    texts = {**texts, **{len(texts) + place: text for place, text in enumerate(config.negatives)}}
    listed = read_table(run.path(paths.DATA), ["split", "digest", "label"]).to_pydict()
    train = run.recipe.train.model_dump(mode="json")
    key = digest(
        [request.id for request in requests],
        describe_scorer(config.checkpoint, texts),
        train,
        run.recipe.hard.epochs,
        listed,
    )
    path = run.path(paths.ALIA)
    if not restore_table(path, key, "both models run again"):
        write_table(pa.table(_score_images(run, requests, labels, texts)), path, key)
    found = read_table(path, key=key)
    semantic, confidence = found["semantic"].to_pylist(), found["confidence"].to_pylist()
    dropped = [
        "CLIP prefers a text that fits any picture" if fits else REASONS[sure]
        for fits, sure in zip(semantic, confidence, strict=True)
    ]
    return [Verdict(not reason, reason) for reason in dropped]


def _score_images(
    run: Run, requests: Sequence[Request], labels: np.ndarray, texts: Mapping[int, str]
) -> dict[str, np.ndarray]:
    """`semantic` bool and `confidence` int64, `[images]`, by the formulas of `baselines.alia`."""
    classes, count = len(run.train.class_names), len(requests)
    images = stored_images(run, [request.id for request in requests])
    scorer = ClipScorer(run.recipe.filter.checkpoint, texts, run.device)
    anchors = scorer.text_embeddings.cpu().numpy()
    cosines = np.empty((count, len(texts)), np.float32)
    with progress("compare with texts", count) as advance:
        for first in range(0, count, 512):
            rows = range(first, min(first + 512, count))
            cosines[first : first + 512] = (
                scorer.embed([decode_image(images[row]["image"]) for row in rows]) @ anchors.T
            )
            advance(len(rows))
    splits = [split for split in ("train", "validation") if split in run.tables]
    tables = [run.tables[split] for split in splits]
    joint = join_tables(tables, images, labels)
    known, end = tables[-1], len(joint) - count
    start = end - len(known)
    probabilities = fit_classifier(
        joint,
        list(range(len(run.train))),
        list(range(start, len(joint))),
        run.recipe.train,
        epochs=run.recipe.hard.epochs,
        device=run.device,
        aspects=aspects_for(run, splits, requests),
    )
    confidence = mean_self_confidence(probabilities[: end - start], known.labels, classes)
    return {
        "semantic": semantic_drop(cosines[np.arange(count), labels], cosines[:, classes:]),
        "confidence": confidence_drop(probabilities[end - start :], labels, confidence),
    }
