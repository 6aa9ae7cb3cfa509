"""A small network, trained to tell what images are worth to one that starts at random.

A head on features that know a class already gains little from more images of it. A network that
learns its features from the same images may gain a lot.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16
STEPS, BATCH, RATE = 480, 64, 3e-3
"""Updates, images of each, and the learning rate that falls to 0 along half a cosine."""
SHIFT = 1 / 16
"""Images are moved by up to this part of their side, and every second is mirrored."""


def fit_proxy(
    pixels: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    num_classes: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Callable[[np.ndarray], np.ndarray]:
    """Trains three convolutions on images drawn by their weights.

    Returns a function from pixels, as these, to labels, int64 `[images]`.

    - `pixels`: uint8 `[images, 3, side, side]`; `labels`: int64 `[images]`.
    - `weights`: how often an image is drawn, relative to the others, float64 `[images]`.
    """
    draws = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_proxy(num_classes).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0)
    images, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    chance = weights / weights.sum()
    for step in range(STEPS):
        rows = torch.from_numpy(draws.choice(len(labels), BATCH, p=chance))
        moved = _augment(_centred(images[rows]), generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        loss = F.cross_entropy(network(moved), targets[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()

    def predict(others: np.ndarray) -> np.ndarray:
        found = [np.zeros(0, np.int64)]
        with torch.inference_mode():
            for part in torch.from_numpy(others).split(1000):
                found.append(network(_centred(part).to(device)).argmax(1).cpu().numpy())
        return np.concatenate(found)

    return predict


def make_proxy(num_classes: int) -> nn.Module:
    """Three strided convolutions with batch norm, the mean over positions, and a linear layer."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, WIDTH),
        *block(WIDTH, 2 * WIDTH),
        *block(2 * WIDTH, 4 * WIDTH),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, num_classes),
    )


def _centred(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 - 0.5


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved at random over black, and every second mirrored."""
    count, side = len(images), images.shape[-1]
    most = max(1, round(SHIFT * side))
    padded = F.pad(images, (most,) * 4, value=-0.5)
    down, right = torch.randint(2 * most + 1, (2, count), generator=generator)
    span = torch.arange(side)
    rows = (down[:, None] + span)[:, None, :, None]
    columns = right[:, None] + span
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)[:, None, None, :]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[torch.arange(count)[:, None, None, None], channels, rows, columns]
