"""One epoch of gradient steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..curriculum.sampling import sample_weights
from ..curriculum.schedule import Finish
from ..errors import TrainingError
from ..models.classifier import ClassifierConfig, normalise
from ..models.clip import ClipClassifier
from ..models.heads import head_of
from ..utils.hashing import derive_seed
from .augmentation import augment_shard, make_augmentation, mix_images
from .distributed import GradientAverage, Processes, sync_batch_norm
from .footprint import Footprint, KeptActivations, measure_footprint
from .hooks import TrainingHook
from .image_cache import EpochLoader, ImageCache
from .inference import autocast, choose_attention
from .objectives import FLYP, Objective, contrastive, weighted_loss, widest
from .optim import ema_decay, update_average

LOOK_EVERY = 50
"""Steps between two checks of the loss; each waits for the device."""


@dataclass(frozen=True)
class StepConfig:
    """How a gradient step is made.

    - `crop_scale`: fractions of the area that random-resized crops take.
    - `mixup`, `cutmix`: α of Beta(α, α); 0 is off.
    - `accumulate`: parts of a batch whose gradients are averaged. FLYP contrasts within a part.
    - `ema`: decay of a moving average of the weights, which is then what is evaluated.
    - `head_epochs`: first epochs, in which only the head is trained.
    - `synthetic_weight`: of synthetic images in the loss, or at the start and at the end of
      training; None for 1.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    mixup: float = 0.0
    cutmix: float = 0.0
    accumulate: int = 1
    ema: float | None = None
    head_epochs: int = 0
    synthetic_weight: float | tuple[float, float] | None = None


@dataclass(frozen=True)
class EpochPart:
    """Steps of one epoch, all of them or a part.

    - `rows`: of the pool, `[steps × batch_size]`.
    - `epochs`: of the training; `first_step`: of this part in its epoch.
    - `steps_per_epoch`: by default those of `rows`.
    - `synthetic`: which rows of the pool are synthetic, bool `[pool]`, if they have a weight.
    """

    rows: np.ndarray
    epoch: int
    epochs: int
    batch_size: int
    seed: int
    first_step: int = 0
    steps_per_epoch: int | None = None
    synthetic: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return len(self.rows) // self.batch_size

    @property
    def epoch_steps(self) -> int:
        """Steps of the whole epoch."""
        return self.steps_per_epoch or self.steps

    def progress(self, step: int) -> float:
        """Progress of the training, in [0, 1), at a step of this part."""
        return (self.epoch + (self.first_step + step) / self.epoch_steps) / self.epochs

    def taken(self, step: int) -> int:
        """Steps of the training before one of this part."""
        return self.epoch * self.epoch_steps + self.first_step + step


