"""Checks of the strategy, objective and system of a method.

Built-in and installed ones are checked when the recipe is read. A plugin, `module:attribute`, is
only imported by `check_own_pieces`, in a stage that trains and with `--allow-plugins`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..baselines import make_system
from ..curriculum.policies import make_policy
from ..curriculum.strategies import follows_progress
from ..errors import RecipeError, arguments_named
from ..training.objectives import make_objective
from ..utils.plugins import PERMISSION, is_address, read_piece
from .methods import Method
from .train import Train

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .recipe import Recipe


PIECES = ("strategy", "objective", "system")


def addresses(name: str, method: Method) -> dict[str, str]:
    """`{key of the recipe: module:attribute}` of the plugins of a method."""
    system = read_piece("system", method.system)[0] if method.system is not None else None
    named = {"strategy": method.strategy, "objective": method.loss.name, "system": system}
    return {
        f"methods.{name}.{key}": text for key, text in named.items() if text and is_address(text)
    }


def tried_addresses(recipe: Recipe) -> dict[str, str]:
    """As `addresses`, of the values that `compare.tune` tries."""
    tune, found = recipe.compare.tune, {}
    spaces = {
        "space": tune.space,
        **{f"methods.{name}": each for name, each in tune.methods.items()},
    }
    for where, space in spaces.items():
        for key, values in (space or {}).items():
            if key.partition(".")[0] not in PIECES:
                continue
            for value in values:
                name = value.get("name") if isinstance(value, dict) else value
                if is_address(name):
                    found[f"compare.tune.{where}.{key}"] = str(name)
    return found


def check_own_pieces(recipe: Recipe, allow_plugins: bool, tuned: bool = False) -> None:
    """Imports and checks the plugins of every method, named as `module:attribute`.

    - `allow_plugins`: whether plugins may be imported. If not, a plugin raises RecipeError.
    - `tuned`: whether the values that `compare.tune` tries count as well.

    Raises RecipeError for a plugin of another kind, or one that does not fit the rest of its
    method.
    """
    found = {} if not tuned else tried_addresses(recipe)
    if recipe.loop is not None and is_address(
        policy := read_piece("policy", recipe.loop.policy)[0]
    ):
        found["loop.policy"] = policy
    for name, method in recipe.methods.items():
        found |= addresses(name, method)
    if found and not allow_plugins:
        raise RecipeError(
            "\n".join(f"{key}: '{each}' {PERMISSION}." for key, each in found.items())
        )
    if recipe.loop is not None and "loop.policy" in found:
        with arguments_named(policy="loop.policy"):
            make_policy(recipe.loop.policy, recipe.loop.rounds, allow_plugins)
    for name, method in recipe.methods.items():
        for key in addresses(name, method):
            try:
                check_piece(
                    key.rpartition(".")[2],
                    name,
                    method,
                    train=recipe.training(name),
                    levels=recipe.spectrum.levels,
                    allow_plugins=True,
                )
            except RecipeError as error:
                problem = str(error)
                raise RecipeError(
                    problem if problem.startswith("methods.") else f"{key}: {problem}"
                ) from error


def check_pieces(name: str, method: Method, train: Train, levels: Sequence[int]) -> None:
    """Raises RecipeError for a built-in or installed piece that does not fit its method."""
    own = addresses(name, method)
    for key in ("strategy", "system"):
        if f"methods.{name}.{key}" not in own:
            check_piece(key, name, method, train=train, levels=levels, allow_plugins=False)


def check_piece(
    key: str,
    name: str,
    method: Method,
    *,
    train: Train,
    levels: Sequence[int],
    allow_plugins: bool,
) -> None:
    """Raises RecipeError where the strategy, objective or system does not fit the method."""
    if key == "strategy":
        # raises errors that would otherwise appear after generation
        strategy = method.make_strategy(train, levels, allow_plugins)
        if method.prior == "effective" and follows_progress(method.strategy, strategy):
            raise RecipeError(
                f"methods.{name}: prior 'effective' needs a schedule that is known in advance, but "
                f"strategy '{method.strategy}' has none; use real."
            )
    elif key == "objective":
        make_objective(method.objective, allow_plugins)
    elif method.system is not None:
        _check_system(name, method, train, allow_plugins)


def _check_system(name: str, method: Method, train: Train, allow_plugins: bool) -> None:
    system, objective = make_system(method.system or "", allow_plugins), method.loss.name
    if (train.mixup or train.cutmix) and not system.takes_mixed:
        raise RecipeError(
            f"methods.{name}: system {method.system} needs the network's output for each image, "
            "which mixup and cutmix do not give; set them to 0, or remove the system."
        )
    reason = system.objection(objective)
    if reason is not None:
        raise RecipeError(
            f"methods.{name}: system {method.system} has no effect with objective {objective}: "
            f"{reason}. Use another objective, or remove the system."
        )
