"""Long-tailed class counts; many, medium and few."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..assets import embedded_index
from ..errors import DataError, unknown
from ..utils.hashing import derive_seed

if TYPE_CHECKING:
    from .table import ImageTable

INDEX_CHARACTERS = 12


def exponential_counts(num_classes: int, n_max: int, imbalance_ratio: float) -> list[int]:
    """n_c = ⌊n_max · IR^(−c/(C−1))⌋ for c = 0 … C − 1, head first (arXiv 1901.05555, section 5)."""
    if num_classes == 1:
        return [n_max]
    exact = (n_max * imbalance_ratio ** (-c / (num_classes - 1)) for c in range(num_classes))
    return [int(count + 1e-9) for count in exact]  # 500 · 100^(−1) is 4.999… in floats


def order_classes(class_names: Sequence[str], order: Sequence[str] | int | None) -> list[int]:
    """Labels from head to tail.

    - `order`: all class names in order, a seed to shuffle by, or None for the order of the labels.

    Raises DataError for an unknown or a missing name.
    """
    if order is None:
        return list(range(len(class_names)))
    if isinstance(order, int):
        rng = np.random.default_rng(derive_seed("class-order", order))
        return rng.permutation(len(class_names)).tolist()
    for name in order:
        if name not in class_names:
            raise DataError(unknown("class", name, class_names), argument="order")
    missing = [name for name in class_names if name not in order]
    if missing or len(order) != len(class_names):
        raise DataError(
            f"got {len(order)} names for {len(class_names)} classes; missing: "
            f"{', '.join(missing) or 'none'}.",
            argument="order",
        )
    return [list(class_names).index(name) for name in order]


def take_long_tail(
    table: ImageTable,
    n_max: int,
    imbalance_ratio: float,
    order: Sequence[int],
    *,
    seed: int,
    ranks: Sequence[int] | None = None,
) -> list[int]:
    """Row numbers, in table order, of a long-tailed sample.

    Each class is shuffled by (seed, id), or sorted by `ranks`, and its first n_c images are taken.
    So samples of different imbalance ratios are nested.

    - `n_max`: images of the first class.
    - `imbalance_ratio`: n_max / images of the last class.
    - `order`: labels from head to tail.
    - `ranks`: rank of each image by `rank_by_index`, −1 for images that are not listed.

    Raises DataError for a class with too few images, and for a profile that leaves a class empty.
    """
    labels, ids = table.labels, table.ids
    chosen: list[int] = []
    for label, count in zip(
        order, exponential_counts(len(order), n_max, imbalance_ratio), strict=True
    ):
        name = table.class_names[label]
        if count == 0:
            raise DataError(
                f"the long-tail profile leaves no image of class '{name}': n_max / imbalance_ratio "
                f"is {n_max / imbalance_ratio:.3g} and has to be at least 1. Raise n_max or lower "
                "imbalance_ratio.",
                argument="n_max",
            )
        rows = np.flatnonzero(labels == label).tolist()
        if ranks is not None:
            rows = [row for row in rows if ranks[row] >= 0]
        if len(rows) < count:
            listed = "" if ranks is None else " in the index"
            raise DataError(
                f"class '{name}' has {len(rows)} images{listed}, and the long-tail profile needs "
                f"{count}; lower n_max (got {n_max}).",
                argument="n_max",
            )
        if ranks is None:
            rows.sort(key=lambda row: derive_seed("long-tail", seed, ids[row]))
        else:
            rows.sort(key=ranks.__getitem__)
        chosen += rows[:count]
    return sorted(chosen)


def rank_by_index(digests: Sequence[str], index: str) -> list[int]:
    """Rank of each image in an index list, −1 for images that are not listed.

    Images are matched by content, so every copy of a data set gives the same sample.

    - `digests`: of the images, by `digest_image`.
    - `index`: a file, or `embedded:NAME`, with the first 12 characters of a digest per line.

    Raises DataError for a file that is missing or lists none of the images.
    """
    prefix = "embedded:"
    embedded = index.startswith(prefix)
    file = embedded_index(index.removeprefix(prefix)) if embedded else Path(index)
    if not file.is_file():
        raise DataError(f"there is no file {file}.", argument="index")
    rank_of = {line: rank for rank, line in enumerate(file.read_text().split())}
    ranks = [rank_of.get(content[:INDEX_CHARACTERS], -1) for content in digests]
    if max(ranks) < 0:
        raise DataError(
            f"{file} lists none of the {len(ranks)} images by content; it belongs to another data "
            "set.",
            argument="index",
        )
    return ranks


def class_groups(class_counts: Sequence[int], many: int, few: int) -> dict[str, list[int]]:
    """`{group: labels}` of the groups many, medium and few; an empty group is absent.

    - `many`: classes with more training images are in the group many.
    - `few`: classes with fewer training images are in the group few.
    """
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for label, count in enumerate(class_counts):
        groups["many" if count > many else "few" if count < few else "medium"].append(label)
    return {name: labels for name, labels in groups.items() if labels}
