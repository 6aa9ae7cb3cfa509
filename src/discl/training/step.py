"""One epoch of gradient steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..models.classifier import ClassifierConfig, normalise
from ..models.clip import ClipClassifier
from ..utils.hashing import derive_seed
from .augmentation import augment_share, make_augmentation, mix_images
from .distributed import Processes, share_statistics
from .hooks import TrainingHook
from .image_cache import EpochLoader, ImageCache
from .objectives import FLYP, Objective, contrastive, widest
from .optim import ema_decay


@dataclass(frozen=True)
class StepConfig:
    """How a gradient step is made.

    `mixup` and `cutmix` are α of Beta(α, α), 0 for off; `accumulate` divides a batch into that many parts whose gradients are
    averaged (FLYP contrasts within a part); `ema` is the decay of a moving average of the weights, which is then what is evaluated;
    in the first `head_epochs` epochs only the head is trained.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    mixup: float = 0.0
    cutmix: float = 0.0
    accumulate: int = 1
    ema: float | None = None
    head_epochs: int = 0


class TrainState:
    """A model with its optimizer and, where asked for, the moving average of its weights."""

    def __init__(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], objective: Objective,
        class_counts: np.ndarray,
        config: ClassifierConfig, stepping: StepConfig, augment: tuple[str, ...], precision: torch.dtype, device: torch.device | str,
        hook: TrainingHook | None = None, processes: Processes | None = None,
    ) -> None:  # fmt: skip
        if objective.name == FLYP and not isinstance(model, ClipClassifier):
            raise TrainingError(
                f"objective flyp needs a CLIP (train.model.architecture: clip); this is a {type(model).__name__}."
            )
        self.objective, self.config = objective, config
        self.hook = hook or TrainingHook()
        self.stepping, self.precision, self.device = stepping, precision, torch.device(device)
        self.processes = processes or Processes()
        self.model = share_statistics(model, self.processes, self.device)
        choose_attention(self.model, self.device, precision)
        self.optimizer = make_optimizer(self.model)
        self.counts = torch.as_tensor(class_counts, dtype=widest(self.device), device=self.device)
        self.augment = make_augmentation(augment, config.image_size, stepping.crop_scale)
        self.average = (
            copy.deepcopy(self.model).requires_grad_(False) if stepping.ema is not None else None
        )
        self.trainable = {
            name for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    @property
    def evaluated(self) -> nn.Module:
        """The model to measure and to save: the moving average where there is one."""
        return self.model if self.average is None else self.average

    def batches(self, pixels: ImageCache, batch_size: int, workers: int) -> EpochLoader:
        """EpochLoader of this process's share, in parts if gradients accumulate. Raises TrainingError where a batch cannot be divided."""
        self.processes.check_batch_size(batch_size, self.stepping.accumulate)
        return EpochLoader(
            pixels, batch_size // (self.processes.size * self.stepping.accumulate), workers
        )

    def train_epoch(
        self, batches: EpochLoader, rows: np.ndarray, labels: np.ndarray, epoch: int, epochs: int, batch_size: int, seed: int,
        learning_rate: Callable[[float], float], checkpoint: Path, first_step: int = 0, steps_per_epoch: int | None = None,
    ) -> float:  # fmt: skip
        """Mean loss over `rows` `[steps × batch_size]` of an epoch, or of a part of it from `first_step` on; `labels` `[pool]` of all rows.

        The random state is set anew, so that an epoch does not depend on those before it. Raises TrainingError where the loss, or at
        the end a parameter, is not finite.
        """
        self._freeze(epoch < self.stepping.head_epochs)
        torch.manual_seed(
            derive_seed("augment", seed, epoch, *(["from", first_step] if first_step else []))
        )
        parts, here = self.stepping.accumulate, len(rows) // batch_size
        steps = steps_per_epoch or here
        total, first_bad = (
            torch.zeros((), device=self.device),
            torch.full((), here, device=self.device),
        )
        for part, (chosen, stored) in enumerate(
            batches.of(self.processes.share(rows, batch_size // parts))
        ):
            step = part // parts
            progress = (epoch + (first_step + step) / steps) / epochs
            if part % parts == 0:
                self.optimizer.zero_grad(set_to_none=True)
            rate = (
                learning_rate(progress) if (part + 1) % parts == 0 else 0.0
            )  # of the step that follows at once: after the last part
            loss = (
                self._loss(
                    stored,
                    chosen,
                    torch.from_numpy(labels[chosen]).to(self.device),
                    progress,
                    rate,
                    batches.aspects_of(chosen),
                )
                / parts
            )
            loss.backward()
            total += loss.detach()
            first_bad = torch.where(loss.detach().isfinite(), first_bad, first_bad.clamp(max=step))
            if (part + 1) % parts == 0:
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(progress)
                self._step(epoch * steps + first_step + step)
                looked_at = (step + 1) % 50 == 0 or step + 1 == here  # a look waits for the device
                if looked_at and (bad := int(self.processes.gather(first_bad[None]).min())) < here:
                    raise TrainingError(_not_finite("loss", epoch, first_step + bad, checkpoint))
        if not _finite(
            self.model
        ):  # the last step's doing, whose own loss was still finite: it must not reach a checkpoint
            raise TrainingError(_not_finite("network", epoch, first_step + here - 1, checkpoint))
        self.processes.average([total])
        self.processes.average_buffers(self.model)
        if self.average is not None:
            self.processes.average_buffers(self.average)
        return total.item() / here

    def _loss(
        self,
        stored: Tensor,
        rows: np.ndarray,
        labels: Tensor,
        progress: float,
        learning_rate: float,
        aspects: Tensor | None = None,
    ) -> Tensor:
        images = augment_share(
            self.augment,
            stored.to(self.device, non_blocking=True).float() / 255,
            self.processes,
            aspects,
            self.stepping.crop_scale,
        )
        images, mixed_in, share = self._mix(
            normalise(self._alter(images, labels), self.config), labels
        )
        images = images.contiguous(memory_format=torch.channels_last)
        if self.objective.name == FLYP:
            clip: Any = self.model
            drawn = self.processes.local_shard(clip.draw_prompts(self.processes.size * len(labels)))
            with autocast(self.device, self.precision), self.processes.rank_rng():
                seen, texts = clip.pairs(images, labels, drawn)
            return contrastive(
                self.processes.gather(seen), self.processes.gather(texts), clip.scale
            )
        with autocast(self.device, self.precision), self.processes.rank_rng():
            logits = self.model(images).float()
        self._tell(rows, labels, logits.detach(), learning_rate)
        loss = self.objective.loss(logits, labels, self.counts, progress)
        if mixed_in is not None:
            loss = share * loss + (1 - share) * self.objective.loss(
                logits, mixed_in, self.counts, progress
            )
        return loss

    def _alter(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the hook makes of the images: of the whole batch in every process, since its draws go by the place in it."""
        if type(self.hook).alter is TrainingHook.alter:
            return images
        return self.processes.local_shard(
            self.hook.alter(self.processes.gather(images), self.processes.gather(labels))
        )

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """(images, labels of what was mixed into them or None, share of their own): over the whole batch, as one process mixes it."""
        if self.stepping.mixup <= 0 and self.stepping.cutmix <= 0:
            return images, None, 1.0
        mixed, order, share = mix_images(
            self.processes.gather(images), self.stepping.mixup, self.stepping.cutmix
        )
        return (
            self.processes.local_shard(mixed),
            self.processes.local_shard(self.processes.gather(labels)[order]),
            share,
        )

    def _tell(self, rows: np.ndarray, labels: Tensor, logits: Tensor, learning_rate: float) -> None:
        """Tells the hook what was seen, by all processes, so that each keeps the same state and draws the same rows by it."""
        if self.processes.size > 1 and type(self.hook).learn is not TrainingHook.learn:
            rows = self.processes.gather(torch.as_tensor(rows, device=self.device)).cpu().numpy()
            labels, logits = self.processes.gather(labels), self.processes.gather(logits)
        self.hook.learn(rows, labels, logits, learning_rate)

    def _step(self, taken: int) -> None:
        self.processes.average_gradients(self.model)
        self.optimizer.step()
        if isinstance(self.model, ClipClassifier):
            self.model.clamp_scale()
        if self.average is not None and self.stepping.ema is not None:
            decay = ema_decay(self.stepping.ema, taken)
            with torch.no_grad():
                for mean, now in zip(
                    self.average.state_dict().values(),
                    self.model.state_dict().values(),
                    strict=True,
                ):
                    if mean.is_floating_point():
                        mean.lerp_(now, 1 - decay)
                    else:
                        mean.copy_(now)

    def _freeze(self, head_only: bool) -> None:
        """Training mode; with `head_only` everything but the head gets no gradient and stays in evaluation mode."""
        self.model.train(not head_only)
        head = (
            {id(parameter) for parameter in head_of(self.model).parameters()}
            if head_only
            else set()
        )
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(
                name in self.trainable and (not head_only or id(parameter) in head)
            )

    def write(self, action: Callable[[], None]) -> None:
        """Lets the first process write a file while the others wait."""
        if self.processes.first:
            action()
        self.processes.barrier()

    def state(self) -> dict[str, Tensor]:
        """All tensors that a checkpoint keeps: `model.*`, `optimizer.INDEX.*` and, where there are some, `average.*` and `hook.*`."""
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

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave. Raises KeyError or RuntimeError for another model's."""
        groups: dict[str, dict[str, Tensor]] = {
            "model": {},
            "average": {},
            "optimizer": {},
            "hook": {},
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


def head_of(model: nn.Module) -> nn.Module:
    """The last layer of a classifier. Raises TrainingError for one that has none apart."""
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        raise TrainingError(
            f"a {type(model).__name__} has no head of its own to train; use fine_tune: full."
        )
    return head


def choose_attention(model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Plain matrix products in the place of torch's fused attention for transformers trained in bfloat16 on a CPU.

    There the backward pass of the fused one alone takes half of a step (benchmarks/training.py).
    """
    if device.type == "cpu" and precision == torch.bfloat16:
        for module in model.children():
            choose: Any = getattr(module, "set_attn_implementation", None)
            if choose is not None:
                choose("eager")


def autocast(device: torch.device | str, precision: torch.dtype) -> Any:
    """Computation in that precision where torch deems it safe; nothing changes for float32."""
    return (
        nullcontext()
        if precision == torch.float32
        else torch.autocast(torch.device(device).type, precision)
    )


def _finite(model: nn.Module) -> bool:
    return bool(
        torch.stack([parameter.detach().isfinite().all() for parameter in model.parameters()]).all()
    )


def _not_finite(what: str, epoch: int, step: int, checkpoint: Path) -> str:
    kept = (
        f"the last good checkpoint is {checkpoint}"
        if checkpoint.exists()
        else "no checkpoint had been saved yet"
    )
    mend = "Lower train.optimizer.lr or use train.precision: float32."
    return f"the {what} is not finite in epoch {epoch}, step {step}; {kept}. {mend}"
