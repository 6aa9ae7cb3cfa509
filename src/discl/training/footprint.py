"""What a training keeps in memory, counted from tensors: the same on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Footprint:
    """Parameters and memory of a training.

    - `parameters`: of the network; `trained_parameters`: those with gradients.
    - `training_bytes`: weights, gradients, the optimizer's state and the activations that a forward
      pass keeps for the backward pass. Buffers of libraries come on top.
    """

    parameters: int
    trained_parameters: int
    training_bytes: int

    def plain(self) -> dict[str, int]:
        return asdict(self)


class KeptActivations:
    """Counts the bytes that a forward pass keeps for its backward pass, without the weights."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
        self._sizes: dict[int, int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._see, lambda tensor: tensor):
            yield

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())


def measure_footprint(
    model: nn.Module, optimizer: torch.optim.Optimizer, kept: KeptActivations
) -> Footprint:
    """The footprint after the first step.

    - `kept`: of the first part of a batch; a forward pass has one part at a time.
    """
    parameters = list(model.parameters())
    trained = [each for each in parameters if each.requires_grad]
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return Footprint(
        sum(each.numel() for each in parameters),
        sum(each.numel() for each in trained),
        _bytes([*parameters, *trained, *states]) + kept.bytes,
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
