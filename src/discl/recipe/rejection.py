"""When images are rejected before they are finished."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from ..errors import RecipeError
from .types import Strict


class EarlyRejection(Strict):
    """Drops images on the way that look as if the filter would drop them.

    Some images of each level are finished first, and a bound is learnt from them. Images of fewer
    than five steps are not looked at.
    """

    loss: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="fraction of the images that the filter would keep which may be lost, at most",
    )
    audit: float = Field(
        0.05,
        ge=0,
        le=1,
        description="fraction of the rejected images that are finished all the same, so that the "
        "loss is measured",
    )
    at: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.1, 0.3],
        min_length=1,
        max_length=10,
        description="fractions of a chain at which its image is looked at; the loss is divided "
        "among them",
    )
    teach: int = Field(
        200,
        ge=20,
        le=1_000_000,
        description="images of each level that are finished first; twice as many while too few of "
        "them are kept for a bound",
    )

    @field_validator("audit")
    @classmethod
    def _is_measured(cls, value: float) -> float:
        if value == 0:
            raise RecipeError(
                "got 0: without an audit nobody learns how many good images are lost; write a "
                "fraction such as 0.05."
            )
        return value
