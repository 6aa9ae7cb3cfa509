"""Pieces that a recipe names and that may be your own: systems, strategies, objectives. A name is resolved here and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import reduce
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from .errors import RecipeError, unknown


def find_piece(kind: str, name: str, shipped: Mapping[str, Any], group: str) -> Callable[..., Any]:
    """What a name stands for: a piece of `shipped` (or its address there), of an entry point of `group`, or of `module:attribute`.

    A shipped name goes before an entry point's. Raises RecipeError for an unknown name, with the nearest one proposed, for an address
    where nothing is, and for what cannot be called.
    """
    if name in shipped and not isinstance(shipped[name], str):
        return shipped[name]
    own = {} if name in shipped or ":" in name else {entry.name: entry.value for entry in entry_points(group=group)}
    address = name if ":" in name else {**own, **shipped}.get(name)
    if address is None:
        raise RecipeError(f"{unknown(kind, name, [*shipped, *own])} One of your own is named as module:attribute.")
    module, _, attribute = address.partition(":")
    try:
        found = reduce(getattr, attribute.strip().split("."), import_module(module.strip()))
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: no module's name at all
        raise RecipeError(f"{kind} '{name}' cannot be found: {error}") from error
    if not callable(found):
        raise RecipeError(f"{kind} '{name}' is a {type(found).__name__} and cannot be called.")
    return found


def check_call(kind: str, name: str, piece: Callable[..., Any], *positional: str, **given: Any) -> None:
    """Raises RecipeError where a piece cannot be called with these arguments; `positional` names those for the message."""
    try:
        inspect.signature(piece).bind(*positional, **given)
    except (TypeError, ValueError) as error:
        expected = ", ".join([*positional, *(f"{key}=" for key in given)])
        raise RecipeError(f"{kind} '{name}' has to take ({expected}): {error}.") from error
