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

SYSTEMS = {"cuda": "discl.baselines.cuda:Cuda", "docl": "discl.baselines.docl:Docl", "ldmlr": "discl.baselines.ldmlr:Ldmlr"}
GROUP = "discl.systems"


def find_system(asked: str | Mapping[str, Any]) -> tuple[Callable[..., Companion], dict[str, Any]]:
    """The class of a system and the parameters that the recipe gives it.

    Raises RecipeError for an unknown name, a module that cannot be imported, or a parameter that the class does not take.
    """
    if not isinstance(asked, str) and not (isinstance(asked, Mapping) and isinstance(asked.get("name"), str)):
        raise RecipeError(f"a system is a name or a mapping such as {{name: cuda, threshold: 0.4}}; got {asked!r}.")
    name = asked if isinstance(asked, str) else asked["name"]
    given = {} if isinstance(asked, str) else {key: value for key, value in asked.items() if key != "name"}
    found = find_piece("system", name, SYSTEMS, GROUP)
    known = [each.name for each in inspect.signature(found).parameters.values() if each.kind is each.KEYWORD_ONLY]
    for key in given:
        if key not in known:
            raise RecipeError(unknown(f"parameter of system {name}", key, known))
    return found, given


def make_system(asked: str | Mapping[str, Any]) -> Companion:
    """A new companion for one training. Raises RecipeError as `find_system` does, or for values that the system refuses."""
    found, given = find_system(asked)
    try:
        return found(**given)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"system {asked!r}: {error}") from error
