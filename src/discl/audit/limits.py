"""`Limits`: when an image or a class is a finding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """When an image or class is a finding.

    - `copies`: smallest correlation of details of two copies; see `copies.find_copies`.
    - `own_source`: level in per cent from which on an image may resemble its source.
    - `dark`: largest brightness, of the brightest 5 %, of an image that is too dark.
    - `bright`: smallest brightness, of the darkest 5 %, of an image that is too bright.
    - `sharpness`, `information`: see `Measures`; smaller ones are findings.
    - `aspect`: longer side over shorter side; larger ones are findings.
    - `size`: factor between the area of an image and the median of its split.
    - `colour`: largest difference of colour channels of a grey image.
    - `coverage`: variety of the synthetic images of a class, as a fraction of that of as many real
      ones; smaller ones are findings.
    - `precision`: fraction of the synthetic images of a class that are near real ones.
    """

    copies: float = 0.9
    own_source: int = 80
    dark: float = 0.25
    bright: float = 0.75
    sharpness: float = 0.15
    information: float = 1.0
    aspect: float = 3.0
    size: float = 16.0
    colour: float = 0.02
    coverage: float = 0.3
    precision: float = 0.3
