"""Pictures that stay where they are inside larger files, and are read from there when they are asked for.

`slice://OFFSET:SIZE::FILE` is a part of a file, such as a member of a tar; `parquet://ROW:COLUMN::FILE` a cell of a Parquet file.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SLICE, CELL = "slice://", "parquet://"
KEPT_GROUPS = 2
"""Row groups that are kept: neighbours are asked for one after another by whoever reads in order."""

_lock = Lock()


def is_inside(path: str | None) -> bool:
    """Whether this is the address of a picture inside a larger file."""
    return path is not None and path.startswith((SLICE, CELL))


def cell_address(row: int, column: str, file: Path) -> str:
    """The address of a row of a column of a Parquet file."""
    return f"{CELL}{row}:{column}::{file}"


def file_of(path: str) -> str:
    """The file in which a picture lies: the path itself, or the larger file of an address."""
    return path.partition("::")[2] if is_inside(path) else path


def is_below(path: str, folder: Path) -> bool:
    """Whether a whole path, links followed, leads to a file below the folder; addresses inside other files do not."""
    return (
        not is_inside(path)
        and Path(path).is_absolute()
        and Path(path).resolve().is_relative_to(folder.resolve())
    )


def read_inside(address: str) -> dict[str, Any]:
    """`{bytes, path}` of what lies at an address. Raises OSError or ValueError where nothing does."""
    place, file = address.partition("://")[2].partition("::")[0], file_of(address)
    if address.startswith(SLICE):
        offset, size = map(int, place.split(":"))
        with Path(file).open("rb") as stream:
            stream.seek(offset)
            return {"bytes": stream.read(size), "path": None}
    row, _, column = place.partition(":")
    return _read_cell(int(row), column, file)


def _read_cell(row: int, column: str, file: str) -> dict[str, Any]:
    starts = _starts(file)
    if row >= starts[-1]:
        raise ValueError(
            f"{file} has {starts[-1]} rows; row {row} is none of them, so the file has changed"
        )
    group = int(np.searchsorted(starts, row, side="right")) - 1
    with _lock:  # one reader fetches the group, the others find it
        cells = _group(file, column, group)
    value = cells[row - int(starts[group])].as_py()
    stored = value if isinstance(value, dict) else {"bytes": value, "path": None}
    if (
        stored.get("bytes") is None
        and stored.get("path") is not None
        and not is_below(stored["path"], Path(file).parent)
    ):
        raise ValueError(
            f"the Parquet file names '{stored['path']}', outside its folder, and does not hold the picture"
        )
    return stored


@lru_cache(64)
def _starts(file: str) -> np.ndarray:
    """The first row of each row group, and the number of rows."""
    found = pq.read_metadata(file)
    return np.cumsum(
        [0, *(found.row_group(number).num_rows for number in range(found.num_row_groups))]
    )


@lru_cache(KEPT_GROUPS)
def _group(file: str, column: str, group: int) -> pa.ChunkedArray:
    with pq.ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=[column])[column]
