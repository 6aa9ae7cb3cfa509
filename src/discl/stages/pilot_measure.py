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
from ..utils.console import progress
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


class Measurer:
    """Measures the candidates of a pilot against the real images of its run.

    Real images are all of the classes with hard images, and some of the others.

    - `run`: has its hard images.
    - `embedder`: of the filter's CLIP; `judge`: what gains are measured with.
    """

    def __init__(self, run: Run, embedder: Embedder, judge: Judge) -> None:
        self.run, self.embedder, self.judge = run, embedder, judge
        train, hard = run.train, hard_rows(run)
        tail = set(train.labels[hard].tolist())
        rows = _some_rows(train.ids, train.labels, judge.real_per_class, tail)
        split, chosen, held_out = "train", rows, None
        if "validation" in run.tables:
            split, table = "validation", run.tables["validation"]
            chosen = _some_rows(table.ids, table.labels, judge.real_per_class, tail)
            held_out = Features(judge.real(split, chosen.tolist()), table.labels[chosen])
        labels = run.tables[split].labels
        judged = chosen[np.isin(labels[chosen], list(tail))]
        self.real = RealImages(
            Features(judge.real("train", rows.tolist()), train.labels[rows]),
            rows,
            hard[rows],
            deal_folds(train.labels[rows], hard[rows], run.recipe.pilot.folds),
            held_out,
            Features(embedder.real(split, judged.tolist()), labels[judged]),
        )

    def candidate(self, name: str, trials: Sequence[Run]) -> tuple[list[Outcome], list[Tried]]:
        """(outcomes of all levels together and level by level, thresholds) of a candidate.

        The threshold is chosen first, on all levels together. The outcomes are those at it.
        """
        made = self._collect(trials)
        own, wanted = self.run.recipe.filter.threshold, self.run.recipe.pilot.thresholds
        thresholds = (
            thresholds_to_try(own, made.similarity) if wanted is None else sorted({own, *wanted})
        )
        levels = np.unique(made.levels).tolist()
        levels = levels if len(levels) > 1 else []
        tried, everything = [], np.ones(len(made.levels), bool)
        with progress("measure", len(thresholds) + len(levels)) as advance:
            for threshold in thresholds:
                passed = made.similarity >= threshold
                worth = self._worth(made, np.flatnonzero(passed))
                tried.append(Tried(name, threshold, float(passed.mean()), worth))
                advance(1)
            chosen = choose_threshold(own, tried)
            worth = next(each.worth for each in tried if each.threshold == chosen)
            outcomes = [self._outcome(name, None, chosen, made, at=everything, worth=worth)]
            for level in levels:
                at = made.levels == level
                worth = self._worth(made, np.flatnonzero(at & (made.similarity >= chosen)))
                outcomes.append(self._outcome(name, level, chosen, made, at=at, worth=worth))
                advance(1)
        return outcomes, tried

    def mixtures(self, trials: Sequence[Run], advice: Mapping[str, Any]) -> list[MixtureScore]:
        """Scores of the mixtures on validation images; none where the recipe names one mixture.

        - `trials`: those of the recommended candidate. Its images at the recommended levels and
          threshold take part; none do where nothing is recommended.
        """
        settings, real, made = self.run.recipe.pilot, self.real, None
        if len(settings.mixture) < 2 or real.held_out is None:
            return []
        if advice["generate"]:
            found = self._collect(trials)
            passed = found.similarity >= advice["threshold"]
            chosen = passed & np.isin(found.levels, advice["levels"])
            made = found.features.take(np.flatnonzero(chosen))
        return score_mixtures(
            real.train,
            real.hard,
            made,
            real.held_out,
            mixtures=settings.mixture,
            fit=self.judge.fit,
            class_counts=self.run.train.class_counts,
            scale=self.run.recipe.synthetic_scale,
        )

    def _collect(self, trials: Sequence[Run]) -> MadeImages:
        ids = self.run.train.ids
        row_of = {ids[row]: place for place, row in enumerate(self.real.rows.tolist())}
        verdicts, features, looks, cost = [], [], [], []
        for trial in trials:
            found = read_table(trial.path(paths.FILTER)).to_pylist()
            names = [row["id"] for row in found]
            requests = {request.id: request for request in read_plan(trial.path(paths.PLAN))}
            features.append(self.judge.synthetic(trial, names))
            looks.append(self.embedder.synthetic(trial, names))
            cost += [count_rows(trial, [requests[name]]) for name in names]
            verdicts += found
        labels, levels, similarity = (
            np.asarray([row[key] for row in verdicts])
            for key in ("label", "level", "clip_similarity")
        )
        return MadeImages(
            Features(np.concatenate(features), labels),
            Features(np.concatenate(looks), labels),
            levels,
            similarity,
            np.asarray([row_of[row["source_id"]] for row in verdicts]),
            np.asarray(cost),
        )

    def _worth(self, made: MadeImages, rows: np.ndarray) -> Worth | None:
        """What these images are worth; None for too few to tell."""
        if len(rows) < FEWEST:
            return None
        return estimate_worth(
            self.real.train,
            self.real.hard,
            made.features.take(rows),
            made.sources[rows],
            fold_of=self.real.fold_of,
            fit=self.judge.fit,
            held_out=self.real.held_out,
            class_counts=self.run.train.class_counts,
            mixture=self.run.recipe.pilot.mixture[0],
            scale=self.run.recipe.synthetic_scale,
        )

    def _outcome(
        self,
        name: str,
        level: int | None,
        threshold: float,
        made: MadeImages,
        *,
        at: np.ndarray,
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
        precision, coverage = _fidelity(made.embeddings.take(rows), self.real.reference)
        return replace(basic, precision=precision, coverage=coverage, worth=worth)


def _some_rows(ids: Sequence[str], labels: np.ndarray, most: int, whole: set[int]) -> np.ndarray:
    """Up to `most` rows of each class, ascending, in an order of the ids alone; all of `whole`."""
    chosen: list[int] = []
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label).tolist()
        if label not in whole:
            rows = sorted(rows, key=lambda row: digest("pilot", ids[row]))[:most]
        chosen += rows
    return np.asarray(sorted(chosen), np.int64)


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
