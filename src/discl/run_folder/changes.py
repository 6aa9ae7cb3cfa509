"""Compares two recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import checkpoint_digest
from ..errors import BrokenFileError, RecipeError
from ..recipe import Recipe, load_recipe
from ..utils.stored import read_recipe_tree


def read_tree(kept: Path) -> dict[str, Any]:
    """The recipe in a file as a plain tree; empty if it cannot be read."""
    try:
        return read_recipe_tree(kept)
    except BrokenFileError:
        return {}


def changed_values(old: dict[str, Any], recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of each difference.

    The sections `runtime`, `pilot` and `audit`, and checkpoints that were copied elsewhere, make no
    difference.
    """
    unused = dict.fromkeys(("runtime", "pilot", "audit"))
    before = {**_with_defaults(old), **unused}
    now = {**recipe.plain(), **unused}
    return [each for each in _differences(before, now) if not _is_moved(*each)]


def _is_moved(key: str, before: Any, now: Any) -> bool:
    """Whether a key names a copy of the checkpoint that it named before."""
    if key.rpartition(".")[2] != "checkpoint" or not all(
        isinstance(each, str) and Path(each).is_dir() for each in (before, now)
    ):
        return False
    return checkpoint_digest(Path(before)) == checkpoint_digest(Path(now))


def _with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the defaults of keys that it does not state; unchanged if it is not valid."""
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
