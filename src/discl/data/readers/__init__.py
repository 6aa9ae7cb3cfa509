"""One function per data format, all in `READERS`.

A reader is a function from a `Source` to `{split: ImageTable}` and a name in `READERS`. It opens nothing but lists: images are
decoded when they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...assets import embedded
from ...errors import DataError, unknown
from ..gate import refuse_outside
from ..table import ImageTable
from .annotated import BESIDE_IMAGES, read_coco, read_inaturalist, read_wilds
from .building import SPLIT_NAMES, Source, missing, tree
from .cifar import is_pickled, read_cifar
from .described import (
    FILE_NAME,
    is_described,
    metadata_files,
    one_hot_folders,
    read_metadata,
    read_one_hot,
)
from .files import LISTS, read_image_folder, read_lists, subfolders, too_few_classes
from .lists import LIST_SUFFIXES, heading_of
from .manifests import guess_columns, read_manifest
from .opening import plain_file, whole_path
from .tabular import read_hub, read_parquet, read_saved
from .webdataset import read_webdataset

READERS: dict[str, Callable[[Source], dict[str, ImageTable]]] = {
    "imagefolder": read_image_folder,
    "metadata": read_metadata,
    "roboflow": read_one_hot,
    "parquet": read_parquet,
    "hub": read_hub,
    "datasets": read_saved,
    "manifest": read_manifest,
    "imagenet-lt": read_lists,
    "cifar": read_cifar,
    "inaturalist": read_inaturalist,
    "wilds": read_wilds,
    "webdataset": read_webdataset,
    "coco": read_coco,
}

LISTS_END = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".bin", ".arrow")
"""Endings of the files that readers take for lists, names or records, not for pictures."""

__all__ = [
    "FILE_NAME",
    "LIST_SUFFIXES",
    "READERS",
    "SPLIT_NAMES",
    "Source",
    "format_of",
    "guess_columns",
    "list_inside",
    "read_tables",
    "too_few_classes",
]


def read_tables(
    root: str,
    kind: str = "auto",
    columns: Mapping[Any, str] | None = None,
    splits: Mapping[Any, str | None] | None = None,
    files: Mapping[str, str] | None = None,
    on_unused: Callable[[list[str]], None] = lambda splits: None,
    images: str | None = None,
    on_left_out: Callable[[str], None] = lambda told: None,
) -> dict[str, ImageTable]:
    """`{split: table}` of a data set; data without splits is `train`.

    - `root`: a folder, a file, a name on the hub, or `embedded:...`.
    - `kind`: one of `READERS`, or `auto`, which looks at the files.
    - `columns`: column names of the data set for ours, for example `{"label": "fine_label"}`.
    - `splits`: split names of the data set for ours, for example `{"test": "eval"}`; None leaves a
      split out.
    - `files`: for formats with lists, the list of each split.
    - `on_unused`: called with the names of splits that are not used.
    - `images`: folder of the images of a list (`manifest`); default the list's own.
    - `on_left_out`: called with a description of the files that are not read, if any.

    Raises DataError for a missing file, column or split.

    ```python
    import discl

    tables = discl.read_tables("photos")
    print(tables["train"].class_names)
    ```
    """
    source = _source(root, columns, splits, files, images)
    if kind == "auto":
        kind = _guess_kind(source)
    if kind not in READERS:
        raise DataError(unknown("data.format", kind, READERS))
    if images is not None and kind != "manifest":
        raise DataError(
            f"data.images is the folder of the images that a list names, but '{root}' is read as {kind}; leave it out."
        )
    if kind != "hub" and not source.path.exists():
        raise DataError(missing(source, kind))
    try:
        _refuse_linked_lists(source)
        found = READERS[kind](source)
    except OSError as error:
        raise DataError(f"data.root '{root}' cannot be read as {kind}: {error}") from error
    tables = _rename_splits(found, source)
    unused = [
        name for name, table in found.items() if not any(table is each for each in tables.values())
    ]
    if unused:
        on_unused(unused)
    if source.unread:
        on_left_out(f"of '{root}' are left out: {source.unread}.")
    return tables


def _refuse_linked_lists(source: Source) -> None:
    """Raises DataError for a list that a link leads to outside the root: its text would become names of classes, and go on from there."""
    if not source.path.is_dir():
        return
    folders = [source.path, *(each for each in subfolders(source.path) if not each.is_symlink())]
    listed = [source.path / name for name in source.files.values()]
    named = [file for file in listed if file.is_symlink() and file.is_relative_to(source.path)]
    for folder in folders:
        with os.scandir(folder) as entries:
            named += [
                Path(entry.path)
                for entry in entries
                if entry.is_symlink() and Path(entry.name).suffix.lower() in LISTS_END
            ]
    refuse_outside(named, source.path)


def format_of(root: str, kind: str = "auto") -> str:
    """The name in `READERS` of the reader that `read_tables` takes. Raises DataError where `auto` finds none."""
    return _guess_kind(_source(root)) if kind == "auto" else kind


def list_inside(root: str, columns: Mapping[Any, str] | None = None) -> Path | None:
    """The file of metadata that describes the images of a folder, where the folder is read by such a file."""
    source = _source(root, columns)
    if _guess_kind(source) != "metadata":
        return None
    return next(iter(metadata_files(source).values()))


def _source(
    root: str,
    columns: Mapping[Any, str] | None = None,
    splits: Mapping[Any, str | None] | None = None,
    files: Mapping[str, str] | None = None,
    images: str | None = None,
) -> Source:
    path = embedded(root) if root.startswith("embedded:") else whole_path(root)
    _look(root, path)
    named = {ours: theirs for ours, theirs in (splits or {}).items() if theirs is not None}
    left_out = frozenset(set(splits or {}) - set(named))
    if "train" in left_out:
        raise DataError("data.splits.train is null, but training needs a split; name it.")
    return Source(root, path, columns or {}, named, files or {}, images, left_out)


def _look(root: str, path: Path) -> None:
    """Raises DataError for a root that the system does not even look for: with a zero byte, too long, or not allowed."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise DataError(f"data.root {root[:200]!r} cannot be read: {str(error)[:200]}") from error


