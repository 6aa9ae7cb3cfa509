"""The loop: one function, resumable to the bit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..curriculum.progress import GuidanceSet
from ..curriculum.sampling import Pool, SamplingConfig
from ..curriculum.schedule import EpochSchedule, Record
from ..curriculum.strategies import Strategy
from ..errors import BrokenFileError, TrainingError
from ..evaluation.metrics import true_class_probability
from ..models.classifier import (
    TRAINED_AGAIN,
    ClassifierConfig,
    build_classifier,
    first_cause,
    normalise,
    save_classifier,
)
from ..run_folder import paths
from ..utils.atomic import clear_unfinished, make_folder
from ..utils.hashing import derive_seed
from ..utils.stored import (
    read_header,
    read_lines,
    read_tensors,
    reading,
    save_tensors,
    write_text,
)
from .augmentation import centre
from .distributed import Processes, current_processes
from .hooks import TrainingContext, TrainingHook
from .image_cache import EpochLoader, ImageCache
from .objectives import Objective, make_objective
from .step import StepConfig, TrainState, autocast


@dataclass(frozen=True)
class TrainSettings:
    """What training needs besides samples, strategy and loss; `learning_rate` maps progress in [0, 1] to a rate.

    `probe_samples` is |D| of algorithm 2, rounded to whole batches; they are part of the epoch's samples.
    `fingerprint` says what is trained on what; it is kept in the files, so that those of another
    training are told apart.
    """

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
    stepping: StepConfig = field(default_factory=StepConfig)
    probe_samples: int = 0
    fingerprint: str = ""


def train_classifier(
    pool: Pool,
    pixels: ImageCache,
    strategy: Strategy,
    mixing: SamplingConfig,
    objective: str | Mapping[str, Any] | Objective,
    class_counts: np.ndarray,
    config: ClassifierConfig,
    settings: TrainSettings,
    folder: Path,
    validate: Callable[[nn.Module], float] | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    on_epoch: Callable[[Record], None] = lambda record: None,
    make_model: Callable[[], nn.Module] | None = None,
    guidance: GuidanceSet | None = None,
    hook: TrainingHook | None = None,
    processes: Processes | None = None,
) -> list[Record]:
    """Trains a classifier into `folder` (`model.safetensors`, `config.json`, `history.jsonl`) and returns its history.

    `pixels` holds the images of the pool's rows; `validate(model)` returns the figure by which `select="validation"` chooses;
    `make_model` gives the network to begin with (default `build_classifier(config)`); `guidance` is V, for strategies that measure
    progress; `hook` is another system that takes part; `processes` are those that train together (default: all that were
    started together). Every random draw is a function of (seed, epoch), so a run that was killed
    and called again ends with the same weights. Raises TrainingError where the loss is not finite, naming epoch, step and the last good
    checkpoint.
    """
    if settings.select == "validation" and validate is None:
        raise TrainingError(
            "select is 'validation', but there is nothing to validate on; use select: last."
        )
    course = make_schedule(pool, strategy, mixing, settings, guidance)
    make_folder(folder)
    torch.manual_seed(derive_seed("init", settings.seed))
    model = (make_model or partial(build_classifier, config))().to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = TrainState(
        model, settings.make_optimizer, make_objective(objective), class_counts, config, settings.stepping, settings.augment,
        settings.precision, device, hook, processes or current_processes(),
    )  # fmt: skip
    context = TrainingContext(
        pool, pixels, learner, settings.seed, settings.batch_size, settings.epochs, workers
    )
    learner.hook.begin(context)
    learner.write(
        lambda: clear_unfinished(folder, older_than=0)
    )  # of a training that was killed while it saved; a checkpoint is large
    checkpoint = folder / paths.CHECKPOINT
    history: list[Record] = (
        _load_checkpoint(checkpoint, learner, settings.fingerprint) if checkpoint.exists() else []
    )
    batches = learner.batches(pixels, settings.batch_size, workers)
    judge = _Judge(learner, pixels, guidance) if guidance is not None else None
    for record in history:
        on_epoch(record)
    saved = time.monotonic()
    for epoch in range(len(history), settings.epochs):
        started, busy = time.monotonic(), time.process_time()
        chosen, rows = _train_epoch(
            context, batches, course, settings, epoch, history, judge, checkpoint
        )
        record = {
            "epoch": epoch, **chosen, "samples": len(rows), "synthetic_share": float(pool.synthetic[rows].mean()),
            "hard_share": float((pool.synthetic | pool.hard)[rows].mean()), "learning_rate": learner.optimizer.param_groups[0]["lr"],
            "class_samples": np.bincount(pool.labels[rows], minlength=pool.num_classes).tolist(),
        }  # fmt: skip
        last = epoch + 1 == settings.epochs
        if validate is not None and (
            settings.select == "validation" or last or (epoch + 1) % settings.validate_every == 0
        ):
            record["validation_accuracy"] = learner.processes.broadcast(validate(learner.evaluated))
            if settings.select == "validation" and record["validation_accuracy"] > max(
                (past["validation_accuracy"] for past in history), default=-1.0
            ):
                learner.write(
                    lambda: save_classifier(learner.evaluated, config, folder / paths.BEST)
                )
        record["seconds"], record["processor_seconds"] = (
            round(time.monotonic() - started, 3),
            round(time.process_time() - busy, 3),
        )
        history.append(record)
        if learner.processes.broadcast(last or time.monotonic() - saved > settings.save_seconds):
            learner.write(
                lambda: _save_checkpoint(checkpoint, learner, history, settings.fingerprint)
            )
            saved = time.monotonic()
        on_epoch(record)
    learner.write(lambda: _finish(folder, context, config, settings, history))
    return history


def make_schedule(
    pool: Pool,
    strategy: Strategy,
    mixing: SamplingConfig,
    settings: TrainSettings,
    guidance: GuidanceSet | None = None,
) -> EpochSchedule:
    """What training draws, with the probe in whole batches. Raises TrainingError where the probe would leave an epoch no step."""
    samples, probe = settings.steps_per_epoch * settings.batch_size, 0
    if strategy.measures(0) == "probe":
        steps = max(round(settings.probe_samples / settings.batch_size), 1)
        if steps >= settings.steps_per_epoch:
            raise TrainingError(
                f"the probe of {settings.probe_samples} samples takes {steps} of the epoch's {settings.steps_per_epoch} steps and leaves "
                "none for the chosen level; lower methods.*.probe_samples or raise train.steps_per_epoch."
            )
        probe = steps * settings.batch_size
    return EpochSchedule(
        pool,
        strategy,
        mixing,
        samples=samples,
        seed=settings.seed,
        guidance=guidance,
        probe_samples=probe,
    )


def check_batch_size(pool: Pool, batch_size: int) -> None:
    """Raises TrainingError where a batch is larger than the real images, so that an update without synthetic ones would see some twice."""
    rows = int((~pool.synthetic & ~pool.held_out).sum())
    if rows < batch_size:
        raise TrainingError(
            f"train.batch_size = {batch_size} exceeds the {rows} real images that there are to train on, so a batch would hold images "
            f"twice; use at most {rows}."
        )


class _Judge:
    """Measures the true-class probability of every image of V, with the model in evaluation mode; V is decoded once.

    It is computed in float32 whatever training is in: the change that a few steps bring is smaller
    than what bfloat16 tells apart. What the first process measures holds for all, so that they
    choose one level.
    """

    def __init__(self, learner: TrainState, pixels: ImageCache, guidance: GuidanceSet) -> None:
        self.learner, self.guidance, self.pixels = learner, guidance, pixels.of_rows(guidance.rows)

    def __call__(self) -> np.ndarray:
        learner, rows = self.learner, np.arange(len(self.guidance))
        logits = predict_logits(
            learner.model, self.pixels, rows, learner.config, device=learner.device
        )
        return learner.processes.broadcast(true_class_probability(logits, self.guidance.labels))


def _train_epoch(
    context: TrainingContext, batches: EpochLoader, course: EpochSchedule, settings: TrainSettings,
    epoch: int, history: list[Record], judge: _Judge | None,
    checkpoint: Path,
) -> tuple[Record, np.ndarray]:  # fmt: skip
    """The steps of one epoch, part by part: what was chosen and measured, as plain values for the record, and the rows that were drawn."""
    record: Record = {}
    drawn: list[np.ndarray] = []
    total, learner = 0.0, context.learner
    learner.hook.begin_epoch(context, epoch)
    for part in range(course.parts(epoch)):
        rows, chosen = course.draw(epoch, part, [*history, record] if record else history)
        rows = learner.hook.draw(context, epoch, rows)
        before = course.measure_before(epoch, part, judge)
        total += len(rows) * learner.train_epoch(
            batches, rows, course.pool.labels, epoch, settings.epochs, settings.batch_size, settings.seed, settings.learning_rate,
            checkpoint, sum(map(len, drawn)) // settings.batch_size, settings.steps_per_epoch,
        )  # fmt: skip
        record |= {**chosen, **course.measure_after(before, judge)}
        drawn.append(rows)
    rows = np.concatenate(drawn)
    return {**record, "loss": total / len(rows)}, rows


@torch.inference_mode()
def logits_of(
    model: nn.Module,
    squares: Tensor,
    config: ClassifierConfig,
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    aspects: Tensor | None = None,
) -> Tensor:
    """Logits, float32 `[batch, classes]` on the CPU, of the centre crops of uint8 squares `[batch, 3, size, size]`.

    With `aspects` `[batch]`, width / height, the squares are whole pictures squeezed.
    The model, which has to be in evaluation mode, is on `device`.
    """
    middle = centre(squares.to(device).float() / 255, config.image_size, aspects)
    images = normalise(middle, config)
    with autocast(device, precision):
        return model(images.contiguous(memory_format=torch.channels_last)).float().cpu()


@torch.inference_mode()
def predict_logits(
    model: nn.Module, pixels: ImageCache, rows: np.ndarray, config: ClassifierConfig, precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", batch_size: int = 256, workers: int = 0, on_progress: Callable[[int], None] = lambda count: None,
) -> Tensor:  # fmt: skip
    """Logits, float32 `[rows, classes]` on the CPU, of the centre crops, with the model in evaluation mode (and back afterwards)."""
    training = model.training
    model.eval()
    result = []
    batches = EpochLoader(pixels, batch_size, workers)
    for chosen, stored in batches.of(rows):
        aspects = batches.aspects_of(chosen)
        result.append(logits_of(model, stored, config, precision, device, aspects))
        on_progress(len(chosen))
    model.train(training)
    return torch.cat(result)


def choose_precision(name: str, device: torch.device | str) -> torch.dtype:
    """bfloat16 where it is asked for, or where `auto` finds hardware that is faster with it; else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    return (
        torch.bfloat16
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else torch.float32
    )


