"""Section `audit`: what `discl audit` reports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..audit.limits import Limits
from .paths import PathOrName
from .types import Strict

DEFAULT = Limits()


class Audit(Strict):
    """What `discl audit` reports. `benchmarks/audit.py` measures the limits."""

    leakage: Literal["drop", "keep"] = Field(
        "drop",
        description="synthetic images that copy a validation or test image: an error, and dropped "
        "by the filter; or a note",
    )
    features: PathOrName | None = Field(
        None,
        description="CLIP of collapsed and wandered classes, another one than the generator's; "
        "null: filter.checkpoint",
    )
    per_class: int = Field(
        200, ge=6, le=2000, description="images of a class and level whose features are compared"
    )
    copies: float = Field(
        DEFAULT.copies, gt=0, le=1, description="smallest correlation of details of two copies"
    )
    own_source: int = Field(
        DEFAULT.own_source,
        ge=0,
        le=100,
        description="level in per cent from which on an image may resemble its source",
    )
    dark: float = Field(
        DEFAULT.dark, ge=0, le=1, description="brightness that the brightest 5 % of an image reach"
    )
    bright: float = Field(
        DEFAULT.bright, ge=0, le=1, description="brightness that the darkest 5 % of an image exceed"
    )
    sharpness: float = Field(
        DEFAULT.sharpness, ge=0, le=10, description="Laplacian over contrast of a blurred image"
    )
    information: float = Field(
        DEFAULT.information, ge=0, le=8, description="bits of entropy of the grey values"
    )
    aspect: float = Field(
        DEFAULT.aspect, ge=1, le=20_000, description="longer side over shorter side"
    )
    size: float = Field(
        DEFAULT.size, ge=1, le=10**9, description="factor between an area and the median"
    )
    colour: float = Field(
        DEFAULT.colour, ge=0, le=1, description="difference of channels of a grey image"
    )
    coverage: float = Field(
        DEFAULT.coverage,
        ge=0,
        le=1,
        description="variety of the synthetic images of a class and level, as a fraction of that "
        "of as many real ones",
    )
    precision: float = Field(
        DEFAULT.precision,
        ge=0,
        le=1,
        description="fraction of the synthetic images of a class and level near real ones",
    )

    @property
    def limits(self) -> Limits:
        """The limits that the findings use."""
        chosen = self.model_dump(exclude={"leakage", "features", "per_class"})
        return Limits(**chosen)
