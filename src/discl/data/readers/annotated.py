"""COCO annotations, and those of iNaturalist in the same style.

Read by hand because pycocotools holds every annotation as a Python object. Arrow reads a million
images in a fifth of the memory, and reports every broken value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from ...errors import DataError
from ..table import ImageTable
from .building import SPLIT_NAMES, Source, build_table, expected, files_below, full_paths
from .opening import plain_file, read_json

INATURALIST = {"train": "train2018.json", "val": "val2018.json"}
BESIDE_IMAGES = "_annotations.coco.json"
"""Roboflow's name of the annotations beside the images of a split."""
OTHER_TASKS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")
"""Prefixes of COCO's files without categories of objects."""
SHOWN_FILES = 6
SHOWN_IDS = 8
STYLE = "JSON with annotations in the style of COCO"


def read_inaturalist(source: Source) -> dict[str, ImageTable]:
    """COCO-style JSON with one category per image, the layout of iNaturalist 2018.

    Files: `train2018.json`, `val2018.json`, `train_val2018/`. Class names come from
    `categories.json` if present, else from the annotations (those of 2018 hide them).
    """
    files = source.files or {
        split: name for split, name in INATURALIST.items() if (source.path / name).is_file()
    }
    if "train" not in files:
        raise expected(source, "inaturalist")
    return _read_splits(source, files)


def read_coco(source: Source) -> dict[str, ImageTable]:
    """COCO annotations of images that show one category each.

    Files: `annotations/*_train*.json`, `*_val*.json`. Several annotations of one category give one
    label. An image with several categories has no single class, and choosing one would invent a
    label: DataError counts such images.
    """
    files = source.files or _annotation_files(source)
    files = {split: name for split, name in files.items() if not source.leaves_out(split)}
    if not {*files} & {*SPLIT_NAMES["train"], source.splits.get("train")}:
        raise expected(source, "coco")
    return _read_splits(source, files)


def _annotation_files(source: Source) -> dict[str, str]:
    """`{split: file}`: beside the images, or the file of objects in `annotations/`.

    Raises DataError for several candidates.
    """
    beside = files_below(source.path, BESIDE_IMAGES)
    if beside:
        return {file.parent.name: str(file.relative_to(source.path)) for file in beside}
    result = {}
    for split in ("train", "val", "test"):
        candidates = [
            file
            for file in sorted(source.path.glob(f"annotations/*{split}*.json"))
            if file.is_file() and not file.name.startswith((".", *OTHER_TASKS))
        ]
        objects = [file for file in candidates if file.name.startswith("instances")] or candidates
        if len(objects) > 1:
            raise DataError(
                f"{source.path}/annotations holds {len(objects)} files for {split} "
                f"({_join_names(objects)}); name the right one, for example "
                f"{{{split}: annotations/{objects[0].name}}}.",
                argument="files",
            )
        if objects:
            result[split] = str(objects[0].relative_to(source.path))
    if "train" not in result and (others := sorted(source.path.glob("annotations/*.json"))):
        raise DataError(
            f"{source.path}/annotations holds no instances_train….json with categories of objects "
            f"(found: {_join_names(others)}); name the file, for example "
            "{train: annotations/mine.json}.",
            argument="files",
        )
    return result


def _join_names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:SHOWN_FILES])


def _read_splits(source: Source, files: Mapping[str, str]) -> dict[str, ImageTable]:
    annotations = {split: _load_annotations(source.path / name) for split, name in files.items()}
    categories = {
        number: name for each in annotations.values() for number, name in each.categories.items()
    }
    if (source.path / "categories.json").is_file():
        categories |= _read_categories(source.path / "categories.json")
    if len({type(number) for number in categories}) > 1 or None in categories:
        shown = ", ".join(map(repr, [*categories][:SHOWN_IDS]))
        raise DataError(
            f"'{source.root}': ids of categories have to be all numbers or all texts; got {shown}.",
            argument="root",
        )
    numbers = sorted(categories)
    names = [categories[number] for number in numbers]
    if len(set(names)) < len(names):
        names = [f"{categories[number]} ({number})" for number in numbers]
    tables = {}
    for split, content in annotations.items():
        file = source.path / files[split]
        listed = content.images.field("file_name")
        if not len(listed) or listed[0].as_py() is None:
            raise DataError(f"{file} lists no image, or one without a file_name.")
        labels = content.labels(numbers, file)
        below = _image_folder(source.path, file, listed[0].as_py())
        paths = full_paths(source.path / below, listed, str(file))
        tables[split] = build_table(paths, labels, names, ids=listed, root=source.path)
    return tables


