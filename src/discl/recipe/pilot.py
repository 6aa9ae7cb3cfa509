"""Section `pilot`: what is measured before the spectrum is paid for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_serializer,
)

from ..mixtures import Mixture
from .types import Strict


def _as_list(value: Any) -> Any:
    """A name as a list; names of a list once each."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return list(dict.fromkeys(value))
    return [value] if isinstance(value, str) else value


class Pilot(Strict):
    """What `discl pilot` makes and measures before the spectrum is paid for."""

    images: int = Field(128, ge=8, le=100_000, description="images of each candidate")
    folds: int = Field(3, ge=2, le=100, description="of the cross-validation over hard images")
    mixture: Annotated[list[Mixture], BeforeValidator(_as_list)] = Field(
        ["class-balanced"],
        min_length=1,
        max_length=4,
        description="how classes are mixed, with and without synthetic images; a list: the first "
        "one for the gains, and all are compared on validation images",
    )
    judge: Literal["head", "network"] = Field(
        "head",
        description="what the gain is measured with. head: a linear head on features of the "
        "filter's CLIP; network: a small network, trained from scratch",
    )
    thresholds: list[Annotated[float, Field(ge=-1, le=1)]] | None = Field(
        None,
        min_length=1,
        max_length=20,
        description="of the filter, to choose from besides filter.threshold; null: those that keep "
        "all, three quarters, half and a quarter of a candidate's images",
    )
    real_per_class: int = Field(
        20, ge=2, le=10_000, description="real images of each class without hard images"
    )
    candidates: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        max_length=100,
        description="name: values of spectrum or prompts; none: the spectrum as it is",
    )

    @field_serializer("mixture")
    def _one_by_its_name(self, value: list[Mixture]) -> list[Mixture] | Mixture:
        return value[0] if len(value) == 1 else value
