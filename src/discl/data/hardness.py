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
    """Fold of each row, int64 `[rows]`; stratified by label, stable in the ids, and a group stays in one fold.

    Raises DataError where there are fewer groups (or images) than folds.
    """
    units: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        units.setdefault(groups[row] if groups is not None else name, []).append(row)
    if len(units) < folds:
        raise DataError(
            f"hard.folds = {folds}, but there are only {len(units)} {'images' if groups is None else 'groups'} to divide."
        )
    result = np.zeros(len(ids), np.int64)
    filled = np.zeros((int(max(labels)) + 1, folds))
    for unit in sorted(units, key=lambda unit: (-len(units[unit]), derive_seed("fold", unit))):
        rows = units[unit]
        present = sorted({labels[row] for row in rows})
        fold = int(np.lexsort((filled.sum(0), filled[present].sum(0)))[0])
        result[rows] = fold
        for row in rows:
            filled[labels[row], fold] += 1
    return result


def cross_fitted_probability(
    fold_of_row: np.ndarray, labels: Sequence[int], fit_predict: FitPredict
) -> np.ndarray:
    """True-class probability of each row, float64 `[rows]` in [0, 1], by a classifier that never saw the row.

    `fit_predict(training_rows, judged_rows)` returns probabilities `[judged, classes]`.
    """
    result = np.full(len(labels), np.nan)
    for fold in np.unique(fold_of_row):
        judged = np.flatnonzero(fold_of_row == fold)
        probabilities = fit_predict(np.flatnonzero(fold_of_row != fold).tolist(), judged.tolist())
        result[judged] = probabilities[np.arange(len(judged)), np.asarray(labels)[judged]]
    return result
