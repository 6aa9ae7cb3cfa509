"""Folders with `metadata.csv` or `_classes.csv` beside the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ...errors import DataError
from ..listing import LeftOut
from ..table import ImageTable
from .building import SPLIT_NAMES, Source, build_table, expected, full_paths
from .files import holds_images, images_below, subfolders
from .lists import read_csv, read_list
from .manifests import USUAL_COLUMNS, listed_rows, place_images
from .tabular import to_tables

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
ONE_HOT = "_classes.csv"
SHOWN = 5


def read_metadata(source: Source) -> dict[str, ImageTable]:
    """Images with a `metadata.csv`, `.jsonl` or `.parquet` at the root or in each split's folder, as `datasets` documents it.

    The column `file_name` names each image from there, and `label` its class. A file at the root may describe folders that are
    named like splits. Images that it does not name are counted and left out.
    """
    root, theirs = source.path, source.columns.get("image", FILE_NAME)
    files = metadata_files(source)
    if not files:
        raise DataError(expected(source, "metadata"))
    parts: dict[str, Dataset] = {}
    whole: dict[str, bool] = {}
    listed_paths: set[str] = set()
    for split, file in files.items():
        if source.leaves_out(split):
            continue
        listed, numbers = _numbers_as_texts(*listed_rows(file, theirs, source), source)
        if not split and "split" not in (*listed.column_names, *source.columns):
            listed = _with_split(listed, theirs, source)
        prefix = f"{split}/" if split else ""
        rows = place_images(listed, theirs, file.parent, str(file), "id" in source.columns, prefix)
        parts[split or "train"] = rows
        whole[split] = numbers
        listed_paths |= set(rows.data.column("image").combine_chunks().field("path").to_pylist())
    _count_unlisted(source, [file.parent for file in files.values()], listed_paths)
    if len(set(whole.values())) > 1:
        raise DataError(
            f"{root}: the labels are whole numbers in {', '.join(split for split in whole if whole[split])} and not in "
            f"{', '.join(split for split in whole if not whole[split])}."
        )
    columns = {ours: name for ours, name in source.columns.items() if ours != "image"}
    return to_tables(parts, source.with_columns(columns), root, numbers=all(whole.values()))


def _numbers_as_texts(listed: pa.Table, whole: bool, source: Source) -> tuple[pa.Table, bool]:
    """Labels that are numbers as the texts that a CSV holds, so that files of both kinds go together."""
    label = source.columns.get("label", "label")
    if label not in listed.column_names or not pa.types.is_integer(listed.schema.field(label).type):
        return listed, whole
    texts = listed.column(label).cast(pa.string())
    return listed.set_column(listed.column_names.index(label), label, texts), True


def metadata_files(source: Source) -> dict[str, Path]:
    """`{split: file}` of the folders of splits that hold metadata, else `{"": file}` of the root, or nothing.

    Raises DataError where a folder holds two such files, or images of one split are described and those of another are not.
    """
    splits = _split_folders(source)
    found = {folder.name: file for folder in splits if (file := _metadata_in(folder))}
    bare = [
        folder.name
        for folder in splits
        if folder.name not in found and not source.leaves_out(folder.name)
    ]
    if found and bare:
        raise DataError(
            f"{source.path}: {', '.join(found)} have a file of metadata, {', '.join(bare)} none, so the images there have no "
            "label. Add one, or leave the split out, for example data.splits: {test: null}."
        )
    if not found and (file := _metadata_in(source.path)):
        return {"": file}
    return found


def is_described(source: Source) -> bool:
    """Whether labels come from a file of metadata, and not from the folders that the images lie in.

    They come from the folders where these are the classes that the metadata name, one for one, and where it names none.
    """
    for file in metadata_files(source).values():
        listed, _ = read_list(file, source.columns.get("label", "label"), ())
        theirs = source.columns.get("image", FILE_NAME)
        if theirs not in listed.column_names or not pa.types.is_string(
            listed.schema.field(theirs).type
        ):
            return False
        below = pc.replace_substring_regex(listed.column(theirs), "[^/]*$", "")
        known = "|".join(name for names in SPLIT_NAMES.values() for name in names)
        below = pc.replace_substring_regex(below, f"^(?i:{known})/", "")
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
    names = (source.columns.get("label"), *usual[1], *usual[2])
    return next((name for name in names if name in listed.column_names), None)


def _metadata_in(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder} holds {' and '.join(file.name for file in found)}; keep one of them."
        )
    return found[0] if found else None


def _split_folders(source: Source) -> list[Path]:
    known = {name for names in SPLIT_NAMES.values() for name in names}
    return [
        folder
        for folder in subfolders(source.path)
        if folder.name in source.splits.values() or folder.name.lower() in known
    ]


def _with_split(listed: pa.Table, theirs: str, source: Source) -> pa.Table:
    """With a column `split`, where every image lies in a folder that is named like one."""
    try:
        first = [str(path).split("/")[0] for path in listed.column(theirs).to_pylist()]
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
    """Roboflow's CSV for several classes: `_classes.csv` in each split's folder, with a column of 0 and 1 for each class.

    Raises DataError where an image has several classes, or none: such images are no samples of one class.
    """
    folders = one_hot_folders(source)
    if not folders:
        raise DataError(expected(source, "roboflow"))
    names: list[str] = []
    tables = {}
    for split, folder in folders.items():
        if source.leaves_out(split):
            continue
        file = folder / ONE_HOT
        listed = read_csv(file)
        if not listed.num_rows:
            raise DataError(f"{file} has no rows.")
        first, *classes = listed.column_names
        if len(set(listed.column_names)) < listed.num_columns:
            raise DataError(
                f"{file}: a column stands twice; it has {', '.join(listed.column_names)}."
            )
        if first != source.columns.get("image", "filename") or not classes:
            raise DataError(
                f"{file}: the columns filename and one for each class are expected; it has {', '.join(listed.column_names)}."
            )
        names = names or classes
        if sorted(classes) != sorted(names):
            raise DataError(
                f"{file} names the classes {', '.join(classes[:SHOWN])} …; those of the other splits are {', '.join(names[:SHOWN])} …"
            )
        labels = _only_ones(listed.select(names), file)
        written = listed.column(0).cast(pa.string()).combine_chunks()
        paths = full_paths(folder, written, str(file))
        prefix = f"{split}/" if folder != source.path else ""
        ids = pc.binary_join_element_wise(prefix, written, "")
        tables[split] = build_table(paths, labels, names, ids, source.path)
    return tables


def one_hot_folders(source: Source) -> dict[str, Path]:
    """`{split: folder}` of the folders that hold a `_classes.csv`; the root itself is `train`."""
    found = {
        folder.name: folder
        for folder in _split_folders(source)
        if (folder / ONE_HOT).is_file() or (holds_images(folder) and not subfolders(folder))
    }
    if any((folder / ONE_HOT).is_file() for folder in found.values()):
        return found
    return {"train": source.path} if (source.path / ONE_HOT).is_file() else {}


def _only_ones(columns: pa.Table, file: Path) -> np.ndarray:
    """The column that holds the 1 of each row."""
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
            f"{file}: {several:,} images have several classes and {none:,} have none, so they are no samples of one class; "
            "take them out of the list."
        )
    return marks.argmax(1).astype(np.int64)
