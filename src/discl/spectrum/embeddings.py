"""CLIP embeddings of images as they are stored, and the nearest ones of an image."""

from __future__ import annotations

import threading
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import StoreError
from .store import Shards

SCHEMA = pa.schema(
    [("id", pa.string()), ("clip", pa.string()), ("embedding", pa.list_(pa.float32()))]
)
LARGEST_COSINE = 1.001
"""The largest cosine, and number of a vector of length 1, with a margin for rounding."""


def embedding_shards(folder: Path) -> Shards:
    """The store of embeddings, keyed by image (id, or digest of a real one) and CLIP."""
    return Shards(folder, SCHEMA, ("id", "clip"), filled=("embedding",))


@dataclass(frozen=True)
class _Space:
    """Embeddings by one CLIP.

    - `blocks`: float16 `[rows, dimensions]` of length 1, one for each shard, in the order of `ids`.
    """

    ids: list[str]
    row_of: dict[str, int]
    blocks: list[np.ndarray]

    def vector(self, name: str) -> np.ndarray:
        """float32 `[dimensions]`."""
        row = self.row_of[name]
        for block in self.blocks:
            if row < len(block):
                return block[row].astype(np.float32)
            row -= len(block)
        raise KeyError(name)

    def cosines(self, vector: np.ndarray) -> np.ndarray:
        """With each id, float32 `[ids]`; a block at a time is widened."""
        return np.concatenate([block.astype(np.float32) @ vector for block in self.blocks])


class Neighbours:
    """The nearest images in CLIP space, from stored embeddings; nothing is embedded here.

    They are read with the first question, and again where there are new ones. 100,000 embeddings of
    512 numbers take 100 MB.

    - `folder`: as of `embedding_shards`.
    """

    def __init__(self, folder: Path) -> None:
        self.shards = embedding_shards(folder)
        self._files: list[PurePath] | None = None
        self._spaces: list[_Space] = []
        self._lock = threading.Lock()

    def nearest(
        self, name: str, wanted: Container[str], count: int
    ) -> list[tuple[str, float]] | None:
        """(id, cosine) of the images nearest to one, best first; None if it has no embedding.

        - `name`: an id, or the digest of a real image.
        - `wanted`: ids to choose from. `name` itself is left out.
        - `count`: how many.
        """
        with self._lock:
            self._refresh()
            space = next((each for each in self._spaces if name in each.row_of), None)
        if space is None:
            return None
        cosines = space.cosines(space.vector(name))
        found: dict[str, float] = {}
        for row in np.argsort(-cosines, kind="stable").tolist():
            if len(found) == count:
                break
            other = space.ids[row]
            if other != name and other in wanted:
                found.setdefault(other, float(cosines[row]))  # two processes may have stored it
        return list(found.items())

    def _refresh(self) -> None:
        files = list(self.shards.files())
        if files == self._files:
            return
        parts: dict[tuple[str, int], tuple[list[str], list[np.ndarray]]] = {}
        for file in files:
            try:
                with self.shards.opened(file) as shard:
                    table = self.shards.read_columns(shard)
            except StoreError:
                continue
            for clip, ids, vectors in valid_embeddings(table):
                names, found = parts.setdefault((clip, vectors.shape[1]), ([], []))
                names += ids
                found.append(vectors.astype(np.float16))
        spaces = []
        for names, found in parts.values():
            row_of = {name: row for row, name in enumerate(names)}
            spaces.append(_Space(names, row_of, found))
        self._spaces = sorted(spaces, key=lambda space: -len(space.ids))
        self._files = files


def valid_embeddings(table: pa.Table) -> list[tuple[str, list[str], np.ndarray]]:
    """(CLIP, ids, float32 `[ids, dimensions]`) of stored rows, without those of no unit vectors.

    There is one for each CLIP and number of dimensions.
    """
    table = table.combine_chunks()
    widths = pc.fill_null(pc.list_value_length(table["embedding"]), 0).to_numpy()
    clips = np.asarray(table["clip"].to_pylist(), object)
    parts = []
    for clip, width in sorted({*zip(clips.tolist(), widths.tolist(), strict=True)}):
        rows = np.flatnonzero((clips == clip) & (widths == width))
        if not width:
            continue
        chosen = table.take(rows)
        numbers = pc.list_flatten(chosen["embedding"]).to_numpy().reshape(-1, width)
        valid = (np.abs(numbers) <= LARGEST_COSINE).all(axis=1)  # false for NaN and null
        ids = chosen["id"].filter(pa.array(valid)).to_pylist()
        parts.append((clip, ids, numbers[valid]))
    return parts
