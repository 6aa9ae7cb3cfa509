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
    """`id` and `image` of these shards, memory-mapped; they are copied into `cache` where they are not there yet.

    A copy that cannot be read is made again once, and so is one that lacks some of `ids` that are
    among the shards' `known` ones. Raises StoreError where the disk has no room or a shard is
    broken.
    """
    found = _read(files, cache)
    if found is not None:
        lacking = set(ids).difference(found.select_columns("id")[:]["id"])
        if not lacking or lacking.isdisjoint(known()):
            return found
    if any(cache.glob("parquet/*/*/*/*.arrow")):
        logger.warning(
            f"{cache} holds a copy of the shards that cannot be used, so it is made again"
        )
    shutil.rmtree(cache / "parquet", ignore_errors=True)
    try:
        return _open(files, cache)
    except (DatasetGenerationError, OSError, ValueError, pa.ArrowException) as error:
        raise _not_copied(cache, error.__cause__ or error) from error


def _open(files: Sequence[str], cache: Path) -> Dataset:
    found = Dataset.from_parquet(list(files), cache_dir=str(cache), columns=COLUMNS)
    if not set(COLUMNS) <= set(found.column_names):
        raise ValueError(f"it has the columns {', '.join(found.column_names)}")
    return found


def _read(files: Sequence[str], cache: Path) -> Dataset | None:
    """The rows; None where they cannot be had and making the copy again may help."""
    try:
        return _open(files, cache)
    except (
        Exception
    ) as error:  # datasets reads files of its own in the folder, and has no error of its own
        if getattr(error.__cause__ or error, "errno", None) is not None:
            raise _not_copied(cache, error.__cause__ or error) from error
        return None


def _not_copied(cache: Path, cause: BaseException) -> StoreError:
    """Why the shards are not in the cache: only what the system refuses has a number, else a shard is broken."""
    if getattr(cause, "errno", None) is not None:
        return StoreError(
            f"the cache {cache} cannot be written: {cause}; free space and run again."
        )
    told = " ".join(str(cause).split())
    return StoreError(
        f"the shards cannot be copied to the cache {cache}: {told}; delete the shard that is "
        "broken, or free space, and run again."
    )
