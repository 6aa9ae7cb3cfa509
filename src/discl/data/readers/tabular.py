"""Tables that are tables already: Parquet files, data sets of the hub or on disk, and manifests that list files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Value,
    config,
    load_dataset,
    load_from_disk,
)
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import generate_random_fingerprint
from huggingface_hub import constants

from ...errors import DataError, unknown
from ..gate import Gate, Unreadable, roots_of
from ..shards import CELL, cell_address
from ..table import OPTIONAL, ImageTable, check_table, rows_of
from .building import Source, arrow_images, blank_rows, full_paths, read_csv, refuse_escape

COPIED_BYTES = 4_000_000_000
BATCH_BYTES = 16_000_000
"""Of the copy, about: a mapped file costs a page or more for each of its batches, and a million thumbnails in batches of 100 are many."""

USUAL_COLUMNS = {
    "image": (
        "the paths of the images",
        ("path",),
        ("file", "filename", "file_name", "image", "image_path", "img"),
    ),
    "label": ("the classes", ("label", "fine_label"), ("class", "class_name", "category")),
}
"""Our column: what it holds, the names that are read without a word, and those that `discl init` takes for it."""


def read_hub(source: Source) -> dict[str, ImageTable]:
    """A data set of the hub by its owner/name, with a configuration and a revision as owner/name:config@revision."""
    address, _, revision = source.root.partition("@")
    name, _, config = address.partition(":")
    try:
        splits = dict(load_dataset(name, config or None, revision=revision or None))
    except Exception as error:
        raise DataError(
            f"data.root '{source.root}' is no local folder, and it could not be loaded from the hub: {error}"
        ) from error
    return to_tables(splits, source, *_hub_folders(name))


def _hub_folders(name: str) -> tuple[Path, ...]:
    """Where `datasets` and the hub keep the files of a data set on this machine."""
    cache = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    return cache, Path(config.EXTRACTED_DATASETS_PATH)


def read_saved(source: Source) -> dict[str, ImageTable]:
    """A folder that `datasets` wrote with `save_to_disk`."""
    _refuse_foreign_parts(source.path)
    try:
        found = load_from_disk(str(source.path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.root '{source.root}' cannot be read as a folder of save_to_disk: {error}"
        ) from error
    splits = dict(found) if isinstance(found, DatasetDict) else {"train": found}
    plain = {str(split): rows.with_format(None) for split, rows in splits.items()}
    return to_tables(plain, source, source.folder)


def _refuse_foreign_parts(folder: Path) -> None:
    """Raises DataError where the lists of a folder of save_to_disk name Arrow files or splits outside it."""
    gate = Gate(roots_of(folder))
    try:
        named = _stated(folder / "dataset_dict.json", gate).get("splits", [])
        splits = [folder / str(split) for split in named] or [folder]
        for split in splits:
            gate.find(str(split))
            for file in _stated(split / "state.json", gate).get("_data_files", []):
                gate.find(str(split / str(file["filename"])))
    except (Unreadable, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"data.root '{folder}' cannot be read as a folder of save_to_disk: {error}"
        ) from error


def _stated(file: Path, gate: Gate) -> dict[str, Any]:
    """The JSON object in a file, an empty one where there is none."""
    if not file.exists():
        return {}
    with gate.open(str(file)) as stream:
        return dict(json.load(stream))


def read_parquet(source: Source) -> dict[str, ImageTable]:
    """One Parquet file, or files that are named after their split.

    Pictures of small sets are copied once into one memory-mapped Arrow file of `datasets`; those of larger ones (more than `COPIED_BYTES`)
    stay in the Parquet files, of which a row group is read at a time. For fast epochs `discl data prepare` writes them at training size.
    """
    root, path = source.root, source.path
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise DataError(f"data.root '{root}' holds no *.parquet file.")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(file.stem.split("-")[0] if path.is_dir() else "train", []).append(file)
    refuse_escape(files, source.folder)
    large = sum(file.stat().st_size for file in files) > COPIED_BYTES
    stay = large and all(_picture_column(file, source) for file in files)
    splits = {split: _load_parquet(shards, stay, source) for split, shards in by_split.items()}
    # one by one: a joint load takes one split's names
    return to_tables(splits, source, source.folder, schemes=(CELL,) if stay else ())


def _picture_column(file: Path, source: Source) -> str | None:
    """The column of a Parquet file that holds pictures, not only their paths."""
    try:
        features = Features.from_arrow_schema(pq.read_schema(file))
    except (OSError, ValueError):
        return None
    usual = (source.columns.get("image"), "image", "img")
    image = next((name for name in usual if name in features), None)
    kind = features[image] if image is not None else None
    return None if isinstance(kind, Value) and "binary" not in kind.dtype else image


def _load_parquet(shards: list[Path], stay: bool, source: Source) -> Dataset:
    try:
        features = [Features.from_arrow_schema(pq.read_schema(shard)) for shard in shards]
        for shard, each in zip(shards, features, strict=True):
            if each != features[0]:
                raise DataError(
                    f"{shard} has other columns or class names than {shards[0]}: {each} against {features[0]}."
                )
        if stay and (image := _picture_column(shards[0], source)) is not None:
            return _where_they_are(shards, image, features[0])
        count, size = (
            sum(pq.read_metadata(shard).num_rows for shard in shards),
            sum(shard.stat().st_size for shard in shards),
        )
        batch = int(np.clip(BATCH_BYTES * count // max(size, 1), 100, 10_000))
        return Dataset.from_parquet([str(shard) for shard in shards], writer_batch_size=batch)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise DataError(
            f"{', '.join(map(str, shards[:3]))} cannot be read as Parquet: {error}"
        ) from error


def _where_they_are(shards: list[Path], image: str, features: Features) -> Dataset:
    """The plain columns (numbers, texts) of the shards, and for each picture the address of its cell."""
    plain = [
        name
        for name, feature in features.items()
        if isinstance(feature, Value | ClassLabel) and "binary" not in feature.dtype
    ]
    plain = [name for name in plain if name != image]
    parts = []
    for shard in shards:
        rows = pq.read_metadata(shard).num_rows
        addresses = arrow_images([cell_address(row, image, shard) for row in range(rows)])
        part = pq.read_table(shard, columns=plain).replace_schema_metadata(None)
        parts.append(part.append_column(image, addresses))
    kinds = {name: features[name] for name in plain} | {image: ImageFeature(decode=False)}
    return Dataset(pa.concat_tables(parts), fingerprint=generate_random_fingerprint()).cast(
        Features(kinds)
    )


def to_tables(
    splits: Mapping[str, Dataset], source: Source, *folders: Path, schemes: Sequence[str] = ()
) -> dict[str, ImageTable]:
    """`{split: table}` of data sets with the columns image and label, under the user's names for them.

    Files that the column image names have to lie below one of `folders`; `schemes` are those of the addresses that the reader made.
    """
    root, columns = source.root, source.columns
    places = {split: f"split '{split}' of '{root}'" for split in splits}
    renamed = {
        split: _rename_columns(rows, columns, places[split]) for split, rows in splits.items()
    }
    if len(renamed) == 1 and "split" in (rows := next(iter(renamed.values()))).column_names:
        renamed = _divide(rows)
        places = {split: f"split '{split}' of '{root}'" for split in renamed}
    for split, rows in renamed.items():
        _refuse_blank(rows, places[split])
    names, to_label = _class_names({places[split]: rows for split, rows in renamed.items()})
    if any("fine_label" in rows.column_names for rows in splits.values()):
        names = tuple(
            name.replace("_", " ") for name in names
        )  # CIFAR-100's aquarium_fish: texts are written from these names
    return {
        split: _to_table(rows, split, places[split], names, to_label, folders, schemes)
        for split, rows in renamed.items()
    }


def _divide(rows: Dataset) -> dict[str, Dataset]:
    """The splits that a column `split` names, in the order in which they first appear."""
    named = [str(value) for value in rows.select_columns("split")[:]["split"]]
    return {
        split: rows.select([row for row, name in enumerate(named) if name == split])
        for split in dict.fromkeys(named)
    }


def _rename_columns(rows: Dataset, columns: Mapping[str, str], where: str) -> Dataset:
    if not len(rows):
        raise DataError(f"{where} has no rows.")
    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            raise DataError(
                f"data.columns.{ours}: {where}: {unknown('column', theirs, rows.column_names)}"
            )
        if ours != theirs:
            rows = (rows.remove_columns(ours) if ours in rows.column_names else rows).rename_column(
                theirs, ours
            )
    for ours, theirs in (
        ("image", "img"),
        ("label", "fine_label"),
    ):  # as uoft-cs/cifar10 and cifar100 call them
        if ours not in rows.column_names and theirs in rows.column_names:
            rows = rows.rename_column(theirs, ours)
    for needed in ("image", "label"):
        if needed not in rows.column_names:
            raise DataError(
                f"{where} has no column '{needed}' (it has {', '.join(rows.column_names)}); "
                f"name it in data.columns, for example {{{needed}: their_name}}."
            )
    return rows


def _refuse_blank(rows: Dataset, where: str) -> None:
    """Raises DataError for labels that are missing or empty, which would make a class without a name."""
    plain = rows.select_columns(
        [name for name in ("label", "id") if name in rows.column_names]
    ).with_format("arrow")[:]
    names = plain["id"].combine_chunks() if "id" in plain.column_names else None
    if told := blank_rows(plain["label"].combine_chunks(), names):
        raise DataError(
            f"{where} has images without a label; remove these rows or fill the label in: {told}."
        )


def _class_names(splits: Mapping[str, Dataset]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The classes of all splits together, and the label of each value in the column `label`."""
    listed: dict[str, tuple[str, ...]] = {}
    values: set[Any] = set()
    for where, rows in splits.items():
        feature = rows.features["label"]
        if isinstance(feature, ClassLabel):
            listed[where] = tuple(feature.names)
        elif feature.dtype not in {"string", "large_string"} and "int" not in feature.dtype:
            raise DataError(
                f"{where}: labels of type {feature.dtype}; whole numbers, texts or a ClassLabel are expected."
            )
        values |= set(rows.unique("label"))
    if listed:
        first, *others = listed.values()
        if len(listed) < len(splits) or any(names != first for names in others):
            told = " | ".join(
                f"{where}: {', '.join(listed.get(where, ('no names',))[:12])}" for where in splits
            )
            raise DataError(f"the splits name different classes, or in another order: {told}.")
        return first, {label: label for label in values}
    if all(isinstance(value, str) for value in values):
        names = tuple(sorted(values))
        return names, {name: label for label, name in enumerate(names)}
    if any(isinstance(value, str) for value in values):
        raise DataError("the labels are texts in one split and numbers in another.")
    return tuple(str(label) for label in range(max(values) + 1)), {label: label for label in values}


