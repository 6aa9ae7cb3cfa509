"""Data sets with annotation files: iNaturalist 2018 and COCO (JSON), WILDS (metadata.csv)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from ...assets import common_names
from ...errors import DataError
from ..table import ImageTable
from .building import Source, build_table, expected, full_paths

INATURALIST = {"train": "train2018.json", "val": "val2018.json"}
WILDS_SPLITS = {"train": "train", "id_val": "validation", "id_test": "test", "val": "validation-ood", "test": "test-ood"}


def read_inaturalist(source: Source) -> dict[str, ImageTable]:
    """COCO-style JSON with one category per image, as iNaturalist 2018 has it: `train2018.json`, `val2018.json`, `train_val2018/`.

    Class names come from `categories.json` where it is there (the annotation files of 2018 hide them), else from the annotations.
    """
    files = source.files or {split: name for split, name in INATURALIST.items() if (source.path / name).is_file()}
    if "train" not in files:
        tree = ["train2018.json, val2018.json", "categories.json (names; optional)", "train_val2018/Plantae/7477/….jpg"]
        raise DataError(expected(source, "inaturalist", tree))
    return _read_json(source, files)


def read_coco(source: Source) -> dict[str, ImageTable]:
    """COCO annotations over images that show one category each: `annotations/*_train*.json`, `*_val*.json`.

    An image with annotations of several categories is no sample of one class: DataError counts them.
    """
    files = source.files or {
        split: str(file.relative_to(source.path))
        for split in ("train", "val", "test")
        for file in sorted(source.path.glob(f"annotations/*{split}*.json"))[:1]
    }
    if "train" not in files:
        raise DataError(expected(source, "coco", ["annotations/instances_train.json, instances_val.json", "train/….jpg, val/….jpg"]))
    return _read_json(source, files)


def _read_json(source: Source, files: Any) -> dict[str, ImageTable]:
    stated = {split: _load_json(source.path / name) for split, name in files.items()}
    categories = {each["id"]: str(each.get("name", each["id"])) for content in stated.values() for each in content.get("categories", [])}
    if (source.path / "categories.json").is_file():
        categories |= {each["id"]: str(each["name"]) for each in _load_json(source.path / "categories.json")}
    numbers = sorted(categories)
    label_of = {number: label for label, number in enumerate(numbers)}
    names = [categories[number] for number in numbers]
    if len(set(names)) < len(names):
        names = [f"{categories[number]} ({number})" for number in numbers]
    tables = {}
    for split, content in stated.items():
        file = source.path / files[split]
        category_of = dict(content["annotations"])
        several = len({image for image, category in content["annotations"] if category_of[image] != category})
        if several:
            raise DataError(
                f"{file}: {several} images show several categories, so they are no samples of one class; cut the objects out first."
            )
        images = content["images"]
        bare = sum(number not in category_of for number, _ in images)
        if bare:
            raise DataError(f"{file}: {bare} images have no annotation; take them out of the list.")
        unknown_ids = {category_of[number] for number, _ in images} - set(label_of)
        if unknown_ids:
            raise DataError(f"{file}: category {min(unknown_ids)} stands in no list of categories; the file is of another version.")
        below = _image_folder(source.path, file, images[0][1])
        paths = full_paths(source.path, [below + name for _, name in images], str(file))
        labels = np.asarray([label_of[category_of[number]] for number, _ in images], np.int64)
        tables[split] = build_table(paths, labels, names, [name for _, name in images], source.path)
    return tables


def _image_folder(root: Path, file: Path, example: str) -> str:
    """The folder below the root that file names are relative to: the root itself, or one named like the annotations or `images`."""
    split = file.stem.split("_")[-1]
    for below in ("", f"{split}/", "images/", f"images/{split}/"):
        if (root / below / example).exists():
            return below
    return ""


def _compact(each: dict[str, Any]) -> Any:
    """An image as (id, file_name), an annotation as (image_id, category_id): a million of them as they stand would take 2 GB."""
    if "file_name" in each and "id" in each:
        return each["id"], str(each["file_name"])
    if "image_id" in each and "category_id" in each:
        return each["image_id"], each["category_id"]
    return each


def _load_json(file: Path) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_hook=_compact)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from error
    lacking = [] if isinstance(content, list) else [name for name in ("images", "annotations") if name not in (content or {})]
    if lacking:
        raise DataError(f"{file} has no {' and no '.join(lacking)}; annotations in the style of COCO are expected.")
    return content


def read_wilds(source: Source) -> dict[str, ImageTable]:
    """iWildCam v2.0 as WILDS stores it (arXiv 2012.07421): `metadata.csv` (split, y, filename, location, sequence) and images in `train/`.

    `id_val` is our `validation`, `id_test` our `test`, `val` and `test` are `validation-ood` and `test-ood`. The domain is the
    camera (location), the group the sequence. Class names come from `categories.csv`, and are common names where we know one for the
    scientific name (`assets/names/iwildcam.yaml`).
    """
    metadata = source.file("metadata", "metadata.csv")
    tree = ["metadata.csv (split, y, filename, location_remapped, sequence_remapped)", "categories.csv (y, name)", "train/….jpg"]
    if not metadata.is_file():
        raise DataError(expected(source, "wilds", tree))
    listed = pacsv.read_csv(metadata)
    lacking = [name for name in ("split", "y", "filename") if name not in listed.column_names]
    if lacking:
        raise DataError(f"{metadata} has no column {' and no '.join(lacking)} (it has {', '.join(listed.column_names)}); v2.0 is expected.")
    domain = next((name for name in ("location_remapped", "location") if name in listed.column_names), None)
    group = next((name for name in ("sequence_remapped", "seq_id", "sequence") if name in listed.column_names), None)
    names = _wilds_names(source.path / "categories.csv", int(pc.max(listed["y"]).as_py()) + 1)
    tables = {}
    for theirs, ours in WILDS_SPLITS.items():
        rows = listed.filter(pc.equal(listed["split"], theirs))
        if rows.num_rows:
            files = rows["filename"].cast(pa.string()).combine_chunks()
            paths = full_paths(source.path / "train", files, str(metadata))
            optional = {
                ours_: rows[each].cast(pa.string()).combine_chunks() for ours_, each in (("domain", domain), ("group", group)) if each
            }
            tables[ours] = build_table(paths, rows["y"].to_numpy(), names, files, source.path, **optional)
    if "train" not in tables:
        raise DataError(
            f"{metadata} has no row of the split train; its splits are {', '.join(map(str, pc.unique(listed['split']).to_pylist()))}."
        )
    return tables


def _wilds_names(file: Path, classes: int) -> list[str]:
    if not file.is_file():
        return [str(label) for label in range(classes)]
    listed = pacsv.read_csv(file)
    lacking = [name for name in ("y", "name") if name not in listed.column_names]
    if lacking:
        raise DataError(f"{file} has no column {' and no '.join(lacking)} (it has {', '.join(listed.column_names)}).")
    stated = {
        label: str(name)
        for label, name in zip(listed["y"].to_pylist(), listed["name"].to_pylist(), strict=True)
        if label is not None and label >= 0
    }
    common = common_names("iwildcam")
    spoken = {label: common.get(name, name) for label, name in stated.items()}
    twice = {name for name, count in Counter(spoken.values()).items() if count > 1}
    names = {label: f"{name} ({stated[label]})" if name in twice else name for label, name in spoken.items()}
    return [names.get(label, str(label)) for label in range(max(classes, max(names, default=-1) + 1))]
