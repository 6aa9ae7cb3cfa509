"""The systems that DisCL is compared with.

A recipe names one as `system: cuda`, or with parameters as `system: {name: cuda, threshold: 0.4}`. A system of
your own is a subclass of `discl.training.hooks.TrainingHook`, named by an entry point of the group
`discl.systems` or, with `allow_plugins`, as `module:Class`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError, shorten, unknown
from ..training.hooks import TrainingHook
from ..utils.plugins import find_piece, named_parameters

SYSTEMS = {
    "cuda": "discl.baselines.cuda:Cuda",
    "docl": "discl.baselines.docl:Docl",
    "ldmlr": "discl.baselines.ldmlr:Ldmlr",
}
GROUP = "discl.systems"


def read_system(asked: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, parameters) that a recipe gives a system; nothing is looked up. Raises RecipeError for other shapes."""
    if isinstance(asked, str):
        return asked, {}
    if not isinstance(asked, Mapping) or not isinstance(asked.get("name"), str):
        raise RecipeError(
            f"a system is a name or a mapping such as {{name: cuda, threshold: 0.4}}; got {shorten(asked)}."
        )
    return asked["name"], {key: value for key, value in asked.items() if key != "name"}


def find_system(
    asked: str | Mapping[str, Any], allow_plugins: bool = False
) -> tuple[type[TrainingHook], dict[str, Any]]:
    """The class of a system and the parameters that the recipe gives it.

    Parameters are those of its constructor that have a name; it is not called. `allow_plugins` gives leave to
    import `module:Class`. Raises RecipeError for an unknown name, an address without leave, a module that
    cannot be imported, what is no subclass of TrainingHook, or a parameter that it does not take.
    """
    name, given = read_system(asked)
    found = find_piece("system", name, SYSTEMS, GROUP, allow_plugins)
    if not isinstance(found, type) or not issubclass(found, TrainingHook):
        raise _no_hook(name, found)
    known = [each.name for each in named_parameters(found)]
    for key in given:
        if key not in known:
            raise RecipeError(
                unknown(f"parameter of system {name}", key, known)
                if known
                else f"system {name} has no parameter; got {shorten(key)}."
            )
    return found, given


def make_system(asked: str | Mapping[str, Any], allow_plugins: bool = False) -> TrainingHook:
    """A new hook for one training.

    Raises RecipeError as `find_system` does, or for values that the system refuses.
    """
    found, given = find_system(asked, allow_plugins)
    try:
        return found(**given)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"system {shorten(asked)}: {shorten(str(error), 300, quoted=False)}"
        ) from error


def _no_hook(name: str, found: Any) -> RecipeError:
    base = f"{TrainingHook.__module__}.{TrainingHook.__qualname__}"
    what = "class" if isinstance(found, type) else type(found).__name__
    return RecipeError(
        f"system '{name}' is a {what} that is no hook of training, and was not called; make it a "
        f"subclass of {base}."
    )