def _to_table(
    rows: Dataset,
    split: str,
    where: str,
    names: tuple[str, ...],
    to_label: Mapping[Any, int],
    folders: Sequence[Path],
    schemes: Sequence[str],
) -> ImageTable:
    labels = [to_label[value] for value in rows.select_columns("label")[:]["label"]]
    rows = rows.remove_columns("label").add_column("label", np.asarray(labels, np.int64))
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{split}-{row:08d}" for row in range(len(rows))])
    elif rows.features["id"] != Value("string"):
        rows = rows.cast_column("id", Value("string"))
    keep = [name for name in ("id", "image", "label", *OPTIONAL) if name in rows.column_names]
    try:
        rows = rows.select_columns(keep).cast_column("image", ImageFeature(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{where}: the column 'image' holds no images but {rows.features['image']}; name another in data.columns."
        ) from error
    root, *elsewhere = folders
    return check_table(ImageTable(rows, names, root, tuple(elsewhere), frozenset(schemes)))


def read_manifest(source: Source) -> dict[str, ImageTable]:
    """A CSV, TSV or Parquet file that lists `path` and `label`, optionally `id`, `split`, `domain`, `group`.

    Paths are relative to it, or to the folder that `data.images` names; absolute ones have to lie below that. Without a column `id` an
    image is called by its path below the folder.
    """
    file = source.path if source.path.is_file() else source.file("train", _only_list(source.path))
    label = source.columns.get("label", "label")
    try:
        listed = (
            pq.read_table(file)
            if file.suffix == ".parquet"
            else _with_labels_as_written(file, label)
        )
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file} cannot be read as a table: {error}") from error
    theirs = source.columns.get("image", "path")
    if theirs not in listed.column_names:
        raise DataError(
            f"{file}: {unknown('column', theirs, listed.column_names)} Say data.columns: {{image: their_name}}."
        )
    folder = _image_folder(source, file)
    named = listed.column(theirs).cast(pa.string()).combine_chunks()
    paths = full_paths(
        folder,
        named,
        str(file),
        "name the folder that holds all the images in data.images (discl init: --images)",
    )
    columns = {name: listed.column(name) for name in listed.column_names if name != theirs}
    if "id" not in columns and "id" not in source.columns:
        below = pc.utf8_slice_codeunits(paths, len(f"{folder}/"))
        columns["id"] = pc.if_else(pc.starts_with(named, "/"), below, named)
    table = pa.table(
        {
            "image": arrow_images(paths),
            **{name: values for name, values in columns.items() if name != "image"},
        }
    )
    rows = rows_of(table)
    columns = {ours: name for ours, name in source.columns.items() if ours != "image"}
    return to_tables({"train": rows}, Source(source.root, source.path, columns), folder)


