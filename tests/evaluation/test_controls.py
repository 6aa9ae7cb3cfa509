"""Controls without synthetic images, against recipes whose answer is written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from discl.evaluation.controls import (
    absent_control,
    find_control,
    make_controls,
    split_variant,
    takes_synthetic_images,
)
from discl.recipe import load_recipe

D2S = "diverse-to-specific"
REAL: dict[str, Any] = {"strategy": "real-only"}
UNDERSAMPLED = REAL | {"undersample": True}
BALANCED = {"sampling": "class-balanced"}


@pytest.mark.parametrize(
    ("method", "takes"),
    [
        ({}, False),
        (REAL, False),
        ({"strategy": "fixed", "level": 100}, False),
        ({"strategy": "fixed", "level": 100, "images": "retrieved"}, False),
        ({"strategy": "fixed", "level": 0}, True),
        ({"strategy": D2S}, True),
        ({"strategy": "mine:strategy"}, True),
    ],
)
def test_level_100_is_real(method: dict[str, Any], takes: bool) -> None:
    assert takes_synthetic_images(method) == takes


@pytest.mark.parametrize(
    ("change", "control", "found"),
    [
        ({}, UNDERSAMPLED, True),
        ({}, {"strategy": "fixed", "level": 100}, True),
        ({}, {"strategy": "fixed", "level": 100, "images": "retrieved"}, False),
        ({}, {"strategy": "fixed", "level": 50}, False),
        ({}, REAL, False),
        ({"undersample": True}, UNDERSAMPLED, True),
        ({"synthetic_scale": 1.0, "threshold": 0.3, "missing": "nearest"}, UNDERSAMPLED, True),
        ({"undersample": False} | BALANCED, REAL | BALANCED, True),
        ({"undersample": False} | BALANCED, UNDERSAMPLED | BALANCED, False),
        ({"mixture": "class-balanced"}, REAL | BALANCED, True),
        ({"finish": {"epochs": 3}, "synthetic_weight": 0.5}, UNDERSAMPLED, True),
        ({"finish": {"epochs": 3, "head_only": True}}, UNDERSAMPLED, False),
        (
            {"finish": {"epochs": 3, "head_only": True}},
            UNDERSAMPLED | {"finish": {"epochs": 3, "head_only": True}},
            True,
        ),
        ({"undersample": False} | BALANCED, REAL | {"mixture": "class-balanced"}, True),
        ({}, REAL | {"mixture": "undersampled"}, True),
        ({"mixture": "all"}, REAL | {"mixture": "all"}, False),
        (BALANCED, UNDERSAMPLED, False),
        (BALANCED, UNDERSAMPLED | BALANCED, True),
        # the tail has four samples an image with synthetic images, one without
        ({"undersample": False}, REAL, False),
        ({"undersample": False}, {"strategy": "fixed", "level": 100, "undersample": False}, True),
        (
            {"undersample": False, "synthetic_scale": 1.0},
            {"strategy": "fixed", "level": 100, "undersample": False},
            False,
        ),
        ({"objective": "focal"}, UNDERSAMPLED, False),
        ({"objective": "focal"}, UNDERSAMPLED | {"objective": {"name": "focal"}}, True),
        (
            {"objective": {"name": "focal", "gamma": 2}},
            UNDERSAMPLED | {"objective": "focal"},
            False,
        ),
        ({"fine_tune": "lp-ft"}, UNDERSAMPLED, False),
        ({"system": "cuda"}, UNDERSAMPLED, False),
        ({"system": "cuda"}, UNDERSAMPLED | {"system": {"name": "cuda"}}, True),
        ({"prior": "effective"}, UNDERSAMPLED, False),
        ({"train": {"epochs": 3}}, UNDERSAMPLED, False),
        ({"train": {"epochs": 3}}, UNDERSAMPLED | {"train": {"epochs": 3}}, True),
    ],
)
def test_the_same_mixture(change: dict[str, Any], control: dict[str, Any], found: bool) -> None:
    methods = {"ce": {**REAL, "objective": "ldam"}, "control": control}
    methods["discl"] = {"strategy": D2S} | change
    assert find_control(methods, "discl", by_tail=True) == ("control" if found else None)


def test_without_a_tail_nothing_is_undersampled() -> None:
    methods = {"real": REAL, "discl": {"strategy": D2S}, "all": {"strategy": D2S} | BALANCED}
    assert find_control(methods, "discl", by_tail=False) is None
    repeated = {"repeated": {"strategy": "fixed", "level": 100}}
    assert find_control(methods | repeated, "discl", by_tail=False) == "repeated"
    assert find_control(methods | {"b": REAL | BALANCED}, "all", by_tail=False) == "b"


@pytest.mark.parametrize("by_tail", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"undersample": False},
        {"undersample": True, "synthetic_scale": 2.0},
        {"undersample": False, "synthetic_scale": 2.0, "sampling": "square-root"},
        BALANCED,
        {"undersample": False} | BALANCED,
        {"mixture": "square-root"},
        {"mixture": "all", "synthetic_scale": 2.0},
        {"objective": {"name": "focal", "gamma": 2.0}, "system": "docl", "prior": "effective"},
        {"fine_tune": "lp-ft", "train": {"optimizer": {"lr": 0.1}}},
    ],
)
def test_an_absent_control_is_one_when_added(change: dict[str, Any], by_tail: bool) -> None:
    method = {"strategy": D2S} | change
    methods = {"discl": method, "added": absent_control(method, by_tail)}
    assert find_control(methods, "discl", by_tail) == "added"


def recipe(**methods: Any) -> dict[str, Any]:
    return {"methods": methods, "hard": {"rule": "tail"}}


def controls(tree: dict[str, Any], scores: dict[str, float], chosen_on: str = "validation") -> Any:
    return make_controls(
        tree, list(scores), scores, metric="top-1", chosen_on=chosen_on, shown="test"
    )


def test_rows_and_notes() -> None:
    tree = recipe(ce=REAL, under=UNDERSAMPLED, discl={"strategy": D2S}, all={"strategy": D2S})
    scores = {"ce": 0.5, "ce+la": 0.6, "under": 0.4, "discl": 0.9, "discl+la": 0.9, "all": 0.7}
    found = controls(tree, scores)
    assert found.same_mixture == {"discl": "under", "discl+la": None, "all": "under"}
    assert found.best == "ce+la" and found.lines == ""
    assert found.notes == [
        "Same mixture without synthetic images: under for discl and all.",
        "Best row without synthetic images: ce+la, chosen by top-1 on validation.",
    ]
    assert controls(tree, scores | {"under+la": 0.1}).same_mixture["discl+la"] == "under+la"
    assert "on test, the split that is shown" in controls(tree, scores, "test").notes[1]


def test_retrieved_images_have_a_control_and_may_be_the_best_row() -> None:
    """They are no synthetic images, but more than the same mixture of training images."""
    retrieval = {"strategy": "fixed", "level": 100, "images": "retrieved"}
    tree = recipe(under=UNDERSAMPLED, discl={"strategy": D2S}, retrieval=retrieval)
    found = controls(tree, {"under": 0.4, "discl": 0.9, "retrieval": 0.7})
    assert found.same_mixture == {"discl": "under", "retrieval": "under"}
    assert found.best == "retrieval"
    alone = controls(recipe(retrieval=retrieval), {"retrieval": 0.7})
    assert alone.same_mixture == {"retrieval": None}
    assert yaml.safe_load(alone.lines) == {"same-mixture": REAL | {"mixture": "undersampled"}}


def test_lines_add_each_absent_control_once() -> None:
    balanced = {"strategy": D2S, "undersample": False} | BALANCED
    tree = recipe(
        ce=REAL, discl={"strategy": D2S}, all={"strategy": "all-levels"}, balanced=balanced
    )
    tree["methods"]["Same-Mixture"] = {"strategy": D2S, "train": {"epochs": 2}}
    found = controls(tree, dict.fromkeys(["ce", "discl", "all", "balanced", "Same-Mixture"], 0.5))
    assert found.same_mixture["discl"] is None
    assert yaml.safe_load(found.lines) == {
        "same-mixture-2": REAL | {"mixture": "undersampled"},
        "same-mixture-3": REAL | {"mixture": "class-balanced"},
        "same-mixture-4": REAL | {"mixture": "undersampled", "train": {"epochs": 2}},
    }


def test_rows_that_are_not_in_the_table_are_not_spoken_of() -> None:
    tree = recipe(under=UNDERSAMPLED, discl={"strategy": D2S}, later={"strategy": "all-levels"})
    found = controls(tree, {"under": 0.4, "discl": 0.9})
    assert found.notes[0] == "Same mixture without synthetic images: under for discl."
    assert controls(tree, {"under": 0.4}) is None


def test_a_table_without_synthetic_images_has_no_controls() -> None:
    assert controls(recipe(ce=REAL, under=UNDERSAMPLED), {"ce": 0.5, "under": 0.6}) is None


def test_a_table_of_synthetic_rows_has_no_best_row() -> None:
    found = controls(recipe(discl={"strategy": D2S}), {"discl": 0.5})
    assert found.best is None and found.same_mixture == {"discl": None}


def test_shipped_recipe_with_the_control() -> None:
    tree = load_recipe("cifar100-lt-ir100-ce-discl").plain()
    assert find_control(tree["methods"], "ce-discl", by_tail=True) == "ce-undersampled"


def test_variants() -> None:
    assert split_variant("discl+la") == ("discl", "+la")
    assert split_variant("a+b") == ("a+b", "")
