"""One function per data format, all in `READERS`.

A reader maps a `Source` to `{split: ImageTable}`. It opens only lists; images are decoded on
access. The readers are written by hand because no library reads these formats without running code
from the data, following links, copying every image, or dropping files silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import concatenate_datasets

from ...assets import embedded
from ...errors import DataError, arguments_named, shorten, unknown
from ..gate import refuse_outside
from ..listing import known_suffixes, walk_images
from ..table import ImageTable, check_table
from .annotated import BESIDE_IMAGES, read_coco, read_inaturalist
from .building import SPLIT_NAMES, UNLABELLED, Source, build_table, missing, tree
from .camera_traps import Cameras, read_camera_traps
from .cifar import is_pickled, read_cifar
from .described import (
    FILE_NAME,
    is_described,
    metadata_files,
    one_hot_folders,
    read_metadata,
    read_one_hot,
)
from .folders import read_image_folder, subfolders, too_few_classes
from .imagenet_lt import LISTS, read_lists
from .lists import LIST_SUFFIXES, heading_of
from .manifests import guess_columns, read_manifest
from .opening import plain_file, whole_path
from .tabular import read_hub, read_parquet, read_saved
from .webdataset import read_webdataset
from .wilds import read_wilds

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
"""Suffixes of the files that readers parse as lists, names or records, not as images."""

LONGEST_ROOT = 200

__all__ = [
    "FILE_NAME",
    "LIST_SUFFIXES",
    "READERS",
    "SPLIT_NAMES",
    "Cameras",
    "Source",
    "format_of",
    "guess_columns",
    "list_inside",
    "read_archive",
    "read_tables",
    "too_few_classes",
]


def read_tables(
    root: str,
    kind: str = "auto",
    *,
    columns: Mapping[Any, str] | None = None,
    splits: Mapping[Any, str | None] | None = None,
    files: Mapping[str, str] | None = None,
    images: str | None = None,
    cameras: Cameras | None = None,
    on_unused: Callable[[list[str]], None] = lambda splits: None,
    on_left_out: Callable[[str], None] = lambda message: None,
) -> dict[str, ImageTable]:
    """`{split: table}` of a data set; data without splits is `train` alone.

    - `root`: a folder, a file, a data set of the hub (`owner/name`), or `embedded:fashion-mnist`.
    - `kind`: a name in `READERS`, or `auto` to detect it from the files.
    - `columns`: column names in the data, by ours (`{"label": "fine_label"}`).
    - `splits`: split names in the data, by ours (`{"test": "eval"}`); None leaves a split out.
    - `files`: list files by split, for formats with lists.
    - `images`: folder of the images that a list (`manifest`) names; by default the list's own.
    - `cameras`: reads the data set as one of camera traps; None reads it as it is.
    - `on_unused`: called with the names of splits that are not used.
    - `on_left_out`: called with a message that counts the files that are not read, by kind.

    Raises DataError for anything missing or broken, with the expected layout.

    ```python
    import discl

    tables = discl.read_tables("photos")
    print({split: len(table) for split, table in tables.items()})
    ```
    """
    source = _source(root, columns, splits, files, images)
    if kind == "auto":
        kind = _guess_kind(source)
    if kind not in READERS:
        raise DataError(unknown("format", kind, READERS), argument="kind")
    if images is not None and kind != "manifest":
        raise DataError(
            f"only lists (manifest) have a separate folder of images, but '{root}' is read as "
            f"{kind}; remove it.",
            argument="images",
        )
    if kind != "hub" and not source.path.exists():
        raise DataError(missing(source, kind), argument="root")
    try:
        _refuse_linked_lists(source)
        parts = READERS[kind](source)
    except OSError as error:
        raise DataError(f"'{root}' cannot be read as {kind}: {error}", argument="root") from error
    tables = _rename_splits(parts, source)
    unused = [
        name for name, table in parts.items() if not any(table is each for each in tables.values())
    ]
    if unused:
        on_unused(unused)
    if source.unread:
        on_left_out(f"left out of '{root}': {source.unread}.")
    return tables if cameras is None else read_camera_traps(tables, cameras)


def read_archive(
    root: str,
    kind: str = "auto",
    *,
    columns: Mapping[Any, str] | None = None,
    images: str | None = None,
    on_left_out: Callable[[str], None] = lambda message: None,
) -> ImageTable:
    """The images of an archive, of all its splits, with 0 as their label. Labels are not read.

    A folder without a list is searched at any depth. Lists and Parquet files need no labels. Other
    formats are read as `read_tables` does.

    - `root`, `kind`, `columns`, `images`, `on_left_out`: as in `read_tables`.

    Raises DataError for anything missing or broken, and for an archive without an image.
    """
    source = replace(_source(root, columns, images=images), labelled=False)
    on_hub = kind == "hub" or (kind == "auto" and _names_hub(root))
    if not on_hub and not source.path.exists():
        raise DataError(
            f"'{root}' does not exist; looked for {source.path.absolute()}. Name a folder of "
            "images, a list of images, or a Parquet file.",
            argument="root",
        )
    if kind == "auto":
        kind = _guess_kind(source)
    try:
        _refuse_linked_lists(source)
        parts = (
            {"": _walk_archive(source)} if kind == "imagefolder" else dict(READERS[kind](source))
        )
    except OSError as error:
        raise DataError(f"'{root}' cannot be read as {kind}: {error}", argument="root") from error
    if source.unread:
        on_left_out(f"left out of '{root}': {source.unread}.")
    return _join_unlabelled(parts)


def _walk_archive(source: Source) -> ImageTable:
    """The images of a folder and of those below it."""
    paths = list(walk_images(source.path, source.unread))
    if not paths:
        found = f" It holds {source.unread}." if source.unread else ""
        raise DataError(
            f"'{source.root}' holds no image (none ends in {known_suffixes()}).{found}",
            argument="root",
        )
    ids = [Path(path).relative_to(source.path).as_posix() for path in paths]
    labels = np.zeros(len(paths), np.int64)
    return build_table(paths, labels, [UNLABELLED], ids=ids, root=source.path)


def _join_unlabelled(parts: Mapping[str, ImageTable]) -> ImageTable:
    """All splits in one table; ids begin with the split where there are several."""
    rows = []
    for split, table in parts.items():
        plain = table.rows.select_columns(["id", "image"])
        if len(parts) > 1:
            plain = plain.remove_columns("id").add_column(
                "id", [f"{split}/{name}" for name in table.ids]
            )
        rows.append(plain.add_column("label", np.zeros(len(plain), np.int64)))
    tables = list(parts.values())
    folders = [
        folder for each in tables for folder in (each.root, *each.elsewhere) if folder is not None
    ]
    root, *elsewhere = dict.fromkeys(folders) if folders else (None,)
    schemes = frozenset[str]().union(*(each.schemes for each in tables))
    joined = concatenate_datasets(rows)
    below = tuple(folder for folder in elsewhere if folder is not None)
    return check_table(ImageTable(joined, (UNLABELLED,), root, below, schemes))


def _refuse_linked_lists(source: Source) -> None:
    """Raises DataError for a list that is a link out of the root.

    Its text would become class names and spread from there.
    """
    if not source.path.is_dir():
        return
    folders = [source.path, *(each for each in subfolders(source.path) if not each.is_symlink())]
    named = [source.path / name for name in source.files.values()]
    links = [file for file in named if file.is_symlink() and file.is_relative_to(source.path)]
    for folder in folders:
        with os.scandir(folder) as entries:
            links += [
                Path(entry.path)
                for entry in entries
                if entry.is_symlink() and Path(entry.name).suffix.lower() in LISTS_END
            ]
    refuse_outside(links, source.path)


def format_of(root: str, kind: str = "auto") -> str:
    """The name in `READERS` of the reader that `read_tables` uses.

    Raises DataError where `auto` detects none.
    """
    return _guess_kind(_source(root)) if kind == "auto" else kind


def list_inside(root: str, columns: Mapping[Any, str] | None = None) -> Path | None:
    """The metadata file of a folder that is read by such a file, else None."""
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
    with arguments_named("root"):
        path = embedded(root) if root.startswith("embedded:") else whole_path(root)
    _check_root(root, path)
    named = {split: name for split, name in (splits or {}).items() if name is not None}
    left_out = frozenset(set(splits or {}) - set(named))
    if "train" in left_out:
        raise DataError(
            "train is null, but training needs a split; name it.",
            argument="splits",
        )
    return Source(root, path, columns or {}, named, files or {}, images, left_out)


def _check_root(root: str, path: Path) -> None:
    """Raises DataError for a path that the system rejects: a zero byte, too long, forbidden."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        cause = str(error)[:LONGEST_ROOT]
        raise DataError(
            f"{shorten(root, LONGEST_ROOT)} cannot be read: {cause}", argument="root"
        ) from error


