"""What every section of the recipe is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)

from ..errors import RecipeError, unknown
from ..levels import GuidanceLevel
from ..prompts import CAPTION, SETTING, fill


def _level(value: Any) -> GuidanceLevel:
    return value if isinstance(value, GuidanceLevel) else GuidanceLevel(value)


def one_of(kind: str, known: Any) -> BeforeValidator:
    """Validator of a name that has to be among `known`."""

    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in known:
            raise RecipeError(unknown(kind, str(value), known))
        return value

    return BeforeValidator(check)


def _template(value: str) -> str:
    fill(value, "")
    for place in (CAPTION, SETTING):
        if place in value:
            raise RecipeError(
                f"template '{value}' holds {place}; only prompts.templates may, for only they describe one image."
            )
    return value


def _image_template(value: str) -> str:
    fill(value, "")
    return value


Level = Annotated[
    GuidanceLevel, BeforeValidator(_level), PlainSerializer(lambda level: level.percent)
]
Template = Annotated[str, AfterValidator(_template)]
ImageTemplate = Annotated[str, AfterValidator(_image_template)]


class Strict(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `on` and `yes` as true, which pydantic would take for the number 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (
            bool,
            bool | None,
        ):
            raise RecipeError(
                f"got the truth value {value} (so YAML reads yes, no, on and off); put it in quotes if a text is meant."
            )
        return value
