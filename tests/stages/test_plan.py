"""`discl plan`: what a generator cannot do is an error before the work, with the recipe's key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from discl.assets import embedded
from discl.errors import BrokenFileError, CheckpointError, DisclError
from discl.recipe import Recipe, load_recipe, validate
from discl.run_folder import paths
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
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


def test_a_checkpoint_that_does_not_exist_is_an_error_of_its_key(
    small_tree: dict[str, Any], tmp_path: Path
) -> None:
    """Recipes inherit checkpoints, so the address alone does not say which key to change."""
    clip = {"architecture": "clip"}
    template = {"prompts.templates": ["a photo of a {class}, {caption}"], "prompts.phrases": None}
    weights = str(embedded("fashion-mnist/diffusion/unet/diffusion_pytorch_model.safetensors"))
    own = "methods.other.train.model.checkpoint"
    cases: dict[str, dict[str, Any]] = {
        "spectrum.checkpoint": {},
        "spectrum.config": {"spectrum.checkpoint": weights},
        "filter.checkpoint": {},
        "prompts.captions.checkpoint": template,
        "train.model.checkpoint": {"train.model": clip},
        own: {"methods.other": {"strategy": "real-only", "train": {"model": clip}}},
    }
    for key, more in cases.items():
        recipe = load_recipe(small_tree, {**more, key: "./no/such"})
        with pytest.raises(DisclError, match="no/such") as raised:
            check_models(Run(recipe, tmp_path), "train")
        assert raised.value.argument == key
    recipe = load_recipe(small_tree, {"spectrum.loras": [{"path": "./no/such.safetensors"}]})
    with pytest.raises(CheckpointError, match=r"^spectrum\.loras: .*no/such\.safetensors"):
        check_models(Run(recipe, tmp_path), "train")


def test_a_wrong_line_by_hand_is_an_error_before_images_are_made(
    small_tree: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / paths.OVERRIDES).write_text("id,verdict\na,kepp\n")
    with pytest.raises(BrokenFileError, match="line 2: verdict"):
        check_models(Run(validate(small_tree), tmp_path), "generate")


def test_every_key_is_one_of_the_recipe() -> None:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    for key in GENERATOR_KEYS.values():
        section, _, name = key.partition(".")
        assert name in sections[section].model_fields, key  # type: ignore[union-attr]
