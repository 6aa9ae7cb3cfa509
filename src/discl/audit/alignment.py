"""Compares two thumbnails pixel by pixel, one as a crop of the other."""

from __future__ import annotations

from functools import cache

import numpy as np

from .coefficients import SIDE, SMALLEST_CROP, crop_axis

BLUR = 2.0
"""Standard deviation, in pixels, of the blur that is subtracted to compare details."""
LEAST_CORRELATION = 0.9
"""Of the whole thumbnails: copies have .92 and more."""
REFINEMENTS = ((0.025, 0.65), (0.0125, 0.75), (0.006, 0.85), (0.003, 0.0))
"""(step, as a fraction of the image, in which side and position of the crop are refined; smallest
correlation of details to go on with)."""


def align(query: np.ndarray, reference: np.ndarray, crop: tuple[float, float, float]) -> float:
    """The best correlation of details over crops near `crop`; −1 where the whole differs.

    - `query`, `reference` `[32, 32]`: grey values, float32.
    """
    whole, details = _unit(query), _unit(_details(query))
    best = (-1.0, -1.0, crop)
    for step, enough in REFINEMENTS:
        _, _, (scale, top, left) = best
        for side in _around(scale, step, SMALLEST_CROP - 0.03, 1.0):
            shift = (scale - side) / 2
            tops = _around(top + shift, step, 0.0, 1 - side)
            lefts = _around(left + shift, step, 0.0, 1 - side)
            rows = np.stack([crop_axis(side, each) for each in tops]) @ reference
            columns = np.stack([crop_axis(side, each) for each in lefts])
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
