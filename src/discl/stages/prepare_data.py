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
from ..errors import BrokenFileError, DataError
from ..escaping import one_line
from ..recipe import LongTail
from ..recipe.data import OwnSplit
from ..run_folder import paths
from ..run_folder.open import NOT_FOR_JUDGES
from ..run_folder.run import Run, read_data
from ..utils.console import progress
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import AGAIN, read_table, write_table

logger = get_logger(__name__)

SHOWN = 5


def prepare_data(run: Run) -> Path:
    """Checks every image once and lists the rows of each split in `data.parquet`.

    Raises DataError for fewer than two classes, unreadable images (unless they are skipped), a class without training images, and images of
    the validation or test split that also lie in training.
    """
    path, data = run.path(paths.DATA), run.recipe.data
    key = digest(data.model_dump(mode="json", exclude_defaults=True))
    if is_usable(path, key, "every image is checked again"):
        return path
    found = read_data(data, lambda names: logger.warning(unused_splits(names)), logger.warning)
    if told := too_few_classes(data.root, found["train"].class_names):
        raise DataError(told)
    found, seen = _settled(
        found, {split: _inspect(found[split], split, data.unreadable) for split in found}, data.bits
    )
    listed = {split: _columns(table, seen[split]) for split, table in found.items()}
    placed = {split: (split, np.arange(len(columns["row"]))) for split, columns in listed.items()}
    own = listed["train"]
    parts = own_parts(
        own["id"].tolist(), own["label"].tolist(), own["unit"].tolist(), data.own_split, list(found)
    )
    placed |= {split: ("train", np.asarray(rows, np.int64)) for split, rows in parts.items()}
    tables = {
        split: {name: column[rows] for name, column in listed[source].items()}
        for split, (source, rows) in placed.items()
    }
    names = found["train"].class_names
    if data.long_tail:
        train = tables["train"]
        rows = np.asarray(
            long_tail_rows(
                found["train"].select(train["row"]), train["digest"].tolist(), data.long_tail
            )
        )
        tables["train"] = {name: column[rows] for name, column in train.items()}
    _check_splits(tables, names, data.overlap)
    columns = {
        name: np.concatenate(
            [table.get(name, np.full(len(table["row"]), "", object)) for table in tables.values()]
        )
        for name in dict.fromkeys(
            name for table in tables.values() for name in table
        )  # a split may lack domain or group
    }
    columns["split"] = np.repeat(list(tables), [len(table["row"]) for table in tables.values()])
    columns["source_split"] = np.repeat(
        [placed[split][0] for split in tables], [len(table["row"]) for table in tables.values()]
    )
    del columns["unit"]
    if found["train"].depth is not None:
        told = json.dumps(found["train"].depth.plain())
        columns["depth"] = np.full(len(columns["id"]), told, object)
    write_table(pa.table(columns), path, key)
    return path


def is_usable(path: Path, key: str, otherwise: str) -> bool:
    """Whether a table is there and was made from what `key` is the digest of.

    Says of one that is there and cannot be used, and what is done `otherwise`.
    """
    if not path.exists():
        return False
    try:
        read_table(path, key=key)
    except BrokenFileError as error:
        logger.warning(f"{str(error).removesuffix(f' {AGAIN}')} So {otherwise}.")
        return False
    return True


def own_parts(
    ids: Sequence[str],
    labels: Sequence[int],
    units: Sequence[str],
    asked: OwnSplit,
    given: Sequence[str],
) -> dict[str, list[int]]:
    """`{split: rows}` of the training images where `data.own_split` makes splits of them that are not given; else nothing."""
    stated = (("validation", asked.validation), ("test", asked.test))
    shares = {name: share for name, share in stated if name not in given and share}
    return split_rows(ids, labels, units, shares, asked.seed) if shares else {}


def units_of(table: ImageTable, digests: Sequence[str]) -> list[str]:
    """What never straddles a split, for each image: its group, else (as copies of one picture must not) its content."""
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
    """What never straddles a split, for each image of `data.parquet`; a split without groups may stand beside one that has them."""
    digests = listed["digest"].to_pylist()
    return (
        own_units(listed["group"].to_pylist(), digests)
        if "group" in listed.column_names
        else digests
    )


def unused_splits(names: list[str]) -> str:
    """What is said of splits that are neither for training nor for measuring."""
    return f"splits that are not used: {', '.join(names)}; name them in data.splits if they should be, for example {{test: {names[0]}}}."


