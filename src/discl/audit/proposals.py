"""Pairs of thumbnails that may show the same picture: a sieve, then exact cosines.

The sieve compares 32 coefficients for 14 crops and both mirror images, for all pairs, as matrix
products. What passes is compared in 64 coefficients for 55 crops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .coefficients import (
    COARSE_COEFFICIENTS,
    coarse_crops,
    coefficients,
    crops,
    odd,
    unit_rows,
)
from .stack import Stack

SIEVE = 0.8
"""Smallest coarse cosine at which two images are compared further. In CIFAR-10 and Fashion-MNIST,
99.5 % of copies have .81 and more; 0.1 % of the pairs of CIFAR have .8."""
PROPOSED = 0.9
"""Smallest cosine of coefficients at which two images are compared pixel by pixel. Copies have .91
and more, in 99 % of cases .93; other images of CIFAR-10 at most .89 in 99 %."""
WHOLE = (1.0, 0.0, 0.0)
QUERIES_AT_ONCE, REFERENCES_AT_ONCE = 256, 512
"""Such blocks stay in the cache of a core."""
PAIRS_AT_ONCE = 1_000_000
"""Pairs that are held between two steps."""
NO_CROP = -1
_Halves = tuple[np.ndarray, np.ndarray]
"""Coefficients that mirroring leaves, and those whose sign it changes."""


@dataclass(frozen=True)
class Pairs:
    """Pairs that are proposed, as columns of one length.

    - `queries`, `references`: int32, rows of the images.
    - `cosines`: float32, of the best crop.
    - `plain`, `mirrored`: int8, the best crop of the reference for the query as it is and for its
      mirror image; −1 where the cosine is below `PROPOSED`.
    """

    queries: np.ndarray
    references: np.ndarray
    cosines: np.ndarray
    plain: np.ndarray
    mirrored: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, rows: np.ndarray) -> Pairs:
        return Pairs(*(column[rows] for column in self._columns()))

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.queries, self.references, self.cosines, self.plain, self.mirrored

    @staticmethod
    def joined(parts: list[Pairs]) -> Pairs:
        columns = zip(*(part._columns() for part in parts), strict=True)
        return Pairs(*(np.concatenate(column) for column in columns))


NONE = Pairs(
    *(np.zeros(0, kind) for kind in (np.int32, np.int32, np.float32, np.int8, np.int8)),
)


def propose(
    queries: np.ndarray,
    references: np.ndarray | Stack,
    *,
    same_query: np.ndarray | None,
    same_reference: np.ndarray | None,
    candidates: int,
    on_progress: Callable[[int], None],
) -> Pairs:
    """The most similar references of each query, up to `candidates`, in order of the queries.

    Arguments as in `copies.find_copies`.
    """
    best = _Best(candidates, most=max(PAIRS_AT_ONCE, 2 * candidates * len(queries)))
    coarse, fine = _describe(queries)
    for start in range(0, len(references), REFERENCES_AT_ONCE):
        block = _Block.of(references[start : start + REFERENCES_AT_ONCE])
        waiting: list[np.ndarray] = []  # query × size of the block + reference
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            last = min(first + QUERIES_AT_ONCE, len(queries))
            even, changed = (part[first:last] for part in coarse)
            cosines = _coarse_cosines(even, changed, block)
            passed = np.flatnonzero(cosines >= SIEVE) + first * len(block)
            if same_query is not None and same_reference is not None:
                query, reference = np.divmod(passed, len(block))
                passed = passed[same_query[query] != same_reference[start + reference]]
            waiting.append(passed)
            on_progress(cosines.size)
            if sum(map(len, waiting)) >= PAIRS_AT_ONCE or last == len(queries):
                best.add(_compare(*fine, block, np.concatenate(waiting)), start)
                waiting = []
    return best.pairs()


def _describe(queries: np.ndarray) -> tuple[_Halves, _Halves]:
    """Coefficients of the sieve, and all coefficients, each (even, odd) and of length 1."""
    own = np.zeros((len(queries), len(odd())), np.float32)
    for first in range(0, len(queries), REFERENCES_AT_ONCE):
        rows = slice(first, first + REFERENCES_AT_ONCE)
        own[rows] = coefficients(queries[rows], WHOLE)
    return _split(unit_rows(own[:, :COARSE_COEFFICIENTS])), _split(unit_rows(own))


def match(queries: np.ndarray | Stack, references: np.ndarray | Stack) -> Pairs:
    """The rows whose query resembles its reference; both numbers of a pair are the row.

    - `queries`, `references` `[pairs, 32, 32]`: uint8.
    """
    found = [NONE]
    for start in range(0, len(queries), REFERENCES_AT_ONCE):
        rows = slice(start, start + REFERENCES_AT_ONCE)
        block = _Block.of(references[rows])
        even, changed = _split(unit_rows(coefficients(queries[rows], WHOLE)))
        cosines = (block.even @ even[..., None])[..., 0], (block.odd @ changed[..., None])[..., 0]
        numbers = np.arange(start, start + len(block))
        found.append(_near(numbers, numbers, *cosines))
    return Pairs.joined(found)


@dataclass(frozen=True)
class _Block:
    """Coefficients of all crops of some references, split by what mirroring changes.

    - `even`, `odd`: `[references, crops, coefficients]`, of length 1 together.
    - `coarse`: (even, odd) of each crop of the sieve, `[coefficients, references]`.
    """

    even: np.ndarray
    odd: np.ndarray
    coarse: list[_Halves]

    def __len__(self) -> int:
        return len(self.even)

    @staticmethod
    def of(thumbnails: np.ndarray) -> _Block:
        every = np.stack([coefficients(thumbnails, crop) for crop in crops()], 1)
        lowest = unit_rows(every[:, list(coarse_crops()), :COARSE_COEFFICIENTS])
        even, changed = (part.transpose(1, 2, 0).copy() for part in _split(lowest))
        coarse = list(zip(even, changed, strict=True))
        return _Block(*_split(unit_rows(every)), coarse)


@dataclass
class _Best:
    """The best pairs of each query so far.

    - `most`: pairs that are held before those that are not among the best are left out.
    """

    candidates: int
    most: int
    parts: list[Pairs] = field(default_factory=lambda: [NONE])

    def add(self, pairs: Pairs, start: int) -> None:
        """- `start`: the first reference of the block that `pairs` belong to."""
        shifted = (pairs.references + start).astype(np.int32)
        columns = (pairs.queries, shifted, pairs.cosines, pairs.plain, pairs.mirrored)
        self.parts.append(Pairs(*columns))
        if sum(map(len, self.parts)) > self.most:
            self.parts = [self.pairs()]

    def pairs(self) -> Pairs:
        every = Pairs.joined(self.parts)
        order = np.lexsort((every.references, -every.cosines, every.queries))
        sorted_queries = every.queries[order]
        rank = np.arange(len(order)) - np.searchsorted(sorted_queries, sorted_queries)
        return every.take(order[rank < self.candidates])


def _split(values: np.ndarray) -> _Halves:
    """Even and odd coefficients, each in one block of memory."""
    changed = odd()[: values.shape[-1]]
    return np.ascontiguousarray(values[..., ~changed]), np.ascontiguousarray(values[..., changed])


def _coarse_cosines(even: np.ndarray, odd: np.ndarray, block: _Block) -> np.ndarray:
    """Largest cosine over the crops of the sieve and mirroring, float32 `[queries, references]`.

    - `even`, `odd`: `[queries, coefficients]`.
    """
    result = np.full((len(even), len(block)), -1, np.float32)
    total, changed = np.empty_like(result), np.empty_like(result)
    for block_even, block_odd in block.coarse:
        np.matmul(even, block_even, out=total)
        np.matmul(odd, block_odd, out=changed)
        total += np.abs(changed, out=changed)
        np.maximum(result, total, out=result)
    return result


def _compare(own_even: np.ndarray, own_odd: np.ndarray, block: _Block, passed: np.ndarray) -> Pairs:
    """Of the pairs that passed the sieve, those with a cosine of `PROPOSED` and more.

    - `own_even`, `own_odd`: coefficients of the queries.
    - `passed`: query × size of the block + reference.
    """
    queries, references = np.divmod(passed, len(block))
    order = np.argsort(references, kind="stable")
    queries, references = queries[order], references[order]
    bounds = np.searchsorted(references, np.arange(len(block) + 1))
    found = [NONE]
    for reference in np.flatnonzero(np.diff(bounds)).tolist():
        rows = queries[bounds[reference] : bounds[reference + 1]]
        even = own_even[rows] @ block.even[reference].T
        changed = own_odd[rows] @ block.odd[reference].T
        found.append(_near(rows, np.full(len(rows), reference), even, changed))
    return Pairs.joined(found)


def _near(
    queries: np.ndarray, references: np.ndarray, even: np.ndarray, changed: np.ndarray
) -> Pairs:
    """The pairs with a cosine of `PROPOSED` and more.

    - `even`, `changed` `[pairs, crops]`: the parts of the cosine whose sign mirroring leaves and
      changes.
    """
    near = np.flatnonzero((even + abs(changed)).max(1, initial=-1) >= PROPOSED)
    if not len(near):
        return NONE
    even, changed = even[near], changed[near]
    plain, mirrored = even + changed, even - changed
    return Pairs(
        queries[near].astype(np.int32),
        references[near].astype(np.int32),
        np.maximum(plain, mirrored).max(1),
        _best_crop(plain),
        _best_crop(mirrored),
    )


def _best_crop(cosines: np.ndarray) -> np.ndarray:
    best = cosines.argmax(1)
    near = np.take_along_axis(cosines, best[:, None], 1)[:, 0] >= PROPOSED
    return np.where(near, best, NO_CROP).astype(np.int8)
