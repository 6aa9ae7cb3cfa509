"""`discl plan`: what a generator cannot do is an error before the work, with the recipe's key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from discl.errors import CheckpointError
from discl.recipe import Recipe, validate
from discl.run_folder.open import open_run
from discl.stages.engine import GENERATOR_KEYS
from discl.stages.plan import check_models


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"size": 30}, "spectrum.size"),
        ({"num_inference_steps": 1001}, "spectrum.num_inference_steps"),
        ({"levels": [96], "num_inference_steps": 50, "steps": "fixed"}, "spectrum.levels"),
    ],
)
def test_errors_of_a_generator_name_the_recipes_key(
    settings: dict[str, Any], key: str, small_tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe = validate(small_tree | {"spectrum": small_tree["spectrum"] | settings})
    with pytest.raises(CheckpointError) as raised:
        check_models(open_run(recipe, tmp_path / "run"), "plan")
    assert raised.value.argument == key
    assert str(raised.value).startswith(f"{key}: ")


def test_every_key_is_one_of_the_recipe() -> None:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    for key in GENERATOR_KEYS.values():
        section, _, name = key.partition(".")
        assert name in sections[section].model_fields, key  # type: ignore[union-attr]
