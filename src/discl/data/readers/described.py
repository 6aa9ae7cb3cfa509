"""Folders with `metadata.csv` or `_classes.csv` beside the images.

Read by hand because `datasets` copies every image, and silently ignores images without a row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ...errors import DataError
from ..listing import LeftOut
from ..table import ImageTable
from .building import Source, build_table, expected, full_paths, known_splits
from .columns import to_tables
from .folders import holds_images, images_below, subfolders
from .lists import read_csv, read_list
from .manifests import USUAL_COLUMNS, attach_images, read_rows

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
ONE_HOT = "_classes.csv"
SHOWN = 5


def read_metadata(source: Source) -> dict[str, ImageTable]:
    """Images with a `metadata.csv`, `.jsonl` or `.parquet`, as `datasets` documents it.

    The file is at the root or in each split's folder. Its column `file_name` names each image
    relative to the file, and `label` its class. A file at the root may describe folders named like
    splits. Images without a row are counted and left out.
    """
    root, image_column = source.path, source.columns.get("image", FILE_NAME)
    files = metadata_files(source)
    if not files:
        raise expected(source, "metadata")
    parts: dict[str, Dataset] = {}
    are_numbers: dict[str, bool] = {}
    listed_paths: set[str] = set()
    for split, file in files.items():
        if source.leaves_out(split):
            continue
        listed, numbers = _numbers_as_texts(*read_rows(file, image_column, source), source)
        if not split and "split" not in (*listed.column_names, *source.columns):
            listed = _with_split(listed, image_column, source)
        rows = attach_images(
            listed,
            image_column,
            file.parent,
            where=str(file),
            has_ids="id" in source.columns,
            prefix=f"{split}/" if split else "",
        )
        parts[split or "train"] = rows
        are_numbers[split] = numbers
        listed_paths |= set(rows.data.column("image").combine_chunks().field("path").to_pylist())
    _count_unlisted(source, [file.parent for file in files.values()], listed_paths)
    if len(set(are_numbers.values())) > 1:
        whole = ", ".join(split for split, numbers in are_numbers.items() if numbers)
        others = ", ".join(split for split, numbers in are_numbers.items() if not numbers)
        raise DataError(f"{root}: the labels are whole numbers in {whole} and not in {others}.")
    columns = {name: theirs for name, theirs in source.columns.items() if name != "image"}
    numbers = all(are_numbers.values())
    return to_tables(parts, source.with_columns(columns), root, numbers=numbers)


def _numbers_as_texts(listed: pa.Table, numbers: bool, source: Source) -> tuple[pa.Table, bool]:
    """Labels that are numbers as the texts of a CSV, so that files of both kinds combine."""
    label = source.columns.get("label", "label")
    if label not in listed.column_names or not pa.types.is_integer(listed.schema.field(label).type):
        return listed, numbers
    texts = listed.column(label).cast(pa.string())
    return listed.set_column(listed.column_names.index(label), label, texts), True


def metadata_files(source: Source) -> dict[str, Path]:
    """`{split: file}` of the splits' folders, else `{"": file}` of the root, or nothing.

    Raises DataError for two such files in a folder, and if only some splits have one.
    """
    splits = _split_folders(source)
    files = {folder.name: file for folder in splits if (file := _metadata_in(folder))}
    bare = [
        folder.name
        for folder in splits
        if folder.name not in files and not source.leaves_out(folder.name)
    ]
    if files and bare:
        raise DataError(
            f"{source.path}: {', '.join(files)} have a metadata file, {', '.join(bare)} none, so "
            "the images there have no label. Add one, or leave the split out, for example "
            "{test: null}.",
            argument="splits",
        )
    if not files and (file := _metadata_in(source.path)):
        return {"": file}
    return files


def is_described(source: Source) -> bool:
    """Whether labels come from a metadata file rather than from the folders of the images.

    They come from the folders if the metadata name no label, or the same class for each folder.
    """
    for file in metadata_files(source).values():
        listed, _ = read_list(file, source.columns.get("label", "label"), ())
        image_column = source.columns.get("image", FILE_NAME)
        if image_column not in listed.column_names or not pa.types.is_string(
            listed.schema.field(image_column).type
        ):
            return False
        below = pc.replace_substring_regex(listed.column(image_column), "[^/]*$", "")
        below = pc.replace_substring_regex(below, f"^(?i:{'|'.join(known_splits())})/", "")
        folders = len(pc.unique(below))
        label = _label_column(listed, source)
        if label is None:
            return folders < 2
        try:
            pairs = pa.table({"folder": below, "label": listed.column(label)})
            count = pairs.group_by(["folder", "label"]).aggregate([]).num_rows
            return folders < 2 or not count == folders == len(pc.unique(listed.column(label)))
        except pa.ArrowException:
            return True
    return False


def _label_column(listed: pa.Table, source: Source) -> str | None:
    usual = USUAL_COLUMNS["label"]
    names = (source.columns.get("label"), *usual.read, *usual.guessed)
    return next((name for name in names if name in listed.column_names), None)


def _metadata_in(folder: Path) -> Path | None:
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError(
            f"{folder} holds {' and '.join(file.name for file in files)}; keep one of them."
        )
    return files[0] if files else None


def _split_folders(source: Source) -> list[Path]:
    known = set(known_splits())
    return [
        folder
        for folder in subfolders(source.path)
        if folder.name in source.splits.values() or folder.name.lower() in known
    ]


def _with_split(listed: pa.Table, image_column: str, source: Source) -> pa.Table:
    """With a column `split`, if every image is in a folder named like one."""
    try:
        first = [str(path).split("/")[0] for path in listed.column(image_column).to_pylist()]
    except pa.ArrowException:
        return listed
    splits = {folder.name for folder in _split_folders(source)}
    return listed.append_column("split", pa.array(first)) if set(first) <= splits else listed


def _count_unlisted(source: Source, folders: list[Path], listed: set[str]) -> None:
    for folder in folders:
        for path in images_below(str(folder), source.path, LeftOut()):
            if path not in listed:
                name = path[len(str(source.path)) + 1 :]
                source.unread.add("images that the metadata do not name", name)


def read_one_hot(source: Source) -> dict[str, ImageTable]:
    """Roboflow's CSV: `_classes.csv` per split, with a column of 0 and 1 for each class.

    Raises DataError for an image with several classes or none.
    """
    folders = one_hot_folders(source)
    if not folders:
        raise expected(source, "roboflow")
    names: list[str] = []
    tables = {}
    for split, folder in folders.items():
        if source.leaves_out(split):
            continue
        file = folder / ONE_HOT
        listed = _read_one_hot(file, source.columns.get("image", "filename"))
        classes = listed.column_names[1:]
        names = names or classes
        if sorted(classes) != sorted(names):
            raise DataError(
                f"{file} names the classes {', '.join(classes[:SHOWN])} …; those of the other "
                f"splits are {', '.join(names[:SHOWN])} …"
            )
        labels = _labels_of_marks(listed.select(names), file)
        written = listed.column(0).cast(pa.string()).combine_chunks()
        paths = full_paths(folder, written, str(file))
        prefix = f"{split}/" if folder != source.path else ""
        ids = pc.binary_join_element_wise(prefix, written, "")
        tables[split] = build_table(paths, labels, names, ids=ids, root=source.path)
    return tables


def _read_one_hot(file: Path, image_column: str) -> pa.Table:
    listed = read_csv(file)
    if not listed.num_rows:
        raise DataError(f"{file} has no rows.")
    present = ", ".join(listed.column_names)
    if len(set(listed.column_names)) < listed.num_columns:
        raise DataError(f"{file}: a column occurs twice; it has {present}.")
    if listed.column_names[0] != image_column or listed.num_columns < 2:
        raise DataError(
            f"{file}: the columns filename and one for each class are expected; it has {present}."
        )
    return listed


def one_hot_folders(source: Source) -> dict[str, Path]:
    """`{split: folder}` of the folders with a `_classes.csv`; the root itself is `train`."""
    folders = {
        folder.name: folder
        for folder in _split_folders(source)
        if (folder / ONE_HOT).is_file() or (holds_images(folder) and not subfolders(folder))
    }
    if any((folder / ONE_HOT).is_file() for folder in folders.values()):
        return folders
    return {"train": source.path} if (source.path / ONE_HOT).is_file() else {}


def _labels_of_marks(columns: pa.Table, file: Path) -> np.ndarray:
    """The number of the column that holds the 1 of each row, int64 `[rows]`."""
    try:
        marks = np.stack([column.to_numpy().astype(np.float64) for column in columns.columns], 1)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{file}: columns of 0 and 1 are expected: {error}") from error
    if not np.isin(marks, (0, 1)).all():
        odd = marks[~np.isin(marks, (0, 1))][0]
        raise DataError(f"{file}: columns of 0 and 1 are expected; one holds {odd:g}.")
    several, none = int((marks.sum(1) > 1).sum()), int((marks.sum(1) == 0).sum())
    if several or none:
        raise DataError(
            f"{file}: {several:,} images have several classes and {none:,} have none, so they have "
            "no single class; remove them from the list."
        )
    return marks.argmax(1).astype(np.int64)
