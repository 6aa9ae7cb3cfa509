"""Finds images that are copies of others: as they are, mirrored, cropped, compressed or noisy.

Written by hand because `imagehash` and the like compare 64 bits per image, with no allowance for
crops. Here an image is a thumbnail of 32×32 grey values. The search compares 64 DCT coefficients
(a 64-bit DCT hash holds only their signs) for 55 crops and both mirror images at once. What it
proposes is aligned and compared pixel by pixel. `benchmarks/audit.py` has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from ..data import to_square

SIDE = 32
"""Pixels per side of a thumbnail."""
COEFFICIENTS = 64
SMALLEST_CROP = 0.8
"""Side of the smallest crop that is searched, as a fraction of the image."""
SCALES = {1.0: 1, 0.95: 2, 0.9: 3, 0.85: 4, 0.8: 5}
"""Sides of the crops that are compared, and positions of each per axis."""
PROPOSED = 0.9
"""Smallest cosine of coefficients at which two images are compared pixel by pixel. Copies have .91
and more, in 99 % of cases .93; other images of CIFAR-10 at most .89 in 99 %."""
CANDIDATES = 32
"""Most similar references that are aligned and compared pixel by pixel, per query."""
LEAST_CORRELATION = 0.9
"""Of the whole thumbnails: copies have .92 and more."""
BLUR = 2.0
"""Standard deviation, in pixels, of the blur that is subtracted to compare details."""
QUERIES_AT_ONCE, REFERENCES_AT_ONCE = 1024, 1024


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
    queries: np.ndarray,
    references: np.ndarray,
    *,
    same_query: np.ndarray | None = None,
    same_reference: np.ndarray | None = None,
    threshold: float = 0.9,
    candidates: int = CANDIDATES,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Copies:
    """Every query that shows the picture of a reference, or a crop of it.

    The search is exact over all pairs, in blocks, so memory does not grow with the number of pairs.
    A reference that is a crop of a query is found by the search in the other direction.

    - `queries` `[n, 32, 32]`, `references` `[m, 32, 32]`: uint8, from `make_thumbnail`.
    - `same_query` `[n]`, `same_reference` `[m]`: pairs of equal numbers are left out, such as an
      image and itself.
    - `threshold`: smallest `similarity`, in (0, 1].
    - `candidates`: most similar references that are aligned, per query. Fewer are faster, and lose
      crops in sets whose images look alike.
    - `on_progress`: called with the number of queries × references that were compared.
    """
    nearest, cosines = _propose(
        queries, references, same_query, same_reference, candidates, on_progress
    )
    found: list[tuple[int, int, float]] = []
    for row, column in np.argwhere(cosines >= PROPOSED):
        other = int(nearest[row, column])
        similarity = compare(queries[row], references[other])
        if similarity >= threshold:
            found.append((int(row), other, similarity))
    rows, others, similarities = zip(*found, strict=True) if found else ((), (), ())
    return Copies(
        np.asarray(rows, np.int64),
        np.asarray(others, np.int64),
        np.asarray(similarities, np.float32),
    )


def compare(query: np.ndarray, reference: np.ndarray) -> float:
    """Correlation of the details of two thumbnails, after the best crop and mirroring, in [−1, 1].

    −1 where the images differ at a glance.

    - `query`: uint8 `[32, 32]`, the reference or a crop of it.
    - `reference`: uint8 `[32, 32]`.
    """
    own, reference = _coefficients(query[None])[0], reference.astype(np.float32)
    variants = _cropped_coefficients(reference)
    even, odd = variants[:, ~_odd()] @ own[~_odd()], variants[:, _odd()] @ own[_odd()]
    result = -1.0
    for cosines, shown in ((even + odd, query), (even - odd, query[:, ::-1])):
        best = int(cosines.argmax())
        if cosines[best] >= PROPOSED:
            crop = _crops()[best]
            result = max(result, _align(shown.astype(np.float32), reference, crop))
    return result


# ---------------------------------------------------------------- proposals


def _propose(
    queries: np.ndarray,
    references: np.ndarray,
    same_query: np.ndarray | None,
    same_reference: np.ndarray | None,
    candidates: int,
    on_progress: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the most similar references, their cosines), both `[queries, candidates]`."""
    nearest = np.zeros((len(queries), candidates), np.int64)
    cosines = np.full((len(queries), candidates), -1, np.float32)
    own = _coefficients(queries)
    for start, block in _blocks(references, REFERENCES_AT_ONCE):
        variants = [_coefficients(block, *crop) for crop in _crops()]
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            rows = slice(first, first + QUERIES_AT_ONCE)
            best = _best_cosines(own[rows], variants)
            if same_query is not None and same_reference is not None:
                alike = same_query[rows, None] == same_reference[None, start : start + len(block)]
                best[alike] = -1
            columns = np.arange(start, start + len(block))
            together = np.concatenate([cosines[rows], best], 1)
            numbers = np.concatenate(
                [nearest[rows], np.broadcast_to(columns, (len(best), len(block)))], 1
            )
            order = np.argpartition(-together, candidates - 1, 1)[:, :candidates]
            cosines[rows] = np.take_along_axis(together, order, 1)
            nearest[rows] = np.take_along_axis(numbers, order, 1)
            on_progress(len(best) * len(block))
    return nearest, cosines


