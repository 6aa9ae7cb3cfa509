"""Hard rows: rare classes, folds that keep groups together, cross-fitted probabilities."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from discl.data.hardness import (
    assign_folds,
    cross_fitted_probability,
    even_probability,
    tail_rows,
)
from discl.errors import DataError


def test_tail_rows_are_those_of_classes_with_fewer_images() -> None:
    labels = [0, 1, 0, 2, 1, 0]
    assert tail_rows(labels, [3, 2, 1], 3) == [1, 3, 4]
    assert tail_rows(labels, [3, 2, 1], 2) == [3]
    assert tail_rows(labels, [3, 2, 1], 1) == []


def test_folds_are_stratified() -> None:
    labels = [0] * 30 + [1] * 7 + [2] * 2
    folds = assign_folds([f"image {row}" for row in range(39)], labels, None, 3)
    counts = [
        [int(((folds == fold) & (np.array(labels) == label)).sum()) for fold in range(3)]
        for label in range(3)
    ]
    assert counts[0] == [10, 10, 10]
    assert sorted(counts[1]) == [2, 2, 3]
    assert sorted(counts[2]) == [0, 1, 1]
    assert set(Counter(folds.tolist()).values()) <= {12, 13, 14}


def test_groups_stay_in_one_fold() -> None:
    groups = [f"camera {row % 7}" for row in range(70)]
    folds = assign_folds([str(row) for row in range(70)], [row % 2 for row in range(70)], groups, 3)
    assert all(
        len({fold for fold, name in zip(folds, groups, strict=True) if name == group}) == 1
        for group in set(groups)
    )
    assert sorted(Counter(folds.tolist()).values()) == [20, 20, 30]


@pytest.mark.parametrize("grouped", [False, True])
def test_folds_do_not_depend_on_the_order_of_rows(grouped: bool) -> None:
    ids = [f"image {row}" for row in range(50)]
    labels = [row % 3 for row in range(50)]
    groups = [f"group {row % 11}" for row in range(50)] if grouped else None
    folds = dict(zip(ids, assign_folds(ids, labels, groups, 4).tolist(), strict=True))
    order = np.random.default_rng(0).permutation(50).tolist()
    other = assign_folds(
        [ids[row] for row in order],
        [labels[row] for row in order],
        groups and [groups[row] for row in order],
        4,
    )
    assert dict(zip([ids[row] for row in order], other.tolist(), strict=True)) == folds


def test_fewer_groups_than_folds_are_refused() -> None:
    with pytest.raises(DataError, match=r"^folds: 3 folds .* groups; got 2"):
        assign_folds(["a", "b", "c"], [0, 0, 1], ["x", "x", "y"], 3)
    with pytest.raises(DataError, match=r"^folds: 3 folds .* images; got 2"):
        assign_folds(["a", "b"], [0, 1], None, 3)


def test_every_row_is_judged_once_by_a_classifier_that_did_not_see_it() -> None:
    labels = [0, 1, 2, 0, 1, 2, 0]
    folds = np.array([0, 1, 2, 1, 0, 2, 2])
    calls: list[tuple[list[int], list[int]]] = []

    def fit_predict(fitted: list[int], judged: list[int]) -> np.ndarray:
        calls.append((fitted, judged))
        return np.array([[row / 10, row / 100, row / 1000] for row in judged])

    probability = cross_fitted_probability(folds, labels, fit_predict)
    assert calls == [
        ([1, 2, 3, 5, 6], [0, 4]),
        ([0, 2, 4, 5, 6], [1, 3]),
        ([0, 1, 3, 4], [2, 5, 6]),
    ]
    assert probability.tolist() == [0.0, 0.01, 0.002, 0.3, 0.04, 0.005, 0.6]


def test_probabilities_of_equally_likely_classes_by_hand() -> None:
    """.6 / 6, .3 / 1 and .1 / 0 are in proportion 1 : 3 : 0."""
    got = even_probability(np.array([[0.6, 0.3, 0.1]]), np.array([6, 1, 0]))
    np.testing.assert_allclose(got, [[0.25, 0.75, 0.0]])
