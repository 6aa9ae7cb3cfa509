"""Pieces that a recipe names and that may be your own: systems, strategies, objectives. A name is resolved here and nowhere else."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache, reduce
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from .digests import digest
from .errors import RecipeError, unknown


def find_piece(kind: str, name: str, shipped: Mapping[str, Any], group: str) -> Callable[..., Any]:
    """What a name stands for: a piece of `shipped` (or its address there), of an entry point of `group`, or of `module:attribute`.

    A shipped name goes before an entry point's. Raises RecipeError for an unknown name, with the nearest one proposed, for an address
    where nothing is, and for what cannot be called.
    """
    if name in shipped and not isinstance(shipped[name], str):
        return shipped[name]
    module, _, attribute = _address(kind, name, shipped, group).partition(":")
    try:
        home = import_module(module.strip())
        found = reduce(getattr, attribute.strip().split("."), home)
    except (
        ImportError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # the last two: no module's name at all
        raise RecipeError(
            f"{kind} '{name}' cannot be found: {error}{_remedy(module.strip(), error)}"
        ) from error
    if not callable(found):
        raise RecipeError(f"{kind} '{name}' is a {type(found).__name__} and cannot be called.")
    _source(home)  # as it is loaded now; the file may be edited later
    return found


def own_source(kind: str, name: str, shipped: Mapping[str, Any], group: str) -> str | None:
    """Digest of the source of a piece of your own, 32 hexadecimal digits; None for a piece that ships.

    It is of the module that the name leads to and of the one that defines the piece, not of what these import, as they were loaded. A
    module without source counts by its name and version. Raises RecipeError as `find_piece` does.
    """
    found = find_piece(kind, name, shipped, group)
    if name in shipped:
        return None
    home = import_module(_address(kind, name, shipped, group).partition(":")[0].strip())
    modules = [
        each for each in (home, inspect.getmodule(found)) if each is not None and _is_own(each)
    ]
    return digest({each.__name__: _source(each) for each in modules}) if _is_own(home) else None


def _is_own(module: ModuleType) -> bool:
    return (
        module.__name__.partition(".")[0]
        not in {__name__.partition(".")[0], *sys.stdlib_module_names}
        or module.__name__ == "__main__"
    )


@cache
def _source(module: ModuleType) -> str:
    """Digest of a module's source when it was first asked for."""
    try:
        return digest(inspect.getsource(module))
    except (OSError, TypeError):
        return digest(module.__name__, str(getattr(module, "__version__", "")))


def _address(kind: str, name: str, shipped: Mapping[str, Any], group: str) -> str:
    """The `module:attribute` that a name stands for. Raises RecipeError for an unknown one."""
    own = (
        {}
        if name in shipped or ":" in name
        else {entry.name: entry.value for entry in entry_points(group=group)}
    )
    address = name if ":" in name else {**own, **shipped}.get(name)
    if address is None:
        raise RecipeError(
            f"{unknown(kind, name, [*shipped, *own])} One of your own is named as module:attribute."
        )
    return address


def _remedy(module: str, error: Exception) -> str:
    """How to make a module importable, where it is that one (or a package above it) that was not found."""
    if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{error.name}."):
        return ""
    file = f"{module.partition('.')[0]}.py"
    return f". Python has to be able to import it: install its package, or, in the folder where {file} lies, run `PYTHONPATH=. discl …`."


def check_call(
    kind: str, name: str, piece: Callable[..., Any], *positional: str, **given: Any
) -> None:
    """Raises RecipeError where a piece cannot be called with these arguments; `positional` names those for the message."""
    try:
        inspect.signature(piece).bind(*positional, **given)
    except (TypeError, ValueError) as error:
        expected = ", ".join([*positional, *(f"{key}=" for key in given)])
        raise RecipeError(f"{kind} '{name}' has to take ({expected}): {error}.") from error
