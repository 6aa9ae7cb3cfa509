"""Types that the sections share."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from ..errors import RecipeError, shorten, unknown
from ..levels import REAL, TEXT_ONLY, check_level
from ..prompts import CAPTION, SETTING, fill


def one_of(kind: str, known: Any) -> BeforeValidator:
    """Validator of a name that must be one of `known`."""

    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in known:
            raise RecipeError(unknown(kind, value, known))
        return value

    return BeforeValidator(check)


def _template(value: str) -> str:
    fill(value, "")
    for slot in (CAPTION, SETTING):
        if slot in value:
            raise RecipeError(
                f"template '{shorten(value, quoted=False)}' holds {slot}; only prompts.templates "
                "may, because only they describe one image."
            )
    return value


def _image_template(value: str) -> str:
    fill(value, "")
    return value


LONGEST_NAME = 100
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices."""


def _name(value: str) -> str:
    if RESERVED.fullmatch(value) or value.endswith("."):
        raise RecipeError(
            f"'{value}' cannot be the name of a folder on every system: it ends in '.', or names a "
            "device on Windows; choose another name."
        )
    return value


def as_name(text: str) -> str:
    """The nearest name of a folder to a text: 1 to 100 ASCII letters, digits, '.', '_' and '-'."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:LONGEST_NAME].rstrip("-._")
    return f"data-{name}"[:LONGEST_NAME] if RESERVED.fullmatch(name) else name or "my-data"


Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME),
    AfterValidator(_name),
]
"""The name of a folder."""
LARGEST_SEED = 2**53
"""The largest whole number that JSON keeps exactly in every program."""
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


Level = Annotated[int, Field(ge=TEXT_ONLY, le=REAL), BeforeValidator(check_level)]
LevelKey = Annotated[
    int,
    Field(ge=TEXT_ONLY, le=REAL),
    BeforeValidator(
        lambda key: int(key) if re.fullmatch("[0-9]{1,3}", str(key)) else check_level(key)
    ),
]
"""A level as the key of a mapping, which JSON writes as a text."""
Template = Annotated[str, AfterValidator(_template)]
ImageTemplate = Annotated[str, AfterValidator(_image_template)]


def _first_truth(value: Any) -> bool | None:
    """A truth value, or the first one in a list or mapping of plain values; None without one."""
    if isinstance(value, bool):
        return value
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple):
        return None
    return next((found for part in parts if (found := _first_truth(part)) is not None), None)


@cache
def _takes_truth(section: type[BaseModel], name: str) -> bool:
    """Whether a key of a section may hold truth values, or a section that checks its own."""
    return _allows(section.model_fields[name].annotation)


def _allows(kind: Any) -> bool:
    if parts := get_args(kind):
        return any(_allows(part) for part in parts)
    return kind in (bool, Any) or (isinstance(kind, type) and issubclass(kind, BaseModel))


class Strict(BaseModel):
    """Frozen; an unknown key is an error.

    - `LATER`: keys that are written only where they differ from their defaults. They came later, so
      older fingerprints stay valid.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )
    LATER: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _plain(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unwritten = self._unwritten()
        return {key: value for key, value in write(self).items() if key not in unwritten}

    def _unwritten(self) -> set[str]:
        """Keys that are not written."""
        fields = type(self).model_fields
        defaults = {key: fields[key].get_default(call_default_factory=True) for key in self.LATER}
        return {key for key, value in defaults.items() if getattr(self, key) == value}

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `on` and `yes` as true, which pydantic would take for the number 1."""
        found = _first_truth(value)
        if found is not None and not _takes_truth(cls, str(info.field_name)):
            raise RecipeError(
                f"got the truth value {found} (YAML reads yes, no, on and off as one); put it in "
                "quotes if it is a text."
            )
        return value
