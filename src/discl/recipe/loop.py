"""Section `loop`: rounds that generate, train and measure in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from ..curriculum.policies import make_policy
from ..curriculum.rounds import drawn_levels, round_starts
from ..errors import RecipeError, unknown
from ..utils.plugins import check_address, is_address, read_piece
from .types import Strict

if TYPE_CHECKING:
    from .methods import Method
    from .recipe import Recipe


def _policy(value: Any) -> Any:
    name, _ = read_piece("policy", value)
    if is_address(name):
        check_address("policy", name)
    else:
        make_policy(value, 1)
    return value


class Loop(Strict):
    """Rounds that generate, train and measure in turn.

    Each round asks for the images that the policy chooses. The curriculum is divided among the
    rounds, and its training goes on from one to the next. One round is a run without a loop.
    """

    rounds: int = Field(ge=1, le=1000, description="each has at least one curriculum epoch")
    policy: Annotated[str | dict[str, Any], BeforeValidator(_policy)] = Field(
        "uniform",
        description="what a round asks for: uniform, deficit, entropy, progress, or "
        "{name: entropy, low: 0.1}",
    )
    learner: str | None = Field(
        None,
        description="method whose training the rounds follow; null: the first with synthetic "
        "images. Others train on the finished spectrum",
    )
    explore: float = Field(
        0.2,
        ge=0,
        le=1,
        description="fraction of a round's budget that goes evenly to all classes and levels",
    )
    hold_out: float = Field(
        0.2,
        gt=0,
        le=0.5,
        description="entropy, progress: fraction of the hard images of each class that the "
        "learner is measured on instead of trained",
    )


def learner_of(recipe: Recipe) -> str | None:
    """The method whose training a loop of several rounds follows; None without such a loop."""
    loop = recipe.loop
    if loop is None or loop.rounds == 1:
        return None
    if loop.learner is not None:
        return loop.learner
    return next(name for name, each in recipe.methods.items() if each.takes_synthetic)


def check_loop(recipe: Recipe) -> None:
    """Raises RecipeError where the rounds of a loop cannot go on from one to the next."""
    loop = recipe.loop
    if loop is None:
        return
    if loop.learner is not None and loop.learner not in recipe.methods:
        raise RecipeError(unknown("method in loop.learner", loop.learner, recipe.methods))
    if loop.rounds == 1:
        return
    if loop.learner is None and not any(each.takes_synthetic for each in recipe.methods.values()):
        raise RecipeError(
            "loop needs a method that trains on synthetic images, and there is none "
            "(real-only, or level 100); add one, or remove loop."
        )
    spectrum = recipe.spectrum
    if spectrum.tries > 1 or spectrum.wanted is not None:
        raise RecipeError(
            f"loop.rounds = {loop.rounds} asks for further seeds itself; set spectrum.tries to 1 "
            "and remove spectrum.wanted. Policy deficit fills classes to a target."
        )
    if recipe.filter.rule != "threshold":
        raise RecipeError(
            f"loop.rounds = {loop.rounds} needs verdicts that stay, and those of filter.rule "
            f"{recipe.filter.rule} are made by a classifier of all images; use threshold."
        )
    name = str(learner_of(recipe))
    _check_learner(recipe, name, recipe.methods[name])


def _check_learner(recipe: Recipe, name: str, method: Method) -> None:
    """Raises RecipeError for a method whose training cannot go on with more images."""
    rounds, train = recipe.loop.rounds if recipe.loop else 1, recipe.training(name)
    why = ""
    if not method.takes_synthetic:
        why = f"takes no synthetic image (strategy {method.strategy})"
    elif method.system is not None:
        why = f"has system {method.system}, whose state is of a fixed set of images"
    elif method.prior == "effective":
        why = "has prior effective, which needs all images beforehand"
    if why:
        raise RecipeError(
            f"loop.rounds = {rounds}: the training of methods.{name} cannot go on from round to "
            f"round, because it {why}. Name another method in loop.learner."
        )
    if rounds > train.curriculum_epochs:
        raise RecipeError(
            f"loop.rounds = {rounds} exceeds the {train.curriculum_epochs} curriculum epochs of "
            f"methods.{name}, so rounds would have no epoch; use fewer rounds, or raise "
            "train.curriculum_epochs."
        )
    if is_address(method.strategy):
        return
    starts, levels = round_starts(rounds, train.curriculum_epochs), recipe.spectrum.levels
    strategy = method.make_strategy(train, levels)
    planned = drawn_levels(strategy, starts, train.curriculum_epochs, levels)
    if planned is not None and not all(planned):
        raise RecipeError(
            f"loop.rounds = {rounds}: round {planned.index(()) + 1} of methods.{name} draws no "
            f"level of the spectrum (strategy {method.strategy}). Name another method in "
            "loop.learner."
        )