def guess_columns(file: Path, stated: Mapping[str, str]) -> dict[str, str]:
    """`data.columns` of a list, or of a Parquet file with pictures: what is `stated`, and the one column whose name is usual for it.

    Raises DataError where several have such a name, or none.
    """
    schema = (
        pq.read_schema(file)
        if file.suffix == ".parquet"
        else read_csv(file, _delimiter(file)).schema
    )
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
    folder = file.parent if source.images is None else Path(source.images).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(
            f"data.images '{source.images}' is no folder; looked for {folder.absolute()}."
        )
    return folder


def _with_labels_as_written(file: Path, label: str) -> pa.Table:
    """A CSV or TSV file; labels that look like truth values or dates are the texts that they are, whole numbers as 1.0 are numbers."""
    delimiter = _delimiter(file)
    listed = read_csv(file, delimiter)
    if label not in listed.column_names:
        return listed
    values = listed[label]
    if pa.types.is_floating(values.type) and pc.all(pc.equal(pc.floor(values), values)).as_py():
        return listed.set_column(listed.column_names.index(label), label, values.cast(pa.int64()))
    if pa.types.is_boolean(values.type) or pa.types.is_temporal(values.type):
        return read_csv(file, delimiter, {label: pa.string()})
    return listed


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix in {".tsv", ".tab"} else ","


def _only_list(folder: Path) -> str:
    found = sorted(
        file.name for file in folder.iterdir() if file.suffix in {".csv", ".tsv", ".parquet"}
    )
    if len(found) != 1:
        raise DataError(
            f"{folder} holds {len(found)} lists ({', '.join(found[:6]) or 'no .csv, .tsv or .parquet'}); name the right one as data.root."
        )
    return found[0]