@dataclass(frozen=True)
class _Annotations:
    """A COCO-style file, column by column.

    - `images`: {id, file_name}.
    - `annotations`: {image_id, category_id}.
    - `categories`: names by id.
    """

    images: pa.StructArray
    annotations: pa.StructArray
    categories: dict[Any, str]

    def labels(self, numbers: Sequence[Any], file: Path) -> np.ndarray:
        """Index of each image's category in `numbers`, int64 `[images]`.

        Raises DataError unless each image has exactly one category.
        """
        image_id = self.annotations.field("image_id")
        category_id = self.annotations.field("category_id")
        row = _index_in(image_id, self.images.field("id"))
        label = _index_in(category_id, pa.array(numbers, category_id.type))
        known = row >= 0
        unknown = np.flatnonzero(known & (label < 0))
        if len(unknown):
            raise DataError(
                f"{file}: category {pc.min(category_id.take(pa.array(unknown)))} is in no list of "
                "categories; the file is of another version."
            )
        result = np.full(len(self.images), -1, np.int64)
        result[row[known]] = label[known]
        several = len(np.unique(row[known & (result[row] != label)]))
        if several:
            raise DataError(
                f"{file}: {several} images show several categories, so they have no single class; "
                "crop the objects first."
            )
        bare = int((result < 0).sum())
        if bare:
            raise DataError(f"{file}: {bare} images have no annotation; remove them from the list.")
        return result


def _index_in(values: pa.Array, known: pa.Array) -> np.ndarray:
    """Index of each value in `known`, −1 for others."""
    found = pc.fill_null(pc.index_in(values, value_set=known), -1)
    return found.to_numpy(zero_copy_only=False)


def _image_folder(root: Path, file: Path, example: str) -> str:
    """The folder below the root that file names are relative to.

    The root itself, or a folder named `images` or like the annotations' split.
    """
    split = file.stem.split("_")[-1]
    if file.name == BESIDE_IMAGES and file.parent != root and file.is_relative_to(root):
        return f"{file.parent.relative_to(root).as_posix()}/"
    for below in ("", f"{split}/", "images/", f"images/{split}/"):
        if (root / below / example).exists():
            return below
    return ""


def _load_annotations(file: Path) -> _Annotations:
    """The columns that matter; ids may be numbers or texts."""
    _check_begins_as_object(file)
    problem: Exception | None = None
    text, number = pa.string(), pa.int64()
    for image_id, category_id in ((number, number), (text, number), (text, text)):
        wanted = {
            "images": {"id": image_id, "file_name": text},
            "annotations": {"image_id": image_id, "category_id": category_id},
            "categories": {"id": category_id, "name": text},
        }
        try:
            table = _read_columns(file, wanted)
        except (pa.ArrowException, OSError, OverflowError) as error:
            problem = error
            continue
        absent = [
            name
            for name in ("images", "annotations")
            if table.num_rows != 1 or not table[name][0].is_valid
        ]
        if absent:
            raise DataError(f"{file} has no {' and no '.join(absent)}; {STYLE} is expected.")
        images, annotations, categories = (
            table[name].combine_chunks().flatten() for name in wanted
        )
        ids, names = (categories.field(name).to_pylist() for name in ("id", "name"))
        named = {
            key: str(key if name is None else name) for key, name in zip(ids, names, strict=True)
        }
        return _Annotations(images, annotations, named)
    raise DataError(f"{file} cannot be read as {STYLE}: {problem}")


def _check_begins_as_object(file: Path) -> None:
    try:
        with plain_file(file).open("rb") as stream:
            first = stream.read(64).lstrip()[:1]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if first != b"{":
        raise DataError(f"{file} cannot be read as {STYLE}: it does not begin with {{.")


def _read_columns(file: Path, wanted: Mapping[str, Mapping[str, pa.DataType]]) -> pa.Table:
    schema = pa.schema(
        [(name, pa.list_(pa.struct(list(fields.items())))) for name, fields in wanted.items()]
    )
    parse = pajson.ParseOptions(
        explicit_schema=schema, newlines_in_values=True, unexpected_field_behavior="ignore"
    )
    block = file.stat().st_size + 1  # the file is a single value
    table = pajson.read_json(file, pajson.ReadOptions(use_threads=False, block_size=block), parse)
    table.validate(full=True)
    return table


def _category_id(category: Any) -> int | str:
    value = category["id"]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"the id {value!r} is no whole number and no text")
    return value


def _read_categories(file: Path) -> dict[Any, str]:
    try:
        return {_category_id(each): str(each["name"]) for each in read_json(file)}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} cannot be read as a list of categories (id, name): {error}"
        ) from error
