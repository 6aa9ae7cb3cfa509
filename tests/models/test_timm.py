"""Models of timm: the network of a folder is built, filled, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discl.errors import CheckpointError
from discl.models.classifier import load_classifier, save_classifier
from discl.recipe import Train
from discl.stages.classifiers import describe_classifier, starter_of
from helpers.timm_stand_in import OPTIONS, SMALL, import_or_stand_in, save

NAMES = ("boot", "shirt", "coat")


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_or_stand_in(monkeypatch)


def training(folder: Path) -> Train:
    return Train.model_validate(
        {"image_size": 32, "model": {"architecture": "timm", "checkpoint": str(folder)}}
    )


def start(folder: Path) -> tuple[Any, Any]:
    config = describe_classifier(training(folder), NAMES)
    return starter_of(config, training(folder))().eval(), config


def test_model_args_are_passed_on_saved_and_loaded_back(timm: Any, tmp_path: Path) -> None:
    """Layer scale, pooling and sizes: logits are those of timm, before and after saving."""
    saved = save(timm, tmp_path / "vit")
    model, config = start(tmp_path / "vit")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = saved(pixels)
        assert torch.equal(model(pixels), expected)
        save_classifier(model, config, tmp_path / "trained")
        assert torch.equal(load_classifier(tmp_path / "trained")[0](pixels), expected)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)
    assert plain.state_dict().keys() != saved.state_dict().keys()


def test_pooling_that_is_told_beside_the_arguments_is_kept(timm: Any, tmp_path: Path) -> None:
    """Older folders state the pooling only there; no tensor name would show the difference."""
    saved = save(timm, tmp_path / "vit", model_args=SMALL | {"init_values": 0.1})
    model, _ = start(tmp_path / "vit")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(pixels), saved(pixels))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_args": OPTIONS | {"init_values": None}}, r"ls1\.gamma"),
        ({"model_args": OPTIONS | {"depth": 1}}, r"blocks\.1\."),
        ({"model_args": OPTIONS | {"depth": 3}}, "14 tensors are missing"),
        ({"model_args": OPTIONS | {"in_chans": 1}}, "images of 1 channels"),
        ({"model_args": OPTIONS | {"depth": 10**9}}, r"depth of config\.json is 1000000000"),
        ({"model_args": OPTIONS | {"embed_dim": 10**6}}, "describes a network of|cannot create"),
        ({"model_args": [1]}, r"model_args of config\.json is \[1\]"),
        (
            {"model_args": SMALL | {"nonsense": 1}},
            "timm cannot create 'vit_tiny_patch16_224' with",
        ),
        ({"architecture": "hf-hub:owner/name"}, "'hf-hub:owner/name'"),
        ({"architecture": "local-dir:/somewhere"}, "'local-dir:/somewhere'"),
        ({"architecture": "vit_of_nobody"}, "vit_of_nobody"),
        ({"architecture": None}, r"architecture in its config\.json is None"),
        ({"pretrained_cfg": {"mean": "x"}}, "mean is 'x'"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, r"std is \[0, 1, 1\]"),
    ],
)
def test_another_network_than_the_files_is_refused(
    timm: Any, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(timm, tmp_path / "vit", **changed)
    with pytest.raises(CheckpointError, match=message):
        start(tmp_path / "vit")


def test_a_head_of_other_classes_is_replaced_and_no_other_tensor(timm: Any, tmp_path: Path) -> None:
    save(timm, tmp_path / "vit")
    file = tmp_path / "vit" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"head.weight": torch.zeros(7, 16), "head.bias": torch.zeros(7)}, file)
    model, _ = start(tmp_path / "vit")
    assert model.head.weight.shape == (3, 16)
    save_file(weights | {"extra.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"1 tensors .*: extra\.weight"):
        start(tmp_path / "vit")
