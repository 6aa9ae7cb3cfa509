"""Processes that train one classifier together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingError
from ..utils.hashing import derive_seed

T = TypeVar("T")


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

    def check_batch_size(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises TrainingError where a batch cannot be divided evenly into `accumulate` parts for each process."""
        parts = self.size * accumulate
        if batch_size % parts:
            raise TrainingError(
                f"train.batch_size = {batch_size} cannot be divided evenly into {parts} parts "
                f"(train.accumulate {accumulate} × {self.size} processes)."
            )

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
            for tensor, mean in zip(
                group, flat.split([tensor.numel() for tensor in group]), strict=True
            ):
                tensor.detach().copy_(mean.view_as(tensor))

    def average_gradients(self, model: nn.Module) -> None:
        """Averages the gradients of a model; where each process has the mean loss of its share, that is the whole batch's gradient."""
        self.average(
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        )

    def average_buffers(self, model: nn.Module) -> None:
        """Averages running statistics, so that all processes hold the same model."""
        self.average(buffer for buffer in model.buffers() if buffer.is_floating_point())

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, one after the other, with gradients that flow back to whose they are."""
        if self.size == 1:
            return tensor
        gathered: Tensor = _Gather.apply(tensor, self)
        return gathered

    def local_shard(self, whole: Tensor) -> Tensor:
        """This process's rows of what is there for a whole batch."""
        return whole if self.size == 1 else whole.chunk(self.size)[self.rank]

    @contextmanager
    def rank_rng(self) -> Iterator[None]:
        """Within it torch's random numbers, such as a network's dropout, are this process's own; otherwise all draw the same ones."""
        if self.size == 1:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("apart", int(torch.randint(2**62, ())), self.rank))
            yield

    def broadcast(self, value: T) -> T:
        """The first process's value, in every process; each has to ask.

        Whatever decides how training goes on is asked for so: clocks differ, and figures may by a rounding.
        """
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` gives in the first process, which alone carries it out while the others wait; each has to ask."""
        return self.broadcast(action() if self.first else cast(T, None))

    def barrier(self) -> None:
        """Returns once every process has come here."""
        if self.size > 1:
            dist.barrier()


def share_statistics(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """The model with batch norms that see the whole batch where processes share it; torch's own where they are on GPUs.

    On CPUs the layers of torch are replaced, in place; a network's own kinds go on with the statistics of their share.
    """
    if processes.size == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, layer in list(model.named_children()):
        if type(layer) in {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}:
            setattr(model, name, SharedBatchNorm.of(layer))
        else:
            share_statistics(layer, processes, device)
    return model


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm whose mean and variance in training are those of all processes' shares together, which are equally large."""

    @classmethod
    def of(cls, layer: Any) -> SharedBatchNorm:
        """One with the parameters and running statistics of a layer of torch."""
        made = cls(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        made.weight, made.bias, made.training = layer.weight, layer.bias, layer.training
        made.running_mean, made.running_var = layer.running_mean, layer.running_var
        made.num_batches_tracked = layer.num_batches_tracked
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        processes, x = (
            current_processes(),
            input.to(torch.promote_types(input.dtype, torch.float32)),
        )
        others = [dim for dim in range(x.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        mean = _Mean.apply(x.mean(others), processes)
        centred = x - mean.view(shape)
        variance = _Mean.apply(centred.square().mean(others), processes)
        self._follow(mean.detach(), variance.detach(), processes.size * x.numel() // x.shape[1])
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Moves the running statistics, the variance unbiased as torch has it."""
        if (
            self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
        ):
            return
        self.num_batches_tracked.add_(1)
        weight = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / max(count - 1, 1), weight)


class _Mean(torch.autograd.Function):
    """The mean of every process's tensor; so is its gradient the mean of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return _Mean._averaged(tensor, processes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Mean._averaged(gradients[0], ctx.processes), None

    @staticmethod
    def _averaged(tensor: Tensor, processes: Processes) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        if processes.size > 1:
            dist.all_reduce(total)
        return total / processes.size


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

        PartialState(
            cpu=cpu, timeout=timedelta(days=7)
        )  # the others wait while the first makes the spectrum
    return current_processes()
