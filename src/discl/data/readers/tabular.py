"""Parquet files, the hub, `save_to_disk`.

`datasets` and Arrow read these. By hand are the checks before them: which files a list may name,
and how long its lists of classes may be.
"""

from __future__ import annotations

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

from ...errors import DataError
from ..addresses import CELL, cell_address
from ..gate import Gate, Unreadable, refuse_outside, roots_of
from ..table import ImageTable
from .building import Source, arrow_images, files_below
from .columns import to_tables
from .opening import parse_json, plain_file

COPIED_BYTES = 4_000_000_000
MOST_CLASSES = 1_000_000
SHOWN_CHARACTERS = 300
SHOWN_FILES = 3
BATCH_BYTES = 16_000_000
"""Size of a batch of the copy, about: each batch of a mapped file costs a page or more, and a
million thumbnails in batches of 100 are many."""


def read_hub(source: Source) -> dict[str, ImageTable]:
    """A data set of the hub, `owner/name` or `owner/name:config@revision`."""
    address, _, revision = source.root.partition("@")
    name, _, config = address.partition(":")
    try:
        splits = dict(load_dataset(name, config or None, revision=revision or None))
        odd = [split for split, rows in splits.items() if not isinstance(rows, Dataset)]
        if odd or not splits:
            raise DataError(f"its splits ({', '.join(map(str, odd)) or 'none'}) are no tables")
    except Exception as error:
        raise DataError(
            f"'{source.root}' is no local folder, and it could not be loaded from the hub: {error}",
            argument="root",
        ) from error
    return to_tables(splits, source, *_hub_folders(name))


def _hub_folders(name: str) -> tuple[Path, ...]:
    """Where `datasets` and the hub keep the files of a data set on this machine."""
    cache = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    return cache, Path(config.EXTRACTED_DATASETS_PATH)


def read_saved(source: Source) -> dict[str, ImageTable]:
    """A folder that `datasets` wrote with `save_to_disk`."""
    try:
        _refuse_foreign_parts(source.path)
        loaded = load_from_disk(str(source.path))
        splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
        plain = {str(split): rows.with_format(None) for split, rows in splits.items()}
    except Unreadable as error:
        raise _not_saved(source.root, error) from error
    except DataError:
        raise
    except Exception as error:  # `datasets` raises anything on foreign lists
        raise _not_saved(source.root, error) from error
    return to_tables(plain, source, source.folder)


def _not_saved(root: str, error: Exception) -> DataError:
    return DataError(
        f"'{root}' cannot be read as a folder of save_to_disk: {_describe(error)}", argument="root"
    )


def _describe(error: BaseException) -> str:
    """The failure of a library, in one line."""
    return f"{type(error).__name__}: {str(error)[:SHOWN_CHARACTERS]}"


def _refuse_foreign_parts(folder: Path) -> None:
    """Raises for Arrow files or splits outside a folder of save_to_disk, and huge class lists."""
    gate = Gate(roots_of(folder))
    named = _read_object(folder / "dataset_dict.json", gate).get("splits", [])
    splits = [folder / str(split) for split in named] or [folder]
    for split in splits:
        gate.find(str(split))
        for file in _read_object(split / "state.json", gate).get("_data_files", []):
            plain_file(Path(gate.find(str(split / str(file["filename"])))))
        _refuse_huge_lists(_read_object(split / "dataset_info.json", gate), str(split))


def _read_object(file: Path, gate: Gate) -> dict[str, Any]:
    """The JSON object in a file, an empty one if it does not exist."""
    if not file.exists():
        return {}
    with gate.open(str(file)) as stream:
        return dict(parse_json(stream.read().decode(), str(file)))


