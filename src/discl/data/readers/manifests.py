"""Your own lists: CSV, TSV, JSON lines, Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ...errors import DataError, unknown
from ..table import ImageTable, rows_of
from .building import Source, arrow_images, full_paths
from .lists import LIST_SUFFIXES, read_list, read_names
from .opening import whole_path
from .tabular import to_tables

USUAL_COLUMNS = {
    "image": (
        "the paths of the images",
        ("path",),
        ("file", "filename", "file_name", "image", "image_path", "img"),
    ),
    "label": ("the classes", ("label", "fine_label"), ("class", "class_name", "category")),
}
"""Our column: what it holds, the names that are read without a word, and those that `discl init` takes for it."""
OURS = ("id", "label", "split", "domain", "group")
MEND = "name the folder that holds all the images in data.images (discl init: --images)"


def read_manifest(source: Source) -> dict[str, ImageTable]:
    """A CSV, TSV, JSON lines or Parquet file that lists `path` and `label`, optionally `id`, `split`, `domain`, `group`.

    Paths are relative to it, or to the folder that `data.images` names; absolute ones have to lie below that. Without a column `id` an
    image is called by its path below the folder. Labels of a CSV that are whole numbers are names, sorted as numbers.
    """
    file = source.path if source.path.is_file() else source.file("train", _only_list(source.path))
    theirs = source.columns.get("image", "path")
    listed, whole = listed_rows(file, theirs, source)
    folder = _image_folder(source, file)
    rows = place_images(listed, theirs, folder, str(file), named="id" in source.columns)
    columns = {ours: name for ours, name in source.columns.items() if ours != "image"}
    return to_tables({"train": rows}, source.with_columns(columns), folder, numbers=whole)


def listed_rows(file: Path, theirs: str, source: Source) -> tuple[pa.Table, bool]:
    """The rows of a list, and whether its labels are whole numbers as texts. Raises DataError without a column of paths."""
    wanted = {theirs, *OURS, *source.columns.values()}
    listed, whole = read_list(file, source.columns.get("label", "label"), wanted)
    if theirs not in listed.column_names:
        raise DataError(
            f"{file}: {unknown('column', theirs, listed.column_names)} Say data.columns: {{image: their_name}}."
        )
    return listed, whole


def place_images(
    listed: pa.Table, theirs: str, folder: Path, where: str, named: bool = False, prefix: str = ""
) -> Dataset:
    """Rows whose `image` is the file that the column `theirs` names below the folder.

    Their id, unless they have one (or `named` says that another column is it), is the path below the folder behind `prefix`.
    """
    try:
        paths_written = listed.column(theirs).cast(pa.string()).combine_chunks()
    except pa.ArrowException as error:
        raise DataError(
            f"{where}: the column '{theirs}' holds {listed.schema.field(theirs).type}, no paths; name another in data.columns."
        ) from error
    written = _plain_slashes(paths_written, folder)
    paths = full_paths(folder, written, where, MEND)
    columns = {name: listed.column(name) for name in listed.column_names if name != theirs}
    if "id" not in columns and not named:
        below = pc.utf8_slice_codeunits(paths, len(f"{folder}/"))
        written = pc.if_else(pc.starts_with(written, "/"), below, written)
        columns["id"] = pc.binary_join_element_wise(prefix, written, "")
    others = {name: values for name, values in columns.items() if name != "image"}
    return rows_of(pa.table({"image": arrow_images(paths), **others}))


def _plain_slashes(paths: pa.Array, folder: Path) -> pa.Array:
    """Paths of Windows with / for \\, unless a file is really called so."""
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
    """`data.columns` of a list, or of a Parquet file with pictures: what is `stated`, and the one column whose name is usual for it.

    Raises DataError where several have such a name, or none.
    """
    schema = read_names(file)
    texts = {
        field.name
        for field in schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    }
    found = dict(stated)
    for ours, (what, known, usual) in USUAL_COLUMNS.items():
        if ours in stated or set(known) & set(schema.names):
            continue
        fitting = [
            name
            for name in schema.names
            if name.casefold() in usual and (ours != "image" or name in texts)
        ]
        if ours == "image" and file.suffix == ".parquet" and not fitting:
            continue  # it holds the pictures themselves
        if len(fitting) != 1:
            told = (
                f"{' and '.join(fitting)} may both be"
                if fitting
                else f"none of {', '.join(schema.names)} has a usual name for"
            )
            raise DataError(
                f"{file}: {told} {what}. Say which one it is, discl init {file} --column {ours}={(fitting or ['NAME'])[0]}, or call it "
                f"'{known[0]}' in the list."
            )
        found[ours] = fitting[0]
    return found


def _image_folder(source: Source, file: Path) -> Path:
    """The folder that the paths of a list are relative to."""
    folder = file.parent if source.images is None else whole_path(source.images)
    if not folder.is_dir():
        raise DataError(
            f"data.images '{source.images}' is no folder; looked for {folder.absolute()}."
        )
    return folder


def _only_list(folder: Path) -> str:
    found = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix.lower() in LIST_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if len(found) != 1:
        raise DataError(
            f"{folder} holds {len(found)} lists ({', '.join(found[:6]) or 'no ' + ', '.join(LIST_SUFFIXES)}); "
            "name the right one as data.root."
        )
    return found[0]
