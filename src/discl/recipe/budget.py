"""Section `spectrum.budget`: the most that a run generates."""

from __future__ import annotations

from pydantic import Field, model_validator

from ..errors import RecipeError
from .types import Strict


class Budget(Strict):
    """The most that a run generates: one of the three.

    It counts the images of the plan, whether they are made now or were made before. A larger
    budget only adds images.
    """

    unet_rows: int | None = Field(
        None, ge=1, le=10**15, description="rows that the network computes; two per guided step"
    )
    images: int | None = Field(
        None,
        ge=0,
        le=10**12,
        description="images, kept or dropped; 0: no spectrum, for recipes that train on real "
        "images only",
    )
    hours: float | None = Field(
        None,
        gt=0,
        le=10**6,
        description="of the network on this machine's devices. Turned into UNet rows once, by "
        "its measured speed; the run keeps the number",
    )

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        stated = [name for name, value in self if value is not None]
        if len(stated) != 1:
            raise RecipeError(
                f"spectrum.budget states {' and '.join(stated) or 'nothing'}; write one of "
                "unet_rows, images and hours, such as {unet_rows: 50000}, or remove it."
            )
        return self
