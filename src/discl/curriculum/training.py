"""The training loop: one function, resumable to the bit at the epochs where it saved."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..digests import derive_seed
from ..errors import TrainingError
from .augmentation import centre, make_augmentation
from .mixture import Mixing, Pool, Round, mix_epoch
from .models import ClassifierConfig, build_classifier, first_cause, normalise, save_classifier
from .objectives import OBJECTIVES
from .pixels import Batches, Pixels
from .strategies import Levels, Strategy

Record = dict[str, Any]


@dataclass(frozen=True)
class TrainSettings:
    """What training needs besides samples, strategy and loss; `learning_rate` maps progress in [0, 1] to a rate."""

    epochs: int
    steps_per_epoch: int
    batch_size: int
    augment: tuple[str, ...]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    learning_rate: Callable[[float], float]
    precision: torch.dtype
    seed: int
    select: str = "last"
    validate_every: int = 5
    save_seconds: float = 15.0


def train_classifier(
    pool: Pool,
    pixels: Pixels,
    strategy: Strategy,
    mixing: Mixing,
    objective: str,
    class_counts: np.ndarray,
    config: ClassifierConfig,
    settings: TrainSettings,
    folder: Path,
    validate: Callable[[nn.Module], float] | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    on_epoch: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Trains a classifier into `folder` (`model.safetensors`, `config.json`, `history.jsonl`) and returns its history.

    `pixels` holds the images of the pool's rows; `validate(model)` returns the figure by which `select="validation"`
    chooses. Every random draw is a function of (seed, epoch), so a run that was killed and called again ends with the
    same weights. Raises TrainingError where the loss is not finite, naming epoch, step and the last good checkpoint.
    """
    if settings.select == "validation" and validate is None:
        raise TrainingError("select is 'validation', but there is nothing to validate on; use select: last.")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(derive_seed("init", settings.seed))
    model = build_classifier(config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = settings.make_optimizer(model)
    checkpoint = folder / "checkpoint.safetensors"
    history: list[Record] = _load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else []
    batches = Batches(pixels, settings.batch_size, workers)
    augment = make_augmentation(settings.augment, config.image_size)
    counts = torch.as_tensor(class_counts, dtype=torch.float64, device=device)
    for record in history:
        on_epoch(record)
    saved = time.monotonic()
    for epoch in range(len(history), settings.epochs):
        started = time.monotonic()
        levels = strategy.levels(epoch, history)
        rows, first = epoch_rows(pool, levels, mixing, settings, epoch)
        loss = _train_epoch(
            model,
            optimizer,
            batches,
            rows,
            pool.labels,
            augment,
            OBJECTIVES[objective],
            counts,
            config,
            settings,
            epoch,
            device,
            checkpoint,
        )
        record = {
            "epoch": epoch, "levels": [level.percent for level in levels], "loss": loss, "samples": len(rows),
            "synthetic_share": float(pool.synthetic[rows].mean()), "hard_share": float((pool.synthetic | pool.hard)[rows].mean()),
            "effective_scale": first.effective_scale, "learning_rate": optimizer.param_groups[0]["lr"],
            "class_samples": np.bincount(pool.labels[rows], minlength=pool.num_classes).tolist(),
        }  # fmt: skip
        last = epoch + 1 == settings.epochs
        if validate is not None and (settings.select == "validation" or last or (epoch + 1) % settings.validate_every == 0):
            record["validation_accuracy"] = validate(model)
            if settings.select == "validation" and record["validation_accuracy"] > max(
                (past["validation_accuracy"] for past in history), default=-1.0
            ):
                save_classifier(model, config, folder / "best")
        record["seconds"] = round(time.monotonic() - started, 3)
        history.append(record)
        if last or time.monotonic() - saved > settings.save_seconds:
            _save_checkpoint(checkpoint, model, optimizer, history)
            saved = time.monotonic()
        on_epoch(record)
    _finish(folder, model, config, settings.select, history)
    return history


def epoch_rows(pool: Pool, levels: Levels, mixing: Mixing, settings: TrainSettings, epoch: int) -> tuple[np.ndarray, Round]:
    """The rows that an epoch draws, and its first round: a pure function of (seed, epoch, levels)."""
    return mix_epoch(pool, levels, mixing, settings.steps_per_epoch * settings.batch_size, derive_seed("mix", settings.seed, epoch))


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, rows: np.ndarray, labels: np.ndarray, augment: nn.Module,
    objective: Callable[[Tensor, Tensor, Tensor], Tensor], counts: Tensor, config: ClassifierConfig, settings: TrainSettings,
    epoch: int, device: torch.device | str, checkpoint: Path,
) -> float:  # fmt: skip
    """Mean loss of one epoch. The random state is set anew, so that an epoch does not depend on those before it."""
    model.train()
    torch.manual_seed(derive_seed("augment", settings.seed, epoch))
    total = torch.zeros((), device=device)
    for step, (chosen, stored) in enumerate(batches.of(rows)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate((epoch + step / settings.steps_per_epoch) / settings.epochs)
        images = normalise(augment(stored.to(device, non_blocking=True).float() / 255), config)
        target = torch.from_numpy(labels[chosen]).to(device)
        with _autocast(device, settings.precision):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = objective(logits.float(), target, counts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        looked_at = (step + 1) % 50 == 0 or step + 1 == settings.steps_per_epoch  # a look waits for the device
        if looked_at and not bool(total.isfinite()):
            kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "no checkpoint had been saved yet"
            mend = "Lower train.optimizer.lr or use train.precision: float32."
            raise TrainingError(f"the loss is not finite in epoch {epoch}, step {step}; {kept}. {mend}")
    return total.item() / settings.steps_per_epoch


def _autocast(device: torch.device | str, precision: torch.dtype) -> Any:
    return nullcontext() if precision == torch.float32 else torch.autocast(torch.device(device).type, precision)


@torch.inference_mode()
def predict_logits(
    model: nn.Module, pixels: Pixels, rows: np.ndarray, config: ClassifierConfig, precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", batch_size: int = 256, workers: int = 0, on_progress: Callable[[int], None] = lambda count: None,
) -> Tensor:  # fmt: skip
    """Logits, float32 `[rows, classes]` on the CPU, of the centre crops, with the model in evaluation mode (and back afterwards)."""
    training = model.training
    model.eval()
    result = []
    for chosen, stored in Batches(pixels, batch_size, workers).of(rows):
        images = normalise(centre(stored.to(device).float() / 255, config.image_size), config)
        with _autocast(device, precision):
            result.append(model(images.contiguous(memory_format=torch.channels_last)).float().cpu())
        on_progress(len(chosen))
    model.train(training)
    return torch.cat(result)


def make_learning_rate(
    peak: float, schedule: str, epochs: int, warm_up_epochs: int = 0, milestones: Sequence[float] = ()
) -> Callable[[float], float]:
    """Learning rate over progress in [0, 1]: linear warm-up, then `cosine` to 0, `constant`, or `steps` (× .01 after each milestone)."""
    warm_up = warm_up_epochs / epochs

    def rate(progress: float) -> float:
        if progress < warm_up:
            return peak * (progress * epochs + 1) / (warm_up_epochs + 1)
        if schedule == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
        if schedule == "steps":
            return peak * 0.01 ** sum(progress >= milestone for milestone in milestones)
        return peak

    return rate


def make_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float, momentum: float, nesterov: bool) -> torch.optim.Optimizer:
    """The torch optimizer of that name over all parameters."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(model.parameters(), lr=lr, weight_decay=weight_decay)


def choose_precision(name: str, device: torch.device | str) -> torch.dtype:
    """bfloat16 where it is asked for, or where `auto` finds hardware that is faster with it; else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32


def _save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[Record]) -> None:
    """Weights, optimizer state and history in one file that appears whole or not at all."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items() if value is not None}
    unfinished = path.with_suffix(".new")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished, {"history": json.dumps(history)})
    unfinished.replace(path)
    write_history(history, path.parent / "history.jsonl")


def _load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Record]:
    """Restores model and optimizer in place and returns the history. Raises TrainingError for another model's checkpoint."""
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (not a dict)
                kind, _, name = key.partition(".")
                if kind == "model":
                    weights[name] = stored.get_tensor(key)
                else:
                    index, _, moment = name.partition(".")
                    moments.setdefault(int(index), {})[moment] = stored.get_tensor(key)
            history = json.loads(stored.metadata()["history"])
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, OSError, TypeError, ValueError, SafetensorError) as error:
        cause = first_cause(error)
        raise TrainingError(f"checkpoint {path} does not belong to this model: {cause} Delete its folder to train anew.") from error
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return history


def write_history(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One JSON line per epoch."""
    unfinished = path.with_suffix(".new")
    unfinished.write_text("".join(json.dumps(record) + "\n" for record in history))
    unfinished.replace(path)


def read_history(path: Path) -> list[Record]:
    """The records that `write_history` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _finish(folder: Path, model: nn.Module, config: ClassifierConfig, select: str, history: list[Record]) -> None:
    """Puts the chosen classifier in place; killed anywhere, it can be done again, for `best` goes after the checkpoint."""
    write_history(history, folder / "history.jsonl")
    best = folder / "best"
    if select == "validation" and best.exists():
        model.load_state_dict(load_file(best / "model.safetensors"))
    save_classifier(model, config, folder)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    shutil.rmtree(best, ignore_errors=True)
