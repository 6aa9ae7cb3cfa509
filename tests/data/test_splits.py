"""The split of data that comes without one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from discl.data import split_rows

SHARES = {"validation": 0.1, "test": 0.2}


def counts_of(parts: dict[str, list[int]], labels: list[int]) -> dict[str, list[int]]:
    return {
        name: [sum(labels[row] == label for row in rows) for label in range(max(labels) + 1)]
        for name, rows in parts.items()
    }


def test_shares_are_kept_in_every_class() -> None:
    labels = [0] * 100 + [1] * 50 + [2] * 10
    parts = split_rows([str(row) for row in range(160)], labels, None, SHARES, seed=0)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(160))
    assert counts_of(parts, labels) == {
        "train": [70, 35, 7],
        "validation": [10, 5, 1],
        "test": [20, 10, 2],
    }
    assert all(rows == sorted(rows) for rows in parts.values())


def test_a_split_of_no_share_is_absent() -> None:
    parts = split_rows(
        [str(row) for row in range(10)], [0] * 10, None, {"validation": 0.0, "test": 0.5}, seed=0
    )
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 5, "test": 5}


@pytest.mark.parametrize("seed", range(5))
def test_groups_never_straddle_and_shares_are_near(seed: int) -> None:
    draw = np.random.default_rng(seed)
    groups = [f"camera {number}" for number in draw.integers(0, 60, 600)]
    labels = draw.integers(0, 3, 600).tolist()
    parts = split_rows([str(row) for row in range(600)], labels, groups, SHARES, seed=seed)
    places = {name: {groups[row] for row in rows} for name, rows in parts.items()}
    assert not places["train"] & places["validation"]
    assert not places["train"] & places["test"]
    assert not places["validation"] & places["test"]
    assert sum(len(rows) for rows in parts.values()) == 600
    assert abs(len(parts["validation"]) - 60) <= 20
    assert abs(len(parts["test"]) - 120) <= 20


def test_groups_of_one_class_are_stratified() -> None:
    labels = [label for label in range(4) for _ in range(40)]
    groups = [
        f"{label}-{row % 10}" for row, label in enumerate(labels)
    ]  # ten groups of four in each class
    parts = split_rows([str(row) for row in range(160)], labels, groups, SHARES, seed=1)
    assert counts_of(parts, labels) == {"train": [28] * 4, "validation": [4] * 4, "test": [8] * 4}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_class_keeps_training_images(count: int) -> None:
    labels = [0] * 50 + [1] * count
    for seed in range(10):
        parts = split_rows(
            [str(row) for row in range(50 + count)],
            labels,
            None,
            {"validation": 0.4, "test": 0.4},
            seed=seed,
        )
        assert counts_of(parts, labels)["train"][1] >= 1


def test_a_class_in_one_group_stays_in_training() -> None:
    labels = [0, 0, 0, 0, 1, 1, 1]
    parts = split_rows(
        [str(row) for row in range(7)], labels, ["a", "b", "c", "d", "e", "e", "e"], SHARES, seed=0
    )
    assert {4, 5, 6} <= set(parts["train"])


@pytest.mark.parametrize("grouped", [False, True])
def test_the_split_does_not_depend_on_the_order_of_rows(grouped: bool) -> None:
    ids = [f"image {row}" for row in range(120)]
    labels = [row % 4 for row in range(120)]
    groups = [f"group {row % 17}" for row in range(120)] if grouped else None
    first = split_rows(ids, labels, groups, SHARES, seed=5)
    order = np.random.default_rng(1).permutation(120).tolist()
    second = split_rows(
        [ids[row] for row in order],
        [labels[row] for row in order],
        groups and [groups[row] for row in order],
        SHARES,
        seed=5,
    )
    assert {name: {ids[row] for row in rows} for name, rows in first.items()} == {
        name: {ids[order[row]] for row in rows} for name, rows in second.items()
    }


def test_seeds_split_differently_and_place_every_image_somewhere() -> None:
    ids, labels = [str(row) for row in range(100)], [0] * 100
    tests = [
        frozenset(split_rows(ids, labels, None, SHARES, seed=seed)["test"]) for seed in range(30)
    ]
    assert len(set(tests)) == 30
    assert set(Counter(row for rows in tests for row in rows)) == set(range(100))


def test_a_group_weighs_a_deficit_by_its_number_of_images() -> None:
    """Four groups of two classes, half of the 13 and 10 images for either split, largest first.

    - b [6, 2] goes to train, which has none. a [2, 4]: train .5 · 2 + 3 · 4 = 13, test 33: test.
    - d [2, 3]: train .5 · 2 + 3 · 3 = 10, test 4.5 · 2 + 1 · 3 = 12: test. Squared weights would
      give 29 against 27.
    - c [3, 1]: train .5 · 3 + 3 · 1 = 4.5, test 2.5 · 3 − 2 · 1 = 5.5: test. Without weights train
      would need 3.5 and test .5.
    """
    images = {"a": [2, 4], "b": [6, 2], "c": [3, 1], "d": [2, 3]}
    groups = [name for name, counts in images.items() for _ in range(sum(counts))]
    labels = [label for counts in images.values() for label in (0, 1) for _ in range(counts[label])]
    ids = [str(row) for row in range(len(labels))]
    for seed in range(3):
        parts = split_rows(ids, labels, groups, {"test": 0.5}, seed=seed)
        assert {groups[row] for row in parts["train"]} == {"b"}
        assert {groups[row] for row in parts["test"]} == {"a", "c", "d"}


def test_a_tie_goes_to_the_larger_split() -> None:
    """Of four images train needs 1.5 and test 2.5, so the last one leaves .5 in either."""
    parts = split_rows(["a", "b", "c", "d"], [0] * 4, None, {"test": 0.625}, seed=0)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 1, "test": 3}
