"""Stratified splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..utils.hashing import derive_seed


def split_rows(
    ids: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str] | None,
    fractions: Mapping[str, float],
    *,
    seed: int,
) -> dict[str, list[int]]:
    """`{split: row numbers}`, near-stratified by label; a group stays in one split.

    Units (groups, or single images) are visited in an order shuffled by (seed, id), large groups
    first. Each goes to the split with the largest deficit: the images that the split still needs
    of each class, weighted by the unit's number of images of that class. Ties go to the larger
    split. A class keeps at least one unit in training.

    - `ids`: of the images, unique.
    - `labels`: of the images, 0 … C − 1.
    - `groups`: name of each image's group, or None.
    - `fractions`: `{split: fraction of the images}`; `train` gets the rest.
    - `seed`: of the order.
    """
    target = {
        "train": 1 - sum(fractions.values()),
        **{name: fraction for name, fraction in fractions.items() if fraction > 0},
    }
    units: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        unit = f"group:{groups[row]}" if groups is not None else f"image:{name}"
        units.setdefault(unit, []).append(row)
    label_array = np.asarray(labels)
    num_classes = int(label_array.max()) + 1
    totals = np.bincount(label_array, minlength=num_classes)
    counts_of = {name: np.zeros(num_classes) for name in target}
    result: dict[str, list[int]] = {name: [] for name in target}
    order = sorted(units, key=lambda unit: derive_seed("own-split", seed, unit))
    if groups is not None:  # small groups can compensate for large ones
        order.sort(key=lambda unit: -len(units[unit]))
    for unit in order:
        rows = units[unit]
        counts = np.bincount(label_array[rows], minlength=num_classes)
        present = counts > 0
        if (counts_of["train"][present] == 0).any():
            best = "train"
        else:
            deficit = {
                name: ((fraction * totals - counts_of[name])[present] * counts[present]).sum()
                for name, fraction in target.items()
            }
            best = max(deficit, key=lambda name: (deficit[name], target[name]))
        counts_of[best] += counts
        result[best] += rows
    return {name: sorted(rows) for name, rows in result.items()}
