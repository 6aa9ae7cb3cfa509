"""One training of `gpu_cifar.py`: pixels on the device, a gradient step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from discl.curriculum.sampling import Pool
from discl.curriculum.schedule import EpochSchedule, make_sampling
from discl.curriculum.strategies import make_strategy
from discl.models.classifier import build_classifier, normalise
from discl.training.objectives import make_objective
from discl.training.optim import make_learning_rate, make_optimizer
from discl.training.step import EpochPart
from discl.utils.hashing import derive_seed
from gpu_data import Data


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops after padding by an eighth, and flips, of uint8 `[n, 3, size, size]`.

    As `random-crop` and `flip` of the package, for a whole epoch in one gather.
    """
    count, _, size, _ = pixels.shape
    border, device = size // 8, pixels.device
    padded = F.pad(pixels, (border,) * 4)
    top, left = torch.randint(
        2 * border + 1, (2, count, 1), generator=generator, device=device
    ).unbind(0)
    flipped = torch.rand(count, 1, generator=generator, device=device) < 0.5
    along = torch.arange(size, device=device)
    columns = left + torch.where(flipped, along.flip(0), along)
    rows = top + along
    image = torch.arange(count, device=device)[:, None, None]
    channels_last = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    return channels_last.permute(0, 3, 1, 2)


class Training:
    """One training of a row with a seed; `steps` goes through it step by step.

    - `pixels`: of the row's pool, uint8 `[rows, 3, 32, 32]` on the device.
    - `graph`: whether a step is captured as a CUDA graph.
    - `augmented`: whether images are cropped and flipped.
    """

    def __init__(
        self,
        data: Data,
        name: str,
        seed: int,
        pixels: Tensor,
        *,
        graph: bool,
        precision: torch.dtype = torch.bfloat16,
        augmented: bool = True,
    ) -> None:
        self.name, self.seed, self.pixels = name, seed, pixels
        self.device, self.precision, self.augmented = pixels.device, precision, augmented
        self.config, self.plan = data.config, data.settings["train"]
        row, pool = data.settings["rows"][name], data.pool(name)
        self.pool, self.batch = pool, self.plan["batch_size"]
        self.schedule = make_schedule(data, row, pool, seed)
        self.objective = make_objective(row["objective"])
        self.counts = torch.from_numpy(pool.real_counts).to(self.device, torch.float64)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (self.config.mean, self.config.std)
        )
        torch.manual_seed(derive_seed("init", seed))
        model: Any = build_classifier(self.config).to(self.device)
        self.model = model.to(memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(self.model, **self.plan["optimizer"])
        self.learning_rate = make_learning_rate(**self.plan["learning_rate"])
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        size = self.config.image_size
        self.images = torch.zeros(self.batch, 3, size, size, device=self.device).contiguous(
            memory_format=torch.channels_last
        )
        self.targets = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        self.total = torch.zeros((), device=self.device)
        self.losses = torch.zeros(self.plan["epochs"], device=self.device)
        self.drawn = np.zeros(pool.num_classes, np.int64)
        self.levels: list[list[int]] = []
        if self.stream is not None:  # what was made so far is on another stream
            torch.cuda.synchronize()
        self.graph = self._capture() if graph else None

    def on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _step(self) -> None:
        """Forward, backward and optimizer; no call of it waits for the device."""
        with torch.autocast(
            self.device.type,
            self.precision,
            enabled=self.precision != torch.float32,
            cache_enabled=False,
        ):
            logits = self.model(self.images).float()
        loss = self.objective.loss(logits, self.targets, self.counts)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def _capture(self) -> Any:
        """The step as a graph; weights and moments are then as before."""
        self.rate = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:  # SGD reads a tensor's rate on the device
            group["lr"], group["fused"], group["foreach"] = self.rate, True, False
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        torch.cuda.synchronize()
        with self.on_stream():
            for _ in range(3):
                self.optimizer.zero_grad(set_to_none=True)
                self._step()
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._step()
        self.model.load_state_dict(before)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        self.total.zero_()
        torch.cuda.synchronize()
        return graph

    def take(self, images: Tensor, targets: Tensor, rate: float) -> None:
        """One gradient step on a batch of normalised images."""
        self.images.copy_(images)
        self.targets.copy_(targets)
        if self.graph is not None:
            self.rate.fill_(rate)
            self.graph.replay()
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self._step()

    def prepare(self, rows: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """(Normalised images, labels) of the rows of an epoch, on the device."""
        index, labels = self._send(rows), self._send(self.pool.labels[rows])
        pixels = self.pixels[index]
        if self.augmented:
            generator = torch.Generator(self.device)
            generator.manual_seed(derive_seed("augment", self.seed, epoch))
            pixels = augment(pixels, generator)
        # as `normalise` of the package, which copies mean and std to the device and waits
        return (pixels.float() / 255 - self.mean) / self.std, labels

    def _send(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.stream is not None:  # from pinned memory, so that the host need not wait
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def steps(self) -> Iterator[int]:
        """Trains; yields the epoch after each step has been launched."""
        for epoch in range(self.plan["epochs"]):
            rows, record = self.schedule.draw(epoch, 0, [])
            self.levels.append(record["levels"])
            self.drawn += np.bincount(self.pool.labels[rows], minlength=len(self.drawn))
            part = EpochPart(
                rows, epoch, epochs=self.plan["epochs"], batch_size=self.batch, seed=self.seed
            )
            with self.on_stream():
                self.total.zero_()
                images, labels = self.prepare(rows, epoch)
            for step in range(part.steps):
                batch = slice(step * self.batch, (step + 1) * self.batch)
                with self.on_stream():
                    self.take(images[batch], labels[batch], self.learning_rate(part.progress(step)))
                yield epoch
            with self.on_stream():
                self.losses[epoch] = self.total / part.steps

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> Tensor:
        """Logits of uint8 `[n, 3, 32, 32]`, float32 `[n, classes]` on the CPU."""
        self.model.eval()
        with self.on_stream():
            parts = [
                self.model(
                    normalise(part.float() / 255, self.config).contiguous(
                        memory_format=torch.channels_last
                    )
                )
                for part in pixels.split(1000)
            ]
            found = torch.cat(parts).float().cpu()
        self.model.train()
        return found


def make_schedule(data: Data, row: dict[str, Any], pool: Pool, seed: int) -> EpochSchedule:
    """What a row draws; a function of its settings and the seed."""
    plan = data.settings["train"]
    strategy = make_strategy(
        row["strategy"],
        levels=data.settings["levels"],
        curriculum_epochs=row["curriculum_epochs"],
        level=row["level"],
        seed=seed,
    )
    mixture = {
        name: row[name]
        for name in ("undersample", "synthetic_scale", "shortage", "missing", "class_power")
    }
    sampling = make_sampling(pool, row["strategy"], **mixture)
    samples = plan["steps_per_epoch"] * plan["batch_size"]
    schedule = EpochSchedule(pool, strategy, sampling, samples=samples, seed=seed)
    schedule.check(data.settings["levels"], plan["epochs"])
    return schedule
