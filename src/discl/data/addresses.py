"""Images inside tars and Parquet files, by address.

- `slice://OFFSET:SIZE::FILE` is a part of a file, such as a member of a tar.
- `parquet://ROW:COLUMN::FILE` is a cell of a Parquet file.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from .gate import Gate

if TYPE_CHECKING:
    import pyarrow as pa

SLICE, CELL = "slice://", "parquet://"
KEPT_GROUPS = 2
"""Row groups in memory: readers that go in order need neighbouring ones."""

_lock = Lock()


def cell_address(row: int, column: str, file: Path) -> str:
    """The address of a row of a column of a Parquet file."""
    return f"{CELL}{row}:{column}::{file}"


def slice_address(offset: int, size: int, file: Path) -> str:
    """The address of `size` bytes of a file."""
    return f"{SLICE}{offset}:{size}::{file}"


def read_slice(address: str, gate: Gate) -> bytes:
    """The bytes at an address.

    Raises Unreadable for a file that the gate refuses, OSError or ValueError for a wrong address.
    """
    position, file = _parse(address)
    offset, size = map(int, position.split(":"))
    with gate.open(file) as stream:
        stream.seek(offset)
        return stream.read(size)


def read_cell(address: str, gate: Gate) -> dict[str, Any]:
    """`{bytes, path}` of the cell at an address; raises as `read_slice` does.

    The path comes from the data; no reader of this package wrote it.
    """
    position, file = _parse(address)
    row, _, column = position.partition(":")
    return _read_cell(int(row), column, gate.find(file))


def _parse(address: str) -> tuple[str, str]:
    """(position in the file, the file) of an address."""
    position, _, file = address.partition("://")[2].partition("::")
    return position, file


def _read_cell(row: int, column: str, file: str) -> dict[str, Any]:
    starts = _group_starts(file)
    if row >= starts[-1]:
        raise ValueError(
            f"{file} has {starts[-1]} rows and no row {row}, so the file has changed since it was "
            "indexed"
        )
    group = int(np.searchsorted(starts, row, side="right")) - 1
    with _lock:  # one thread reads the group, the others use the cache
        cells = _read_group(file, column, group)
    value = cells[row - int(starts[group])].as_py()
    return value if isinstance(value, dict) else {"bytes": value, "path": None}


@lru_cache(64)
def _group_starts(file: str) -> np.ndarray:
    """The first row of each row group, and the number of rows."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file)
    return np.cumsum(
        [0, *(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))]
    )


@lru_cache(KEPT_GROUPS)
def _read_group(file: str, column: str, group: int) -> pa.ChunkedArray:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=[column])[column]
