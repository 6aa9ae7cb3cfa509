"""What one image tells about itself: how dark, bright, sharp, rich and colourful it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

LONGEST_SIDE = 256
"""Larger images are measured at this size."""


@dataclass(frozen=True)
class Measures:
    """Figures of one image.

    - `dark`: brightness below which 95 % of its pixels are, in [0, 1].
    - `bright`: brightness above which 95 % of its pixels are, in [0, 1].
    - `information`: entropy of its grey values in bits, 0 to 8.
    - `sharpness`: deviation of the Laplacian over that of the grey values, 0 or more; 0 for an
      image of one colour. White noise has about 4.5.
    - `colour`: difference of the colour channels below which 99 % of its pixels are, in [0, 1].
    """

    dark: float
    bright: float
    information: float
    sharpness: float
    colour: float


def measure_image(image: Image.Image) -> Measures:
    """The figures of an image.

    - `image`: RGB, of any size.
    """
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small)
    grey = np.asarray(small.convert("L"))
    counts = np.bincount(grey.ravel(), minlength=256)
    part = counts / grey.size
    present = part[part > 0]
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    most, least = (one(one(red, green), blue) for one in (np.maximum, np.minimum))
    spread = np.bincount((most - least).ravel(), minlength=256)
    return Measures(
        dark=_quantile(counts, 0.95) / 255,
        bright=_quantile(counts, 0.05) / 255,
        information=float(-(present * np.log2(present)).sum()),
        sharpness=_sharpness(grey.astype(np.float32)),
        colour=_quantile(spread, 0.99) / 255,
    )


def _quantile(counts: np.ndarray, fraction: float) -> float:
    """What np.quantile gives for whole values of which each has `counts[value]`."""
    ranks = counts.cumsum()
    place = (int(ranks[-1]) - 1) * fraction
    rank = int(place)
    low, high = ranks.searchsorted((rank, min(rank + 1, int(ranks[-1]) - 1)), "right").tolist()
    part, step = place - rank, high - low
    return float(high - step * (1 - part) if part >= 0.5 else low + step * part)


def _sharpness(grey: np.ndarray) -> float:
    """Of the inner pixels, with the four-neighbour Laplacian."""
    if min(grey.shape) < 3 or (deviation := grey.std()) == 0:
        return 0.0
    inner = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * inner).std() / deviation)