def _best_cosines(queries: np.ndarray, variants: list[np.ndarray]) -> np.ndarray:
    """Largest cosine over crops and mirroring, float32 `[queries, references]`.

    Mirroring changes the sign of the coefficients with an odd horizontal frequency.
    """
    odd = _odd()
    result = np.full((len(queries), len(variants[0])), -1, np.float32)
    for variant in variants:
        even_part = queries[:, ~odd] @ variant[:, ~odd].T
        even_part += abs(queries[:, odd] @ variant[:, odd].T)
        np.maximum(result, even_part, out=result)
    return result


def _blocks(images: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(images), size):
        yield start, images[start : start + size]


def _coefficients(
    thumbnails: np.ndarray, scale: float = 1.0, top: float = 0.0, left: float = 0.0
) -> np.ndarray:
    """Low-frequency DCT coefficients of a crop, of length 1, float32 `[images, 64]`.

    They are weighted by their frequency, because amplitudes of photos fall with it. An image of one
    colour has zeros.
    """
    basis = _basis()
    rows, columns = basis @ _crop_axis(scale, top), basis @ _crop_axis(scale, left)
    return _unit_rows(rows @ thumbnails.astype(np.float32) @ columns.T)


def _cropped_coefficients(thumbnail: np.ndarray) -> np.ndarray:
    """The same for every crop of one image, float32 `[crops, 64]`."""
    rows, columns = _crop_bases()
    return _unit_rows(rows @ thumbnail @ columns.transpose(0, 2, 1))


