"""The stored images of a run, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from datasets import Image as ImageFeature

from ..data.gate import CLOSED, first_foreign
from ..errors import StoreError
from ..spectrum.cache import mapped_rows
from . import paths
from .run import Run


def stored_images(run: Run, ids: Sequence[str]) -> Dataset:
    """`id` and undecoded `image` of these rows of the store, in this order, memory-mapped.

    The shards, those of a remote store too, are copied once into an Arrow file in `cache/` of the
    run folder. It may be deleted at any time. A row that is stored twice is returned once.

    Raises StoreError if a row is missing, a shard is broken, a picture has changed since it was
    made, or the disk is full.
    """
    cache = run.path(paths.CACHE)
    files = run.spectrum.local_files(cache / paths.CACHED_SHARDS)
    if not files:
        raise StoreError("the store holds no image yet; run `discl generate` first.")
    run.spectrum.check_images(files, cache / paths.CHECKED_SHARDS)
    stored = mapped_rows(files, cache, ids, run.spectrum.ids)
    row_of = {name: row for row, name in enumerate(stored.select_columns("id")[:]["id"])}
    missing = sum(name not in row_of for name in ids)
    if missing:
        raise StoreError(
            f"{missing} of the {len(ids)} images that the plan names are not in the store; "
            "run `discl generate` first."
        )
    chosen = stored.select([row_of[name] for name in ids]).cast_column(
        "image", ImageFeature(decode=False)
    )
    if problem := first_foreign(stored.data.column("image"), CLOSED):
        raise StoreError(
            f"the store {run.location(paths.SPECTRUM)} has an image without its bytes: {problem}. "
            "Delete the shard that holds it."
        )
    return chosen