def _guess_kind(source: Source) -> str:
    root, path = source.root, source.path
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            return "manifest" if _names_images(path, source) else "parquet"
        if suffix == ".tar" or suffix in LIST_SUFFIXES:
            return "webdataset" if suffix == ".tar" else "manifest"
    elif path.is_dir():
        return _guess_folder(path, source)
    elif _names_hub(root):
        return "hub"
    if not path.exists():
        raise DataError(missing(source, "auto"), argument="root")
    raise DataError(
        f"'{root}' is no Parquet, CSV or tar file; name such a file, or a folder laid out as\n"
        f"{tree('imagefolder')}",
        argument="root",
    )


def _names_hub(root: str) -> bool:
    """Whether a root that is no path on this machine may be `owner/name` on the hub."""
    return root.partition("@")[0].count("/") == 1 and not root.startswith((".", "/", "~"))


def _guess_folder(path: Path, source: Source) -> str:
    def holds(*patterns: str) -> bool:
        matches = (each for pattern in patterns for each in path.glob(pattern))
        return any(each.is_file() and not each.name.startswith(".") for each in matches)

    def is_cifar() -> bool:
        names = ("cifar-10*-binary", "cifar-10-batches-bin")
        return holds("train.bin", "data_batch_1.bin") or any(
            next(path.glob(name), None) is not None for name in names
        )

    def names_images() -> bool:
        return any(_names_images(file, source) for file in sorted(path.glob("*.parquet"))[:1])

    marks: dict[str, Callable[[], bool]] = {
        "cifar": lambda: is_pickled(path),
        "imagenet-lt": lambda: holds(LISTS["train"]),
        "inaturalist": lambda: holds("train2018.json"),
        "wilds": lambda: holds("metadata.csv") and _lists_images(path, "wilds"),
        "metadata": lambda: is_described(source),
        "roboflow": lambda: bool(one_hot_folders(source)),
        "datasets": lambda: holds("dataset_dict.json", "dataset_info.json"),
    }
    weaker_marks: dict[str, Callable[[], bool]] = {
        "cifar": is_cifar,
        "parquet": lambda: holds("*.parquet", "*/*.parquet", "*/*/*.parquet"),
        "webdataset": lambda: holds("*.tar", "*/*.tar"),
        "coco": lambda: holds("annotations/*.json", f"*/{BESIDE_IMAGES}"),
        "manifest": lambda: holds("*.csv", "*.tsv") and _lists_images(path, "manifest"),
    }
    first = next((kind for kind, fits in marks.items() if fits()), None)
    kind = first or next((kind for kind, fits in weaker_marks.items() if fits()), "imagefolder")
    return "manifest" if kind == "parquet" and names_images() else kind


