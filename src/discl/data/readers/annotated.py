"""iNaturalist, COCO, WILDS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from ...assets import common_names
from ...errors import DataError
from ...utils.logging import get_logger
from ..table import ImageTable
from .building import SPLIT_NAMES, Source, build_table, expected, files_below, full_paths
from .lists import read_csv, tidy
from .opening import plain_file, read_json

logger = get_logger(__name__)

INATURALIST = {"train": "train2018.json", "val": "val2018.json"}
WILDS_SPLITS = {
    "train": "train",
    "id_val": "validation",
    "id_test": "test",
    "val": "validation-ood",
    "test": "test-ood",
}
BESIDE_IMAGES = "_annotations.coco.json"
"""What Roboflow calls the annotations that lie beside the images of a split."""
OTHER_TASKS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")
"""How names of COCO's files begin that name no category of an object."""
WILDS_OPTIONAL = ("location_remapped", "location", "sequence_remapped", "seq_id", "sequence")
NO_CLASS = 99_999
"""What WILDS writes as `y` of a category, or of an image, that is in no class; other copies write a number below 0."""


def read_inaturalist(source: Source) -> dict[str, ImageTable]:
    """COCO-style JSON with one category per image, as iNaturalist 2018 has it: `train2018.json`, `val2018.json`, `train_val2018/`.

    Class names come from `categories.json` where it is there (the annotation files of 2018 hide them), else from the annotations.
    """
    files = source.files or {
        split: name for split, name in INATURALIST.items() if (source.path / name).is_file()
    }
    if "train" not in files:
        raise DataError(expected(source, "inaturalist"))
    return _read_json(source, files)


def read_coco(source: Source) -> dict[str, ImageTable]:
    """COCO annotations over images that show one category each: `annotations/*_train*.json`, `*_val*.json`.

    An image with annotations of several categories is no sample of one class, and any choice among them (the first, the largest, the most
    frequent) would make labels that nobody gave: DataError counts such images. Several annotations of one category are one label.
    """
    files = source.files or _annotation_files(source)
    files = {split: name for split, name in files.items() if not source.leaves_out(split)}
    if not {*files} & {*SPLIT_NAMES["train"], source.splits.get("train")}:
        raise DataError(expected(source, "coco"))
    return _read_json(source, files)


def _annotation_files(source: Source) -> dict[str, str]:
    """`{split: file}` below the root: beside the images, or the one of `annotations/` that names objects.

    Raises DataError where several files may be meant.
    """
    beside = files_below(source.path, BESIDE_IMAGES)
    if beside:
        return {file.parent.name: str(file.relative_to(source.path)) for file in beside}
    found = {}
    for split in ("train", "val", "test"):
        files = [
            file
            for file in sorted(source.path.glob(f"annotations/*{split}*.json"))
            if file.is_file() and not file.name.startswith((".", *OTHER_TASKS))
        ]
        objects = [file for file in files if file.name.startswith("instances")] or files
        if len(objects) > 1:
            raise DataError(
                f"{source.path}/annotations holds {len(objects)} files for {split} ({', '.join(file.name for file in objects[:6])}); "
                f"say which one it is, for example data.files: {{{split}: annotations/{objects[0].name}}}."
            )
        if objects:
            found[split] = str(objects[0].relative_to(source.path))
    if "train" not in found and (others := sorted(source.path.glob("annotations/*.json"))):
        raise DataError(
            f"{source.path}/annotations holds no instances_train….json, whose annotations name categories (found: "
            f"{', '.join(file.name for file in others[:6])}); name the file in data.files, for example {{train: annotations/mine.json}}."
        )
    return found


def _read_json(source: Source, files: Any) -> dict[str, ImageTable]:
    stated = {split: _load_annotations(source.path / name) for split, name in files.items()}
    categories = {
        number: name for each in stated.values() for number, name in each.categories.items()
    }
    if (source.path / "categories.json").is_file():
        categories |= _names_of(source.path / "categories.json")
    if len({type(number) for number in categories}) > 1 or None in categories:
        raise DataError(
            f"data.root '{source.root}': ids of categories are all numbers or all texts; got {', '.join(map(repr, [*categories][:8]))}."
        )
    numbers = sorted(categories)
    names = [categories[number] for number in numbers]
    if len(set(names)) < len(names):
        names = [f"{categories[number]} ({number})" for number in numbers]
    tables = {}
    for split, content in stated.items():
        file = source.path / files[split]
        listed_files = content.images.field("file_name")
        if not len(listed_files) or listed_files[0].as_py() is None:
            raise DataError(f"{file} lists no image, or one without a file_name.")
        labels = content.labels(numbers, file)
        below = _image_folder(source.path, file, listed_files[0].as_py())
        paths = full_paths(source.path / below, listed_files, str(file))
        tables[split] = build_table(paths, labels, names, listed_files, source.path)
    return tables


