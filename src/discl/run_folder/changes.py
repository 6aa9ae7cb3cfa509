"""Compares two recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import checkpoint_digest
from ..errors import BrokenFileError, RecipeError
from ..recipe import Recipe, load_recipe
from ..utils.stored import read_recipe_tree


def read_tree(kept: Path) -> dict[str, Any]:
    """The recipe that a folder keeps; nothing where it cannot be read."""
    try:
        return read_recipe_tree(kept)
    except BrokenFileError:
        return {}


def changed_values(old: dict[str, Any], recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of what differs, `runtime` aside, and a checkpoint that only lies elsewhere."""
    return compare_trees(with_defaults(old), recipe.plain())


def compare_trees(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """As `changed_values`, of two plain trees."""
    return [
        each
        for each in _differences({**old, "runtime": None}, {**new, "runtime": None})
        if not _only_moved(*each)
    ]


def _only_moved(key: str, before: Any, now: Any) -> bool:
    """Whether a key names a copy of the checkpoint that it named before."""
    if key.rpartition(".")[2] != "checkpoint" or not all(
        isinstance(each, str) and Path(each).is_dir() for each in (before, now)
    ):
        return False
    return checkpoint_digest(Path(before)) == checkpoint_digest(Path(now))


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe that was written before some keys were there, with their defaults, which are what it meant; others as they are."""
    try:
        return load_recipe(tree).plain()
    except RecipeError:
        return tree


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            each
            for name in dict.fromkeys([*old, *new])
            for each in _differences(
                old.get(name), new.get(name), f"{key}.{name}" if key else str(name)
            )
        ]
    return [] if old == new else [(key, old, new)]
