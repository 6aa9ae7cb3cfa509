"""Images to adapt a generator to, and the memory that a step of it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from discl.spectrum.adaptation import AdapterImages

CLASSES = ("bag", "coat")


def make_images(count: int = 6, text: str = "a photo of a {}", size: int = 32) -> AdapterImages:
    """Flat pictures of two classes, the second one brighter."""
    labels = np.arange(count) % 2

    def load(row: int) -> np.ndarray:
        rng = np.random.default_rng(row)
        return (rng.integers(0, 60, (size, size, 3)) + 150 * labels[row]).astype(np.uint8)

    return AdapterImages(load, labels, [[text.format(CLASSES[label])] for label in labels])


def bytes_kept(networks: Iterable[Any], call: Callable[[], Any]) -> int:
    """Bytes that autograd keeps in a call, without the weights of the networks."""
    weights = {id(parameter) for network in networks for parameter in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        call()
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
