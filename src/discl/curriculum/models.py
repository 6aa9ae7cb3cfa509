"""Classifiers, saved as safetensors beside a `config.json` that says how to build them and how to feed them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet10": {"blocks": (1, 1, 1, 1), "width": 64, "shortcut": "projection"},
    "resnet18": {"blocks": (2, 2, 2, 2), "width": 64, "shortcut": "projection"},
    "resnet34": {"blocks": (3, 4, 6, 3), "width": 64, "shortcut": "projection"},
    "resnet32-cifar": {"blocks": (5, 5, 5), "width": 16, "shortcut": "padding"},
}


@dataclass(frozen=True)
class ClassifierConfig:
    """All that is needed to build and feed a classifier: `image_size` in pixels a side, `mean` and `std` per channel of [0, 1]."""

    architecture: str
    stem: str
    width: int
    class_names: tuple[str, ...]
    image_size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (arXiv 1512.03385, fig. 2); option A pads channels with zeros, option B projects."""

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - channels_in) // 2
        self.downsample = None
        if shortcut == "projection" and (stride != 1 or channels_in != channels):
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.padding or self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class ResNet(nn.Module):
    """A residual network of basic blocks. Stem 7×7 is ImageNet's (stride 2, max-pooled), 3×3 keeps the resolution."""

    def __init__(self, blocks: tuple[int, ...], width: int, num_classes: int, stem: str = "7x7", shortcut: str = "projection") -> None:
        super().__init__()
        large = stem == "7x7"
        self.conv1 = nn.Conv2d(3, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        layers, channels_in = [], width
        for stage, count in enumerate(blocks):
            channels = width * 2**stage
            for block in range(count):
                layers.append(BasicBlock(channels_in, channels, 2 if stage and not block else 1, shortcut))
                channels_in = channels
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features `[batch, channels]` of normalised pixels `[batch, 3, h, w]`."""
        return self.layers(self.maxpool(F.relu(self.bn1(self.conv1(x))))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]` of normalised pixels `[batch, 3, h, w]`."""
        return self.fc(self.features(x))


def build_classifier(config: ClassifierConfig) -> ResNet:
    """The network of a configuration, freshly initialised from torch's random state."""
    known = ARCHITECTURES[config.architecture]
    stem = "3x3" if config.architecture.endswith("-cifar") else config.stem
    return ResNet(known["blocks"], config.width, len(config.class_names), stem, known["shortcut"])


def normalise(pixels: Tensor, config: ClassifierConfig) -> Tensor:
    """(pixels − mean) / std for float pixels `[batch, 3, h, w]` in [0, 1]."""
    mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return (pixels - mean) / std


def save_classifier(model: nn.Module, config: ClassifierConfig, folder: Path) -> None:
    """Writes `model.safetensors` and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2, ensure_ascii=False))
    unfinished = folder / "model.safetensors.new"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, unfinished)
    unfinished.replace(folder / "model.safetensors")


def first_cause(error: Exception) -> str:
    """One line of an error that may list every tensor of a network."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def load_classifier(folder: Path) -> tuple[ResNet, ClassifierConfig]:
    """The classifier of a folder that `save_classifier` wrote, in evaluation mode. Raises CheckpointError if it is none."""
    try:
        plain = json.loads((folder / "config.json").read_text())
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
        config = ClassifierConfig(**settings)
        model = build_classifier(config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"'{folder}' holds no classifier of discl: {first_cause(error)}") from error
    return model.eval(), config