def _refuse_huge_lists(stated: Any, where: str) -> None:
    """Raises DataError for a huge number of classes without names.

    `datasets` would write a name for each.
    """
    stack = [stated]
    while stack:
        each = stack.pop()
        if isinstance(each, list):
            stack += each
        elif isinstance(each, dict):
            stack += each.values()
            count = each.get("num_classes")
            if isinstance(count, int | float) and count > MOST_CLASSES and not each.get("names"):
                raise DataError(
                    f"{where}: a list of {count:,} classes without names; at most {MOST_CLASSES:,} "
                    "are read."
                )


def read_parquet(source: Source) -> dict[str, ImageTable]:
    """One Parquet file, or files that are named after their split.

    Small sets are copied once into a memory-mapped Arrow file of `datasets`. Images of larger ones
    (more than `COPIED_BYTES`) stay in the Parquet files, of which a row group is read at a time.
    For fast epochs `discl data prepare` writes them at training size.
    """
    root, path = source.root, source.path
    files = [path] if path.is_file() else files_below(path, "*.parquet")
    if not files:
        raise DataError(f"'{root}' holds no *.parquet file.", argument="root")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(file.stem.split("-")[0] if path.is_dir() else "train", []).append(file)
    refuse_outside(files, source.folder)
    large = sum(file.stat().st_size for file in files) > COPIED_BYTES
    in_place = large and all(_image_column(file, source) for file in files)
    splits = {  # one by one: a joint load uses the class names of one split
        split: _load_parquet(shards, in_place, source) for split, shards in by_split.items()
    }
    return to_tables(splits, source, source.folder, schemes=(CELL,) if in_place else ())


def _image_column(file: Path, source: Source) -> str | None:
    """The column of a Parquet file that holds images, not only their paths."""
    features = _features(file)
    usual = (source.columns.get("image"), "image", "img")
    image = next((name for name in usual if name in features), None)
    kind = features[image] if image is not None else None
    return None if isinstance(kind, Value) and "binary" not in kind.dtype else image


def _load_parquet(shards: list[Path], in_place: bool, source: Source) -> Dataset:
    try:
        features = [_features(shard) for shard in shards]
        for shard, each in zip(shards, features, strict=True):
            if each != features[0]:
                raise DataError(
                    f"{shard} has other columns or class names than {shards[0]}: {each} against "
                    f"{features[0]}."
                )
        if in_place and (image := _image_column(shards[0], source)) is not None:
            return _address_images(shards, image, features[0])
        count = sum(pq.read_metadata(shard).num_rows for shard in shards)
        size = sum(shard.stat().st_size for shard in shards)
        batch = int(np.clip(BATCH_BYTES * count // max(size, 1), 100, 10_000))
        return Dataset.from_parquet([str(shard) for shard in shards], writer_batch_size=batch)
    except (OSError, ValueError, TypeError, pa.ArrowException, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise DataError(
            f"{', '.join(map(str, shards[:SHOWN_FILES]))} cannot be read as Parquet: "
            f"{cause or error}"
        ) from error


def _features(file: Path) -> Features:
    """The columns of a Parquet file as `datasets` sees them. Raises DataError for other files."""
    try:
        schema = pq.read_schema(plain_file(file))
        twice = {name for name in schema.names if schema.names.count(name) > 1}
        if twice:
            raise DataError(
                f"{file}: the column {' and the column '.join(sorted(twice))} occurs twice; rename "
                "one of the two."
            )
        if (stated := (schema.metadata or {}).get(b"huggingface")) is not None:
            _refuse_huge_lists(parse_json(stated.decode(), f"the metadata of {file}"), str(file))
        return Features.from_arrow_schema(schema)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises anything on foreign metadata
        raise DataError(f"{file} cannot be read as Parquet: {_describe(error)}") from error


def _address_images(shards: list[Path], image: str, features: Features) -> Dataset:
    """The plain columns (numbers, texts) of the shards, and the address of each image's cell."""
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
    types = {name: features[name] for name in plain} | {image: ImageFeature(decode=False)}
    return Dataset(pa.concat_tables(parts), fingerprint=generate_random_fingerprint()).cast(
        Features(types)
    )
