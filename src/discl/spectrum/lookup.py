"""Finds single images in the shards of a store, while others may still be written."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import StoreError
from ..utils.bounded_cache import BoundedCache
from .store import READERS, check_digests, picture_shards

CAPACITY = 96 * 2**20
"""Bytes of row groups that stay in memory."""
COLUMNS = ("id", "label", "prompt")
"""Columns that are read for all rows."""


class Lookup:
    """Where each image of a store is: its shard and its row group.

    Only new shards are read on `refresh`. A picture is read with its row group, so pictures that
    were written together take one read.

    - `folder`: the store, a path or a URL that fsspec knows.

    Attributes:

    - `table`: `COLUMNS` of all rows; a row that is stored twice is there once.
    - `problems`: message for each shard that cannot be read. The others are used.
    - `class_names`: names of the labels as the newest shard states them; empty if none does.

    Raises StoreError for a URL that fsspec cannot open.
    """

    def __init__(self, folder: Path | str) -> None:
        self.shards = picture_shards(folder, {"label": pa.int64(), "prompt": pa.string()})
        self.problems: dict[str, str] = {}
        self.class_names: list[str] = []
        self._parts: dict[PurePath, pa.Table] = {}
        self.table = self._joined()
        self._groups: BoundedCache[pa.Table] = BoundedCache(CAPACITY, lambda table: table.nbytes)
        self._places: dict[str, tuple[PurePath, int]] = {}
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    def refresh(self, files: list[PurePath] | None = None) -> bool:
        """Reads shards that are new; returns whether the rows are others than before.

        - `files`: the shards, if they have been listed.
        """
        with self._lock:
            listed = list(self.shards.files()) if files is None else files
            gone = [file for file in self._parts if file not in set(listed)]
            for file in gone:
                del self._parts[file]
            self.problems = {}
            new = [file for file in listed if file not in self._parts]
            with ThreadPoolExecutor(READERS) as readers:
                for file, part in zip(new, readers.map(self._try_part, new), strict=True):
                    if isinstance(part, StoreError):
                        self.problems[str(file)] = str(part)
                    else:
                        self._parts[file] = part
            if not gone and not any(file in self._parts for file in new):
                return False
            self.table = self._joined()
            self._places = {}
            for file, part in self._parts.items():
                groups = part["group"].to_pylist()
                for name, group in zip(part["id"].to_pylist(), groups, strict=True):
                    self._places.setdefault(name, (file, group))
            return True

    def find(self, name: str) -> dict[str, Any] | None:
        """All columns of an image; None if the store does not have it.

        Raises StoreError if its shard cannot be read, or if its bytes have changed.
        """
        place = self._places.get(name)
        if place is None:
            return None
        file, group = place
        with self._reading:  # pictures that are shown together are in one group
            table = self._groups.get(place, lambda: self._read_group(file, group))
        row = table.slice(pc.index(table["id"], name).as_py(), 1).to_pylist()[0]
        try:
            check_digests([row])
        except ValueError as error:
            raise StoreError(f"{error}.") from error
        return row

    def _try_part(self, file: PurePath) -> pa.Table | StoreError:
        try:
            return self._read_part(file)
        except StoreError as error:
            return error

    def _read_part(self, file: PurePath) -> pa.Table:
        with self.shards.opened(file) as shard:
            table = self.shards.read_columns(shard, COLUMNS)
            sizes = [
                shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)
            ]
            self.class_names = _class_names(shard.schema_arrow) or self.class_names
        groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        return table.append_column("group", pa.array(groups))

    def _read_group(self, file: PurePath, group: int) -> pa.Table:
        with self.shards.opened(file) as shard:
            return self.shards.read_columns(shard, None, [group])

    def _joined(self) -> pa.Table:
        empty = pa.schema([self.shards.schema.field(name) for name in COLUMNS]).empty_table()
        parts = [part.select(COLUMNS).replace_schema_metadata() for part in self._parts.values()]
        table = pa.concat_tables([empty, *parts]).combine_chunks()
        ids = table["id"]
        if pc.count_distinct(ids).as_py() == len(ids):
            return table
        _, first = np.unique(np.asarray(ids.to_pylist(), object).astype(str), return_index=True)
        return table.take(np.sort(first))


def _class_names(schema: pa.Schema) -> list[str]:
    """The names of the labels that `datasets` has written into the schema of a shard."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
