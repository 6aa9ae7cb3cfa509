"""Processes that train one classifier together."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError
from ..utils.hashing import derive_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The number of this process, `rank`, and of all that train together, `size`.

    Rank 0 is the only one that writes files.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shard_rows(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """Returns this process's rows of whole batches `[batches × batch_size]`.

        They are the same part of each batch, in order. Raises TrainingError where a batch cannot be
        divided evenly.
        """
        if self.size == 1:
            return rows
        if batch_size % self.size or len(rows) % batch_size:
            raise TrainingError(
                f"{self.size} processes cannot divide batches of {batch_size} evenly; choose a "
                "multiple.",
                argument="batch_size",
            )
        return rows.reshape(-1, self.size, batch_size // self.size)[:, self.rank].reshape(-1)

    def check_batch_size(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises TrainingError for a batch that does not divide evenly.

        Each process takes `accumulate` equal parts of it.
        """
        parts = self.size * accumulate
        if batch_size % parts:
            raise TrainingError(
                f"{batch_size} cannot be divided evenly into {parts} parts (accumulate "
                f"{accumulate} × {self.size} processes); choose a multiple.",
                argument="batch_size",
            )

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes; one message for each data type."""
        if self.size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for group in by_type.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            flat /= self.size
            means = flat.split([tensor.numel() for tensor in group])
            for tensor, mean in zip(group, means, strict=True):
                tensor.detach().copy_(mean.view_as(tensor))

    def average_buffers(self, model: nn.Module) -> None:
        """Averages running statistics, so that all processes hold the same model."""
        self.average(buffer for buffer in model.buffers() if buffer.is_floating_point())

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the rows of all processes in order; gradients flow back to each process's own."""
        if self.size == 1:
            return tensor
        gathered: Tensor = _Gather.apply(tensor, self)
        return gathered

    def local_shard(self, whole: Tensor) -> Tensor:
        """Returns this process's rows of a whole batch."""
        return whole if self.size == 1 else whole.chunk(self.size)[self.rank]

    @contextmanager
    def rank_rng(self) -> Iterator[None]:
        """Within it, torch's random numbers differ between processes, such as those of dropout.

        Outside of it all processes draw the same ones.
        """
        if self.size == 1:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("apart", int(torch.randint(2**62, ())), self.rank))
            yield

    def broadcast(self, value: T) -> T:
        """Returns the value of rank 0 in every process; all have to call it.

        Decisions that depend on time or measurements go through it, because clocks differ, and
        measurements may by a rounding.
        """
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 alone and returns its result in all; all have to call it."""
        return self.broadcast(action() if self.first else cast(T, None))

    def barrier(self) -> None:
        """Returns when every process has called it."""
        if self.size > 1:
            dist.barrier()


class GradientAverage:
    """Calls a model in training, and averages its gradients over the processes.

    On GPUs torch's DistributedDataParallel sends gradients while the backward pass goes on. On CPUs
    they are averaged after it: the cores that would send are those that compute.

    - `overlap`: whether to use DistributedDataParallel; by default on GPUs.
    """

    def __init__(
        self,
        model: nn.Module,
        processes: Processes,
        device: torch.device,
        overlap: bool | None = None,
    ) -> None:
        self.call: nn.Module = _Call(model)
        self.model, self.processes, self.device = model, processes, device
        overlap = device.type == "cuda" if overlap is None else overlap
        self.overlap = overlap and processes.size > 1
        self.parallel: DistributedDataParallel | None = None

    def __call__(self, images: Tensor, *pairs: Tensor) -> Any:
        """Logits of images; with labels and prompts what `ClipClassifier.pairs` returns, and the
        scale."""
        return (self.parallel or self.call)(images, *pairs)

    def part(self, last: bool) -> AbstractContextManager[Any]:
        """The forward and backward pass of a part of a batch; the `last` one sends gradients."""
        return nullcontext() if self.parallel is None or last else self.parallel.no_sync()

    def average(self) -> None:
        """Averages the gradients after the last part of a batch.

        The mean of the processes' mean losses has the gradient of the whole batch. The first batch
        shows which parameters have a gradient, which DistributedDataParallel has to know.
        """
        if self.parallel is not None:
            return
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.processes.average(each.grad for each in trained if each.grad is not None)
        if self.overlap:
            self.parallel = DistributedDataParallel(
                self.call,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,  # they are averaged at the end of an epoch
                find_unused_parameters=any(each.grad is None for each in trained),
            )

    def reset(self) -> None:
        """Call it after another choice of parameters to train."""
        self.parallel = None


class _Call(nn.Module):
    """What DistributedDataParallel wraps: its outputs hold every trained parameter's effect."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, *pairs: Tensor) -> Any:
        model: Any = self.model
        return (*model.pairs(images, *pairs), model.scale) if pairs else model(images)


def sync_batch_norm(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """Returns the model with batch norms that see the batches of all processes.

    On GPUs they are torch's. On CPUs torch has none: its layers are replaced in place, and a
    network's own kinds keep the statistics of their shard.
    """
    if processes.size == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, layer in list(model.named_children()):
        if type(layer) in {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}:
            setattr(model, name, CpuSyncBatchNorm.of(layer))
        else:
            sync_batch_norm(layer, processes, device)
    return model


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm with the mean and variance of all processes' shards, which have one size.

    torch's own synchronized one needs a GPU.
    """

    @classmethod
    def of(cls, layer: Any) -> CpuSyncBatchNorm:
        """Returns one with the parameters and running statistics of torch's layer."""
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
        processes = current_processes()
        x = input.to(torch.promote_types(input.dtype, torch.float32))
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
    """The mean of a tensor over the processes; its gradient is the mean of their gradients."""

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
    """The tensors of all processes in order; the gradient of each is the sum over processes."""

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
    """Returns the processes that `join_processes` has joined, or this one alone."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


def join_processes(cpu: bool) -> Processes:
    """Joins the processes that `torchrun` or `accelerate launch` started, if any.

    They use gloo on CPUs and NCCL on GPUs. The others wait while rank 0 makes the spectrum, so they
    wait for up to a week. They part when the program ends: a process that ends while the threads
    of its process group still run is aborted now and then, with its work done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=cpu, timeout=timedelta(days=7))
        atexit.register(_part)
    return current_processes()


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
