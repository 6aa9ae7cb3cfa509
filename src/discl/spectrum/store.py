"""The spectrum on disk: a folder of Parquet shards, one row per synthetic image.

A shard is written beside its place and renamed into it, so a row exists whole or not at all. What is missing is the
plan minus the ids present: a crash, a new level or a second worker need no other bookkeeping. Scores lie in shards of
their own and are joined by id. Every shard opens with `datasets.load_dataset("parquet", data_files=...)`.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..digests import digest
from ..errors import StoreError


class Shards:
    """A folder of Parquet shards of one kind of row, keyed by `id`."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self.schema = folder, schema

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the rows as one shard. Raises StoreError, with nothing half-written in place, if the disk refuses."""
        if not rows:
            return
        name = f"part-{digest(sorted(row['id'] for row in rows))}.parquet"
        unfinished = self.folder / f".{name}.{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(list(rows), self.schema), unfinished, row_group_size=256)
            with unfinished.open("rb") as stream:
                os.fsync(stream.fileno())
            unfinished.replace(self.folder / name)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            raise StoreError(
                f"cannot write to {self.folder}: {error}. Finished shards are intact; mend the cause and run the same command again."
            ) from error

    def files(self) -> list[Path]:
        """Finished shards, sorted by name."""
        return sorted(self.folder.glob("part-*.parquet"))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of the finished shards, in no particular order."""
        tables = []
        for file in self.files():
            try:
                tables.append(pq.read_table(file, columns=None if columns is None else list(columns)))
            except (OSError, pa.ArrowInvalid) as error:
                raise StoreError(f"shard {file} cannot be read: {error}. Delete it and run the same command again.") from error
        if not tables:
            wanted = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
            return wanted.empty_table()
        return pa.concat_tables(tables, promote_options="default")

    def ids(self) -> set[str]:
        """Ids of the rows present."""
        return set(self.read(["id"]).column("id").to_pylist())

    def clear_unfinished(self, older_than: float = 3600.0) -> None:
        """Deletes what a killed writer left behind, never a finished shard nor, within `older_than` seconds, one that is being written."""
        for file in self.folder.glob(".part-*"):
            if time.time() - file.stat().st_mtime > older_than:
                file.unlink(missing_ok=True)


def spectrum_shards(folder: Path, class_names: Sequence[str]) -> Shards:
    """The store of synthetic images: how each was asked for, and its encoded picture."""
    from datasets import ClassLabel, Features, Image, Value

    text, number, real = Value("string"), Value("int32"), Value("float64")
    features = Features(
        {
            "id": text, "image": Image(), "label": ClassLabel(names=list(class_names)), "level": number, "seed": number, "attempt": number,
            "prompt": text, "negative_prompt": text, "source_id": text, "source_digest": text, "source_width": number,
            "source_height": number,
            "width": number, "height": number, "model": text, "scheduler": text, "num_inference_steps": number, "guidance_scale": real,
            "dtype": text, "encoding": text, "resize": text, "steps": text, "guidance_from": real, "guidance_to": real, "loras": text,
        }
    )  # fmt: skip
    return Shards(folder, features.arrow_schema)


def score_shards(folder: Path) -> Shards:
    """The store of filter scores; `scorer` is the digest of the CLIP and of the text that was compared with."""
    return Shards(folder, pa.schema([("id", pa.string()), ("scorer", pa.string()), ("clip_similarity", pa.float32())]))