@dataclass(frozen=True)
class _Annotations:
    """A file in the style of COCO, column by column: images {id, file_name}, annotations {image_id, category_id}, names by category."""

    images: pa.StructArray
    annotations: pa.StructArray
    categories: dict[Any, str]

    def labels(self, numbers: Sequence[Any], file: Path) -> np.ndarray:
        """int64 `[images]`: the place of each image's category in `numbers`. Raises DataError unless each image has exactly one."""
        image_id, category_id = (
            self.annotations.field("image_id"),
            self.annotations.field("category_id"),
        )
        place = pc.fill_null(pc.index_in(image_id, value_set=self.images.field("id")), -1).to_numpy(
            zero_copy_only=False
        )
        label = pc.fill_null(
            pc.index_in(category_id, value_set=pa.array(numbers, category_id.type)), -1
        ).to_numpy(zero_copy_only=False)
        listed = place >= 0
        unknown = np.flatnonzero(listed & (label < 0))
        if len(unknown):
            raise DataError(
                f"{file}: category {pc.min(category_id.take(pa.array(unknown)))} stands in no list of categories; "
                "the file is of another version."
            )
        result = np.full(len(self.images), -1, np.int64)
        result[place[listed]] = label[listed]
        several = len(np.unique(place[listed & (result[place] != label)]))
        if several:
            raise DataError(
                f"{file}: {several} images show several categories, so they are no samples of one class; cut the objects out first."
            )
        bare = int((result < 0).sum())
        if bare:
            raise DataError(f"{file}: {bare} images have no annotation; take them out of the list.")
        return result


def _image_folder(root: Path, file: Path, example: str) -> str:
    """The folder below the root that file names are relative to: the root itself, or one named like the annotations or `images`."""
    split = file.stem.split("_")[-1]
    if file.name == BESIDE_IMAGES and file.parent != root and file.is_relative_to(root):
        return f"{file.parent.relative_to(root).as_posix()}/"
    for below in ("", f"{split}/", "images/", f"images/{split}/"):
        if (root / below / example).exists():
            return below
    return ""


def _load_annotations(file: Path) -> _Annotations:
    """The columns that matter, by Arrow: a million images in a fifth of the memory that Python's objects would take."""
    text, number = pa.string(), pa.int64()
    problem: Exception | None = None
    try:
        with plain_file(file).open("rb") as stream:
            opens = stream.read(64).lstrip()[:1]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if opens != b"{":
        raise DataError(
            f"{file} cannot be read as JSON with annotations in the style of COCO: it does not begin with {{."
        )
    for image_id, category_id in ((number, number), (text, number), (text, text)):
        wanted = {
            "images": {"id": image_id, "file_name": text},
            "annotations": {"image_id": image_id, "category_id": category_id},
            "categories": {"id": category_id, "name": text},
        }
        schema = pa.schema(
            [(name, pa.list_(pa.struct(list(fields.items())))) for name, fields in wanted.items()]
        )
        parse = pajson.ParseOptions(
            explicit_schema=schema, newlines_in_values=True, unexpected_field_behavior="ignore"
        )
        try:
            read = pajson.ReadOptions(
                use_threads=False, block_size=file.stat().st_size + 1
            )  # the file is a single value
            table = pajson.read_json(file, read, parse)
            table.validate(full=True)
        except (pa.ArrowException, OSError, OverflowError) as error:
            problem = error
            continue
        lacking = [
            name
            for name in ("images", "annotations")
            if table.num_rows != 1 or not table[name][0].is_valid
        ]
        if lacking:
            raise DataError(
                f"{file} has no {' and no '.join(lacking)}; annotations in the style of COCO are expected."
            )
        images, annotations, categories = (
            table[name].combine_chunks().flatten() for name in wanted
        )
        named = zip(
            categories.field("id").to_pylist(), categories.field("name").to_pylist(), strict=True
        )
        return _Annotations(
            images, annotations, {key: str(key if name is None else name) for key, name in named}
        )
    raise DataError(
        f"{file} cannot be read as JSON with annotations in the style of COCO: {problem}"
    )


def _id_of(category: Any) -> int | str:
    found = category["id"]
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError(f"the id {found!r} is no whole number and no text")
    return found


