"""Readers: from a folder, Parquet files or the hub to tables of one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError

from ..assets import embedded
from ..errors import DataError, unknown
from .table import OPTIONAL, ImageTable, check_table, make_table

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def read_tables(
    root: str, kind: str = "auto", columns: Mapping[Any, str] | None = None, splits: Mapping[Any, str] | None = None
) -> dict[str, ImageTable]:
    """`{split: table}` of a data set; data without splits comes as `train` alone.

    `kind`: `imagefolder` (root/class/image or root/split/class/image), `parquet` (one file, or files named after their split),
    `hub` (a name for `datasets.load_dataset`), or `auto`. `columns` renames theirs to ours (`{"label": "fine_label"}`),
    `splits` names ours in their words (`{"test": "eval"}`). Raises DataError for whatever is missing, and says what was looked for.
    """
    path = embedded(root) if root.startswith("embedded:") else Path(root).expanduser()
    if kind == "auto":
        kind = _guess_kind(root, path)
    if kind != "hub" and not path.exists():
        raise DataError(f"data.root '{root}' does not exist; looked for {path.resolve()}.")
    if kind == "imagefolder":
        tables = _read_image_folder(path, set((splits or {}).values()))
    else:
        tables = _to_tables(_load(kind, root, path), root, columns or {})
    return _rename_splits(tables, splits or {}, root)


def _guess_kind(root: str, path: Path) -> str:
    if path.is_file() and path.suffix == ".parquet":
        return "parquet"
    if path.is_dir():
        return "parquet" if any(path.rglob("*.parquet")) else "imagefolder"
    if root.count("/") <= 1 and not root.startswith((".", "/", "~")) and "/" in root:
        return "hub"
    raise DataError(
        f"data.root '{root}' {'is no Parquet file' if path.is_file() else 'does not exist'}; looked for {path.resolve()}. "
        "Give a folder with one sub-folder of images per class, a folder of Parquet files, or the owner/name of a data set on the hub."
    )


def _load(kind: str, root: str, path: Path) -> dict[str, Dataset]:
    if kind == "hub":
        try:
            return dict(load_dataset(root))
        except Exception as error:
            raise DataError(f"data.root '{root}' is no local folder, and it could not be loaded from the hub: {error}") from error
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise DataError(f"data.root '{root}' holds no *.parquet file.")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(file.stem.split("-")[0] if path.is_dir() else "train", []).append(file)
    return {split: _load_parquet(shards) for split, shards in by_split.items()}  # one by one: a joint load takes one split's class names


def _load_parquet(shards: list[Path]) -> Dataset:
    try:
        features = [Features.from_arrow_schema(pq.read_schema(shard)) for shard in shards]
        for shard, each in zip(shards, features, strict=True):
            if each != features[0]:
                raise DataError(f"{shard} has other columns or class names than {shards[0]}: {each} against {features[0]}.")
        return Dataset.from_parquet([str(shard) for shard in shards])
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise DataError(f"{', '.join(map(str, shards[:3]))} cannot be read as Parquet: {error}") from error


def _to_tables(splits: Mapping[str, Dataset], root: str, columns: Mapping[str, str]) -> dict[str, ImageTable]:
    places = {split: f"split '{split}' of '{root}'" for split in splits}
    renamed = {split: _rename_columns(rows, columns, places[split]) for split, rows in splits.items()}
    if len(renamed) == 1 and "split" in (rows := next(iter(renamed.values()))).column_names:
        renamed = _divide(rows)
        places = {split: f"split '{split}' of '{root}'" for split in renamed}
    names, to_label = _class_names({places[split]: rows for split, rows in renamed.items()})
    return {split: _to_table(rows, split, places[split], names, to_label) for split, rows in renamed.items()}


def _divide(rows: Dataset) -> dict[str, Dataset]:
    """The splits that a column `split` names, in the order in which they first appear."""
    named = [str(value) for value in rows.select_columns("split")[:]["split"]]
    return {split: rows.select([row for row, name in enumerate(named) if name == split]) for split in dict.fromkeys(named)}


def _rename_columns(rows: Dataset, columns: Mapping[str, str], where: str) -> Dataset:
    if not len(rows):
        raise DataError(f"{where} has no rows.")
    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            raise DataError(f"data.columns.{ours}: {where}: {unknown('column', theirs, rows.column_names)}")
        if ours != theirs:
            rows = (rows.remove_columns(ours) if ours in rows.column_names else rows).rename_column(theirs, ours)
    for needed in ("image", "label"):
        if needed not in rows.column_names:
            raise DataError(
                f"{where} has no column '{needed}' (it has {', '.join(rows.column_names)}); "
                f"name it in data.columns, for example {{{needed}: their_name}}."
            )
    return rows


def _class_names(splits: Mapping[str, Dataset]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The classes of all splits together, and the label of each value in the column `label`."""
    listed: dict[str, tuple[str, ...]] = {}
    values: set[Any] = set()
    for where, rows in splits.items():
        feature = rows.features["label"]
        if isinstance(feature, ClassLabel):
            listed[where] = tuple(feature.names)
        elif feature.dtype not in {"string", "large_string"} and "int" not in feature.dtype:
            raise DataError(f"{where}: labels of type {feature.dtype}; whole numbers, texts or a ClassLabel are expected.")
        found = rows.unique("label")
        if None in found:
            raise DataError(f"{where} has images without a label; remove these rows.")
        values |= set(found)
    if listed:
        first, *others = listed.values()
        if len(listed) < len(splits) or any(names != first for names in others):
            told = " | ".join(f"{where}: {', '.join(listed.get(where, ('no names',))[:12])}" for where in splits)
            raise DataError(f"the splits name different classes, or in another order: {told}.")
        return first, {label: label for label in values}
    if all(isinstance(value, str) for value in values):
        names = tuple(sorted(values))
        return names, {name: label for label, name in enumerate(names)}
    if any(isinstance(value, str) for value in values):
        raise DataError("the labels are texts in one split and numbers in another.")
    return tuple(str(label) for label in range(max(values) + 1)), {label: label for label in values}