def _unit_rows(spectrum: np.ndarray) -> np.ndarray:
    vertical, horizontal = _frequencies()
    values = spectrum[:, vertical, horizontal] * np.hypot(vertical, horizontal).astype(np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.where(length > 1, values / np.maximum(length, 1), 0)


@cache
def _crop_bases() -> tuple[np.ndarray, np.ndarray]:
    """The cosines of every crop along rows and columns, each float32 `[crops, 16, 32]`."""
    rows = [_basis() @ _crop_axis(scale, top) for scale, top, _ in _crops()]
    columns = [_basis() @ _crop_axis(scale, left) for scale, _, left in _crops()]
    return np.stack(rows), np.stack(columns)


@cache
def _crops() -> tuple[tuple[float, float, float], ...]:
    """(side, top, left) of the crops that are compared, as fractions of the image."""
    return tuple(
        (scale, float(top), float(left))
        for scale, positions in SCALES.items()
        for top in np.linspace(0, 1 - scale, positions)
        for left in np.linspace(0, 1 - scale, positions)
    )


@cache
def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Vertical and horizontal frequencies of the 64 lowest coefficients without the mean."""
    pairs = sorted(
        (vertical**2 + horizontal**2, vertical, horizontal)
        for vertical in range(SIDE // 2)
        for horizontal in range(SIDE // 2)
    )[1 : COEFFICIENTS + 1]
    return np.asarray([pair[1] for pair in pairs]), np.asarray([pair[2] for pair in pairs])


@cache
def _odd() -> np.ndarray:
    """Whether a coefficient changes its sign in the mirror image, bool `[64]`."""
    return _frequencies()[1] % 2 == 1


@cache
def _basis() -> np.ndarray:
    """The cosines of the DCT, float32 `[16, 32]`."""
    positions = (np.arange(SIDE) + 0.5) / SIDE
    return np.cos(np.pi * np.arange(SIDE // 2)[:, None] * positions).astype(np.float32)


@cache
def _crop_axis(scale: float, offset: float) -> np.ndarray:
    """The matrix that resamples a crop of one axis to 32 pixels, float32 `[32, 32]`.

    Cubic convolution with a = −0.5, as Pillow's bicubic filter; pixels at the border are repeated.
    """
    positions = (offset + scale * (np.arange(SIDE) + 0.5) / SIDE) * SIDE - 0.5
    first = np.floor(positions).astype(int)
    matrix = np.zeros((SIDE, SIDE), np.float32)
    for tap in (-1, 0, 1, 2):
        distance = abs(positions - first - tap)
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        columns = np.clip(first + tap, 0, SIDE - 1)
        np.add.at(matrix, (np.arange(SIDE), columns), np.where(distance < 1, near, far))
    return matrix


# ---------------------------------------------------------------- pixel by pixel

REFINEMENTS = ((0.025, 0.65), (0.0125, 0.75), (0.006, 0.85), (0.003, 0.0))
"""(step, as a fraction of the image, in which side and position of the crop are refined; smallest
correlation of details to go on with)."""


def _align(query: np.ndarray, reference: np.ndarray, crop: tuple[float, float, float]) -> float:
    """The best correlation of details over crops near `crop`; −1 where the whole differs."""
    whole, details = _unit(query), _unit(_details(query))
    best = (-1.0, -1.0, crop)
    for step, enough in REFINEMENTS:
        _, _, (scale, top, left) = best
        for side in _around(scale, step, SMALLEST_CROP - 0.03, 1.0):
            shift = (scale - side) / 2
            tops = _around(top + shift, step, 0.0, 1 - side)
            lefts = _around(left + shift, step, 0.0, 1 - side)
            rows = np.stack([_crop_axis(side, each) for each in tops]) @ reference
            columns = np.stack([_crop_axis(side, each) for each in lefts])
            shown = rows[:, None] @ columns[None].transpose(0, 1, 3, 2)
            correlation = (_unit(shown) * whole).sum((-1, -2))
            fine = (_unit(_details(shown)) * details).sum((-1, -2))
            row, column = np.unravel_index(int((correlation + fine).argmax()), fine.shape)
            found = float(correlation[row, column]), float(fine[row, column])
            if sum(found) > best[0] + best[1]:
                best = (*found, (side, tops[row], lefts[column]))
        if best[1] < enough:
            break
    return best[1] if best[0] >= LEAST_CORRELATION else -1.0


def _around(value: float, step: float, least: float, most: float) -> list[float]:
    """The value and one step to each side, within limits; rounded, so that crops repeat."""
    near = (value + step * count for count in (-1, 0, 1))
    return sorted({round(min(max(each, least), max(most, least)), 4) for each in near})


def _unit(images: np.ndarray) -> np.ndarray:
    """Without their mean and of length 1."""
    images = images - images.mean((-1, -2), keepdims=True)
    length = np.sqrt((images**2).sum((-1, -2), keepdims=True))
    return images / np.maximum(length, 1e-6)


def _details(images: np.ndarray) -> np.ndarray:
    """What a blur takes away."""
    return images - _blur() @ images @ _blur().T


@cache
def _blur() -> np.ndarray:
    distance = np.arange(SIDE)[:, None] - np.arange(SIDE)
    weights = np.exp(-((distance / BLUR) ** 2) / 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
