"""Strategies, objectives and systems by name.

A name is one of ours, that of an installed package's entry point, or an address, `module:attribute`. An
address is somebody's Python code: it is imported only where the caller gives leave (`allow_plugins`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial, reduce
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from ..errors import RecipeError, shorten, unknown
from .hashing import digest

LEAVE = (
    "is Python code that would run. If you trust it, add --allow-plugins "
    "(in Python: allow_plugins=True)"
)


def is_address(name: object) -> bool:
    """Whether a name is `module:attribute`, neither shipped nor an entry point."""
    return isinstance(name, str) and ":" in name


def check_address(kind: str, name: str) -> tuple[str, str]:
    """(module, attribute) of an address; nothing is imported.

    Raises RecipeError for what is no `module:attribute`, and for a module of Python itself: its functions,
    such as `os:system`, are no pieces of a training.
    """
    module, _, attribute = (part.strip() for part in name.partition(":"))
    words = [*module.split("."), *attribute.split(".")]
    if not all(word.isidentifier() and not word.startswith("__") for word in words):
        raise RecipeError(
            f"{kind} '{shorten(name, quoted=False)}' is no address; write module:attribute, for example "
            "my_package.mine:Mine."
        )
    if words[0] in sys.stdlib_module_names:
        raise _of_python(kind, name, words[0])
    return module, attribute


def find_piece(
    kind: str, name: str, shipped: Mapping[str, Any], group: str, allow_plugins: bool = False
) -> Callable[..., Any]:
    """What a name stands for; it is imported, and not called.

    - `shipped`: our pieces, `{name: piece, or its address}`; they go before an entry point's.
    - `group`: the group of entry points in which installed packages offer theirs.
    - `allow_plugins`: whether an address in `name` may be imported.

    Raises RecipeError for an unknown name, with the nearest one proposed, for an address without leave or
    where nothing is, and for what cannot be called or belongs to Python itself.
    """
    if name in shipped and not isinstance(shipped[name], str):
        return shipped[name]
    if is_address(name):
        check_address(kind, name)
        if not allow_plugins:
            raise RecipeError(f"{kind} '{shorten(name, quoted=False)}' {LEAVE}.")
    module, attribute = _home_of(kind, name, shipped, group)
    try:
        home = import_module(module)
        found = reduce(getattr, attribute.split("."), home)
    except Exception as error:
        told = str(error) if isinstance(error, (ImportError, AttributeError)) else repr(error)
        raise RecipeError(
            f"{kind} '{shorten(name, quoted=False)}' cannot be found: {told}{_remedy(module, error)}"
        ) from error
    if not callable(found):
        raise RecipeError(
            f"{kind} '{shorten(name, quoted=False)}' is a {type(found).__name__} and cannot be called."
        )
    maker = _maker_of(found)
    if maker in sys.stdlib_module_names:
        raise _of_python(kind, name, maker)
    _source(home)  # as it is loaded now; the file may be edited later
    return found


def own_source(
    kind: str, name: str, shipped: Mapping[str, Any], group: str, allow_plugins: bool = False
) -> str | None:
    """Digest of the source of a piece of your own, 32 hexadecimal digits; None for a piece that ships.

    It is of the module that the name leads to and of the one that defines the piece, not of what these
    import, as they were loaded. A module without source counts by its name and version. Raises RecipeError
    as `find_piece` does.
    """
    found = find_piece(kind, name, shipped, group, allow_plugins)
    if name in shipped:
        return None
    home = import_module(_home_of(kind, name, shipped, group)[0])
    modules = [
        each for each in (home, inspect.getmodule(found)) if each is not None and _is_own(each)
    ]
    return digest({each.__name__: _source(each) for each in modules}) if _is_own(home) else None


def _of_python(kind: str, name: str, module: str) -> RecipeError:
    return RecipeError(
        f"{kind} '{shorten(name, quoted=False)}' leads to Python's own module '{module}', which holds no {kind}; name a module "
        "of yours. One of yours with the same name needs another."
    )


def _maker_of(found: Any) -> str:
    """The package that defines what was found, whatever module offers it; empty where it does not tell."""
    while isinstance(found, partial):
        found = found.func
    return str(getattr(found, "__module__", None) or "").partition(".")[0]


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


def _home_of(kind: str, name: str, shipped: Mapping[str, Any], group: str) -> tuple[str, str]:
    """The (module, attribute) that a name stands for. Raises RecipeError for an unknown one."""
    own = (
        {}
        if name in shipped or is_address(name)
        else {entry.name: entry.value for entry in entry_points(group=group)}
    )
    address = name if is_address(name) else {**own, **shipped}.get(name)
    if address is None:
        raise RecipeError(
            f"{unknown(kind, name, [*shipped, *own])} One of your own is named as module:attribute."
        )
    module, _, attribute = address.partition(":")
    return module.strip(), attribute.strip()


def _remedy(module: str, error: Exception) -> str:
    """How to make a module importable, where it is that one (or a package above it) that was not found."""
    if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{error.name}."):
        return ""
    file = f"{module.partition('.')[0]}.py"
    return (
        ". Python has to be able to import it: install its package, or, in the folder where "
        f"{file} lies, run `PYTHONPATH=. discl …`."
    )


def check_call(
    kind: str, name: str, piece: Callable[..., Any], *positional: str, **given: Any
) -> None:
    """Raises RecipeError where a piece cannot be called with these arguments; it is not called.

    `positional` names those for the message.
    """
    try:
        inspect.signature(piece).bind(*positional, **given)
    except (TypeError, ValueError) as error:
        expected = ", ".join([*positional, *(f"{key}=" for key in given)])
        raise RecipeError(
            f"{kind} '{shorten(name, quoted=False)}' has to take ({expected}): {error}."
        ) from error


def named_parameters(piece: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a piece that have a name, so neither `*args` nor `**kwargs`; none where it does not tell."""
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        found = inspect.signature(piece).parameters.values()
    except (TypeError, ValueError):
        return []
    return [each for each in found if each.kind not in starred]
