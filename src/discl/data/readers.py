"""Readers: from a folder, Parquet files or the hub to tables of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from datasets import Image as ImageFeature

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
    root: str, kind: str = "auto", columns: Mapping[str, str] | None = None, splits: Mapping[str, str] | None = None
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
        tables = _read_image_folder(path)
    else:
        tables = {name: _to_table(rows, name, root, columns or {}) for name, rows in _load(kind, root, path).items()}
    names = {table.class_names for table in tables.values()}
    if len(names) > 1:
        raise DataError(f"the splits of '{root}' name different classes: {' | '.join(', '.join(each[:12]) for each in sorted(names))}.")
    return _rename_splits(tables, splits or {}, root)


def _guess_kind(root: str, path: Path) -> str:
    if path.is_file() and path.suffix == ".parquet":
        return "parquet"
    if path.is_dir():
        return "parquet" if any(path.rglob("*.parquet")) else "imagefolder"
    if root.count("/") <= 1 and not root.startswith((".", "/", "~")) and "/" in root:
        return "hub"
    raise DataError(
        f"data.root '{root}' does not exist; looked for {path.resolve()}. Give a folder with one sub-folder of images per class, "
        "a folder of Parquet files, or the owner/name of a data set on the hub."
    )


def _load(kind: str, root: str, path: Path) -> DatasetDict:
    if kind == "hub":
        return load_dataset(root)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise DataError(f"data.root '{root}' holds no *.parquet file.")
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(file.stem.split("-")[0] if path.is_dir() else "train", []).append(str(file))
    return load_dataset("parquet", data_files=by_split)


def _to_table(rows: Dataset, split: str, root: str, columns: Mapping[str, str]) -> ImageTable:
    where = f"split '{split}' of '{root}'"
    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            raise DataError(f"data.columns.{ours}: {where}: {unknown('column', theirs, rows.column_names)}")
        if ours != theirs:
            rows = (rows.remove_columns(ours) if ours in rows.column_names else rows).rename_column(theirs, ours)
    for needed in ("image", "label"):
        if needed not in rows.column_names:
            raise DataError(
                f"{where} has no column '{needed}' (it has {', '.join(rows.column_names)}); name it in data.columns, for example {{{needed}: their_name}}."
            )
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
        rows = rows.cast_column("label", Value("int64"))
    elif getattr(feature, "dtype", "") == "string":
        names = tuple(sorted(rows.unique("label")))
        index = {name: label for label, name in enumerate(names)}
        rows = rows.map(lambda row: {"label": index[row["label"]]}, features=_with_feature(rows, "label", Value("int64")))
    else:
        names = tuple(str(label) for label in range(max(rows.unique("label")) + 1))
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{split}-{row:08d}" for row in range(len(rows))])
    elif rows.features["id"] != Value("string"):
        rows = rows.cast_column("id", Value("string"))
    keep = [name for name in ("id", "image", "label", *OPTIONAL) if name in rows.column_names]
    return check_table(ImageTable(rows.select_columns(keep).cast_column("image", ImageFeature(decode=False)), names))


def _with_feature(rows: Dataset, name: str, feature: Any) -> Any:
    features = rows.features.copy()
    features[name] = feature
    return features


def _read_image_folder(root: Path) -> dict[str, ImageTable]:
    folders = _subfolders(root)
    if not folders:
        raise DataError(f"data.root '{root}' has no sub-folders; expected root/class/image.jpg or root/train/class/image.jpg.")
    known = {name for names in SPLIT_NAMES.values() for name in names}
    as_splits = [folder for folder in folders if folder.name.lower() in known]
    by_split = {folder.name: _subfolders(folder) for folder in folders} if len(as_splits) == len(folders) else {"train": folders}
    names = sorted({folder.name for class_folders in by_split.values() for folder in class_folders})
    tables = {}
    for split, class_folders in by_split.items():
        paths, labels = [], []
        for folder in class_folders:
            found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))
            if not found:
                raise DataError(f"class '{folder.name}' has no images: none in {folder} ends in {', '.join(sorted(IMAGE_SUFFIXES))}.")
            _refuse_escape(found, root)
            paths += found
            labels += [names.index(folder.name)] * len(found)
        columns = {
            "id": [path.relative_to(root).as_posix() for path in paths],
            "image": [{"bytes": None, "path": str(path)} for path in paths],
            "label": labels,
        }
        tables[split] = make_table(columns, names)
    return tables


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _refuse_escape(paths: list[Path], root: Path) -> None:
    inside = root.resolve()
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise DataError(
                f"{path} is a link to {path.resolve()}, outside data.root {inside}; copy the image there or name its folder as the root."
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
