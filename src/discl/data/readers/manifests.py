"""Custom lists: CSV, TSV, JSON lines, Parquet.

Read by hand because `datasets` neither checks paths nor keeps labels as they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ...errors import DataError, unknown
from ..table import ImageTable, rows_of
from .building import Source, arrow_images, full_paths
from .columns import to_tables
from .lists import LIST_SUFFIXES, read_list, read_schema
from .opening import whole_path


class UsualColumn(NamedTuple):
    """Names of a column in other people's lists.

    - `content`: what it holds, in words.
    - `read`: names that are read without being told.
    - `guessed`: names that `discl init` proposes.
    """

    content: str
    read: tuple[str, ...]
    guessed: tuple[str, ...]


USUAL_COLUMNS = {
    "image": UsualColumn(
        "the paths of the images",
        ("path",),
        ("file", "filename", "file_name", "image", "image_path", "img"),
    ),
    "label": UsualColumn(
        "the classes", ("label", "fine_label"), ("class", "class_name", "category")
    ),
}
OURS = ("id", "label", "split", "domain", "group")
NAME_FOLDER = "name the folder that holds all the images in `images` (discl init: --images)"
SHOWN = 6


def read_manifest(source: Source) -> dict[str, ImageTable]:
    """A CSV, TSV, JSON lines or Parquet file with the columns `path` and `label`.

    Optional columns are `id`, `split`, `domain` and `group`. Paths are relative to the list, or to
    the folder `images`; absolute ones have to be below it. Without a column `id`, an image's id is
    its path below the folder. Labels of a CSV that are whole numbers are names, sorted as numbers.
    """
    file = source.path if source.path.is_file() else source.file("train", _only_list(source.path))
    image_column = source.columns.get("image", "path")
    listed, numbers = read_rows(file, image_column, source)
    folder = _image_folder(source, file)
    rows = attach_images(
        listed, image_column, folder, where=str(file), has_ids="id" in source.columns
    )
    columns = {name: theirs for name, theirs in source.columns.items() if name != "image"}
    return to_tables({"train": rows}, source.with_columns(columns), folder, numbers=numbers)


def read_rows(file: Path, image_column: str, source: Source) -> tuple[pa.Table, bool]:
    """(the rows of a list; whether its labels are whole numbers as texts).

    Raises DataError without a column of paths.
    """
    wanted = {image_column, *OURS, *source.columns.values()}
    listed, numbers = read_list(file, source.columns.get("label", "label"), wanted)
    if image_column not in listed.column_names:
        raise DataError(
            f"{file}: {unknown('column', image_column, listed.column_names)} Name it, for example "
            "{image: their_name}.",
            argument="columns",
        )
    return listed, numbers


def attach_images(
    listed: pa.Table,
    image_column: str,
    folder: Path,
    *,
    where: str,
    has_ids: bool = False,
    prefix: str = "",
) -> Dataset:
    """Rows whose `image` is the file that a column names below a folder.

    Rows without an id get `prefix` and the path below the folder.

    - `image_column`: name of the column of paths.
    - `where`: the list, for messages.
    - `has_ids`: whether a column with another name holds the ids.
    """
    try:
        texts = listed.column(image_column).cast(pa.string()).combine_chunks()
    except pa.ArrowException as error:
        raise DataError(
            f"{where}: the column '{image_column}' holds {listed.schema.field(image_column).type}, "
            "no paths; name another.",
            argument="columns",
        ) from error
    written = _plain_slashes(texts, folder)
    paths = full_paths(folder, written, where, NAME_FOLDER)
    columns = {name: listed.column(name) for name in listed.column_names if name != image_column}
    if "id" not in columns and not has_ids:
        below = pc.utf8_slice_codeunits(paths, len(f"{folder}/"))
        written = pc.if_else(pc.starts_with(written, "/"), below, written)
        columns["id"] = pc.binary_join_element_wise(prefix, written, "")
    others = {name: values for name, values in columns.items() if name != "image"}
    return rows_of(pa.table({"image": arrow_images(paths), **others}))


def _plain_slashes(paths: pa.Array, folder: Path) -> pa.Array:
    """Paths of Windows with / for \\, unless a file really has that name."""
    marked = paths.filter(pc.fill_null(pc.match_substring(paths, "\\"), False))
    if not len(marked):
        return paths
    try:
        if (folder / marked[0].as_py()).exists():
            return paths
    except (OSError, ValueError):
        pass
    return pc.replace_substring(paths, "\\", "/")


def guess_columns(file: Path, stated: Mapping[str, str]) -> dict[str, str]:
    """The argument `columns` for a list, or for a Parquet file with images.

    - `stated`: columns that are known; others are found by their usual names.

    Raises DataError where several columns have such a name, or none.
    """
    schema = read_schema(file)
    texts = {
        field.name
        for field in schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    }
    result = dict(stated)
    for name, usual in USUAL_COLUMNS.items():
        if name in stated or set(usual.read) & set(schema.names):
            continue
        candidates = [
            column
            for column in schema.names
            if column.casefold() in usual.guessed and (name != "image" or column in texts)
        ]
        if name == "image" and file.suffix == ".parquet" and not candidates:
            continue  # it holds the images themselves
        if len(candidates) != 1:
            raise _undecided(file, name, candidates, schema.names)
        result[name] = candidates[0]
    return result


def _undecided(file: Path, name: str, candidates: list[str], present: list[str]) -> DataError:
    usual = USUAL_COLUMNS[name]
    problem = (
        f"{' and '.join(candidates)} may both be"
        if candidates
        else f"none of {', '.join(present)} has a usual name for"
    )
    example = (candidates or ["NAME"])[0]
    return DataError(
        f"{file}: {problem} {usual.content}. Name the right one, discl init {file} --column "
        f"{name}={example}, or call it '{usual.read[0]}' in the list."
    )


def _image_folder(source: Source, file: Path) -> Path:
    """The folder that the paths of a list are relative to."""
    folder = file.parent if source.images is None else whole_path(source.images)
    if not folder.is_dir():
        raise DataError(
            f"'{source.images}' is no folder; looked for {folder.absolute()}.", argument="images"
        )
    return folder


def _only_list(folder: Path) -> str:
    lists = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix.lower() in LIST_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if len(lists) != 1:
        shown = ", ".join(lists[:SHOWN]) or f"no {', '.join(LIST_SUFFIXES)}"
        raise DataError(
            f"{folder} holds {len(lists)} lists ({shown}); name the right one.", argument="root"
        )
    return lists[0]
