"""A small network that is trained in seconds, to tell what images are worth to one like it.

A head on features that know a class already gains little from more images of it. A network that
learns its features from the same images may gain a lot.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .worth import Features, Predict

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
) -> Predict:
    """Trains a small network on images drawn by their weights.

    Returns a function from pixels, as these, to labels, int64 `[images]`.

    - `pixels`: uint8 `[images, 3, side, side]`; `labels`: int64 `[images]`.
    - `weights`: how often an image is drawn, relative to the others, float64 `[images]`.
    """
    draws = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = make_network(num_classes).train()
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0)
    images, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    chance = weights / weights.sum()
    for step in range(STEPS):
        rows = torch.from_numpy(draws.choice(len(labels), BATCH, p=chance))
        moved = augment(_centred(images[rows]), generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        logits = network(moved.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, targets[rows].to(device))
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


class Proxies:
    """Networks of `fit_proxy`, each trained once for the same images and weights.

    ```python
    import numpy as np

    from discl.evaluation.proxy import Proxies
    from discl.evaluation.worth import Features

    pixels = np.zeros((4, 3, 32, 32), np.uint8)
    images = Features(pixels, np.array([0, 1, 0, 1]))
    predict = Proxies().fit(images, np.ones(4), 2)
    assert predict(pixels).shape == (4,)
    ```
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._fitted: dict[str, Predict] = {}

    def fit(self, images: Features, weights: np.ndarray, num_classes: int) -> Predict:
        """A classifier of these images: see `evaluation.worth.Fit`."""
        key = hashlib.blake2b(np.ascontiguousarray(images.values).data)
        key.update(images.labels.tobytes() + weights.tobytes())
        name = key.hexdigest()
        if name not in self._fitted:
            self._fitted[name] = fit_proxy(
                images.values, images.labels, weights, num_classes, device=self.device
            )
        return self._fitted[name]


def make_network(num_classes: int, width: int = 16, features: int = 64) -> nn.Sequential:
    """[three strided convolutions with batch norm and a mean over positions, a linear layer].

    - `width`: channels of the first convolution; `features`: of the last.
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    body = nn.Sequential(
        *block(3, width),
        *block(width, 2 * width),
        *block(2 * width, features),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(body, nn.Linear(features, num_classes))


def _centred(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 - 0.5


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved at random over black, and every second mirrored.

    - `images`: float32 `[images, channels, side, side]`, black at −0.5.
    """
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
