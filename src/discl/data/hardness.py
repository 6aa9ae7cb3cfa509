"""Which images are hard, as formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import DataError
from ..utils.hashing import derive_seed

FitPredict = Callable[[list[int], list[int]], np.ndarray]


def tail_rows(labels: Sequence[int], class_counts: Sequence[int], fewer_than: int) -> list[int]:
    """Rows of every class with fewer than `fewer_than` training images."""
    return [row for row, label in enumerate(labels) if class_counts[label] < fewer_than]


def assign_folds(
    ids: Sequence[str], labels: Sequence[int], groups: Sequence[str] | None, folds: int
) -> np.ndarray:
    """Fold of each row, int64 `[rows]`; stratified by label, a function of the ids.

    - `groups`: name of each row's group, or None; a group stays in one fold.
    - `folds`: number of folds.

    Raises DataError where there are fewer groups (or images) than folds.
    """
    units: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        units.setdefault(groups[row] if groups is not None else name, []).append(row)
    if len(units) < folds:
        kind = "images" if groups is None else "groups"
        raise DataError(
            f"{folds} folds need at least as many {kind}; got {len(units)}. Use fewer folds.",
            argument="folds",
        )
    result = np.zeros(len(ids), np.int64)
    counts = np.zeros((int(max(labels)) + 1, folds))
    for unit in sorted(units, key=lambda unit: (-len(units[unit]), derive_seed("fold", unit))):
        rows = units[unit]
        present = sorted({labels[row] for row in rows})
        fold = int(np.lexsort((counts.sum(0), counts[present].sum(0)))[0])
        result[rows] = fold
        for row in rows:
            counts[labels[row], fold] += 1
    return result


def even_probability(probabilities: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """Probabilities if all classes were equally likely, float64 `[images, classes]`.

    p_c / n_c, normalised: Bayes' rule for a classifier of cross-entropy. Classes without an image
    get 0.

    - `probabilities`: p, `[images, classes]`.
    - `class_counts`: n, images of each class that the classifier was trained on, `[classes]`.
    """
    known = np.asarray(class_counts) > 0
    weighted = np.where(known, probabilities / np.maximum(class_counts, 1), 0.0)
    return weighted / weighted.sum(1, keepdims=True)


def cross_fitted_probability(
    fold_of_row: np.ndarray, labels: Sequence[int], fit_predict: FitPredict
) -> np.ndarray:
    """True-class probability of each row, float64 `[rows]` in [0, 1].

    Each row is scored by a classifier that was not trained on its fold.

    - `fold_of_row`: int `[rows]`, of `assign_folds`.
    - `fit_predict`: maps (training rows, scored rows) to probabilities `[scored, classes]`.
    """
    result = np.full(len(labels), np.nan)
    for fold in np.unique(fold_of_row):
        scored = np.flatnonzero(fold_of_row == fold)
        probabilities = fit_predict(np.flatnonzero(fold_of_row != fold).tolist(), scored.tolist())
        result[scored] = probabilities[np.arange(len(scored)), np.asarray(labels)[scored]]
    return result
