"""Sizes and shapes of classifiers, networks against those of transformers, saving and loading."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from discl.errors import CheckpointError
from discl.models.classifier import (
    ClassifierConfig,
    build_classifier,
    load_classifier,
    normalise,
    save_classifier,
)
from discl.models.resnet import ARCHITECTURES, BasicBlock, ResNet
from discl.run_folder import paths
from discl.utils.stored import save_tensors


def make_config(
    architecture: str = "resnet10", stem: str = "7x7", width: int | None = None, classes: int = 4
) -> ClassifierConfig:
    return ClassifierConfig(
        architecture,
        stem,
        width or ARCHITECTURES[architecture]["width"],
        tuple(f"class {index}" for index in range(classes)),
        32,
        36,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )


@pytest.mark.parametrize(
    ("architecture", "classes", "parameters"),
    [
        ("resnet10", 1_000, 5_418_792),
        ("resnet18", 1_000, 11_689_512),
        ("resnet34", 1_000, 21_797_672),
        ("resnet32-cifar", 100, 470_004),
        ("resnet50", 1_000, 25_557_032),
    ],
)
def test_number_of_parameters(architecture: str, classes: int, parameters: int) -> None:
    model = build_classifier(make_config(architecture, classes=classes))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("architecture", "stem", "size", "side", "channels"),
    [
        ("resnet10", "7x7", 224, 7, 512),
        ("resnet10", "3x3", 32, 4, 512),
        ("resnet18", "7x7", 64, 2, 512),
        ("resnet32-cifar", "7x7", 32, 8, 64),
    ],
)
def test_stem_and_stages_give_the_expected_sides(
    architecture: str, stem: str, size: int, side: int, channels: int
) -> None:
    """The CIFAR networks have their own 3×3 stem, whatever the recipe says of it."""
    model = build_classifier(make_config(architecture, stem)).eval()
    seen: list[Tensor] = []
    model.layers.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        logits = model(torch.zeros(2, 3, size, size))
        features = model.features(torch.zeros(2, 3, size, size))
    assert seen[0].shape == (2, channels, side, side)
    assert features.shape == (2, channels)
    assert logits.shape == (2, 4)


@pytest.mark.parametrize("blocks", [(1, 1, 1, 1), (3, 4, 6, 3)])
def test_same_logits_as_the_resnet_of_transformers(blocks: tuple[int, ...]) -> None:
    """The same weights in the same order, except that transformers lists the shortcut first."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    ours = ResNet(blocks, 8, 5).eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    settings = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=list(blocks),
        layer_type="basic",
        num_labels=5,
    )
    theirs = ResNetForImageClassification(settings).eval()
    parts: list[nn.Module] = [ours.conv1, ours.bn1]
    for block in ours.layers:
        assert isinstance(block, BasicBlock)
        parts += [*(block.downsample or ()), block.conv1, block.bn1, block.conv2, block.bn2]
    weights = [tensor for part in [*parts, ours.fc] for tensor in part.state_dict().values()]
    names = list(theirs.state_dict())
    assert len(weights) == len(names)
    theirs.load_state_dict(dict(zip(names, weights, strict=True)))
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images).logits)


def test_shortcut_by_padding_puts_the_channels_in_the_middle() -> None:
    block = BasicBlock(4, 8, 2, "padding").eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 4, 6, 6)
    with torch.inference_mode():
        y = block(x)
    assert y.shape == (1, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_same_random_state_same_weights() -> None:
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(build_classifier(make_config(width=8)).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["conv1.weight"], models[2]["conv1.weight"])


def test_pixels_are_normalised_by_channel() -> None:
    pixels = torch.tensor([0.485, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    expected = (
        torch.tensor([0.0, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225])
        .view(1, 3, 1, 1)
        .expand(2, 3, 4, 4)
    )
    torch.testing.assert_close(normalise(pixels, make_config()), expected)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_to_disk_and_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    config = make_config(architecture, "3x3", 8)
    model = build_classifier(config).to(memory_format=torch.channels_last)
    model(torch.randn(4, 3, 32, 32))  # moves the running means
    save_classifier(model, config, tmp_path / "deep" / "folder")
    loaded, read = load_classifier(tmp_path / "deep" / "folder")
    assert read == config
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in loaded.state_dict().items()
    )
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_class_names_keep_their_letters(tmp_path: Path) -> None:
    config = ClassifierConfig(
        "resnet10", "3x3", 8, ("été", "犬"), 32, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )
    save_classifier(build_classifier(config), config, tmp_path)
    assert load_classifier(tmp_path)[1].class_names == ("été", "犬")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", "not json"),
        ("config.json", "[]"),
        ("config.json", json.dumps({"architectures": ["CLIPModel"], "projection_dim": 512})),
        ("model.safetensors", None),
        ("model.safetensors", "not safetensors"),
        ("model.safetensors", ""),
    ],
)
def test_a_folder_that_holds_no_classifier(name: str, content: str | None, tmp_path: Path) -> None:
    config = make_config(width=8)
    save_classifier(build_classifier(config), config, tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match="holds no classifier of discl"):
        load_classifier(tmp_path)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    save_classifier(
        build_classifier(make_config("resnet18", width=8)), make_config(width=8), tmp_path
    )
    with pytest.raises(CheckpointError, match="holds no classifier of discl"):
        load_classifier(tmp_path)
    unknown = json.loads((tmp_path / "config.json").read_text()) | {"architecture": "resnet11"}
    (tmp_path / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(CheckpointError, match="resnet11"):
        load_classifier(tmp_path)


def test_weights_and_settings_that_no_training_writes_are_refused(tmp_path: Path) -> None:
    config = make_config("resnet10", width=4)
    model = build_classifier(config)
    weights = model.state_dict()
    name = next(key for key, value in weights.items() if value.is_floating_point())
    for wrong, told in (
        (torch.full_like(weights[name], math.nan), "not finite"),
        (weights[name].to(torch.int64), "int64"),
        (weights[name].to(torch.complex64), "complex64"),
    ):
        save_classifier(model, config, tmp_path)
        save_tensors({**weights, name: wrong}, tmp_path / paths.WEIGHTS)
        with pytest.raises(CheckpointError, match=f"'{name}' .*{told}"):
            load_classifier(tmp_path)
    for key, value in (("image_size", 99_999), ("light", ["lora"]), ("backbone", "x")):
        save_classifier(model, config, tmp_path)
        stored = json.loads((tmp_path / paths.CONFIG).read_text())
        (tmp_path / paths.CONFIG).write_text(json.dumps({**stored, key: value}))
        with pytest.raises(CheckpointError, match=f"{key} is "):
            load_classifier(tmp_path)
