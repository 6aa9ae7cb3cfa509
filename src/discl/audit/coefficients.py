"""DCT coefficients of thumbnails and of crops of them."""

from __future__ import annotations

from functools import cache

import numpy as np

SIDE = 32
"""Pixels per side of a thumbnail."""
COEFFICIENTS = 64
COARSE_COEFFICIENTS = 32
"""The lowest of them: they change less with the crop, so fewer crops are enough."""
SMALLEST_CROP = 0.8
"""Side of the smallest crop that is searched, as a fraction of the image."""
SCALES = {1.0: 1, 0.95: 2, 0.9: 3, 0.85: 4, 0.8: 5}
"""Sides of the crops that are compared, and positions of each per axis."""
COARSE_SCALES = {1.0: 1, 0.9: 2, 0.8: 3}
"""The same for the sieve. Its crops are among the others."""


def coefficients(thumbnails: np.ndarray, crop: tuple[float, float, float]) -> np.ndarray:
    """Low-frequency DCT coefficients of a crop, float32 `[images, 64]`.

    They are weighted by their frequency, because amplitudes of photos fall with it.

    - `thumbnails` `[images, 32, 32]`: grey values.
    - `crop`: see `crops`.
    """
    scale, top, left = crop
    rows, columns = basis() @ crop_axis(scale, top), basis() @ crop_axis(scale, left)
    return _weighted(rows @ thumbnails.astype(np.float32) @ columns.T)


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Of length 1 along the last axis; zeros for an image of one colour."""
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.where(length > 1, values / np.maximum(length, 1), 0)


@cache
def crops() -> tuple[tuple[float, float, float], ...]:
    """(side, top, left) of the crops that are compared, as fractions of the image."""
    return _grid(SCALES)


@cache
def coarse_crops() -> tuple[int, ...]:
    """Which of `crops` the sieve compares."""
    near = [np.abs(np.subtract(crops(), crop)).max(1) for crop in _grid(COARSE_SCALES)]
    return tuple(int(distance.argmin()) for distance in near)


@cache
def odd() -> np.ndarray:
    """Whether a coefficient changes its sign in the mirror image, bool `[64]`."""
    return _frequencies()[1] % 2 == 1


@cache
def basis() -> np.ndarray:
    """The cosines of the DCT, float32 `[16, 32]`."""
    positions = (np.arange(SIDE) + 0.5) / SIDE
    return np.cos(np.pi * np.arange(SIDE // 2)[:, None] * positions).astype(np.float32)


@cache
def crop_axis(scale: float, offset: float) -> np.ndarray:
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


def _grid(scales: dict[float, int]) -> tuple[tuple[float, float, float], ...]:
    return tuple(
        (scale, float(top), float(left))
        for scale, positions in scales.items()
        for top in np.linspace(0, 1 - scale, positions)
        for left in np.linspace(0, 1 - scale, positions)
    )


def _weighted(spectrum: np.ndarray) -> np.ndarray:
    vertical, horizontal = _frequencies()
    return spectrum[..., vertical, horizontal] * np.hypot(vertical, horizontal).astype(np.float32)


@cache
def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Vertical and horizontal frequencies of the 64 lowest coefficients without the mean."""
    pairs = sorted(
        (vertical**2 + horizontal**2, vertical, horizontal)
        for vertical in range(SIDE // 2)
        for horizontal in range(SIDE // 2)
    )[1 : COEFFICIENTS + 1]
    return np.asarray([pair[1] for pair in pairs]), np.asarray([pair[2] for pair in pairs])
