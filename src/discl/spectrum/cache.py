"""Shards as one memory-mapped Arrow file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from ..errors import StoreError
from ..utils.logging import get_logger

logger = get_logger(__name__)

COLUMNS = ["id", "image"]


def mapped_rows(
    files: Sequence[str], cache: Path, ids: Collection[str], known: Callable[[], set[str]]
) -> Dataset:
    """`id` and `image` of these shards, memory-mapped from a copy in `cache`.

    The copy is made again where it cannot be read, or lacks some of `ids` that the shards have.

    - `files`: the shards on this machine.
    - `known`: returns the ids in the shards.

    Raises StoreError where the disk has no room, and for a broken shard.
    """
    found = _read(files, cache)
    if found is not None:
        missing = set(ids).difference(found.select_columns("id")[:]["id"])
        if not missing or missing.isdisjoint(known()):
            return found
    if any(cache.glob("parquet/*/*/*/*.arrow")):
        logger.warning(
            f"{cache} holds a copy of the shards that cannot be used, so it is made again"
        )
    shutil.rmtree(cache / "parquet", ignore_errors=True)
    try:
        return _open(files, cache)
    except (DatasetGenerationError, OSError, ValueError, pa.ArrowException) as error:
        raise _copy_error(cache, error.__cause__ or error) from error


def _open(files: Sequence[str], cache: Path) -> Dataset:
    found = Dataset.from_parquet(list(files), cache_dir=str(cache), columns=COLUMNS)
    if not set(COLUMNS) <= set(found.column_names):
        raise ValueError(f"it has the columns {', '.join(found.column_names)}")
    return found


def _read(files: Sequence[str], cache: Path) -> Dataset | None:
    """The rows; None where they cannot be read and a new copy may help."""
    try:
        return _open(files, cache)
    except Exception as error:  # `datasets` reads its own files in the folder, with any error
        if getattr(error.__cause__ or error, "errno", None) is not None:
            raise _copy_error(cache, error.__cause__ or error) from error
        return None


def _copy_error(cache: Path, cause: BaseException) -> StoreError:
    """The error for shards that cannot be copied; without an `errno` a shard is broken."""
    if getattr(cause, "errno", None) is not None:
        return StoreError(
            f"the cache {cache} cannot be written: {cause}; free space and run again."
        )
    reason = " ".join(str(cause).split())
    return StoreError(
        f"the shards cannot be copied to the cache {cache}: {reason}; delete the broken shard, or "
        "free space, and run again."
    )
