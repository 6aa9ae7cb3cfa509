"""`discl data prepare`: real images at the training size, once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Image as ImageFeature

from ..data import ImageTable, to_square, to_whole
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.cache import mapped_rows
from ..spectrum.encoding import encode_image
from ..spectrum.store import Shards
from ..utils.console import progress
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_table

logger = get_logger(__name__)

ENCODING = "webp-lossless"
SHARD_ROWS = 512


def prepare_squares(run: Run) -> Path:
    """Writes the square that training sees of every real image to `prepared/`, Parquet shards of lossless WebP; only what is missing.

    Training on them gives the same bits as training on the originals, for nothing is lost but the pixels that training does not see.
    """
    store = _store(run)
    store.clear_unfinished()
    present = store.ids()
    asked = [run.recipe.training(name) for name in run.recipe.methods]
    sizes = sorted({(train.resize or train.image_size, train.resize_mode) for train in asked})
    shapes = dict.fromkeys(
        (size, mode if split == "train" else "square", split)
        for (size, mode), split in product(sizes, run.tables)
    )
    for size, mode, split in shapes:
        table = run.tables[split]
        keys, fit = _keys(run, split, size, mode), to_whole if mode == "whole" else to_square
        missing = [row for row, key in enumerate(keys) if key not in present]
        present |= set(keys)

        def square(
            row: int,
            table: ImageTable = table,
            keys: list[str] = keys,
            size: int = size,
            fit: Any = fit,
        ) -> dict[str, Any]:
            data = encode_image(fit(table.image(row), size).transpose(1, 2, 0), ENCODING)
            return {"id": keys[row], "image": {"bytes": data, "path": None}}

        with (
            progress(f"prepare {split} images", len(missing)) as advance,
            ThreadPoolExecutor(os.cpu_count()) as threads,
        ):
            for first in range(0, len(missing), SHARD_ROWS):
                part = missing[first : first + SHARD_ROWS]
                store.append(list({row["id"]: row for row in threads.map(square, part)}.values()))
                advance(len(part))
    return run.path(paths.PREPARED)


def prepared_table(run: Run, split: str, size: int, mode: str = "square") -> ImageTable:
    """The images of a split as training at `size` pixels wants them: the prepared squares if all of
    them are there, else the originals.

    `mode` is `train.resize_mode`: squares are the centres of the pictures, or the whole pictures
    squeezed.
    """
    table, store = run.tables[split], _store(run)
    if not store.files():
        return table
    keys = _keys(run, split, size, mode)
    files, cache = [str(file) for file in store.files()], run.path(paths.CACHE)
    store.check_pictures(files, cache / paths.CHECKED_SQUARES)
    stored = mapped_rows(files, cache / paths.CACHED_SQUARES, keys, store.ids)
    place = {key: row for row, key in enumerate(stored.select_columns("id")[:]["id"])}
    if any(key not in place for key in keys):
        logger.warning(
            f"prepared/ lacks some {split} images of {size} pixels, so the originals are read; `discl data prepare` makes them"
        )
        return table
    squares = (
        stored.select([place[key] for key in keys])
        .select_columns("image")
        .cast_column("image", ImageFeature(decode=False))
    )
    rows = table.rows.select_columns([name for name in table.rows.column_names if name != "image"])
    for name in rows.column_names:
        squares = squares.add_column(name, rows[name][:])
    return ImageTable(squares, table.class_names)


def _store(run: Run) -> Shards:
    return Shards(
        run.path(paths.PREPARED),
        pa.schema(
            [
                ("id", pa.string()),
                ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                ("image_digest", pa.string()),
            ]
        ),
        later=("image_digest",),
    )


def _keys(run: Run, split: str, size: int, mode: str) -> list[str]:
    """What determines each square: the picture's content, the size and whether it is the centre or
    the whole."""
    listed = read_table(run.path(paths.DATA), ["split", "digest"])
    return [
        digest(content, size, *(["whole"] if mode == "whole" else []))
        for content in listed.filter(pc.equal(listed["split"], split))["digest"].to_pylist()
    ]
