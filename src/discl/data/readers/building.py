"""What readers have in common: sources, layouts, tables from columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import DataError
from ..listing import LeftOut
from ..table import ImageTable, check_table, rows_of

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "id_val"),
    "test": ("test", "testing", "id_test"),
    "validation-ood": ("validation-ood", "val-ood", "ood_val"),
    "test-ood": ("test-ood", "ood_test"),
}
"""Names of splits that are recognised, lower case."""
UNLABELLED = "image"
"""The only class of images without labels."""

SHOWN_ROWS = 5
SHOWN_FILES = 12
FOREIGN = r"^[A-Za-z]:[\\/]|^[A-Za-z][A-Za-z0-9+.-]+://|\x00"
"""What no path below a folder looks like: a drive of Windows, an address, a zero byte."""

TREES: dict[str, tuple[str, ...]] = {
    "imagefolder": (
        "class/image.jpg, a folder for each class",
        "or train/class/image.jpg, test/class/image.jpg",
    ),
    "metadata": (
        "metadata.csv, .jsonl or .parquet (columns file_name, label), the images beside it or "
        "below",
        "or one in train/, one in test/",
    ),
    "roboflow": ("train/_classes.csv (filename, a column of 0 and 1 for each class), train/….jpg",),
    "parquet": (
        "train.parquet, test.parquet or train-00000-of-00002.parquet (columns image, label)",
    ),
    "datasets": ("dataset_dict.json, train/, test/, as save_to_disk of datasets writes them",),
    "manifest": (
        "images.csv, .tsv or .parquet (columns path, label; optionally id, split, domain, group)",
        "the images that it names",
    ),
    "imagenet-lt": (
        "ImageNet_LT_train.txt, ImageNet_LT_val.txt, ImageNet_LT_test.txt "
        "(lines of path and label)",
        "LOC_synset_mapping.txt or classnames.txt (names)",
        "train/n01440764/n01440764_18.JPEG",
        "val/n01440764/ILSVRC2012_val_00000293.JPEG, or flat",
    ),
    "cifar": (
        "train.bin, test.bin, fine_label_names.txt",
        "or data_batch_1.bin … data_batch_5.bin, test_batch.bin, batches.meta.txt",
    ),
    "inaturalist": (
        "train2018.json, val2018.json",
        "categories.json (names; optional)",
        "train_val2018/Plantae/7477/….jpg",
    ),
    "wilds": (
        "metadata.csv (split, y, filename, location_remapped, sequence_remapped)",
        "categories.csv (y, name)",
        "train/….jpg",
    ),
    "webdataset": ("train-000000.tar, test-000000.tar (000.jpg and 000.cls or 000.json)",),
    "coco": (
        "annotations/instances_train.json, instances_val.json",
        "train/….jpg, val/….jpg",
        "or train/_annotations.coco.json beside its images, as Roboflow has it",
    ),
}
"""What each reader expects below the root."""


@dataclass(frozen=True)
class Source:
    """A data set and the user's names for its parts.

    - `root`: as given.
    - `path`: where the root is on this machine.
    - `columns`: column names in the data, by ours.
    - `splits`: split names in the data, by ours.
    - `files`: list files by split.
    - `images`: folder of the images that a list names, if it is not the list's own.
    - `left_out`: our names of the splits that are not read.
    - `labelled`: whether images need a label; without, all have the class `image`.
    - `unread`: counts the files that a reader does not use.
    """

    root: str
    path: Path
    columns: Mapping[Any, str] = field(default_factory=dict)
    splits: Mapping[Any, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    images: str | None = None
    left_out: frozenset[str] = frozenset()
    labelled: bool = True
    unread: LeftOut = field(default_factory=LeftOut, compare=False)

    def leaves_out(self, split: str) -> bool:
        """Whether a split, by its name in the data, is not read."""
        return split not in self.splits.values() and any(
            split.lower() in SPLIT_NAMES[name] for name in self.left_out
        )

    def with_columns(self, columns: Mapping[Any, str]) -> Source:
        """The same data set with other names for its columns."""
        return replace(self, columns=columns)

    @property
    def folder(self) -> Path:
        """The folder that holds everything of the data set."""
        return self.path if self.path.is_dir() else self.path.resolve().parent

    def file(self, split: str, usual: str) -> Path:
        """The file of a split: the one in `files`, else the usual one."""
        return self.path / self.files.get(split, usual)


def files_below(folder: Path, *patterns: str) -> list[Path]:
    """The plain files below a folder that match a pattern, sorted, without hidden ones."""
    matches = {file for pattern in patterns for file in folder.rglob(pattern)}
    depth = len(folder.parts)
    return sorted(
        file
        for file in matches
        if file.is_file() and not any(part.startswith(".") for part in file.parts[depth:])
    )


def expected(source: Source, kind: str) -> DataError:
    """The error for a root with another layout than that of `kind`."""
    present: list[str] = []
    if source.path.is_dir():
        present = sorted(item.name + "/" * item.is_dir() for item in source.path.iterdir())
    shown = ", ".join(present[:SHOWN_FILES]) or "nothing"
    return DataError(
        f"'{source.root}' is not laid out as {kind}. Expected in {source.path.resolve()}:\n"
        f"{tree(kind)}\nFound: {shown}.",
        argument="root",
    )


def missing(source: Source, kind: str) -> str:
    """Message for a root that does not exist; `auto` shows the usual layouts of custom data."""
    shown = ("imagefolder", "parquet", "manifest") if kind == "auto" else (kind,)
    layouts = "\n".join(f"{each}:\n{tree(each)}" for each in shown)
    hub = "\nOr give the owner/name of a data set on the hub." if kind == "auto" else ""
    return (
        f"'{source.root}' does not exist; looked for {source.path.absolute()}. Expected there, "
        f"laid out as\n{layouts}{hub}"
    )


def tree(kind: str) -> str:
    """The layout that a reader expects, one line per part."""
    return "\n".join(f"  {item}" for item in TREES[kind])


def full_paths(
    root: Path,
    paths: Sequence[str] | pa.Array,
    where: str,
    fix: str = "paths have to stay below it",
) -> pa.Array:
    """Full paths of files below `root`.

    - `paths`: relative to `root`, or absolute and below it.
    - `where`: the file that names the paths, for messages.
    - `fix`: how to fix a path outside `root`, for messages.

    Raises DataError for rows without a path, and for a path outside `root`.
    """
    listed = strings(paths)
    if rows := blank_rows(listed):
        raise DataError(
            f"{where} has rows without a path: {rows}; remove them or fill the path in."
        )
    foreign = listed.filter(pc.match_substring_regex(listed, FOREIGN))
    if len(foreign):
        raise DataError(
            f"{where} names {foreign[0].as_py()!r}, which is no path below {root.absolute()} but "
            "an address, a drive or a path with a zero byte. Name files on this machine, relative "
            "to that folder."
        )
    result = pc.binary_join_element_wise(f"{root}/", listed, "")
    suspects = np.flatnonzero(
        pc.or_(pc.starts_with(listed, "/"), pc.match_substring(listed, "..")).to_numpy(
            zero_copy_only=False
        )
    )
    if not len(suspects):
        return result
    bases, checked = [f"{each}/" for each in (root.absolute(), root.resolve())], result.to_pylist()
    for row in suspects:
        path = listed[int(row)].as_py()
        clean = os.path.normpath(path if path.startswith("/") else f"{root.absolute()}/{path}")
        base = next((each for each in bases if clean.startswith(each)), None)
        if base is None:
            leads = "is outside" if path.startswith("/") else "leads out of"
            raise DataError(f"{where} names '{path}', which {leads} {root.absolute()}; {fix}.")
        checked[row] = f"{root}/{clean[len(base) :]}"
    return pa.array(checked, pa.string())


def blank_rows(values: pa.Array, names: pa.Array | None = None) -> str:
    """The first rows, counted from 1, that are empty or blank, for messages; "" for none.

    - `names`: shown with the rows.
    """
    blank = pc.is_null(values)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        blank = pc.or_(blank, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True))
    rows = np.flatnonzero(blank.to_numpy(zero_copy_only=False)).tolist()
    shown = [
        f"row {row + 1}" + (f" ('{names[row].as_py()}')" if names is not None else "")
        for row in rows[:SHOWN_ROWS]
    ]
    more = f" and {len(rows) - SHOWN_ROWS:,} more" if len(rows) > SHOWN_ROWS else ""
    return ", ".join(shown) + more


def strings(values: Sequence[str] | pa.Array) -> pa.Array:
    """The values as an Arrow array of strings."""
    return values if isinstance(values, pa.Array) else pa.array(values, pa.string())


def arrow_images(
    paths: Sequence[str] | pa.Array, data: Sequence[bytes] | None = None
) -> pa.StructArray:
    """A column of {bytes, path} as `datasets` stores images."""
    stored = pa.nulls(len(paths), pa.binary()) if data is None else pa.array(data, pa.binary())
    return pa.StructArray.from_arrays([stored, strings(paths)], names=["bytes", "path"])


def build_table(
    paths: Sequence[str] | pa.Array,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    ids: Sequence[str] | pa.Array,
    root: Path,
    data: Sequence[bytes] | None = None,
    schemes: Sequence[str] = (),
    **optional: Sequence[str] | pa.Array,
) -> ImageTable:
    """A checked table of image files or encoded images.

    - `paths`: of the images, or names where `data` is given.
    - `labels`: int `[images]`.
    - `class_names`: by label.
    - `ids`: of the images, unique.
    - `root`: folder below which the files are.
    - `data`: encoded images.
    - `schemes`: schemes of the addresses in `paths`, if the reader wrote such.
    - `optional`: columns `domain` and `group`.
    """
    try:
        columns = {
            "id": strings(ids),
            "image": arrow_images(paths, data),
            "label": pa.array(labels, pa.int64()),
        }
        columns |= {name: strings(values) for name, values in optional.items()}
    except UnicodeEncodeError as error:
        raise DataError(
            f"the file name {error.object!r} in {root} is not valid UTF-8; rename the file."
        ) from error
    rows = rows_of(pa.table(columns))
    below = root if data is None else None
    return check_table(ImageTable(rows, tuple(class_names), below, schemes=frozenset(schemes)))


def known_splits() -> Iterator[str]:
    """All recognised names of splits."""
    return (name for names in SPLIT_NAMES.values() for name in names)
