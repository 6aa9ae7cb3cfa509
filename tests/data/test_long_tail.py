"""Long-tail profiles against published totals, the sample, and the groups of the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from discl.data import ImageTable, class_groups, exponential_counts, order_classes, take_long_tail
from discl.data.table import make_table
from discl.errors import DataError


def table_of(counts: list[int], order: list[int] | None = None) -> ImageTable:
    """A table without pictures of so many rows per class; `order` permutes the rows."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    ids = [f"{label}/{row}" for row, label in enumerate(labels)]
    rows = order or list(range(len(labels)))
    columns = {
        "id": [ids[row] for row in rows],
        "image": [{"bytes": b"", "path": None}] * len(rows),
        "label": [labels[row] for row in rows],
    }
    return make_table(columns, [f"class {label}" for label in range(len(counts))])


@pytest.mark.parametrize(("imbalance_ratio", "total"), [(100, 10_847), (50, 12_608), (10, 19_573)])
def test_cifar100_lt_has_the_published_totals(imbalance_ratio: int, total: int) -> None:
    counts = exponential_counts(100, 500, imbalance_ratio)
    assert sum(counts) == total
    assert (counts[0], counts[-1]) == (500, 500 // imbalance_ratio)
    assert counts == sorted(counts, reverse=True)


def test_ten_classes_written_out() -> None:
    assert exponential_counts(10, 500, 100) == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert exponential_counts(3, 100, 100) == [100, 10, 1]
    assert exponential_counts(4, 7, 1) == [7, 7, 7, 7]
    assert exponential_counts(1, 7, 100) == [7]
    assert exponential_counts(2, 5, 100) == [5, 0]


@pytest.mark.parametrize("imbalance_ratio", [2, 5, 10, 20, 50, 100, 256])
def test_the_last_class_has_exactly_the_smallest_share(imbalance_ratio: int) -> None:
    assert [
        exponential_counts(size, 3 * imbalance_ratio, imbalance_ratio)[-1] for size in range(2, 120)
    ] == [3] * 118


def test_classes_are_ordered_by_names_by_seed_or_not() -> None:
    names = ["a", "b", "c", "d", "e"]
    assert order_classes(names, None) == [0, 1, 2, 3, 4]
    assert order_classes(names, ["c", "a", "e", "b", "d"]) == [2, 0, 4, 1, 3]
    orders = [order_classes(names, seed) for seed in range(20)]
    assert orders == [order_classes(names, seed) for seed in range(20)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 10


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            ["a", "b", "catt"],
            r"^order: unknown class 'catt'; known: a, b, cat\. Did you mean 'cat'\?",
        ),
        (["a", "b"], r"^order: got 2 names for 3 classes; missing: cat\."),
        (
            ["a", "b", "cat", "a"],
            r"^order: got 4 names for 3 classes; missing: none\.",
        ),
        (["a", "b", "b"], r"missing: cat\."),
    ],
)
def test_an_order_that_is_no_permutation_is_refused(order: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        order_classes(["a", "b", "cat"], order)


def test_the_sample_follows_the_profile_in_table_order() -> None:
    table = table_of([100, 100, 100])
    rows = take_long_tail(table, 100, 100, [2, 0, 1], seed=0)
    assert rows == sorted(set(rows))
    assert np.bincount(table.labels[rows]).tolist() == [10, 1, 100]


def test_samples_of_different_imbalance_ratio_are_nested() -> None:
    table = table_of([60] * 5)
    samples = [
        set(take_long_tail(table, 60, ratio, [0, 1, 2, 3, 4], seed=3)) for ratio in (60, 10, 2, 1)
    ]
    assert samples[0] < samples[1] < samples[2] < samples[3] == set(range(300))


def test_the_sample_is_of_ids_not_of_places_and_another_seed_takes_another() -> None:
    counts = [30, 30]
    order = np.random.default_rng(0).permutation(60).tolist()
    first, second = table_of(counts), table_of(counts, order)
    ids = {first.ids[row] for row in take_long_tail(first, 20, 4, [0, 1], seed=0)}
    assert {second.ids[row] for row in take_long_tail(second, 20, 4, [0, 1], seed=0)} == ids
    assert {first.ids[row] for row in take_long_tail(first, 20, 4, [0, 1], seed=1)} != ids


def test_a_profile_that_the_data_cannot_fill_is_refused() -> None:
    with pytest.raises(DataError, match=r"^n_max: class 'class 1' has 5 images, .* needs 10"):
        take_long_tail(table_of([20, 5]), 20, 2, [0, 1], seed=0)
    with pytest.raises(DataError, match=r"^n_max: .* leaves no image of class 'class 1': .* 0\.2 "):
        take_long_tail(table_of([20, 5]), 20, 100, [0, 1], seed=0)


def test_groups_and_their_bounds() -> None:
    counts = [101, 100, 20, 19, 500, 0]
    assert class_groups(counts, 100, 20) == {"many": [0, 4], "medium": [1, 2], "few": [3, 5]}
    assert class_groups([500, 200], 100, 20) == {"many": [0, 1]}
    assert class_groups([500, 5], 100, 20) == {"many": [0], "few": [1]}
