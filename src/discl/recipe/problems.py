"""Errors of pydantic in one line each, with key, value and fix."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..errors import RecipeError, shorten, unknown

BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
KINDS = {
    "dict_type": "a mapping, {key: value}",
    "model_type": "a mapping, {key: value}",
    "tuple_type": "a list",
    "list_type": "a list",
    "string_type": "a text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
}
"""What is expected, where pydantic names types of Python."""
DEEPEST = 12
"""Keys that are shown, at most."""


def explain(
    problem: Any, section: type[BaseModel], above: str = "", more: Sequence[str] = ()
) -> str:
    """One line about a problem that pydantic found in a section.

    - `problem`: an item of `ValidationError.errors()`.
    - `section`: the validated section.
    - `above`: key of the section in the recipe.
    - `more`: further keys that are allowed at the top of the section.
    """
    steps = [part for part in problem["loc"] if part != "[key]"]
    where = ".".join([*([above] if above else []), *(_shown(part) for part in steps[:DEEPEST])])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, RecipeError):
        text = str(cause)
        return text if not where or text.startswith(where) else f"{where}: {text}"
    if problem["type"] == "literal_error":
        known = re.findall("'([^']*)'", problem["ctx"]["expected"])
        of_a_key = problem["loc"][-1:] == ("[key]",)
        kind = f"key in {where.rpartition('.')[0]}" if of_a_key else f"value of {where}"
        return unknown(kind, problem["input"], known)
    if problem["type"] == "extra_forbidden":
        parent = where.rpartition(f".{_shown(steps[-1])}")[0] if "." in where else ""
        known = [key for model in _sections(section, steps[:-1]) for key in model.model_fields]
        return unknown(
            f"key in {parent or 'the recipe'}",
            str(steps[-1]),
            [*known, *([] if steps[:-1] else more)],
        )
    if problem["type"] == "missing":
        if isinstance(steps[-1], int):
            list_name, _, item = where.rpartition(".")
            return f"{list_name}: item {int(item) + 1} is missing; got {shorten(problem['input'])}."
        return f"{where}: this key is required."
    plain = KINDS.get(problem["type"])
    text = f"input should be {plain}" if plain else shorten(problem["msg"], 300, quoted=False)
    allowed = _range(section, steps) if problem["type"] in BOUNDS else ""
    return f"{where}: {text[:1].lower()}{text[1:]}; got {shorten(problem.get('input'))}.{allowed}"


def _shown(part: Any) -> str:
    return shorten(str(part), 60, quoted=False)


def _kinds(section: Any, steps: Sequence[Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """(type, marks) of all values that may be at these keys of a section."""
    kinds: list[tuple[Any, tuple[Any, ...]]] = [(section, ())]
    for step in steps:
        kinds = [each for kind, _ in kinds for each in _below(kind, step)]
    return kinds


def _below(kind: Any, step: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from _below(parts[0], step)
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        if step in kind.model_fields:
            found = kind.model_fields[step]
            yield found.annotation, tuple(found.metadata)
    elif origin in (Union, UnionType):
        for part in parts:
            yield from _below(part, step)
    elif isinstance(origin, type) and issubclass(origin, Collection):
        yield from ((part, ()) for part in parts[-1:])


def _sections(section: type[BaseModel], steps: Sequence[Any]) -> list[type[BaseModel]]:
    """The sections at these keys; none if there is no such key."""
    found: list[type[BaseModel]] = []
    waiting = [kind for kind, _ in _kinds(section, steps)]
    while waiting:
        kind = waiting.pop(0)
        if get_origin(kind) in (Annotated, Union, UnionType):
            waiting += get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
    return found


def _range(section: type[BaseModel], steps: Sequence[Any]) -> str:
    """The allowed range of a number in words; empty without two bounds."""
    low = high = ""
    for kind, marks in _kinds(section, steps):
        for mark in [*marks, *_marks(kind)]:
            if isinstance(mark, (Ge, Gt)):
                low = f"{mark.ge if isinstance(mark, Ge) else f'more than {mark.gt}'}"
            if isinstance(mark, (Le, Lt)):
                high = f"{mark.le if isinstance(mark, Le) else f'less than {mark.lt}'}"
    return f" Allowed: {low} to {high}." if low and high else ""


def _marks(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Annotated:
        for mark in get_args(kind)[1:]:
            yield from mark.metadata if isinstance(mark, FieldInfo) else [mark]
    if get_origin(kind) in (Annotated, Union, UnionType):
        for part in get_args(kind):
            yield from _marks(part)
