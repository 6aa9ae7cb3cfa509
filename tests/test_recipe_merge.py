"""One rule lays a tree over another."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from discl.errors import RecipeError
from discl.recipe import load_recipe
from discl.recipe.merge import Whole, get_value, merge, set_value
from helpers import miniatures


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}}, {"a": 1, "b": {"c": 2, "d": 3}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"b": 1}}, {"a": 2}, {"a": 2}),
        ({"a": 2}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": None}}, {"a": {"c": 2}}),
        ({}, {"a": None}, {"a": None}),
        ({"a": {"b": 1}}, {"a": Whole({"c": 2})}, {"a": {"c": 2}}),
        ({"a": {"b": 1}}, {"a": Whole(None)}, {"a": None}),
        ({"b": 1, "a": 2}, {"a": 3, "c": 4}, {"b": 1, "a": 3, "c": 4}),
    ],
)
def test_mappings_merge_values_replace_and_null_removes(
    below: dict[str, Any], above: dict[str, Any], merged: dict[str, Any]
) -> None:
    before = deepcopy((below, above))
    found = merge(below, above)
    assert found == merged and list(found) == list(merged)
    assert (below, above) == before


def test_a_value_is_set_as_a_whole_at_its_key() -> None:
    tree = {"a": {"b": {"c": 1}}, "d": None}
    assert set_value(tree, "a.b", {"e": 2}) == {"a": {"b": {"e": 2}}, "d": None}
    assert set_value(tree, "d.e.f", 3) == {"a": {"b": {"c": 1}}, "d": {"e": {"f": 3}}}
    assert set_value(tree, "a.b.c", None) == {"a": {"b": {"c": None}}, "d": None}
    assert tree == {"a": {"b": {"c": 1}}, "d": None}
    assert (get_value(tree, "a.b.c"), get_value(tree, "a.x.c"), get_value(tree, "d.e")) == (
        1,
        None,
        None,
    )


@pytest.mark.parametrize(("key", "named"), [("a.b.c", "'c'"), (".".join("a" * 33), "33 parts")])
def test_a_key_below_a_value_or_too_deep_is_refused(key: str, named: str) -> None:
    with pytest.raises(RecipeError, match=f"here: .*{named}"):
        set_value({"a": {"b": 1}}, key, 2, "here: ")


def test_a_null_of_a_method_takes_the_default_back() -> None:
    """As a null in a file that extends another does."""
    tree = {
        **miniatures.REQUIRED,
        "train": {"epochs": 80, "resize": 256},
        "methods": {"ce": {"train": {"resize": None, "epochs": None}}},
    }
    train = load_recipe(tree).training("ce")
    assert (train.resize, train.epochs) == (None, 65)
