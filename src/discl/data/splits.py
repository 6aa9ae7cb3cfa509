"""Stratified splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..utils.hashing import derive_seed


def split_rows(
    ids: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str] | None,
    shares: dict[str, float],
    seed: int,
) -> dict[str, list[int]]:
    """`{split: row numbers}` with `train` for what the `shares` leave; near-stratified by label, and no group straddles.

    Units (groups, or single images) are taken in an order shuffled by (seed, id). Each goes to the split that lacks most
    of the unit's labels, measured against that split's target for these labels; ties go to the larger split. A class
    keeps at least one unit in training.
    """
    wanted = {
        "train": 1 - sum(shares.values()),
        **{name: share for name, share in shares.items() if share > 0},
    }
    units: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        units.setdefault(
            f"group:{groups[row]}" if groups is not None else f"image:{name}", []
        ).append(row)
    label_array = np.asarray(labels)
    num_classes = int(label_array.max()) + 1
    totals = np.bincount(label_array, minlength=num_classes)
    placed = {name: np.zeros(num_classes) for name in wanted}
    result: dict[str, list[int]] = {name: [] for name in wanted}
    shuffled = sorted(units, key=lambda unit: derive_seed("own-split", seed, unit))
    if groups is not None:
        shuffled.sort(
            key=lambda unit: -len(units[unit])
        )  # large groups first: small ones can even out what they upset
    for unit in shuffled:
        rows = units[unit]
        counts = np.bincount(label_array[rows], minlength=num_classes)
        present = counts > 0
        if (placed["train"][present] == 0).any():
            best = "train"
        else:
            lack = {
                name: ((share * totals - placed[name])[present] * counts[present]).sum()
                for name, share in wanted.items()
            }
            best = max(lack, key=lambda name: (lack[name], wanted[name]))
        placed[best] += counts
        result[best] += rows
    return {name: sorted(rows) for name, rows in result.items()}