def _guess_kind(source: Source) -> str:
    root, path = source.root, source.path
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            return "manifest" if _lists_paths(path, source) else "parquet"
        if suffix == ".tar" or suffix in LIST_SUFFIXES:
            return "webdataset" if suffix == ".tar" else "manifest"
    elif path.is_dir():
        return _guess_folder(path, source)
    elif root.partition("@")[0].count("/") == 1 and not root.startswith((".", "/", "~")):
        return "hub"
    if not path.exists():
        raise DataError(missing(source, "auto"))
    raise DataError(
        f"data.root '{root}' is no Parquet, CSV or tar file; name such a file, or a folder laid out as\n{tree('imagefolder')}"
    )


def _guess_folder(path: Path, source: Source) -> str:
    def holds(*patterns: str) -> bool:
        found = (each for pattern in patterns for each in path.glob(pattern))
        return any(each.is_file() and not each.name.startswith(".") for each in found)

    def is_cifar() -> bool:
        names = ("cifar-10*-binary", "cifar-10-batches-bin")
        return holds("train.bin", "data_batch_1.bin") or any(
            next(path.glob(name), None) is not None for name in names
        )

    def lists_paths() -> bool:
        return any(_lists_paths(file, source) for file in sorted(path.glob("*.parquet"))[:1])

    marks: dict[str, Callable[[], bool]] = {
        "cifar": lambda: is_pickled(path),
        "imagenet-lt": lambda: holds(LISTS["train"]),
        "inaturalist": lambda: holds("train2018.json"),
        "wilds": lambda: holds("metadata.csv") and _lists_images(path, "wilds"),
        "metadata": lambda: is_described(source),
        "roboflow": lambda: bool(one_hot_folders(source)),
        "datasets": lambda: holds("dataset_dict.json", "dataset_info.json"),
    }
    later: dict[str, Callable[[], bool]] = {
        "cifar": is_cifar,
        "parquet": lambda: holds("*.parquet", "*/*.parquet", "*/*/*.parquet"),
        "webdataset": lambda: holds("*.tar", "*/*.tar"),
        "coco": lambda: holds("annotations/*.json", f"*/{BESIDE_IMAGES}"),
        "manifest": lambda: holds("*.csv", "*.tsv") and _lists_images(path, "manifest"),
    }
    first = next((kind for kind, fits in marks.items() if fits()), None)
    kind = first or next((kind for kind, fits in later.items() if fits()), "imagefolder")
    return "manifest" if kind == "parquet" and lists_paths() else kind


def _lists_paths(file: Path, source: Source) -> bool:
    """Whether a Parquet file names its images instead of holding them."""
    try:
        schema = pq.read_schema(plain_file(file))
    except (OSError, pa.ArrowException):
        return False
    usual = ("image", "img", "path")
    name = next(
        (each for each in (source.columns.get("image"), *usual) if each in schema.names), None
    )
    places = [] if name is None else schema.get_all_field_indices(name)
    kinds = [schema.field(place).type for place in places]
    return any(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds)


def _lists_images(path: Path, kind: str) -> bool:
    """Whether a CSV at the root is the list of images, and not something beside folders of classes."""
    lists = sorted(
        file
        for pattern in ("*.csv", "*.tsv")
        for file in path.glob(pattern)
        if file.is_file() and not file.name.startswith(".")
    )
    file = path / "metadata.csv" if kind == "wilds" else lists[0]
    names = heading_of(file)
    return all(
        name in names for name in (("split", "filename") if kind == "wilds" else ("path", "label"))
    )


def _rename_splits(tables: dict[str, ImageTable], source: Source) -> dict[str, ImageTable]:
    result = {}
    splits, root = source.splits, source.root
    for ours, usual in SPLIT_NAMES.items():
        if ours in source.left_out:
            continue
        theirs = splits.get(ours)
        if theirs is not None and theirs not in tables:
            raise DataError(
                f"data.splits.{ours}: '{root}' has no such split: {unknown('split', theirs, tables)}"
            )
        free = [
            name for name in tables if name not in splits.values()
        ]  # what the user gave another name is not taken twice
        found = theirs or next((name for name in free if name.lower() in usual), None)
        if found is not None:
            result[ours] = tables[found]
    if "train" not in result:
        raise DataError(
            f"'{root}' has no training split (it has {', '.join(tables)}); name it in data.splits, for example {{train: their_name}}."
        )
    return result
