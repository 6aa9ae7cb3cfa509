"""Data sets with the columns image and label to tables.

Written by hand because `datasets` has no rule for several splits: class lists that differ, labels
that are missing or negative, and columns of other types would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Value
from datasets import Image as ImageFeature

from ...errors import DataError, unknown
from ..table import OPTIONAL, ImageTable, check_table
from .building import UNLABELLED, Source, blank_rows
from .labels import name_numbers, negative_labels

CIFAR_COLUMNS = {"image": "img", "label": "fine_label"}
"""Names in uoft-cs/cifar10 and cifar100."""
SHOWN = 12


@dataclass(frozen=True)
class _Classes:
    """Classes of all splits: `names` by label, and the label of each value in the data."""

    names: tuple[str, ...]
    label_of: Mapping[Any, int]


def to_tables(
    splits: Mapping[str, Dataset],
    source: Source,
    *folders: Path,
    schemes: Sequence[str] = (),
    numbers: bool = False,
) -> dict[str, ImageTable]:
    """`{split: table}` of data sets with the columns image and label, or the user's names for them.

    - `folders`: files in the column image have to be below one of them.
    - `schemes`: schemes of the addresses that the reader wrote.
    - `numbers`: whether labels that are texts are whole numbers, and sorted as such.
    """
    root = source.root
    splits = {split: rows for split, rows in splits.items() if not source.leaves_out(split)}
    if not source.labelled:
        splits = {split: _without_labels(rows) for split, rows in splits.items()}
    renamed = {
        split: _rename_columns(rows, source.columns, _where(split, root))
        for split, rows in splits.items()
    }
    if len(renamed) == 1 and "split" in (rows := next(iter(renamed.values()))).column_names:
        renamed = _split_by_column(rows)
    renamed = {split: rows for split, rows in renamed.items() if not source.leaves_out(split)}
    if not renamed:
        raise DataError(
            f"every split of '{root}' is left out; keep one for training.", argument="splits"
        )
    for split, rows in renamed.items():
        _refuse_broken(rows, _where(split, root))
        _refuse_blank(rows, _where(split, root))
    by_where = {_where(split, root): rows for split, rows in renamed.items()}
    classes = _collect_classes(by_where, numbers)
    if any("fine_label" in rows.column_names for rows in splits.values()):
        names = tuple(name.replace("_", " ") for name in classes.names)  # for prompts
        classes = _Classes(names, classes.label_of)
    tables = {}
    for split, rows in renamed.items():
        rows = _standard_columns(rows, split, _where(split, root), classes.label_of)
        first, *elsewhere = folders
        tables[split] = check_table(
            ImageTable(rows, classes.names, first, tuple(elsewhere), frozenset(schemes))
        )
    return tables


def _without_labels(rows: Dataset) -> Dataset:
    """The rows with one label for all, and without a column `split`."""
    written = [name for name in ("label", "fine_label", "split") if name in rows.column_names]
    return rows.remove_columns(written).add_column("label", [UNLABELLED] * len(rows))


def _where(split: str, root: str) -> str:
    return f"split '{split}' of '{root}'"


def _split_by_column(rows: Dataset) -> dict[str, Dataset]:
    """The splits that a column `split` names, in the order of their first rows."""
    named = [str(value) for value in rows.select_columns("split")[:]["split"]]
    return {
        split: rows.select([row for row, name in enumerate(named) if name == split])
        for split in dict.fromkeys(named)
    }


def _rename_columns(rows: Dataset, columns: Mapping[str, str], where: str) -> Dataset:
    if not len(rows):
        raise DataError(f"{where} has no rows.")
    for name, theirs in columns.items():
        if theirs not in rows.column_names:
            raise DataError(
                f"{name}: {where}: {unknown('column', theirs, rows.column_names)}",
                argument="columns",
            )
        if name != theirs:
            rows = rows.remove_columns(name) if name in rows.column_names else rows
            rows = rows.rename_column(theirs, name)
    for name, theirs in CIFAR_COLUMNS.items():
        if name not in rows.column_names and theirs in rows.column_names:
            rows = rows.rename_column(theirs, name)
    for needed in ("image", "label"):
        if needed not in rows.column_names:
            raise DataError(
                f"{where} has no column '{needed}' (it has {', '.join(rows.column_names)}); name "
                f"it, for example {{{needed}: their_name}}.",
                argument="columns",
            )
    return rows


def _refuse_broken(rows: Dataset, where: str) -> None:
    """Raises DataError for bytes that are no values of their type, such as invalid UTF-8."""
    try:
        rows.data.table.validate(full=True)
    except pa.ArrowException as error:
        raise DataError(f"{where} holds broken columns: {error}") from error


def _refuse_blank(rows: Dataset, where: str) -> None:
    """Raises DataError for missing or empty labels: the class would have no name."""
    plain = rows.select_columns(
        [name for name in ("label", "id") if name in rows.column_names]
    ).with_format("arrow")[:]
    names = plain["id"].combine_chunks() if "id" in plain.column_names else None
    if blank := blank_rows(plain["label"].combine_chunks(), names):
        raise DataError(
            f"{where} has images without a label; remove these rows or fill the label in: {blank}."
        )


def _collect_classes(splits: Mapping[str, Dataset], numbers: bool) -> _Classes:
    """The classes of all splits together, with the label of each value in the column `label`."""
    listed: dict[str, tuple[str, ...]] = {}
    values: set[Any] = set()
    for where, rows in splits.items():
        feature = rows.features["label"]
        if isinstance(feature, ClassLabel):
            listed[where] = tuple(map(str, feature.names))
        else:
            _check_label_type(feature, where)
        found = set(rows.unique("label"))
        if below := sorted(value for value in found if isinstance(value, int) and value < 0):
            raise negative_labels(where, below)
        values |= found
    if listed:
        first, *others = listed.values()
        if len(listed) < len(splits) or any(names != first for names in others):
            shown = " | ".join(
                f"{where}: {', '.join(listed.get(where, ('no names',))[:SHOWN])}"
                for where in splits
            )
            raise DataError(f"the splits name different classes, or in another order: {shown}.")
        return _Classes(first, {label: label for label in values})
    if all(isinstance(value, str) for value in values):
        names = name_numbers(values, next(iter(splits))) if numbers else tuple(sorted(values))
        return _Classes(names, {name: label for label, name in enumerate(names)})
    if any(isinstance(value, str) for value in values):
        raise DataError("the labels are texts in one split and numbers in another.")
    ordered = sorted(values)
    return _Classes(tuple(map(str, ordered)), {value: label for label, value in enumerate(ordered)})


def _check_label_type(feature: Any, where: str) -> None:
    kind = str(getattr(feature, "dtype", feature))
    is_text = kind in {"string", "large_string"}
    if not isinstance(feature, Value) or not (is_text or "int" in kind):
        raise DataError(
            f"{where}: labels of type {kind}; whole numbers, texts or a ClassLabel are expected. "
            "Write the label as one of these, or name another column, for example "
            "{label: their_name}.",
            argument="columns",
        )


def _standard_columns(
    rows: Dataset, split: str, where: str, label_of: Mapping[Any, int]
) -> Dataset:
    """The rows with the columns of `ImageTable` alone."""
    labels = [label_of[value] for value in rows.select_columns("label")[:]["label"]]
    rows = rows.remove_columns("label").add_column("label", np.asarray(labels, np.int64))
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{split}-{row:08d}" for row in range(len(rows))])
    elif rows.features["id"] != Value("string"):
        kind = getattr(rows.features["id"], "dtype", "")
        if not isinstance(rows.features["id"], Value) or "binary" in kind:
            raise DataError(
                f"{where}: the column 'id' holds {rows.features['id']}; texts or numbers are "
                "expected. Name another.",
                argument="columns",
            )
        rows = rows.cast_column("id", Value("string"))
    keep = [name for name in ("id", "image", "label", *OPTIONAL) if name in rows.column_names]
    try:
        return rows.select_columns(keep).cast_column("image", ImageFeature(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{where}: the column 'image' holds no images but {rows.features['image']}; name "
            "another.",
            argument="columns",
        ) from error