def _names_images(file: Path, source: Source) -> bool:
    """Whether a Parquet file names its images instead of holding them."""
    try:
        schema = pq.read_schema(plain_file(file))
    except (OSError, pa.ArrowException):
        return False
    usual = ("image", "img", "path")
    name = next(
        (each for each in (source.columns.get("image"), *usual) if each in schema.names), None
    )
    numbers = [] if name is None else schema.get_all_field_indices(name)
    types = [schema.field(number).type for number in numbers]
    return any(pa.types.is_string(each) or pa.types.is_large_string(each) for each in types)


def _lists_images(path: Path, kind: str) -> bool:
    """Whether a CSV at the root lists the images, not something beside folders of classes."""
    lists = sorted(
        file
        for pattern in ("*.csv", "*.tsv")
        for file in path.glob(pattern)
        if file.is_file() and not file.name.startswith(".")
    )
    file = path / "metadata.csv" if kind == "wilds" else lists[0]
    heading = heading_of(file)
    needed = ("split", "filename") if kind == "wilds" else ("path", "label")
    return all(name in heading for name in needed)


def _rename_splits(tables: dict[str, ImageTable], source: Source) -> dict[str, ImageTable]:
    result = {}
    splits, root = source.splits, source.root
    free = [name for name in tables if name not in splits.values()]  # not named by the user
    for split, usual in SPLIT_NAMES.items():
        if split in source.left_out:
            continue
        name = splits.get(split)
        if name is not None and name not in tables:
            raise DataError(
                f"{split}: '{root}' has no such split: {unknown('split', name, tables)}",
                argument="splits",
            )
        name = name or next((each for each in free if each.lower() in usual), None)
        if name is not None:
            result[split] = tables[name]
    if "train" not in result:
        raise DataError(
            f"'{root}' has no training split (it has {', '.join(tables)}); name it, for example "
            "{train: their_name}.",
            argument="splits",
        )
    return result
