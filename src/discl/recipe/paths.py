"""Which values may name a file or a folder.

Whoever treats such texts, wherever they stand in the tree, calls `change_places`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel

from ..errors import RecipeError, shorten


class Step(Enum):
    """A step down the tree that is no key of a section."""

    ANY = "each value of a mapping, each item of a list"
    DOTTED = "a mapping of keys such as train.optimizer.lr and lists of values; the keys are those that follow"


Keys = tuple[str | Step, ...]


@dataclass(frozen=True)
class Place:
    """Marks a field, or a part of its type, of which every text may name a file or folder of a machine.

    `within` are the keys of the folder in which it is looked up before any other. `ours` is False for names that another program reads
    (a server, a piece of one's own), which are never looked up here.
    """

    within: tuple[str, ...] = ()
    ours: bool = True


@dataclass(frozen=True)
class Overlay:
    """Marks a plain mapping whose keys are those of `section`; with `dotted` they hold dots, and lists of values to try."""

    section: type[BaseModel]
    dotted: bool = False


def check_path(value: str) -> str:
    """A text that may name a file or folder. Raises RecipeError where no file system takes it."""
    longest = max((len(name.encode()) for name in value.split("/")), default=0)
    if longest > 255 or len(value.encode()) > 4096:
        raise RecipeError(
            f"got {shorten(value)}, whose longest name has {longest} bytes; a file system takes "
            "names of at "
            "most 255 bytes, and at most 4,096 in all."
        )
    return value


Located = Annotated[str, Place(), AfterValidator(check_path)]
"""A text that may name a file or folder of this machine, or something elsewhere: on the hub, embedded, at a URL."""


@cache
def find_places(section: type[BaseModel]) -> tuple[tuple[Keys, Place], ...]:
    """(keys below a section, mark) of every field that is marked, those of nested sections and overlays among them."""
    found = {
        (str(name), *keys): place
        for name, field in section.model_fields.items()
        for keys, place in _below(field.annotation, *field.metadata)
    }
    return tuple(found.items())


def _below(kind: Any, *marks: Any) -> Iterator[tuple[Keys, Place]]:
    """(keys, mark) below a value of a type that has these marks."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        marks = (*marks, *more)
    for mark in marks:
        if isinstance(mark, Place):
            yield (), mark
        if isinstance(mark, Overlay):
            above = (Step.DOTTED,) if mark.dotted else ()
            yield from (((*above, *keys), place) for keys, place in find_places(mark.section))
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from find_places(kind)
    elif origin in (Union, UnionType):
        for part in parts:
            yield from _below(part)
    elif isinstance(origin, type) and issubclass(origin, Collection):
        for part in parts[1:] if issubclass(origin, Mapping) else parts:
            yield from (((Step.ANY, *keys), place) for keys, place in _below(part))


@cache
def find_texts(section: type[BaseModel]) -> frozenset[Keys]:
    """Keys below a section of the lists and mappings whose items are texts, such as class names."""
    return frozenset(
        (str(name), *keys)
        for name, field in section.model_fields.items()
        for keys in _texts_below(field.annotation, *field.metadata)
    )


def _texts_below(kind: Any, *marks: Any) -> Iterator[Keys]:
    """Keys, below a value of a type that has these marks, of the lists and mappings of texts."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        marks = (*marks, *more)
    for mark in marks:
        if isinstance(mark, Overlay):
            above = (Step.DOTTED,) if mark.dotted else ()
            yield from ((*above, *keys) for keys in find_texts(mark.section))
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from find_texts(kind)
    elif origin in (Union, UnionType):
        for part in parts:
            yield from _texts_below(part)
    elif isinstance(origin, type) and issubclass(origin, Collection):
        for part in parts[1:] if issubclass(origin, Mapping) else parts:
            if _is_text(part):
                yield ()
            yield from ((Step.ANY, *keys) for keys in _texts_below(part))


def _is_text(kind: Any) -> bool:
    """Whether a type has texts only, and perhaps null."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        return all(each is type(None) or _is_text(each) for each in get_args(kind))
    literal = get_origin(kind) is Literal and all(isinstance(each, str) for each in get_args(kind))
    return kind is str or literal


@cache
def _tree_of_texts(section: type[BaseModel]) -> dict[Any, Any]:
    """`find_texts` as a tree of steps, in which an END marks where one ends."""
    root: dict[Any, Any] = {}
    for keys in find_texts(section):
        below = root
        for key in keys:
            below = below.setdefault(key, {})
        below[END] = {}
    return root


END = object()


def holds_texts(section: type[BaseModel], keys: tuple[str, ...]) -> bool:
    """Whether the list or mapping at these keys of a plain tree is one of texts.

    The keys are those of mappings and, for an item of a list, anything.
    """
    states = [_tree_of_texts(section)]
    skip = False
    for key in keys:
        if skip:  # one of the values to try of a dotted key
            skip = False
            continue
        after = [each[step] for each in states for step in (key, Step.ANY) if step in each]
        dotted = [each[Step.DOTTED] for each in states if Step.DOTTED in each]
        for part in key.split(".") if dotted else ():
            dotted = [each[step] for each in dotted for step in (part, Step.ANY) if step in each]
        skip = bool(dotted)
        states = [*after, *dotted]
    return not skip and any(END in each for each in states)


def change_places(
    section: type[BaseModel], tree: Mapping[str, Any], change: Callable[[str, Place], str]
) -> dict[str, Any]:
    """A copy of the plain tree of a section in which each text at a marked place is what `change` makes of it.

    The tree need not be valid: what is missing, or of another shape than the section says, stays as it is.
    """
    changed = dict(tree)
    for keys, place in find_places(section):
        changed = _changed(changed, keys, lambda text, place=place: change(text, place))  # type: ignore[misc]
    return changed


def _changed(value: Any, keys: Keys, change: Callable[[str], str]) -> Any:
    if not keys and isinstance(value, str):
        return change(value)
    key, left = (
        (keys[0], keys[1:]) if keys else (Step.ANY, ())
    )  # a mark holds for all that lies below it
    if isinstance(value, list | tuple) and key is Step.ANY:
        return [_changed(each, left, change) for each in value]
    if not isinstance(value, Mapping):
        return value
    if key is Step.DOTTED:
        return {
            name: _tried(each, _left_of(left, str(name)), change) for name, each in value.items()
        }
    return {
        name: _changed(each, left, change) if key in (name, Step.ANY) else each
        for name, each in value.items()
    }


def _tried(values: Any, keys: Keys | None, change: Callable[[str], str]) -> Any:
    """The values to try of one dotted key, below each of which `keys` lead to a place; None where they lead to none."""
    return values if keys is None else _changed(values, (Step.ANY, *keys), change)


def _left_of(keys: Keys, dotted: str) -> Keys | None:
    """What is left of `keys` below a dotted key, which may end above the place or below it; None where it leads elsewhere."""
    parts = dotted.split(".")
    met = all(key in (part, Step.ANY) for key, part in zip(keys, parts, strict=False))
    return keys[len(parts) :] if met else None
