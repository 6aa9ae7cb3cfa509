"""Lays one plain tree over another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError, shorten
from ..utils.yaml_text import RECIPE as LIMITS


@dataclass(frozen=True)
class Whole:
    """A value that replaces what is below it as it is, even if it is a mapping or null."""

    value: Any


def merge(below: Any, above: Any) -> Any:
    """`above` laid over `below`; neither is changed.

    Mappings are merged key by key. Every other value replaces what is below it. A null removes the
    key below it, so that the default holds again. A `Whole` is never merged.
    """
    if isinstance(above, Whole):
        return above.value
    if not isinstance(above, Mapping):
        return above
    merged = dict(below) if isinstance(below, Mapping) else {}
    for key, value in above.items():
        if value is None and key in merged:
            del merged[key]
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def set_value(tree: Any, key: str, value: Any, what: str = "") -> Any:
    """A copy of the tree with the value at a key such as `train.epochs`, replaced as a whole.

    Missing sections are added. `what` begins the message of errors. Raises RecipeError for a key
    with too many parts or below a value that is no mapping.
    """
    keys = key.split(".")
    if len(keys) > LIMITS.depth:
        raise RecipeError(
            f"{what}the key has {len(keys)} parts; at most {LIMITS.depth} are allowed."
        )
    branch = tree
    for name in keys:
        if branch and not isinstance(branch, Mapping):
            raise RecipeError(
                f"{what}'{shorten(name, quoted=False)}' is below a value that is no mapping."
            )
        branch = (branch or {}).get(name)
    change: Any = Whole(value)
    for name in reversed(keys):
        change = {name: change}
    return merge(tree, change)


def get_value(tree: Any, key: str) -> Any:
    """The value at a key such as `train.epochs`; None where there is none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
