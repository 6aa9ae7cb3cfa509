"""The systems that DisCL is compared with: each by its formulas, and those that take part in training as a `Companion`.

A recipe names one as `system: cuda`, or with parameters as `system: {name: cuda, threshold: 0.4}`. A system of your own is a
`discl.curriculum.companion.Companion`, named as `module:Class` or by an entry point of the group `discl.systems`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..curriculum.companion import Companion
from ..errors import RecipeError, unknown
from ..plugins import find_piece

SYSTEMS = {
    "cuda": "discl.baselines.cuda:Cuda",
    "docl": "discl.baselines.docl:Docl",
    "ldmlr": "discl.baselines.ldmlr:Ldmlr",
}
GROUP = "discl.systems"


def find_system(asked: str | Mapping[str, Any]) -> tuple[Callable[..., Companion], dict[str, Any]]:
    """The class of a system and the parameters that the recipe gives it.

    Parameters are those of its constructor that have a name. Raises RecipeError for an unknown name, a module that cannot be imported, a
    class that is no companion, or a parameter that it does not take.
    """
    if not isinstance(asked, str) and not (
        isinstance(asked, Mapping) and isinstance(asked.get("name"), str)
    ):
        raise RecipeError(
            f"a system is a name or a mapping such as {{name: cuda, threshold: 0.4}}; got {asked!r}."
        )
    name = asked if isinstance(asked, str) else asked["name"]
    given = (
        {}
        if isinstance(asked, str)
        else {key: value for key, value in asked.items() if key != "name"}
    )
    found = find_piece("system", name, SYSTEMS, GROUP)
    if isinstance(found, type) and not issubclass(found, Companion):
        raise _no_companion(name, found)
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [
        each.name for each in inspect.signature(found).parameters.values() if each.kind in named
    ]
    for key in given:
        if key not in known:
            raise RecipeError(
                unknown(f"parameter of system {name}", key, known)
                if known
                else f"system {name} has no parameter; got {key}."
            )
    return found, given


def make_system(asked: str | Mapping[str, Any]) -> Companion:
    """A new companion for one training. Raises RecipeError as `find_system` does, or for values that the system refuses."""
    found, given = find_system(asked)
    try:
        made = found(**given)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"system {asked!r}: {error}") from error
    if not isinstance(made, Companion):
        raise _no_companion(asked if isinstance(asked, str) else asked["name"], type(made))
    return made


def _no_companion(name: str, found: type) -> RecipeError:
    base = f"{Companion.__module__}.{Companion.__qualname__}"
    return RecipeError(
        f"system '{name}' gives a {found.__name__}, which is no companion of training; make it a subclass of {base}."
    )
