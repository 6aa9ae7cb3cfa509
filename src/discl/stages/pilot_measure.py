"""Measures what the images of a pilot are worth, per candidate, threshold and level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..evaluation.worth import (
    Features,
    MixtureScore,
    Worth,
    deal_folds,
    estimate_worth,
    precision_and_coverage,
    score_mixtures,
)
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.plan import read_plan
from ..utils.hashing import digest
from ..utils.stored import read_table
from .budget import count_rows
from .pilot_advice import FEWEST, Outcome, Tried, choose_threshold, thresholds_to_try
from .pilot_judges import Judge
from .sample_pool import hard_rows
from .trial import Embedder


@dataclass(frozen=True)
class RealImages:
    """Real images: those to train on, and those held out.

    - `rows`: int64, rows of the training table.
    - `hard`: bool, which of them have a spectrum; `fold_of`: their folds.
    - `reference`: embeddings by the filter's CLIP of those held out, or of all without any, of the
      classes with hard images.
    """

    train: Features
    rows: np.ndarray
    hard: np.ndarray
    fold_of: np.ndarray
    held_out: Features | None
    reference: Features


@dataclass(frozen=True)
class MadeImages:
    """Synthetic images of a candidate.

    - `features`: what the judge gets; `embeddings`: those of the filter's CLIP.
    - `similarity`: clip_similarity; `sources`: row of the source in `RealImages.train`.
    - `cost`: UNet rows.
    """

    features: Features
    embeddings: Features
    levels: np.ndarray
    similarity: np.ndarray
    sources: np.ndarray
    cost: np.ndarray


def describe_real(run: Run, embedder: Embedder, judge: Judge) -> RealImages:
    """Real images of a run: all of the classes with hard images, some of the others."""
    most, train = judge.real_per_class, run.train
    hard = hard_rows(run)
    tail = set(train.labels[hard].tolist())
    rows = _some_rows(train.ids, train.labels, most, tail)
    split, chosen, held_out = "train", rows, None
    if "validation" in run.tables:
        split, table = "validation", run.tables["validation"]
        chosen = _some_rows(table.ids, table.labels, most, tail)
        held_out = Features(judge.real(split, chosen.tolist()), table.labels[chosen])
    features = Features(judge.real("train", rows.tolist()), train.labels[rows])
    labels = run.tables[split].labels
    judged = chosen[np.isin(labels[chosen], list(tail))]
    looks = Features(embedder.real(split, judged.tolist()), labels[judged])
    fold_of = deal_folds(train.labels[rows], hard[rows], run.recipe.pilot.folds)
    return RealImages(features, rows, hard[rows], fold_of, held_out, looks)


def measure_candidate(
    run: Run,
    name: str,
    trials: Sequence[Run],
    real: RealImages,
    embedder: Embedder,
    judge: Judge,
) -> tuple[list[Outcome], list[Tried]]:
    """(outcomes of all levels together and level by level, thresholds) of a candidate.

    The threshold is chosen first, on all levels together. The outcomes are those at it.
    """
    made = _collect(run, trials, real, embedder, judge)
    own, everything = run.recipe.filter.threshold, np.ones(len(made.levels), bool)
    wanted = run.recipe.pilot.thresholds
    tried = []
    for threshold in (
        thresholds_to_try(own, made.similarity) if wanted is None else sorted({own, *wanted})
    ):
        passed = made.similarity >= threshold
        worth = _worth(run, made, np.flatnonzero(passed), real, judge)
        tried.append(Tried(name, threshold, float(passed.mean()), worth))
    chosen = choose_threshold(own, tried)
    worth = next(each.worth for each in tried if each.threshold == chosen)
    outcomes = [_outcome(name, None, chosen, made, at=everything, real=real, worth=worth)]
    levels = np.unique(made.levels).tolist()
    for level in levels if len(levels) > 1 else []:
        at = made.levels == level
        worth = _worth(run, made, np.flatnonzero(at & (made.similarity >= chosen)), real, judge)
        outcomes.append(_outcome(name, level, chosen, made, at=at, real=real, worth=worth))
    return outcomes, tried


def measure_mixtures(
    run: Run,
    trials: Sequence[Run],
    advice: Mapping[str, Any],
    real: RealImages,
    embedder: Embedder,
    judge: Judge,
) -> list[MixtureScore]:
    """Scores of the mixtures on validation images; none where the recipe names one mixture.

    - `trials`: those of the recommended candidate. Its images at the recommended levels and
      threshold take part; none do where nothing is recommended.
    """
    settings, made = run.recipe.pilot, None
    if len(settings.mixture) < 2 or real.held_out is None:
        return []
    if advice["generate"]:
        found = _collect(run, trials, real, embedder, judge)
        passed = found.similarity >= advice["threshold"]
        made = found.features.take(np.flatnonzero(passed & np.isin(found.levels, advice["levels"])))
    return score_mixtures(
        real.train,
        real.hard,
        made,
        real.held_out,
        mixtures=settings.mixture,
        fit=judge.fit,
        class_counts=run.train.class_counts,
        scale=run.recipe.synthetic_scale,
    )


def _some_rows(ids: Sequence[str], labels: np.ndarray, most: int, whole: set[int]) -> np.ndarray:
    """Up to `most` rows of each class, ascending, in an order of the ids alone; all of `whole`."""
    chosen: list[int] = []
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label).tolist()
        if label not in whole:
            rows = sorted(rows, key=lambda row: digest("pilot", ids[row]))[:most]
        chosen += rows
    return np.asarray(sorted(chosen), np.int64)


def _collect(
    run: Run,
    trials: Sequence[Run],
    real: RealImages,
    embedder: Embedder,
    judge: Judge,
) -> MadeImages:
    ids = run.train.ids
    row_of = {ids[row]: place for place, row in enumerate(real.rows.tolist())}
    verdicts, features, looks, cost = [], [], [], []
    for trial in trials:
        found = read_table(trial.path(paths.FILTER)).to_pylist()
        requests = {request.id: request for request in read_plan(trial.path(paths.PLAN))}
        features.append(judge.synthetic(trial, [row["id"] for row in found]))
        looks.append(embedder.synthetic(trial, [row["id"] for row in found]))
        cost += [count_rows(trial, [requests[row["id"]]]) for row in found]
        verdicts += found
    labels, levels, similarity = (
        np.asarray([row[key] for row in verdicts]) for key in ("label", "level", "clip_similarity")
    )
    sources = np.asarray([row_of[row["source_id"]] for row in verdicts])
    made = Features(np.concatenate(features), labels)
    embeddings = Features(np.concatenate(looks), labels)
    return MadeImages(made, embeddings, levels, similarity, sources, np.asarray(cost))


def _worth(
    run: Run, made: MadeImages, rows: np.ndarray, real: RealImages, judge: Judge
) -> Worth | None:
    """What these images are worth; None for too few to tell."""
    if len(rows) < FEWEST:
        return None
    settings = run.recipe.pilot
    return estimate_worth(
        real.train,
        real.hard,
        made.features.take(rows),
        made.sources[rows],
        fold_of=real.fold_of,
        fit=judge.fit,
        held_out=real.held_out,
        class_counts=run.train.class_counts,
        mixture=settings.mixture[0],
        scale=run.recipe.synthetic_scale,
    )


def _outcome(
    name: str,
    level: int | None,
    threshold: float,
    made: MadeImages,
    *,
    at: np.ndarray,
    real: RealImages,
    worth: Worth | None,
) -> Outcome:
    """The row of the images `at` a level; `worth` is that of the kept ones among them."""
    kept = made.similarity >= threshold
    rows = np.flatnonzero(at & kept)
    basic = Outcome(
        name,
        level,
        threshold,
        int(at.sum()),
        float(kept[at].mean()),
        float(made.cost[at].sum() / len(rows)) if len(rows) else None,
    )
    if worth is None:
        return basic
    precision, coverage = _fidelity(made.embeddings.take(rows), real.reference)
    return replace(basic, precision=precision, coverage=coverage, worth=worth)


def _fidelity(made: Features, reference: Features) -> tuple[float | None, float | None]:
    """Mean precision and coverage over classes, against real images of the class."""
    found = []
    for label in np.unique(made.labels).tolist():
        own = reference.values[reference.labels == label]
        if len(own) > 1:
            found.append(precision_and_coverage(own, made.values[made.labels == label]))
    if not found:
        return None, None
    precision, coverage = np.mean(found, axis=0).tolist()
    return precision, coverage
