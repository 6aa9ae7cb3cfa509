"""Networks of checkpoints: what is taken over from a folder, and what a folder may lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discl.errors import CheckpointError, RecipeError
from discl.recipe import Train
from discl.stages.classifiers import describe_classifier, starter_of

NAMES = ("boot", "shirt", "coat")


def training(folder: Path, architecture: str = "transformers", **changed: Any) -> Train:
    return Train.model_validate(
        {
            "epochs": 2,
            "curriculum_epochs": 0,
            "image_size": 32,
            "model": {"architecture": architecture, "checkpoint": str(folder)},
            **changed,
        }
    )


def rewrite(folder: Path, keep: Any) -> None:
    file = folder / "model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if keep(name)},
        file,
        {"format": "pt"},
    )


def start(folder: Path) -> torch.nn.Module:
    return starter_of(describe_classifier(training(folder), NAMES), training(folder))()


@pytest.mark.parametrize("headless", [False, True])
def test_the_backbone_is_taken_over_and_the_head_drawn_anew(vit: Path, headless: bool) -> None:
    from transformers import ViTForImageClassification

    whole = ViTForImageClassification.from_pretrained(vit).state_dict()
    rewrite(vit, lambda name: not headless or not name.startswith("classifier"))
    state = start(vit).state_dict()
    assert len(state) == len(whole)
    for name, tensor in whole.items():
        if not name.startswith("classifier"):
            assert torch.equal(state[f"model.{name}"], tensor), name
    assert state["model.classifier.weight"].shape == (3, 16)


def test_a_folder_that_lacks_weights_of_the_backbone_is_refused(vit: Path) -> None:
    lost = [name for name in load_file(vit / "model.safetensors") if ".1." in name]
    rewrite(vit, lambda name: name not in lost)
    with pytest.raises(
        CheckpointError,
        match=rf"has no vit\.\S*\.1\.\S+, .*: {len(lost)} weights",
    ) as raised:
        start(vit)
    assert len(str(raised.value)) < 600


def test_weights_of_the_backbone_of_another_shape_are_refused(vit: Path) -> None:
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(CheckpointError, match="6 weights"):
        start(vit)


def test_a_model_of_timm_for_images_of_one_size(tmp_path: Path) -> None:
    preprocessing = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "input_size": [3, 224, 224],
        "fixed_input_size": True,
    }
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": preprocessing})
    )
    with pytest.raises(
        CheckpointError,
        match=r"made for images of 224 pixels; set train\.image_size: 224 \(got 32\)",
    ):
        describe_classifier(training(tmp_path, "timm"), NAMES)
    assert describe_classifier(training(tmp_path, "timm", image_size=224), NAMES).mean == (
        0.5,
        0.5,
        0.5,
    )
    preprocessing["fixed_input_size"] = False
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "pretrained_cfg": preprocessing})
    )
    assert describe_classifier(training(tmp_path, "timm"), NAMES).image_size == 32


def test_mean_and_std_of_ones_own(vit: Path) -> None:
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = describe_classifier(training(vit, **own), NAMES)
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    plain = describe_classifier(Train(), NAMES)
    assert (plain.mean, plain.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert describe_classifier(Train(mean=(0.1, 0.2, 0.3)), NAMES).std == plain.std
    with pytest.raises((RecipeError, ValueError), match=r"got \[0\.1, 0\.0, 0\.2\]"):
        Train.model_validate({"std": [0.1, 0, 0.2]})


def test_settings_that_came_later_leave_no_mark_at_their_default() -> None:
    """A classifier's fingerprint is that of these plain values."""
    plain = Train().model_dump(mode="json")
    assert not {"mean", "std"} & plain.keys() and "factor" not in plain["optimizer"]
    plain = Train.model_validate({"std": [0.1, 0.2, 0.3], "optimizer": {"factor": 0.1}}).model_dump(
        mode="json"
    )
    assert plain["std"] == [0.1, 0.2, 0.3] and plain["optimizer"]["factor"] == 0.1
    assert Train.model_validate(plain).model_dump(mode="json") == plain
