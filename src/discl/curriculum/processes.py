"""The processes that train one classifier together: each takes its share of every batch, and gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingError


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are. The first, `rank` 0, is the only one that writes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """This process's rows of whole batches `[batches × batch_size]`: the same part of each batch, in order.

        Raises TrainingError where a batch cannot be divided evenly.
        """
        if self.size == 1:
            return rows
        if batch_size % self.size or len(rows) % batch_size:
            raise TrainingError(
                f"{self.size} processes cannot share batches of {batch_size} evenly; choose a multiple as train.batch_size."
            )
        return rows.reshape(-1, self.size, batch_size // self.size)[:, self.rank].reshape(-1)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes; one message for each type of number."""
        if self.size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for group in by_type.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            flat /= self.size
            for tensor, mean in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.detach().copy_(mean.view_as(tensor))

    def average_gradients(self, model: nn.Module) -> None:
        """Averages the gradients of a model; where each process has the mean loss of its share, that is the whole batch's gradient."""
        self.average(parameter.grad for parameter in model.parameters() if parameter.grad is not None)

    def average_buffers(self, model: nn.Module) -> None:
        """Averages running statistics, so that all processes hold the same model."""
        self.average(buffer for buffer in model.buffers() if buffer.is_floating_point())

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, one after the other, with gradients that flow back to whose they are."""
        if self.size == 1:
            return tensor
        gathered: Tensor = _Gather.apply(tensor, self)
        return gathered

    def wait(self) -> None:
        """Returns once every process has come here."""
        if self.size > 1:
            dist.barrier()


class _Gather(torch.autograd.Function):
    """Every process's tensor, one after the other; the gradient of each is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        parts = [torch.empty_like(tensor) for _ in range(processes.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(ctx.processes.size)[ctx.processes.rank], None


def current_processes() -> Processes:
    """The processes that `join_processes` has brought together, else this one alone."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


def join_processes(cpu: bool) -> Processes:
    """Joins the others that `torchrun` or `accelerate launch` started (gloo on CPUs, NCCL on GPUs); alone without them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=cpu, timeout=timedelta(days=7))  # the others wait while the first makes the spectrum
    return current_processes()