class TrainState:
    """A model with its optimizer and, if configured, the moving average of its weights."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        objective: Objective,
        class_counts: np.ndarray,
        config: ClassifierConfig,
        steps: StepConfig,
        augment: tuple[str, ...],
        precision: torch.dtype,
        device: torch.device | str,
        hook: TrainingHook | None = None,
        processes: Processes | None = None,
        finish: Finish | None = None,
    ) -> None:
        if objective.name == FLYP and not isinstance(model, ClipClassifier):
            raise TrainingError(
                f"objective {FLYP} needs a CLIP; got a {type(model).__name__}.",
                argument="objective",
            )
        self.objective, self.config, self.steps = objective, config, steps
        self.precision, self.device = precision, torch.device(device)
        self.hook, self.processes = hook or TrainingHook(), processes or Processes()
        self.model = sync_batch_norm(model, self.processes, self.device)
        choose_attention(self.model, self.device, precision)
        self.optimizer = make_optimizer(self.model)
        self.gradients = GradientAverage(self.model, self.processes, self.device)
        self.counts = torch.as_tensor(class_counts, dtype=widest(self.device), device=self.device)
        self.finish, self._drawn_evenly = finish, False
        if finish is not None and finish.head_only:
            head_of(self.model)  # raises an error that would otherwise appear after many epochs
        self.augment = make_augmentation(augment, config.image_size, steps.crop_scale)
        self.average = (
            copy.deepcopy(self.model).requires_grad_(False) if steps.ema is not None else None
        )
        self.footprint: Footprint | None = None
        self._kept: KeptActivations | None = None
        self.trainable = {
            name for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    @property
    def evaluated(self) -> nn.Module:
        """The model to measure and to save: the moving average if there is one."""
        return self.model if self.average is None else self.average

    def loader(self, pixels: ImageCache, batch_size: int, workers: int) -> EpochLoader:
        """Returns a loader of this process's shards, in parts if gradients accumulate.

        Raises TrainingError where a batch cannot be divided evenly.
        """
        self.processes.check_batch_size(batch_size, self.steps.accumulate)
        parts = self.processes.size * self.steps.accumulate
        return EpochLoader(pixels, batch_size // parts, workers, self.device)

    def train_epoch(
        self,
        loader: EpochLoader,
        part: EpochPart,
        labels: np.ndarray,
        learning_rate: Callable[[float], float],
        checkpoint: Path,
    ) -> float:
        """Trains an epoch or a part of it; returns the mean loss.

        - `labels`: of all rows, `[pool]`.
        - `learning_rate`: of progress in [0, 1].
        - `checkpoint`: the last good one, for messages.

        The random state is set first, so an epoch does not depend on those before it. Raises
        TrainingError where the loss or, at the end, a weight is not finite.
        """
        of_head = self.finish is not None and self.finish.of_head(part.epoch)
        self._drawn_evenly = of_head
        self._freeze(of_head or part.epoch < self.steps.head_epochs)
        later = ["from", part.first_step] if part.first_step else []
        torch.manual_seed(derive_seed("augment", part.seed, part.epoch, *later))
        pieces, steps = self.steps.accumulate, part.steps
        total = torch.zeros((), device=self.device)
        first_bad = torch.full((), steps, device=self.device)
        shard = self.processes.shard_rows(part.rows, part.batch_size // pieces)
        for number, (rows, squares) in enumerate(loader.of(shard)):
            step, piece = divmod(number, pieces)
            progress, last = part.progress(step), piece + 1 == pieces
            if piece == 0:
                self.optimizer.zero_grad(set_to_none=True)

            # Forward and backward pass
            rate = learning_rate(progress) if last else 0.0  # of the step that follows at once
            targets = torch.from_numpy(labels[rows]).to(self.device)
            aspects = loader.aspects_of(rows)
            with self.gradients.part(last), self._counting(number == 0 and part.taken(0) == 0):
                weights = self._weights(part, rows, progress)
                loss = self._loss(squares, rows, targets, progress, rate, aspects, weights) / pieces
                loss.backward()
            total += loss.detach()
            first_bad = torch.where(loss.detach().isfinite(), first_bad, first_bad.clamp(max=step))
            if not last:
                continue

            # Step
            start = self.finish.start * part.epoch_steps if self.finish and of_head else 0
            self._step(part.taken(step) - start, rate)
            if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
                bad = int(self.processes.gather(first_bad[None]).min())
                if bad < steps:
                    raise _not_finite("loss", part.epoch, part.first_step + bad, checkpoint)

        if not _finite(self.model):  # by the last step; it must not reach a checkpoint
            raise _not_finite("network", part.epoch, part.first_step + steps - 1, checkpoint)
        self.processes.average([total])
        self.processes.average_buffers(self.model)
        if self.average is not None:
            self.processes.average_buffers(self.average)
        return total.item() / steps

    def _counting(self, first: bool) -> AbstractContextManager[None]:
        """Counts what the first forward pass of a training keeps, for `footprint`."""
        if not first:
            return nullcontext()
        self._kept = KeptActivations(self.model)
        return self._kept.counting()

    def _weights(self, part: EpochPart, rows: np.ndarray, progress: float) -> np.ndarray | None:
        """Weights of these rows in the loss, None where all are 1."""
        weight = self.steps.synthetic_weight
        if weight is None or part.synthetic is None:
            return None
        return sample_weights(part.synthetic[rows], weight, progress)

    def _loss(
        self,
        squares: Tensor,
        rows: np.ndarray,
        labels: Tensor,
        progress: float,
        learning_rate: float,
        aspects: Tensor | None = None,
        weights: np.ndarray | None = None,
    ) -> Tensor:
        """The loss of this process's shard of a batch, from uint8 squares on."""
        pixels = squares.to(self.device, non_blocking=True).float() / 255
        images = augment_shard(
            self.augment, pixels, self.processes, aspects=aspects, crop_scale=self.steps.crop_scale
        )
        images = normalise(self._alter(images, labels), self.config)
        images, mixed_in, own = self._mix(images)
        images = images.contiguous(memory_format=torch.channels_last)
        if self.objective.name == FLYP:
            return self._flyp_loss(images, labels, weights)
        with autocast(self.device, self.precision), self.processes.rank_rng():
            logits = self.gradients(images).float()
        self._report(rows, labels, logits.detach(), learning_rate)
        # The prior of classes that are drawn evenly is even
        counts = torch.ones_like(self.counts) if self._drawn_evenly else self.counts
        loss = partial(self.objective.loss, class_counts=counts, progress=progress)
        first = weighted_loss(loss, logits, labels, weights)
        if mixed_in is None:
            return first
        others, of_others = mixed_in(labels), None
        if weights is not None:
            of_others = mixed_in(torch.from_numpy(weights).to(logits)).cpu().numpy()
        return own * first + (1 - own) * weighted_loss(loss, logits, others, of_others)

    def _flyp_loss(self, images: Tensor, labels: Tensor, weights: np.ndarray | None) -> Tensor:
        """The contrastive loss of the whole batch, with one prompt per image."""
        clip: Any = self.model
        prompts = self.processes.local_shard(clip.draw_prompts(self.processes.size * len(labels)))
        with autocast(self.device, self.precision), self.processes.rank_rng():
            image_embeddings, text_embeddings, scale = self.gradients(images, labels, prompts)
        gather = self.processes.gather
        of_pairs = None if weights is None else gather(torch.from_numpy(weights).to(self.device))
        return contrastive(gather(image_embeddings), gather(text_embeddings), scale, of_pairs)

    def _alter(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the hook makes of the images.

        It gets the whole batch in every process, because its draws depend on the index in it.
        """
        if type(self.hook).alter is TrainingHook.alter:
            return images
        gather = self.processes.gather
        return self.processes.local_shard(self.hook.alter(gather(images), gather(labels)))

    def _mix(self, images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None, float]:
        """(images, function to the values of those mixed in or None, fraction of the first ones).

        They are mixed over the whole batch, as one process does it.
        """
        if self.steps.mixup <= 0 and self.steps.cutmix <= 0:
            return images, None, 1.0
        gather, shard = self.processes.gather, self.processes.local_shard
        mixed, order, own = mix_images(gather(images), self.steps.mixup, self.steps.cutmix)
        return shard(mixed), lambda values: shard(gather(values)[order]), own

    def _report(
        self, rows: np.ndarray, labels: Tensor, logits: Tensor, learning_rate: float
    ) -> None:
        """Reports the logits of all processes to the hook, so that each keeps the same state."""
        if self.processes.size > 1 and type(self.hook).learn is not TrainingHook.learn:
            gather = self.processes.gather
            rows = gather(torch.as_tensor(rows, device=self.device)).cpu().numpy()
            labels, logits = gather(labels), gather(logits)
        self.hook.learn(rows, labels, logits, learning_rate)

    def _step(self, taken: int, learning_rate: float) -> None:
        """Updates the weights after `taken` steps, and their moving average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.gradients.average()
        self.optimizer.step()
        if self._kept is not None:
            self.footprint = measure_footprint(self.model, self.optimizer, self._kept)
            self._kept = None
        if isinstance(self.model, ClipClassifier):
            self.model.clamp_scale()
        if self.average is not None and self.steps.ema is not None:
            update_average(self.average, self.model, ema_decay(self.steps.ema, taken))

    def _freeze(self, head_only: bool) -> None:
        """Turns to training mode; `head_only` freezes all but the head, in evaluation mode."""
        self.model.train(not head_only)
        head = set(map(id, head_of(self.model).parameters())) if head_only else set()
        changed = False
        for name, parameter in self.model.named_parameters():
            trained = name in self.trainable and (not head_only or id(parameter) in head)
            changed |= trained != parameter.requires_grad
            parameter.requires_grad_(trained)
        if changed:
            self.gradients.reset()

    def begin_finish(self, head: Mapping[str, Tensor] | None) -> None:
        """Call it before the epochs that train the head only.

        They go on from the moving average, if there is one, and without momentum.

        - `head`: the state that the head begins with; None leaves it as it is.
        """
        if self.average is not None:
            self.model.load_state_dict(self.average.state_dict())
        if head is not None:
            for model in filter(None, (self.model, self.average)):
                head_of(model).load_state_dict(head)
        self.optimizer.state.clear()

    def write(self, action: Callable[[], None]) -> None:
        """Runs `action`, which writes a file, on rank 0 while the others wait."""
        if self.processes.first:
            action()
        self.processes.barrier()

    def state_dict(self) -> dict[str, Tensor]:
        """State of a checkpoint: `model.*`, `optimizer.INDEX.*`, `average.*`, `hook.*`."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {
                f"average.{name}": tensor for name, tensor in self.average.state_dict().items()
            }
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{name}": torch.as_tensor(value)
                for name, value in state.items()
                if value is not None
            }
        return tensors | {f"hook.{name}": tensor for name, tensor in self.hook.state().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the result of `state_dict`.

        Raises KeyError or RuntimeError for the state of another model.
        """
        groups: dict[str, dict[str, Tensor]] = {
            kind: {} for kind in ("model", "average", "optimizer", "hook")
        }
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            groups[kind][name] = tensor
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in groups["optimizer"].items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = tensor
        self.model.load_state_dict(groups["model"])
        if self.average is not None:
            self.average.load_state_dict(groups["average"])
        self.hook.load_state(groups["hook"])
        self.optimizer.load_state_dict(
            {"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )


def _finite(model: nn.Module) -> bool:
    finite = [parameter.detach().isfinite().all() for parameter in model.parameters()]
    return bool(torch.stack(finite).all())


def _not_finite(what: str, epoch: int, step: int, checkpoint: Path) -> TrainingError:
    kept = (
        f"the last good checkpoint is {checkpoint}"
        if checkpoint.exists()
        else "no checkpoint had been saved yet"
    )
    fix = "Lower the learning rate or train in float32."
    return TrainingError(f"the {what} is not finite in epoch {epoch}, step {step}; {kept}. {fix}")
