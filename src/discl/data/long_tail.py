"""Long-tailed class counts; many, medium and few."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..assets import embedded_index
from ..errors import DataError, unknown
from ..utils.hashing import derive_seed
from .table import ImageTable

INDEX_CHARACTERS = 12


def exponential_counts(num_classes: int, n_max: int, imbalance_ratio: float) -> list[int]:
    """n_c = ⌊n_max · IR^(−c/(C−1))⌋ for c = 0 … C − 1, head first (arXiv 1901.05555, section 5)."""
    if num_classes == 1:
        return [n_max]
    exact = (n_max * imbalance_ratio ** (-c / (num_classes - 1)) for c in range(num_classes))
    return [int(count + 1e-9) for count in exact]  # 500 · 100^(−1) is 4.999… in floats


def order_classes(class_names: Sequence[str], order: Sequence[str] | int | None) -> list[int]:
    """Labels from head to tail: given by name, shuffled with a seed, or as they are.

    Raises DataError for an unknown name or one that is missing.
    """
    if order is None:
        return list(range(len(class_names)))
    if isinstance(order, int):
        return (
            np.random.default_rng(derive_seed("class-order", order))
            .permutation(len(class_names))
            .tolist()
        )
    for name in order:
        if name not in class_names:
            raise DataError("data.long_tail.class_order: " + unknown("class", name, class_names))
    missing = [name for name in class_names if name not in order]
    if missing or len(order) != len(class_names):
        raise DataError(
            f"data.long_tail.class_order names {len(order)} classes of {len(class_names)}; missing: {', '.join(missing) or 'none'}."
        )
    return [list(class_names).index(name) for name in order]


def take_long_tail(
    table: ImageTable,
    n_max: int,
    imbalance_ratio: float,
    order: Sequence[int],
    seed: int,
    ranks: Sequence[int] | None = None,
) -> list[int]:
    """Row numbers, in table order, of a long-tailed sample; `order` lists the labels from head to tail.

    Each class is shuffled once by (seed, id), or sorted by `ranks` where they are given (`rank_by_index`), and its first n_c taken, so
    lists of different imbalance ratio are nested. Raises DataError if a class has fewer images than its share, or if its share is none.
    """
    labels, ids = table.labels, table.ids
    chosen: list[int] = []
    for label, count in zip(
        order, exponential_counts(len(order), n_max, imbalance_ratio), strict=True
    ):
        if count == 0:
            raise DataError(
                f"the long-tail profile leaves no image of class '{table.class_names[label]}'; raise data.long_tail.n_max or lower "
                f"imbalance_ratio so that n_max / imbalance_ratio is at least 1 (it is {n_max / imbalance_ratio:.3g})."
            )
        rows = [
            row
            for row in np.flatnonzero(labels == label).tolist()
            if ranks is None or ranks[row] >= 0
        ]
        if len(rows) < count:
            listed = "" if ranks is None else " that data.long_tail.index lists"
            raise DataError(
                f"class '{table.class_names[label]}' has {len(rows)} images{listed}, the long-tail profile asks for {count}; "
                "lower data.long_tail.n_max."
            )
        rows.sort(
            key=lambda row: (
                derive_seed("long-tail", seed, ids[row]) if ranks is None else ranks[row]
            )
        )
        chosen += rows[:count]
    return sorted(chosen)


def rank_by_index(digests: Sequence[str], index: str) -> list[int]:
    """Place of each image in an index list, −1 for those not listed: by content, so that every copy of a data set gives the same sample.

    `digests` are those of `digest_image`; `index` is a file or `embedded:NAME` with the first twelve characters of one a line.
    Raises DataError for a file that is missing or lists none of the images.
    """
    file = (
        embedded_index(index.removeprefix("embedded:"))
        if index.startswith("embedded:")
        else Path(index)
    )
    if not file.is_file():
        raise DataError(f"data.long_tail.index: there is no file {file}.")
    place = {line: rank for rank, line in enumerate(file.read_text().split())}
    ranks = [place.get(content[:INDEX_CHARACTERS], -1) for content in digests]
    if max(ranks) < 0:
        raise DataError(
            f"data.long_tail.index: {file} lists none of the {len(ranks)} images by content; is it of another data set?"
        )
    return ranks


def class_groups(class_counts: Sequence[int], many: int, few: int) -> dict[str, list[int]]:
    """`{group: labels}` with many > `many`, few < `few` and medium between; an empty group is absent."""
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for label, count in enumerate(class_counts):
        groups["many" if count > many else "few" if count < few else "medium"].append(label)
    return {name: labels for name, labels in groups.items() if labels}
