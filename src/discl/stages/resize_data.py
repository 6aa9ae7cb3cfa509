"""`discl data prepare`: real images at the training size, once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image as ImageFeature
from PIL import Image

from ..data import ImageTable, to_square, to_whole
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.cache import mapped_rows
from ..spectrum.encoding import encode_image
from ..spectrum.store import picture_shards
from ..training.inference import side_of_five
from ..utils.console import progress
from ..utils.hashing import digest
from ..utils.logging import get_logger
from .prepare_data import split_rows_of

logger = get_logger(__name__)

ENCODING = "webp-lossless"
SHARD_ROWS = 512


def prepare_squares(run: Run) -> Path:
    """Writes missing squares, the pictures that training sees, to `prepared/` as lossless WebP.

    Training on them gives the same bits as training on the originals: only pixels that training
    does not see are lost. Returns the folder.
    """
    store = picture_shards(run.path(paths.PREPARED))
    store.clear_unfinished()
    present = store.ids()
    trainings = [run.recipe.training(name) for name in run.recipe.methods]
    sizes = sorted({(train.resize or train.image_size, train.resize_mode) for train in trainings})
    shapes = dict.fromkeys(
        (size, mode if split == "train" else "square", split)
        for (size, mode), split in product(sizes, run.tables)
    )
    chosen = run.recipe.evaluate
    if chosen.test_time_crops == 5:
        sides = {side_of_five(each.image_size, chosen.test_time_margin) for each in trainings}
        others = [split for split in run.tables if split != "train"]
        shapes |= dict.fromkeys(product(sorted(sides), ["square"], others))
    for size, mode, split in shapes:
        keys = _keys(run, split, size, mode)
        missing = [row for row, key in enumerate(keys) if key not in present]
        present |= set(keys)
        fit = partial(to_whole if mode == "whole" else to_square, size=size)
        square = partial(_square, run.tables[split], keys, fit)
        with (
            progress(f"prepare {split} images", len(missing)) as advance,
            ThreadPoolExecutor(os.cpu_count()) as threads,
        ):
            for first in range(0, len(missing), SHARD_ROWS):
                part = missing[first : first + SHARD_ROWS]
                store.append(list({row["id"]: row for row in threads.map(square, part)}.values()))
                advance(len(part))
    return run.path(paths.PREPARED)


def _square(
    table: ImageTable, keys: Sequence[str], fit: Callable[[Image.Image], np.ndarray], row: int
) -> dict[str, Any]:
    """A row of the store of squares."""
    data = encode_image(fit(table.image(row)), ENCODING)
    return {"id": keys[row], "image": {"bytes": data, "path": None}}


def prepared_table(run: Run, split: str, size: int, mode: str = "square") -> ImageTable:
    """The images of a split: prepared at `size` pixels if all are stored, else the originals.

    - `mode`: `train.resize_mode`; squares are the centres of the pictures, or the whole pictures
      squeezed.
    """
    table, store = run.tables[split], picture_shards(run.path(paths.PREPARED))
    if not store.files():
        return table
    keys = _keys(run, split, size, mode)
    files, cache = [str(file) for file in store.files()], run.path(paths.CACHE)
    store.check_images(files, cache / paths.CHECKED_SQUARES)
    stored = mapped_rows(files, cache / paths.CACHED_SQUARES, keys, store.ids)
    row_of = {key: row for row, key in enumerate(stored.select_columns("id")[:]["id"])}
    if any(key not in row_of for key in keys):
        logger.warning(
            f"prepared/ has not all {split} images of {size} pixels, so the originals are read; "
            "`discl data prepare` makes the missing ones"
        )
        return table
    squares = (
        stored.select([row_of[key] for key in keys])
        .select_columns("image")
        .cast_column("image", ImageFeature(decode=False))
    )
    rows = table.rows.select_columns([name for name in table.rows.column_names if name != "image"])
    for name in rows.column_names:
        squares = squares.add_column(name, rows[name][:])
    return ImageTable(squares, table.class_names)


def _keys(run: Run, split: str, size: int, mode: str) -> list[str]:
    """Ids of squares, by the picture's content, the size and the mode."""
    more = ["whole"] if mode == "whole" else []
    contents = split_rows_of(run, split, ["digest"])["digest"].to_pylist()
    return [digest(content, size, *more) for content in contents]
