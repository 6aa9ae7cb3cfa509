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

    Raises StoreError if one is not there, a shard is broken or holds a picture that has changed since it was made, or the disk has no
    room for them. The shards are copied once into one Arrow file in the run folder's `cache/`, which may be deleted at any time; so are
    those of a store elsewhere, as they are. A row that is there twice is taken once.
    """
    cache = run.path(paths.CACHE)
    files = run.spectrum.local_files(cache / paths.CACHED_SHARDS)
    if not files:
        raise StoreError("the store holds no image yet; run `discl generate` first.")
    run.spectrum.check_pictures(files, cache / paths.CHECKED_SHARDS)
    stored = mapped_rows(files, cache, ids, run.spectrum.ids)
    place = {name: row for row, name in enumerate(stored.select_columns("id")[:]["id"])}
    lacking = sum(name not in place for name in ids)
    if lacking:
        raise StoreError(
            f"the store lacks {lacking} of {len(ids)} images that the plan names; run `discl generate` first."
        )
    chosen = stored.select([place[name] for name in ids]).cast_column(
        "image", ImageFeature(decode=False)
    )
    if told := first_foreign(stored.data.column("image"), CLOSED):
        raise StoreError(
            f"the store {run.location(paths.SPECTRUM)} has an image without its bytes: {told}. Delete the shard that holds it."
        )
    return chosen
