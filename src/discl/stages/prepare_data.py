"""Checks every image, makes splits and the long tail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data import (
    ImageTable,
    Inspection,
    inspect_images,
    order_classes,
    rank_by_index,
    settle_depth,
    split_rows,
    take_long_tail,
)
from ..data.depth import Ranges
from ..data.readers import SPLIT_NAMES, too_few_classes
from ..errors import DataError, arguments_named
from ..escaping import one_line
from ..recipe import LongTail
from ..recipe.data import OwnSplit
from ..run_folder import paths
from ..run_folder.earlier import NOT_FOR_HARD, restore_table
from ..run_folder.run import Run, read_data
from ..utils.console import progress
from ..utils.counts import count_be, count_have, list_some
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_table

logger = get_logger(__name__)

SHOWN_CLASSES = 8
"""Classes that an error lists."""

Columns = dict[str, np.ndarray]
Rows = np.ndarray


def prepare_data(run: Run) -> Path:
    """Checks every image once and lists the rows of each split in `data.parquet`.

    Returns its path. Raises DataError for fewer than two classes, for unreadable images (unless the
    recipe skips them), for a class without training images, and for images of the validation or
    test split that are in training too.
    """
    path, data = run.path(paths.DATA), run.recipe.data
    key = digest(data.model_dump(mode="json", exclude_defaults=True))
    if restore_table(path, key, "every image is checked again"):
        return path
    sources = read_data(data, lambda names: logger.warning(unused_splits(names)), logger.warning)
    if problem := too_few_classes(data.root, sources["train"].class_names):
        raise DataError(problem)
    inspected = {split: _inspect(sources[split], split, data.unreadable) for split in sources}
    sources, inspected = settle_depth(sources, inspected, data.bits)
    if message := describe_depth(sources, inspected):
        logger.info(message)
    listed = {split: _columns(table, inspected[split]) for split, table in sources.items()}
    rows_of = _divide(listed, data.own_split)
    tables = {
        split: {name: column[rows] for name, column in listed[source].items()}
        for split, (source, rows) in rows_of.items()
    }
    train = tables["train"]
    if data.long_tail:
        images = sources["train"].select(train["row"])
        rows = np.asarray(long_tail_rows(images, train["digest"].tolist(), data.long_tail))
        tables["train"] = {name: column[rows] for name, column in train.items()}
    _check_splits(tables, sources["train"].class_names, data.overlap)
    columns = _join(tables, {split: source for split, (source, _) in rows_of.items()})
    if (depth := sources["train"].depth) is not None:
        columns["depth"] = np.full(len(columns["id"]), json.dumps(depth.plain()), object)
    write_table(pa.table(columns), path, key)
    return path


def _divide(listed: Mapping[str, Columns], own_split: OwnSplit) -> dict[str, tuple[str, Rows]]:
    """`{split: (split of the source, rows in it)}`, with splits taken from the training images."""
    result = {split: (split, np.arange(len(columns["row"]))) for split, columns in listed.items()}
    ids, labels, units = (listed["train"][name].tolist() for name in ("id", "label", "unit"))
    parts = own_parts(ids, labels, units, own_split, given=list(listed))
    return result | {split: ("train", np.asarray(rows, np.int64)) for split, rows in parts.items()}


def _join(tables: Mapping[str, Columns], source_of: Mapping[str, str]) -> Columns:
    """All splits as columns of one table, with `split` and `source_split`."""
    sizes = [len(table["row"]) for table in tables.values()]
    names = dict.fromkeys(name for table in tables.values() for name in table if name != "unit")
    columns = {
        name: np.concatenate(  # a split may have no domain or group
            [
                table.get(name, np.full(size, "", object))
                for table, size in zip(tables.values(), sizes, strict=True)
            ]
        )
        for name in names
    }
    columns["split"] = np.repeat(list(tables), sizes)
    columns["source_split"] = np.repeat([source_of[split] for split in tables], sizes)
    return columns


def own_parts(
    ids: Sequence[str],
    labels: Sequence[int],
    units: Sequence[str],
    own_split: OwnSplit,
    *,
    given: Sequence[str],
) -> dict[str, list[int]]:
    """`{split: rows}` of the training images that `data.own_split` makes a split of.

    - `units`: images of one unit stay together.
    - `given`: splits that the data set has; they are not made.
    """
    fractions = {"validation": own_split.validation, "test": own_split.test}
    wanted = {name: part for name, part in fractions.items() if name not in given and part}
    return split_rows(ids, labels, units, wanted, seed=own_split.seed) if wanted else {}


def units_of(table: ImageTable, digests: Sequence[str]) -> list[str]:
    """The unit of each image, which is never divided between splits: its group, else its content.

    Copies of one picture have one content.
    """
    if "group" not in table.rows.column_names:
        return list(digests)
    return own_units(table.rows["group"][:], digests)


def own_units(groups: Sequence[Any], digests: Sequence[str]) -> list[str]:
    """The group of each image, or its content where it has none (None or an empty text)."""
    return [
        content if group is None or group == "" else str(group)
        for group, content in zip(groups, digests, strict=True)
    ]


def listed_units(listed: pa.Table) -> list[str]:
    """The unit of each image of `data.parquet`; see `units_of`."""
    digests = listed["digest"].to_pylist()
    return (
        own_units(listed["group"].to_pylist(), digests)
        if "group" in listed.column_names
        else digests
    )


def unused_splits(names: list[str]) -> str:
    """Message about splits that are used neither for training nor for measuring."""
    return (
        f"splits that are not used: {', '.join(names)}; name them in data.splits to use them, "
        f"for example {{test: {names[0]}}}."
    )


def long_tail_rows(table: ImageTable, digests: Sequence[str], profile: LongTail) -> list[int]:
    """Rows of a long-tailed sample of a table with these digests."""
    section = "data.long_tail"
    with arguments_named(
        order=f"{section}.class_order", index=f"{section}.index", n_max=f"{section}.n_max"
    ):
        order = order_classes(table.class_names, profile.class_order)
        ranks = rank_by_index(digests, profile.index) if profile.index else None
        return take_long_tail(
            table, profile.n_max, profile.imbalance_ratio, order, seed=profile.seed, ranks=ranks
        )


def key_of_hard(run: Run, listed: pa.Table) -> str:
    """Digest of what decides which of the `listed` training images are hard."""
    hard = run.recipe.hard
    columns = listed.select(["id", "label", "digest"]).to_pydict()
    train = {}
    if hard.rule == "probability":
        left_out = dict.fromkeys(NOT_FOR_HARD, True)
        train = run.recipe.train.model_dump(
            mode="json",
            exclude={**left_out, "model": {"checkpoint"}},
            exclude_defaults=True,
        )
    return digest(hard.model_dump(mode="json", exclude_defaults=True), columns, train)


def describe_depth(
    tables: Mapping[str, ImageTable], inspected: Mapping[str, Inspection]
) -> str | None:
    """Message about grey pictures of more than 8 bits; None if there are none."""
    depth, ranges = tables["train"].depth, Ranges()
    for each in inspected.values():
        for wide in each.wide.values():
            ranges.add(wide)
    return None if depth is None else f"{ranges.describe(depth)} (data.bits states it)"


def _inspect(table: ImageTable, split: str, unreadable: str) -> Inspection:
    with progress(f"check {split} images", len(table)) as advance:
        seen = inspect_images(table, advance)
    if seen.unreadable:
        listing = "\n".join(f"  {one_line(problem)}" for _, problem in seen.unreadable[:20])
        if unreadable == "error":
            raise DataError(
                f"{len(seen.unreadable)} of {len(table)} {split} images cannot be read:\n"
                f"{listing}\n"
                "Fix or delete them, or set data.unreadable: skip."
            )
        skipped = count_be(len(seen.unreadable), f"unreadable {split} image")
        logger.warning(f"{skipped} skipped:\n{listing}")
    return seen


def _columns(table: ImageTable, seen: Inspection) -> Columns:
    """Columns of `data.parquet` for the readable images of a split, and `unit`."""
    bad = {row for row, _ in seen.unreadable}
    good = np.asarray([row for row in range(len(table)) if row not in bad], np.int64)
    sizes = np.asarray(seen.sizes, np.int32)[good]
    columns = {
        "id": np.asarray(table.ids, object)[good],
        "row": good,
        "label": table.labels[good],
        "digest": np.asarray(seen.digests, object)[good],
        "width": sizes[:, 0],
        "height": sizes[:, 1],
        "unit": np.asarray(units_of(table, seen.digests), object)[good],
    }
    if "domain" in table.rows.column_names:
        domains = [str(value) for value in table.rows["domain"][:]]
        columns["domain"] = np.asarray(domains, object)[good]
    if "group" in table.rows.column_names:
        columns["group"] = columns["unit"]
    return columns


def _check_splits(tables: Mapping[str, Columns], names: tuple[str, ...], overlap: str) -> None:
    """Raises DataError for a class without training images, and for images in two splits."""
    counts = np.bincount(tables["train"]["label"], minlength=len(names))
    if (counts == 0).any():
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        raise DataError(
            f"{count_have(len(empty), 'class', 'classes')} no training image: "
            f"{list_some(empty, SHOWN_CLASSES)}. Add images (unreadable ones do not count), or "
            "leave out classes without images with data.drop_empty_classes: true."
        )
    others = [name for name in SPLIT_NAMES if name in tables and name != "train"]
    for first, second in combinations(("train", *others), 2):
        id_of = dict(zip(tables[first]["digest"], tables[first]["id"], strict=True))
        table = tables[second]
        shared = [
            (name, id_of[content])
            for name, content in zip(table["id"], table["digest"], strict=True)
            if content in id_of
        ]
        if shared:
            message = (
                f"{count_be(len(shared), 'image')} in {first} and in {second}, by content "
                f"(for example '{shared[0][0]}' is '{shared[0][1]}')"
            )
            if overlap == "error":
                raise DataError(
                    f"{message}; figures on such images would mean nothing. Remove them from one "
                    "of the two splits. If a published benchmark has them, set data.overlap: keep."
                )
            logger.warning(f"{message}; data.overlap keeps them")


def split_rows_of(run: Run, split: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of `data.parquet` that belong to a split; default all their columns."""
    listed = read_table(run.path(paths.DATA), None if columns is None else ["split", *columns])
    return listed.filter(pc.equal(listed["split"], split))
