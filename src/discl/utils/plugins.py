"""Strategies, objectives and systems by name.

A name is a built-in one, the entry point of an installed package, or an address,
`module:attribute`. An address is Python code that would run, so it is imported only with
`allow_plugins`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, reduce
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from ..errors import RecipeError, shorten, unknown
from .hashing import digest

PERMISSION = (
    "is Python code that would run. If you trust it, add --allow-plugins "
    "(in Python: allow_plugins=True)"
)


def is_address(name: object) -> bool:
    """Whether a name is `module:attribute`, neither shipped nor an entry point."""
    return isinstance(name, str) and ":" in name


def check_address(kind: str, name: str) -> tuple[str, str]:
    """(module, attribute) of an address; nothing is imported.

    Raises RecipeError for anything but `module:attribute`, and for a module of Python itself. Its
    functions, such as `os:system`, are no parts of a training.
    """
    module, _, attribute = (part.strip() for part in name.partition(":"))
    words = [*module.split("."), *attribute.split(".")]
    if not all(word.isidentifier() and not word.startswith("__") for word in words):
        raise RecipeError(
            f"{kind} '{shorten(name, quoted=False)}' is no address; write module:attribute, for "
            "example my_package.mine:Mine."
        )
    if words[0] in sys.stdlib_module_names:
        raise _of_python(kind, name, words[0])
    return module, attribute


def read_piece(kind: str, config: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, parameters) of a piece in a recipe; the name is not looked up.

    - `kind`: what it is in words, such as `system`.
    - `config`: a name, or a mapping with `name` and parameters.

    Raises RecipeError for other values.
    """
    if isinstance(config, str):
        return config, {}
    if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
        raise RecipeError(
            f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} is a name, or a mapping of its name and "
            f"parameters such as {{name: NAME, parameter: value}}; got {shorten(config)}."
        )
    return config["name"], {key: value for key, value in config.items() if key != "name"}


def find_piece(
    kind: str, name: str, shipped: Mapping[str, Any], group: str, allow_plugins: bool = False
) -> Callable[..., Any]:
    """The class or function that a name stands for; it is imported, and not called.

    - `kind`: what it is, for messages, such as "strategy".
    - `shipped`: built-in ones, `{name: object, or its address}`; they win over entry points.
    - `group`: the group of entry points of installed packages.
    - `allow_plugins`: whether an address in `name` may be imported.

    Raises RecipeError for an unknown name, and proposes the nearest one. Raises it also for an
    address that is not allowed, leads nowhere, or leads to something that cannot be called or
    belongs to Python itself.
    """
    if name in shipped and not isinstance(shipped[name], str):
        return shipped[name]
    if is_address(name):
        check_address(kind, name)
        if not allow_plugins:
            raise RecipeError(f"{kind} '{shorten(name, quoted=False)}' {PERMISSION}.")
    module, attribute = _home_of(kind, name, shipped, group)
    try:
        home = import_module(module)
        found = reduce(getattr, attribute.split("."), home)
    except Exception as error:
        reason = str(error) if isinstance(error, (ImportError, AttributeError)) else repr(error)
        raise RecipeError(
            f"{kind} '{shorten(name, quoted=False)}' cannot be found: "
            f"{reason}{_remedy(module, error)}"
        ) from error
    if not callable(found):
        raise RecipeError(
            f"{kind} '{shorten(name, quoted=False)}' is a {type(found).__name__} and cannot be "
            "called."
        )
    maker = _maker_of(found)
    if maker in sys.stdlib_module_names:
        raise _of_python(kind, name, maker)
    _source(home)  # cached now, because the file may be edited later
    return found


def own_source(
    kind: str, name: str, shipped: Mapping[str, Any], group: str, allow_plugins: bool = False
) -> str | None:
    """Digest of the source of a plugin, 32 hexadecimal digits; None for a built-in one.

    It covers the module of the name and the module that defines the object, as they were loaded,
    but not their imports. A module without source counts by name and version. The arguments and
    errors are those of `find_piece`.
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
        f"{kind} '{shorten(name, quoted=False)}' leads to Python's own module '{module}', which "
        f"holds no {kind}; name a module of yours. Rename yours if it has the same name."
    )


def _maker_of(found: Any) -> str:
    """The package that defines an object, whatever module offers it; empty if unknown."""
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
    """Digest of a module's source at the first call."""
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
            f"{unknown(kind, name, [*shipped, *own])} Write a plugin as module:attribute."
        )
    module, _, attribute = address.partition(":")
    return module.strip(), attribute.strip()


def _remedy(module: str, error: Exception) -> str:
    """How to make a module importable, if it (or a package above it) was not found."""
    if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{error.name}."):
        return ""
    file = f"{module.partition('.')[0]}.py"
    return (
        ". Python has to be able to import it: install its package, or, in the folder where "
        f"{file} is, run `PYTHONPATH=. discl …`."
    )


def check_parameters(kind: str, name: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises RecipeError for a parameter that a piece does not have.

    - `kind`, `name`: of the piece, for the message.
    - `given`: names of the parameters in a recipe; `known`: those of the piece.
    """
    for key in given:
        if key not in known:
            raise RecipeError(
                unknown(f"parameter of {kind} {name}", key, known)
                if known
                else f"{kind} {name} has no parameter; got {shorten(key)}."
            )


def check_call(
    kind: str, name: str, piece: Callable[..., Any], *positional: str, **given: Any
) -> None:
    """Raises RecipeError where a plugin cannot be called with these arguments; it is not called.

    - `positional`: names of the positional arguments, for the message.
    """
    try:
        inspect.signature(piece).bind(*positional, **given)
    except (TypeError, ValueError) as error:
        expected = ", ".join([*positional, *(f"{key}=" for key in given)])
        raise RecipeError(
            f"{kind} '{shorten(name, quoted=False)}' must take ({expected}): {error}."
        ) from error


def named_parameters(piece: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that have a name, so neither `*args` nor `**kwargs`; none if unknown."""
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        found = inspect.signature(piece).parameters.values()
    except (TypeError, ValueError):
        return []
    return [each for each in found if each.kind not in starred]
