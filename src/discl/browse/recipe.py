"""What the page of `discl browse` needs of a recipe, read as a plain tree without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..curriculum.strategies import Planned, RandomLevels, make_strategy
from ..errors import RecipeError
from ..levels import REAL
from ..utils.stored import read_recipe_tree
from .rows import MethodRule

MOST_EPOCHS = 10_000
"""Epochs of a curriculum that are looked at."""


def rule_of(name: str, method: Mapping[str, Any], tree: Mapping[str, Any]) -> MethodRule:
    """Which images a method of a recipe may draw. Code that it names is not imported."""
    levels = sorted(tree["spectrum"]["levels"])
    epochs = (method.get("train") or {}).get("curriculum_epochs")
    epochs = tree["train"]["curriculum_epochs"] if epochs is None else epochs
    try:
        strategy = make_strategy(
            str(method["strategy"]),
            levels=levels,
            curriculum_epochs=epochs,
            level=method.get("level"),
        )
    except RecipeError:  # code of the user's own, which is not imported here
        strategy = None
    drawn = set(levels)
    if isinstance(strategy, Planned) and not isinstance(strategy, RandomLevels):
        some = range(0, epochs, max(1, epochs // MOST_EPOCHS))
        drawn = {level for epoch in some for level in strategy.levels(epoch, ())}
    drawn -= {REAL}
    if method.get("images") == "retrieved":
        drawn = set()
    scale = float(method.get("synthetic_scale", 3.0))
    return MethodRule(name, sorted(drawn), method.get("threshold"), scale)


def read_tree(path: Path) -> dict[str, Any]:
    """The recipe of a run folder; a file of an early version gets today's defaults."""
    tree = read_recipe_tree(path)
    if _is_whole(tree):
        return tree
    from ..recipe import load_recipe

    return load_recipe(path).plain()


def _is_whole(tree: Mapping[str, Any]) -> bool:
    """Whether a recipe states what this module reads of it."""
    try:
        return (
            all(_is_level(level) for level in tree["spectrum"]["levels"])
            and isinstance(tree["filter"]["threshold"], int | float)
            and type(tree["train"]["curriculum_epochs"]) is int
            and all(_is_whole_method(method) for method in tree["methods"].values())
            and all(type(tree["groups"][name]) is int for name in ("many", "few"))
            and isinstance(tree["runtime"].get("store"), str | None)
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _is_whole_method(method: Mapping[str, Any]) -> bool:
    epochs = (method.get("train") or {}).get("curriculum_epochs", 0)
    return (
        isinstance(method["strategy"], str)
        and (method.get("level") is None or _is_level(method["level"]))
        and isinstance(method.get("threshold"), int | float | None)
        and type(epochs) in (int, type(None))
        and isinstance(method.get("synthetic_scale", 0), int | float)
    )


def _is_level(level: Any) -> bool:
    return type(level) is int and 0 <= level <= REAL
