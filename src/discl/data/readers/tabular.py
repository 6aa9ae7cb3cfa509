"""Parquet files, the hub, `save_to_disk`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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
from ..addresses import CELL, cell_address
from ..gate import Gate, Unreadable, roots_of
from ..table import OPTIONAL, ImageTable, check_table
from .building import Source, arrow_images, blank_rows, files_below, refuse_escape
from .labels import name_numbers, negative_labels
from .opening import parse_json, plain_file

COPIED_BYTES = 4_000_000_000
MOST_CLASSES = 1_000_000
SHOWN_CHARACTERS = 300
BATCH_BYTES = 16_000_000
"""Of the copy, about: a mapped file costs a page or more for each of its batches, and a million thumbnails in batches of 100 are many."""


def read_hub(source: Source) -> dict[str, ImageTable]:
    """A data set of the hub by its owner/name, with a configuration and a revision as owner/name:config@revision."""
    address, _, revision = source.root.partition("@")
    name, _, config = address.partition(":")
    try:
        splits = dict(load_dataset(name, config or None, revision=revision or None))
        odd = [split for split, rows in splits.items() if not isinstance(rows, Dataset)]
        if odd or not splits:
            raise DataError(
                f"no tables come for its splits ({', '.join(map(str, odd)) or 'there are none'})"
            )
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
        splits = dict(found) if isinstance(found, DatasetDict) else {"train": found}
        plain = {str(split): rows.with_format(None) for split, rows in splits.items()}
    except Exception as error:  # whatever befalls `datasets` on lists that others wrote
        raise DataError(
            f"data.root '{source.root}' cannot be read as a folder of save_to_disk: {_cause(error)}"
        ) from error
    return to_tables(plain, source, source.folder)


def _cause(error: BaseException) -> str:
    """What went wrong in a library, in one line."""
    return f"{type(error).__name__}: {str(error)[:SHOWN_CHARACTERS]}"


def _refuse_foreign_parts(folder: Path) -> None:
    """Raises DataError where the lists of a folder of save_to_disk name Arrow files or splits outside it, or huge lists of classes."""
    gate = Gate(roots_of(folder))
    try:
        named = _stated(folder / "dataset_dict.json", gate).get("splits", [])
        splits = [folder / str(split) for split in named] or [folder]
        for split in splits:
            gate.find(str(split))
            for file in _stated(split / "state.json", gate).get("_data_files", []):
                plain_file(Path(gate.find(str(split / str(file["filename"])))))
            _refuse_huge_lists(_stated(split / "dataset_info.json", gate), str(split))
    except (Unreadable, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise DataError(
            f"data.root '{folder}' cannot be read as a folder of save_to_disk: {_cause(error)}"
        ) from error


def _stated(file: Path, gate: Gate) -> dict[str, Any]:
    """The JSON object in a file, an empty one where there is none."""
    if not file.exists():
        return {}
    with gate.open(str(file)) as stream:
        return dict(parse_json(stream.read().decode(), str(file)))


def _refuse_huge_lists(stated: Any, where: str) -> None:
    """Raises DataError where a ClassLabel has a number of classes and no names, of which `datasets` would make a name for each."""
    waiting = [stated]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        elif isinstance(each, dict):
            waiting += each.values()
            count = each.get("num_classes")
            if isinstance(count, int | float) and count > MOST_CLASSES and not each.get("names"):
                raise DataError(
                    f"{where}: a list of {count:,} classes without names; at most {MOST_CLASSES:,} are read."
                )


def read_parquet(source: Source) -> dict[str, ImageTable]:
    """One Parquet file, or files that are named after their split.

    Pictures of small sets are copied once into one memory-mapped Arrow file of `datasets`; those of larger ones (more than `COPIED_BYTES`)
    stay in the Parquet files, of which a row group is read at a time. For fast epochs `discl data prepare` writes them at training size.
    """
    root, path = source.root, source.path
    files = [path] if path.is_file() else files_below(path, "*.parquet")
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
    features = _features(file)
    usual = (source.columns.get("image"), "image", "img")
    image = next((name for name in usual if name in features), None)
    kind = features[image] if image is not None else None
    return None if isinstance(kind, Value) and "binary" not in kind.dtype else image


def _load_parquet(shards: list[Path], stay: bool, source: Source) -> Dataset:
    try:
        features = [_features(shard) for shard in shards]
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
    except (OSError, ValueError, TypeError, pa.ArrowException, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise DataError(
            f"{', '.join(map(str, shards[:3]))} cannot be read as Parquet: {cause or error}"
        ) from error


def _features(file: Path) -> Features:
    """The columns of a Parquet file as `datasets` sees them. Raises DataError for a file that is none."""
    try:
        schema = pq.read_schema(plain_file(file))
        twice = {name for name in schema.names if schema.names.count(name) > 1}
        if twice:
            raise DataError(
                f"{file}: the column {' and the column '.join(sorted(twice))} stands twice; rename one of the two."
            )
        if (stated := (schema.metadata or {}).get(b"huggingface")) is not None:
            _refuse_huge_lists(parse_json(stated.decode(), f"the metadata of {file}"), str(file))
        return Features.from_arrow_schema(schema)
    except DataError:
        raise
    except Exception as error:  # whatever befalls `datasets` on metadata that others wrote
        raise DataError(f"{file} cannot be read as Parquet: {_cause(error)}") from error


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
    splits: Mapping[str, Dataset],
    source: Source,
    *folders: Path,
    schemes: Sequence[str] = (),
    numbers: bool = False,
) -> dict[str, ImageTable]:
    """`{split: table}` of data sets with the columns image and label, under the user's names for them.

    - `folders`: files that the column image names have to lie below one of them.
    - `schemes`: those of the addresses that the reader made.
    - `numbers`: labels that are texts are whole numbers, and sorted as such.
    """
    root, columns = source.root, source.columns
    splits = {split: rows for split, rows in splits.items() if not source.leaves_out(split)}
    places = {split: f"split '{split}' of '{root}'" for split in splits}
    renamed = {
        split: _rename_columns(rows, columns, places[split]) for split, rows in splits.items()
    }
    if len(renamed) == 1 and "split" in (rows := next(iter(renamed.values()))).column_names:
        renamed = _divide(rows)
        places = {split: f"split '{split}' of '{root}'" for split in renamed}
    renamed = {split: rows for split, rows in renamed.items() if not source.leaves_out(split)}
    if not renamed:
        raise DataError(f"data.splits leaves out every split of '{root}'; keep one for training.")
    for split, rows in renamed.items():
        _refuse_broken(rows, places[split])
        _refuse_blank(rows, places[split])
    names, to_label = _class_names(
        {places[split]: rows for split, rows in renamed.items()}, numbers
    )
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


def _refuse_broken(rows: Dataset, where: str) -> None:
    """Raises DataError for columns whose bytes are no values of their type: texts that are not UTF-8, lists that end before they begin."""
    try:
        rows.data.table.validate(full=True)
    except pa.ArrowException as error:
        raise DataError(f"{where} holds broken columns: {error}") from error


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


def _class_names(
    splits: Mapping[str, Dataset], numbers: bool
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The classes of all splits together, and the label of each value in the column `label`."""
    listed: dict[str, tuple[str, ...]] = {}
    values: set[Any] = set()
    for where, rows in splits.items():
        feature = rows.features["label"]
        kind = str(getattr(feature, "dtype", feature))
        if isinstance(feature, ClassLabel):
            listed[where] = tuple(map(str, feature.names))
        elif not isinstance(feature, Value) or (
            kind not in {"string", "large_string"} and "int" not in kind
        ):
            raise DataError(
                f"{where}: labels of type {kind}; whole numbers, texts or a ClassLabel are expected. "
                "Write the label as one of these, or name another column in data.columns, for example {label: their_name}."
            )
        found = set(rows.unique("label"))
        if below := sorted(value for value in found if isinstance(value, int) and value < 0):
            raise DataError(negative_labels(where, below))
        values |= found
    if listed:
        first, *others = listed.values()
        if len(listed) < len(splits) or any(names != first for names in others):
            told = " | ".join(
                f"{where}: {', '.join(listed.get(where, ('no names',))[:12])}" for where in splits
            )
            raise DataError(f"the splits name different classes, or in another order: {told}.")
        return first, {label: label for label in values}
    if all(isinstance(value, str) for value in values):
        names = name_numbers(values, next(iter(splits))) if numbers else tuple(sorted(values))
        return names, {name: label for label, name in enumerate(names)}
    if any(isinstance(value, str) for value in values):
        raise DataError("the labels are texts in one split and numbers in another.")
    ordered = sorted(values)
    return tuple(map(str, ordered)), {value: label for label, value in enumerate(ordered)}


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
        kind = getattr(rows.features["id"], "dtype", "")
        if not isinstance(rows.features["id"], Value) or "binary" in kind:
            raise DataError(
                f"{where}: the column 'id' holds {rows.features['id']}; texts or numbers are expected. Name another in data.columns."
            )
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