def _save_checkpoint(
    path: Path, learner: TrainState, history: list[Record], fingerprint: str
) -> None:
    """Weights, optimizer state and history in one file that appears whole or not at all.

    Raises WriteError where the disk refuses; the checkpoint before it is then as it was.
    """
    tensors = learner.state()
    save_tensors(tensors, path, {"history": json.dumps(history), "fingerprint": fingerprint})
    write_history(history, path.parent / paths.HISTORY)


def _load_checkpoint(path: Path, learner: TrainState, fingerprint: str) -> list[Record]:
    """Restores the learner in place and returns the history. Raises TrainingError for another model's checkpoint."""
    try:
        _, metadata = read_header(path)
        if metadata.get("fingerprint", fingerprint) != fingerprint:
            raise ValueError("it was saved while something else was trained.")
        history = json.loads(metadata["history"])
        learner.load_state(read_tensors(path))
    except (BrokenFileError, RuntimeError, KeyError, TypeError, ValueError) as error:
        cause = first_cause(error)
        raise TrainingError(
            f"checkpoint {path} does not belong to this model: {cause} Delete its folder to train anew."
        ) from error
    return history


def write_history(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One JSON line per epoch."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in history))


def read_history(path: Path) -> list[Record]:
    """The records that `write_history` wrote. Raises BrokenFileError where they are not whole."""
    return read_lines(path, "epoch", advice=TRAINED_AGAIN)


def _finish(
    folder: Path,
    context: TrainingContext,
    config: ClassifierConfig,
    settings: TrainSettings,
    history: list[Record],
) -> None:
    """Puts the chosen classifier in place; killed anywhere, it can be done again, for `best` goes after the checkpoint."""
    model = context.learner.evaluated
    best = folder / paths.BEST
    if settings.select == "validation" and best.exists():
        chosen = best / paths.WEIGHTS
        with reading(chosen, TRAINED_AGAIN):
            model.load_state_dict(read_tensors(chosen, TRAINED_AGAIN))
    started, busy = time.monotonic(), time.process_time()
    counts = context.learner.hook.finish(context, model)
    if history:  # what a hook does in the end is training too
        last = history[-1]
        last["seconds"] = round(last["seconds"] + time.monotonic() - started, 3)
        last["processor_seconds"] = round(
            last.get("processor_seconds", 0.0) + time.process_time() - busy, 3
        )
        if counts is not None:
            last["last_layer_samples"] = counts.tolist()
    write_history(history, folder / paths.HISTORY)
    save_classifier(model, config, folder, settings.fingerprint)
    (folder / paths.CHECKPOINT).unlink(missing_ok=True)
    shutil.rmtree(best, ignore_errors=True)