def _names_of(file: Path) -> dict[Any, str]:
    try:
        return {_id_of(each): str(each["name"]) for each in read_json(file)}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} cannot be read as a list of categories (id, name): {error}"
        ) from error


def read_wilds(source: Source) -> dict[str, ImageTable]:
    """iWildCam v2.0 as WILDS stores it (arXiv 2012.07421): `metadata.csv` (split, y, filename, location, sequence) and images in `train/`.

    `id_val` is our `validation`, `id_test` our `test`, `val` and `test` are `validation-ood` and `test-ood`; each has to be there. The
    domain is the camera (location), the group the sequence. Class names come from `categories.csv`, and are common names where we know one
    for the scientific name (`assets/names/iwildcam.yaml`). Images without a class (y = 99999, or below 0) are counted and left out.
    """
    metadata = source.file("metadata", "metadata.csv")
    if not metadata.is_file():
        raise DataError(expected(source, "wilds"))
    listed = _read_csv(metadata, ("split", "y", "filename"))
    bare = pc.fill_null(
        pc.or_(pc.less(listed["y"], 0), pc.greater_equal(listed["y"], NO_CLASS)), True
    )
    if count := pc.sum(bare).as_py():
        logger.warning(
            f"{metadata}: {count:,} images have no class (y = {NO_CLASS}, below 0 or empty); they are left out"
        )
        listed = listed.filter(pc.invert(bare))
    lacking = [
        theirs for theirs in WILDS_SPLITS if not pc.any(pc.equal(listed["split"], theirs)).as_py()
    ]
    if lacking:
        there = ", ".join(map(str, pc.unique(listed["split"]).to_pylist()))
        raise DataError(
            f"{metadata} has no row of the split {' and none of '.join(lacking)}; its splits are {there}. iWildCam v2.0 has all five; a "
            "list of your own with other splits is read by data.format: manifest."
        )
    domain = next(
        (name for name in ("location_remapped", "location") if name in listed.column_names), None
    )
    group = next(
        (
            name
            for name in ("sequence_remapped", "seq_id", "sequence")
            if name in listed.column_names
        ),
        None,
    )
    present = set(pc.unique(listed["y"]).to_pylist())
    named = _wilds_names(source.path / "categories.csv", present)
    numbers = pa.array(list(named), pa.int64())
    names = list(named.values())
    tables = {}
    for theirs, ours in WILDS_SPLITS.items():
        rows = listed.filter(pc.equal(listed["split"], theirs))
        files = rows["filename"].cast(pa.string()).combine_chunks()
        paths = full_paths(source.path / "train", files, str(metadata))
        optional = {
            ours_: rows[each].cast(pa.string()).combine_chunks()
            for ours_, each in (("domain", domain), ("group", group))
            if each
        }
        labels = pc.index_in(rows["y"].cast(pa.int64()), value_set=numbers)
        tables[ours] = build_table(paths, labels.to_numpy(), names, files, source.path, **optional)
    return tables


def _read_csv(file: Path, columns: Sequence[str]) -> pa.Table:
    """A list of WILDS; what WILDS writes with pandas has a first column without a name. Raises DataError where a column is missing."""
    listed = tidy(read_csv(file), file, (*columns, *WILDS_OPTIONAL))
    lacking = [name for name in columns if name not in listed.column_names]
    if lacking:
        there = ", ".join(filter(None, listed.column_names))
        raise DataError(
            f"{file} has no column {' and no '.join(lacking)} (it has {there}); v2.0 is expected."
        )
    if "y" in columns and not pa.types.is_integer(listed["y"].type):
        raise DataError(
            f"{file}: the column y holds {listed['y'].type}; whole numbers are expected."
        )
    return listed


def _wilds_names(file: Path, present: Collection[int]) -> dict[int, str]:
    """`{label: name}` in order of the labels, of those that are named or have images.

    Names are common ones, with the label behind them where two classes would share a name.
    """
    if not file.is_file():
        return {label: str(label) for label in sorted(present)}
    listed = _read_csv(file, ("y", "name"))
    stated = dict(
        sorted(
            (label, str(name))
            for label, name in zip(listed["y"].to_pylist(), listed["name"].to_pylist(), strict=True)
            if label is not None and 0 <= label < NO_CLASS
        )
    )
    common = {name: list(spoken) for name, spoken in common_names("iwildcam").items()}
    names = {
        label: common[name].pop(0) if common.get(name) else name for label, name in stated.items()
    }
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    names = {label: f"{name} ({label})" if name in twice else name for label, name in names.items()}
    return {label: names.get(label, str(label)) for label in sorted({*names, *present})}
