"""The systems that DisCL is compared with.

A recipe names one as `system: cuda`, or with parameters as `system: {name: cuda, threshold: 0.4}`.
A custom system is a subclass of `discl.TrainingHook`. It is named by an entry point of the group
`discl.systems` or, with `allow_plugins`, as `module:Class`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError, shorten
from ..training.hooks import TrainingHook
from ..utils.plugins import check_parameters, find_piece, named_parameters, read_piece

SYSTEMS = {
    "cuda": "discl.baselines.cuda:Cuda",
    "docl": "discl.baselines.docl:Docl",
    "ldmlr": "discl.baselines.ldmlr:Ldmlr",
}
GROUP = "discl.systems"


def find_system(
    config: str | Mapping[str, Any], allow_plugins: bool = False
) -> tuple[type[TrainingHook], dict[str, Any]]:
    """The class of a system and its parameters; the class is not called.

    - `config`: a name, or a mapping with `name` and named arguments of the constructor.
    - `allow_plugins`: whether `module:Class` may be imported.

    Raises RecipeError for an unknown name or parameter, for `module:Class` without `allow_plugins`,
    for a failed import, and for a class that is not a subclass of `TrainingHook`.
    """
    name, parameters = read_piece("system", config)
    found = find_piece("system", name, SYSTEMS, GROUP, allow_plugins)
    if not isinstance(found, type) or not issubclass(found, TrainingHook):
        raise _no_hook(name, found)
    known = [each.name for each in named_parameters(found)]
    check_parameters("system", name, parameters, known)
    return found, parameters


def make_system(config: str | Mapping[str, Any], allow_plugins: bool = False) -> TrainingHook:
    """A new hook for one training; arguments as for `find_system`.

    Raises RecipeError as `find_system` does, and for values that the system refuses.
    """
    found, parameters = find_system(config, allow_plugins)
    try:
        return found(**parameters)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"system {shorten(config)}: {shorten(str(error), 300, quoted=False)}"
        ) from error


def _no_hook(name: str, found: Any) -> RecipeError:
    base = f"{TrainingHook.__module__}.{TrainingHook.__qualname__}"
    what = "class" if isinstance(found, type) else type(found).__name__
    return RecipeError(
        f"system '{name}' is a {what}, not a subclass of {base}, and was not called."
    )
