"""`discl hard`: which training images get a spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data import ImageTable
from ..data.hardness import assign_folds, cross_fitted_probability, tail_rows
from ..errors import DataError, RecipeError, arguments_named, unknown
from ..run_folder import paths
from ..run_folder.earlier import restore_table
from ..run_folder.run import Run
from ..utils.counts import count_of
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_table
from .prepare_data import key_of_hard, listed_units, split_rows_of
from .sample_pool import aspects_for
from .train import fit_classifier

logger = get_logger(__name__)

SHOWN = 5
"""Classes that the summary of hard images lists."""
NEARLY_ALL = 0.8
"""Fraction of hard training images above which a warning is logged."""


def ensure_hard(run: Run) -> Path:
    """Lists the training images that get a spectrum in `hard.parquet`: id, label, digest and size.

    A further column holds the class count or the probability that made an image hard. Returns the
    path. Raises RecipeError if `hard.exclude` names no class, DataError if no image is hard.
    """
    path, rule = run.path(paths.HARD), run.recipe.hard
    train, listed = run.train, split_rows_of(run, "train")
    eligible = _eligible(train, rule.exclude)
    key = key_of_hard(run, listed)
    if restore_table(path, key, "hard images are selected again"):
        return path
    select = _rare_rows if rule.rule == "tail" else _uncertain_rows
    rows, name, values = select(run, listed, eligible)
    table = listed.take(rows).select(["id", "label", "digest", "width", "height"])
    write_table(table.append_column(name, pa.array(values)), path, key)
    logger.info(describe_hard(run))
    return path


def _rare_rows(run: Run, listed: pa.Table, eligible: np.ndarray) -> tuple[list[int], str, Any]:
    """(rows of the images of rare classes, `class_count`, its values)."""
    rule, train = run.recipe.hard, run.train
    rows = tail_rows(train.labels.tolist(), train.class_counts.tolist(), rule.fewer_than)
    rows = [row for row in rows if eligible[row]]
    if not rows:
        smallest = train.class_counts[train.labels[eligible]].min()
        raise DataError(
            f"no class{_except(rule.exclude)} has fewer than {rule.fewer_than} training images; "
            f"raise hard.fewer_than (the smallest class has {smallest})."
        )
    return rows, "class_count", train.class_counts[train.labels[rows]]


def _uncertain_rows(run: Run, listed: pa.Table, eligible: np.ndarray) -> tuple[list[int], str, Any]:
    """(rows of images of low probability, `true_class_probability`, its values).

    Each fold is scored by a classifier that is trained on the others.
    """
    rule, train = run.recipe.hard, run.train
    labels = train.labels.tolist()
    units = listed_units(listed)  # copies of one picture are in one fold
    with arguments_named(folds="hard.folds"):
        folds = assign_folds(train.ids, labels, units, rule.folds)
    fit_predict = partial(
        fit_classifier,
        train,
        train=run.recipe.train,
        epochs=rule.epochs,
        device=run.device,
        aspects=aspects_for(run, ["train"], []),
    )
    probability = cross_fitted_probability(folds, labels, fit_predict)
    rows = np.flatnonzero((probability < rule.below) & eligible).tolist()
    if not rows:
        raise DataError(
            f"no training image{_except(rule.exclude)} has a true-class probability below "
            f"{rule.below}; raise hard.below (the lowest probability is "
            f"{probability[eligible].min():.3f})."
        )
    return rows, "true_class_probability", probability[rows]


def _eligible(train: ImageTable, exclude: Sequence[str]) -> np.ndarray:
    """bool `[images]`: False for images of the classes that are never hard.

    Raises RecipeError if a name is no class, DataError if no class is left.
    """
    for name in exclude:
        if name not in train.class_names:
            message = unknown("class", name, train.class_names)
            raise RecipeError(message, argument="hard.exclude")
    labels = [train.class_names.index(name) for name in exclude]
    eligible = ~np.isin(train.labels, labels)
    if not eligible.any():
        raise DataError("hard.exclude names every class, so no image is hard; remove a name.")
    return eligible


def _except(exclude: Sequence[str]) -> str:
    return " outside of hard.exclude" if exclude else ""


def describe_hard(run: Run) -> str:
    """How many training images are hard, and of which classes; with a warning if nearly all are."""
    hard, train, rule = read_table(run.path(paths.HARD)), run.train, run.recipe.hard
    of_class = np.bincount(hard["label"].to_numpy(), minlength=len(train.class_names))
    fractions = of_class / np.maximum(train.class_counts, 1)
    order = np.lexsort((-of_class, -fractions))[: np.count_nonzero(of_class)]
    details = ", ".join(
        f"{train.class_names[label]} {of_class[label]:,} of {train.class_counts[label]:,}"
        for label in order[:SHOWN]
    )
    if (more := len(order) - SHOWN) > 0:
        details += f" and {count_of(more, 'more class', 'more classes')}"
    if "true_class_probability" in hard.column_names:
        bounds = pc.min_max(hard["true_class_probability"]).as_py()
        details += "; probability of their class {min:.2f} to {max:.2f}".format(**bounds)
    text = f"{hard.num_rows:,} of {len(train):,} training images are hard ({details})"
    if hard.num_rows <= NEARLY_ALL * len(train):
        return text
    advice = (
        "the classifiers that score them may have learnt nothing; try more hard.epochs (now "
        f"{rule.epochs}) or a lower hard.below"
        if rule.rule == "probability"
        else f"hard.fewer_than = {rule.fewer_than} is above nearly all class counts; lower it to "
        "make fewer images hard"
    )
    return (
        f"{text}\nwarning: nearly all images are hard, and generation pays for a spectrum of each "
        f"of them; {advice}."
    )