def long_tail_rows(table: ImageTable, digests: Sequence[str], profile: LongTail) -> list[int]:
    """Row numbers of the long-tailed sample that a recipe asks for; `digests` are those of the table's images."""
    order = order_classes(table.class_names, profile.class_order)
    ranks = rank_by_index(digests, profile.index) if profile.index else None
    return take_long_tail(table, profile.n_max, profile.imbalance_ratio, order, profile.seed, ranks)


def key_of_hard(run: Run, listed: pa.Table) -> str:
    """Digest of what decides which of the `listed` training images are hard."""
    hard = run.recipe.hard
    columns = listed.select(["id", "label", "digest"]).to_pydict()
    judges = {}
    if hard.rule == "probability":
        left_out = {key.removeprefix("train."): True for key in NOT_FOR_JUDGES}
        judges = run.recipe.train.model_dump(
            mode="json",
            exclude={**left_out, "model": {"checkpoint"}},
            exclude_defaults=True,
        )
    return digest(hard.model_dump(mode="json", exclude_defaults=True), columns, judges)


def _settled(
    tables: dict[str, ImageTable], seen: dict[str, Inspection], bits: int | None
) -> tuple[dict[str, ImageTable], dict[str, Inspection]]:
    """Tables and what was seen of them, with one depth for all grey pictures of more than 8 bits, which is said."""
    tables, seen = settle_depth(tables, seen, bits)
    if told := depth_told(tables, seen):
        logger.info(told)
    return tables, seen


def depth_told(tables: Mapping[str, ImageTable], seen: Mapping[str, Inspection]) -> str | None:
    """What is said of grey pictures of more than 8 bits; None where there are none."""
    depth, ranges = tables["train"].depth, Ranges()
    for each in seen.values():
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
                f"{len(seen.unreadable)} of {len(table)} {split} images cannot be read:\n{listing}\n"
                "Mend or delete them, or set data.unreadable: skip."
            )
        logger.warning(f"{len(seen.unreadable)} unreadable {split} images are skipped:\n{listing}")
    return seen


def _columns(table: ImageTable, seen: Inspection) -> dict[str, np.ndarray]:
    """What `data.parquet` says of the readable images."""
    bad = {row for row, _ in seen.unreadable}
    good = np.asarray([row for row in range(len(table)) if row not in bad], np.int64)
    sizes = np.asarray(seen.sizes, np.int32)[good]
    columns = {
        "id": np.asarray(table.ids, object)[good], "row": good, "label": table.labels[good],
        "digest": np.asarray(seen.digests, object)[good], "width": sizes[:, 0], "height": sizes[:, 1],
    }  # fmt: skip
    columns["unit"] = np.asarray(units_of(table, seen.digests), object)[good]
    if "domain" in table.rows.column_names:
        columns["domain"] = np.asarray([str(value) for value in table.rows["domain"][:]], object)[
            good
        ]
    if "group" in table.rows.column_names:
        columns["group"] = columns["unit"]
    return columns


def _check_splits(
    tables: dict[str, dict[str, np.ndarray]], names: tuple[str, ...], overlap: str
) -> None:
    counts = np.bincount(tables["train"]["label"], minlength=len(names))
    if (counts == 0).any():
        lacking = [name for name, count in zip(names, counts, strict=True) if not count]
        raise DataError(
            f"{len(lacking)} classes have no training image: {', '.join(lacking[:8])}. Add images (those that cannot be read do "
            "not count), or leave classes that have none out with data.drop_empty_classes: true."
        )
    for second, first in combinations(
        ("train", *(name for name in SPLIT_NAMES if name in tables and name != "train")), 2
    ):
        table, seen = (
            tables[first],
            dict(zip(tables[second]["digest"], tables[second]["id"], strict=True)),
        )
        shared = [
            (name, seen[content])
            for name, content in zip(table["id"], table["digest"], strict=True)
            if content in seen
        ]
        if shared:
            where = "training" if second == "train" else second
            example = f"(for example '{shared[0][0]}' is '{shared[0][1]}')"
            told = f"{len(shared)} images of the {first} split also lie in {where}, by content {example}"
            if overlap == "error":
                raise DataError(
                    f"{told}; figures on them would mean nothing. Remove them from one of the two; where a published benchmark has "
                    "them, data.overlap: keep leaves them in."
                )
            logger.warning(f"{told}; they are kept, as data.overlap says")


def split_rows_of(run: Run, split: str) -> pa.Table:
    listed = read_table(run.path(paths.DATA))
    return listed.filter(pc.equal(listed["split"], split))
