"""Finds images that are copies of others: as they are, mirrored, cropped, compressed or noisy.

Written by hand because `imagehash` and the like compare 64 bits per image, with no allowance for
crops. Here an image is a thumbnail of 32×32 grey values. The search compares DCT coefficients (a
64-bit DCT hash holds only their signs) for many crops and both mirror images at once. What it
proposes is aligned and compared pixel by pixel. `benchmarks/audit.py` has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data import to_square
from .alignment import align
from .coefficients import SIDE, crops
from .proposals import Pairs, match, propose
from .stack import Stack

Thumbnails = np.ndarray | Stack
QUERIES_HELD = 65_536
"""Of these the coefficients and the best pairs are held."""
CANDIDATES = 32
"""Most similar references that are aligned and compared pixel by pixel, per query."""


@dataclass(frozen=True)
class Copies:
    """Pairs that show the same picture.

    - `queries`, `references`: int64 `[pairs]`, rows of the images that were compared.
    - `similarity`: correlation of their details when aligned, float32 `[pairs]`, in [−1, 1].
    """

    queries: np.ndarray
    references: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """Grey values of the image's centre square, uint8 `[32, 32]`.

    - `image`: RGB, of any size.
    """
    return np.asarray(Image.fromarray(to_square(image, SIDE)).convert("L"))


def find_copies(
    queries: Thumbnails,
    references: Thumbnails,
    *,
    same_query: np.ndarray | None = None,
    same_reference: np.ndarray | None = None,
    threshold: float = 0.9,
    candidates: int = CANDIDATES,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Copies:
    """Every query that shows the picture of a reference, or a crop of it.

    All pairs are compared, in blocks, so beside the thumbnails and what is found memory does not
    grow with the images. A reference that is a crop of a query is found by the search in the other
    direction.

    - `queries` `[n, 32, 32]`, `references` `[m, 32, 32]`: uint8, from `make_thumbnail`; an array or
      a `Stack`.
    - `same_query` `[n]`, `same_reference` `[m]`: pairs of equal numbers are left out, such as an
      image and itself.
    - `threshold`: smallest `similarity`, in (0, 1].
    - `candidates`: most similar references that are aligned, per query. Fewer are faster, and lose
      crops in sets whose images look alike.
    - `on_progress`: called with the number of queries × references that were compared.
    """
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    for start in range(0, len(queries), QUERIES_HELD):
        part = slice(start, start + QUERIES_HELD)
        held = queries[part]
        pairs = propose(
            held,
            references,
            same_query=None if same_query is None else same_query[part],
            same_reference=same_reference,
            candidates=candidates,
            on_progress=on_progress,
        )
        similarity = _similarities(held, references, pairs)
        near = np.flatnonzero(similarity >= threshold)
        rows, others = (side[near].astype(np.int64) for side in (pairs.queries, pairs.references))
        found.append((rows + start, others, similarity[near]))
    return Copies(*map(np.concatenate, zip(*found, strict=True)))


def compare(queries: Thumbnails, references: Thumbnails) -> np.ndarray:
    """Correlation of the details of pairs, after the best crop and mirroring, float32 `[pairs]`.

    −1 where two images differ at a glance.

    - `queries` `[pairs, 32, 32]`: uint8, each the reference or a crop of it.
    - `references` `[pairs, 32, 32]`: uint8.
    """
    pairs = match(queries, references)
    result = np.full(len(queries), -1, np.float32)
    result[pairs.queries] = _similarities(queries, references, pairs)
    return result


def _similarities(queries: Thumbnails, references: Thumbnails, pairs: Pairs) -> np.ndarray:
    """Correlation of the details of pairs, float32 `[pairs]`."""
    similarity = np.full(len(pairs), -1, np.float32)
    columns = (pairs.queries, pairs.references, pairs.plain, pairs.mirrored)
    for pair, (row, other, *best) in enumerate(zip(*map(np.ndarray.tolist, columns), strict=True)):
        query, reference = queries[row].astype(np.float32), references[other].astype(np.float32)
        for shown, crop in zip((query, query[:, ::-1]), best, strict=True):
            if crop >= 0:
                similarity[pair] = max(similarity[pair], align(shown, reference, crops()[crop]))
    return similarity
