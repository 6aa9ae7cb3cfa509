"""Residual networks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .heads import CosineHead

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet10": {"blocks": (1, 1, 1, 1), "width": 64, "shortcut": "projection"},
    "resnet18": {"blocks": (2, 2, 2, 2), "width": 64, "shortcut": "projection"},
    "resnet34": {"blocks": (3, 4, 6, 3), "width": 64, "shortcut": "projection"},
    "resnet50": {"blocks": (3, 4, 6, 3), "width": 64, "shortcut": "bottleneck"},
    "resnet32-cifar": {"blocks": (5, 5, 5), "width": 16, "shortcut": "padding"},
}
"""Built-in residual networks."""


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (arXiv 1512.03385, fig. 2).

    The shortcut pads channels with zeros (option A) or projects (option B).
    """

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - channels_in) // 2
        self.downsample = None
        if shortcut == "projection" and (stride != 1 or channels_in != channels):
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.padding or self.stride != 1:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
            )
        return F.relu(x + y)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions to four times the channels (arXiv 1512.03385, fig. 5).

    The stride is in the 3×3 convolution, as in torchvision.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = None
        if stride != 1 or channels_in != 4 * channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, 4 * channels, 1, stride, bias=False),
                nn.BatchNorm2d(4 * channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(
            self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))
        )


class ResNet(nn.Module):
    """A residual network (arXiv 1512.03385).

    - `blocks`: blocks of each stage.
    - `width`: channels of the first stage.
    - `stem`: `7x7` (stride 2, max-pooled) or `3x3`, which keeps the resolution.
    - `shortcut`: `projection` or `padding` of basic blocks, or `bottleneck`.
    - `head`: `linear` or `cosine`.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        num_classes: int,
        *,
        stem: str = "7x7",
        shortcut: str = "projection",
        head: str = "linear",
    ) -> None:
        super().__init__()
        large = stem == "7x7"
        self.conv1 = nn.Conv2d(
            3, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        layers: list[nn.Module] = []
        channels_in = width
        for stage, count in enumerate(blocks):
            channels = width * 2**stage
            for block in range(count):
                stride = 2 if stage and not block else 1
                if shortcut == "bottleneck":
                    layers.append(Bottleneck(channels_in, channels, stride))
                    channels_in = 4 * channels
                else:
                    layers.append(BasicBlock(channels_in, channels, stride, shortcut))
                    channels_in = channels
        self.layers = nn.Sequential(*layers)
        self.fc = (
            CosineHead(channels_in, num_classes)
            if head == "cosine"
            else nn.Linear(channels_in, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # shapes only
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features `[batch, channels]` of normalised pixels `[batch, 3, h, w]`."""
        return self.layers(self.maxpool(F.relu(self.bn1(self.conv1(x))))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]` of normalised pixels `[batch, 3, h, w]`."""
        return self.fc(self.features(x))

    @property
    def head(self) -> nn.Module:
        """The last layer, from features to logits."""
        return self.fc
