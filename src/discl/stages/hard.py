"""`discl hard`: which training images get a spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data import ImageTable
from ..data.hardness import assign_folds, cross_fitted_probability, tail_rows
from ..errors import DataError, RecipeError, unknown
from ..run_folder import paths
from ..run_folder.run import Run
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_table
from .prepare_data import SHOWN, is_usable, key_of_hard, listed_units, split_rows_of
from .sample_pool import real_aspects
from .train import fit_classifier

logger = get_logger(__name__)

NEARLY_ALL = 0.8
"""Share of the training images from which on hard images are no choice any more."""


def find_hard(run: Run) -> Path:
    """Lists the training images that get a spectrum in `hard.parquet`: id, label, digest, size and why.

    Raises RecipeError where `hard.exclude` names no class, DataError where no image is hard.
    """
    path, rule = run.path(paths.HARD), run.recipe.hard
    train, listed = run.train, split_rows_of(run, "train")
    eligible = _eligible(train, rule.exclude)
    key = key_of_hard(run, listed)
    if is_usable(path, key, "hard images are looked for again"):
        return path
    if rule.rule == "tail":
        rows = tail_rows(train.labels.tolist(), train.class_counts.tolist(), rule.fewer_than)
        rows = [row for row in rows if eligible[row]]
        measured = {"class_count": train.class_counts[train.labels[rows]]}
        if not rows:
            smallest = train.class_counts[train.labels[eligible]].min()
            raise DataError(
                f"no class{_beside(rule.exclude)} has fewer than {rule.fewer_than} training images; "
                f"raise hard.fewer_than (the smallest class has {smallest})."
            )
    else:
        folds = assign_folds(
            train.ids, train.labels.tolist(), listed_units(listed), rule.folds
        )  # a copy would give a picture away

        whole = run.recipe.train.resize_mode == "whole"
        aspects = real_aspects(run, "train") if whole else None

        def fit_predict(fitted: list[int], judged: list[int]) -> np.ndarray:
            return fit_classifier(
                train, fitted, judged, run.recipe.train, rule.epochs, run.device, aspects
            )

        probability = cross_fitted_probability(folds, train.labels.tolist(), fit_predict)
        rows = np.flatnonzero((probability < rule.below) & eligible).tolist()
        measured = {"true_class_probability": probability[rows]}
        if not rows:
            raise DataError(
                f"no training image{_beside(rule.exclude)} has a true-class probability below {rule.below}; "
                f"raise hard.below (the lowest probability is {probability[eligible].min():.3f})."
            )
    table = listed.take(rows).select(["id", "label", "digest", "width", "height"])
    for name, values in measured.items():
        table = table.append_column(name, pa.array(values))
    write_table(table, path, key)
    logger.info(describe_hard(run))
    return path


def _eligible(train: ImageTable, exclude: Sequence[str]) -> np.ndarray:
    """bool `[images]`: False for images of the classes that are never hard.

    Raises RecipeError where a name is no class, DataError where no class is left.
    """
    for name in exclude:
        if name not in train.class_names:
            raise RecipeError("hard.exclude: " + unknown("class", name, train.class_names))
    labels = [train.class_names.index(name) for name in exclude]
    eligible = ~np.isin(train.labels, labels)
    if not eligible.any():
        raise DataError("hard.exclude names every class, so that no image is hard; take one out.")
    return eligible


def _beside(exclude: Sequence[str]) -> str:
    return " outside of hard.exclude" if exclude else ""


def describe_hard(run: Run) -> str:
    """How many training images are hard, of which classes above all; with a warning where nearly all are, for each costs a spectrum."""
    hard, train, rule = read_table(run.path(paths.HARD)), run.train, run.recipe.hard
    of_class = np.bincount(hard["label"].to_numpy(), minlength=len(train.class_names))
    order = np.lexsort((-of_class, -of_class / np.maximum(train.class_counts, 1)))[
        : np.count_nonzero(of_class)
    ]
    shown = [
        f"{train.class_names[label]} {of_class[label]:,} of {train.class_counts[label]:,}"
        for label in order[:SHOWN]
    ]
    told = ", ".join(shown) + (
        f" and {len(order) - SHOWN:,} more classes" if len(order) > SHOWN else ""
    )
    if "true_class_probability" in hard.column_names:
        told += "; probability of their class {min:.2f} to {max:.2f}".format(
            **pc.min_max(hard["true_class_probability"]).as_py()
        )
    text = f"{hard.num_rows:,} of {len(train):,} training images are hard ({told})"
    if hard.num_rows <= NEARLY_ALL * len(train):
        return text
    mend = (
        f"the classifiers that judge them may have learnt nothing; try more hard.epochs (now {rule.epochs}) or a lower hard.below"
        if rule.rule == "probability"
        else f"hard.fewer_than = {rule.fewer_than} lies above nearly all classes; a lower one makes fewer of them hard"
    )
    return f"{text}\nwarning: nearly all images are hard, and each of them gets a spectrum, which generation has to pay for; {mend}."
