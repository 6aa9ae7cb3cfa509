"""Checks of the strategy, objective and system of a method.

Those that ship or belong to an installed package are checked as the recipe is read. An address,
`module:attribute`, is only text until `check_own_pieces` gets leave to import it, in a stage that trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..baselines import make_system, read_system
from ..curriculum.strategies import follows_progress, make_strategy
from ..errors import RecipeError, arguments_named
from ..training.objectives import make_objective
from ..utils.plugins import LEAVE, is_address
from .training import Method, Train

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .recipe import Recipe


PIECES = ("strategy", "objective", "system")


def addresses(name: str, method: Method) -> dict[str, str]:
    """`{key of the recipe: module:attribute}` of a method's pieces that are named so."""
    system = read_system(method.system)[0] if method.system is not None else None
    named = {"strategy": method.strategy, "objective": method.loss.name, "system": system}
    return {
        f"methods.{name}.{key}": text for key, text in named.items() if text and is_address(text)
    }


def tried_addresses(recipe: Recipe) -> dict[str, str]:
    """As `addresses`, of what `compare.tune` would try."""
    asked, found = recipe.compare.tune, {}
    spaces = {
        "space": asked.space,
        **{f"methods.{name}": each for name, each in asked.methods.items()},
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
    """Imports the pieces of every method that are named as `module:attribute`, and checks them.

    Raises RecipeError, before anything is imported, where there is one and `allow_plugins` is false, among
    the methods or, with `tuned`, among what is tried for them; with leave for a piece that is not of the kind
    asked for or does not go with the rest of its method.
    """
    found = {} if not tuned else tried_addresses(recipe)
    for name, method in recipe.methods.items():
        found |= addresses(name, method)
    if found and not allow_plugins:
        raise RecipeError("\n".join(f"{key}: '{each}' {LEAVE}." for key, each in found.items()))
    for name, method in recipe.methods.items():
        for key in addresses(name, method):
            try:
                check_piece(
                    key.rpartition(".")[2],
                    name,
                    method,
                    recipe.training(name),
                    recipe.spectrum.levels,
                    True,
                )
            except RecipeError as error:
                told = str(error)
                raise RecipeError(
                    told if told.startswith("methods.") else f"{key}: {told}"
                ) from error


def check_pieces(name: str, method: Method, train: Train, levels: Sequence[int]) -> None:
    """Raises RecipeError for a shipped or installed piece that does not go with the rest of its method."""
    own = addresses(name, method)
    for key in ("strategy", "system"):
        if f"methods.{name}.{key}" not in own:
            check_piece(key, name, method, train, levels, False)


def check_piece(
    key: str, name: str, method: Method, train: Train, levels: Sequence[int], allow_plugins: bool,
) -> None:  # fmt: skip
    """Raises RecipeError where the `strategy`, `objective` or `system` of a method cannot be what it is to be."""
    if key == "strategy":
        with arguments_named(curriculum_epochs="train.curriculum_epochs"):
            strategy = make_strategy(
                method.strategy,
                levels=levels,
                curriculum_epochs=train.curriculum_epochs,
                level=method.level,
                allow_plugins=allow_plugins,
            )  # raises what would otherwise show only after the spectrum is made
        if method.prior == "effective" and follows_progress(method.strategy, strategy):
            raise RecipeError(
                f"methods.{name}: prior 'effective' needs a schedule that is known beforehand, which strategy "
                f"'{method.strategy}' has not; use real."
            )
    elif key == "objective":
        make_objective(method.objective, allow_plugins)
    elif method.system is not None:
        _check_system(name, method, train, allow_plugins)


def _check_system(name: str, method: Method, train: Train, allow_plugins: bool) -> None:
    system, objective = make_system(method.system or "", allow_plugins), method.loss.name
    if (train.mixup or train.cutmix) and not system.takes_mixed:
        raise RecipeError(
            f"methods.{name}: system {method.system} goes by what the network says of each image, and mixup "
            "and cutmix show none alone; set them to 0, or leave the system out."
        )
    reason = system.objection(objective)
    if reason is not None:
        raise RecipeError(
            f"methods.{name}: system {method.system} has no effect beside objective {objective}: {reason}. "
            "Take another objective, or leave the system out."
        )