def _to_table(rows: Dataset, split: str, where: str, names: tuple[str, ...], to_label: Mapping[Any, int]) -> ImageTable:
    labels = [to_label[value] for value in rows.select_columns("label")[:]["label"]]
    rows = rows.remove_columns("label").add_column("label", np.asarray(labels, np.int64))
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{split}-{row:08d}" for row in range(len(rows))])
    elif rows.features["id"] != Value("string"):
        rows = rows.cast_column("id", Value("string"))
    keep = [name for name in ("id", "image", "label", *OPTIONAL) if name in rows.column_names]
    try:
        rows = rows.select_columns(keep).cast_column("image", ImageFeature(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"{where}: the column 'image' holds no images but {rows.features['image']}; name another in data.columns."
        ) from error
    return check_table(ImageTable(rows, names))


def _read_image_folder(root: Path, named_splits: set[str]) -> dict[str, ImageTable]:
    folders = _subfolders(root) if root.is_dir() else []
    if not folders:
        raise DataError(f"data.root '{root}' has no sub-folders; expected root/class/image.jpg or root/train/class/image.jpg.")
    by_split = {folder.name: _subfolders(folder) for folder in folders} if _are_splits(folders, named_splits) else {"train": folders}
    names = sorted({folder.name for class_folders in by_split.values() for folder in class_folders})
    tables = {}
    for split, class_folders in by_split.items():
        paths: list[Path] = []
        labels: list[int] = []
        for folder in class_folders:
            found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))
            if not found:
                raise DataError(f"class '{folder.name}' has no images: none in {folder} ends in {', '.join(sorted(IMAGE_SUFFIXES))}.")
            _refuse_escape([folder, *(file for file in found if file.is_symlink())], root)
            paths += found
            labels += [names.index(folder.name)] * len(found)
        columns: dict[str, Sequence[Any]] = {
            "id": [path.relative_to(root).as_posix() for path in paths],
            "image": [{"bytes": None, "path": str(path)} for path in paths],
            "label": labels,
        }
        try:
            tables[split] = make_table(columns, names)
        except UnicodeEncodeError as error:
            raise DataError(f"the file name {error.object!r} in {root} is not valid UTF-8; rename the file.") from error
    return tables


def _are_splits(folders: list[Path], named: set[str]) -> bool:
    """Whether the folders are splits rather than classes. Raises DataError where only some look like it."""
    known = {name for names in SPLIT_NAMES.values() for name in names}
    like_splits = [folder for folder in folders if folder.name in named or folder.name.lower() in known]
    others = [folder.name for folder in folders if folder not in like_splits]
    if others and like_splits and all(_subfolders(folder) for folder in like_splits):
        raise DataError(
            f"{folders[0].parent} holds splits ({', '.join(folder.name for folder in like_splits)}) and other folders "
            f"({', '.join(others[:8])}); move those away, or name them in data.splits if they are splits."
        )
    return not others


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _refuse_escape(paths: list[Path], root: Path) -> None:
    inside = root.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(inside):
            raise DataError(
                f"{path} leads to {path.resolve()}, outside data.root {inside}; copy the images there or name their folder as the root."
            )


def _rename_splits(tables: dict[str, ImageTable], splits: Mapping[str, str], root: str) -> dict[str, ImageTable]:
    result = {}
    for ours, usual in SPLIT_NAMES.items():
        theirs = splits.get(ours)
        if theirs is not None and theirs not in tables:
            raise DataError(f"data.splits.{ours}: '{root}' has no such split: {unknown('split', theirs, tables)}")
        found = theirs or next((name for name in tables if name.lower() in usual), None)
        if found is not None:
            result[ours] = tables[found]
    if "train" not in result:
        raise DataError(
            f"'{root}' has no training split (it has {', '.join(tables)}); name it in data.splits, for example {{train: their_name}}."
        )
    return result
