"""The loop: one function, resumable to the bit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..curriculum.progress import GuidanceSet
from ..curriculum.sampling import Pool, SamplingConfig
from ..curriculum.schedule import EpochSchedule, Finish, Record
from ..curriculum.strategies import Strategy
from ..errors import TrainingError
from ..evaluation.metrics import true_class_probability
from ..models.classifier import (
    TRAINED_AGAIN,
    ClassifierConfig,
    build_classifier,
    save_classifier,
)
from ..models.heads import head_of
from ..run_folder import paths
from ..utils.atomic import clear_unfinished, make_folder
from ..utils.hashing import derive_seed
from ..utils.stored import read_tensors, reading
from .checkpoint import load_checkpoint, save_checkpoint, write_history
from .distributed import Processes, current_processes
from .hooks import TrainingContext, TrainingHook
from .image_cache import EpochLoader, ImageCache
from .inference import predict_logits
from .objectives import Objective, make_objective
from .step import EpochPart, StepConfig, TrainState

LAST_LAYER = "last_layer_samples"
"""Key of a record: how often each class was shown to the last layer where it was trained alone."""


@dataclass(frozen=True)
class TrainSettings:
    """How a classifier is trained.

    - `steps_per_epoch`, `batch_size`: the updates of an epoch, the same for every strategy.
    - `augment`: names of augmentations; `precision`: of the forward and backward passes.
    - `make_optimizer`: makes the optimizer of a model; `learning_rate`: its rate at a
      fraction of the training in [0, 1].
    - `seed`: of every random draw, together with the epoch.
    - `select`: the `last` epoch, or the best one on `validation`, which measures every epoch; with
      `last` every `validate_every`-th epoch is measured.
    - `save_seconds`: time between two checkpoints.
    - `steps`: how a gradient step is made.
    - `probe_samples`: |D| of algorithm 2 (arXiv 2410.13674), rounded to whole batches. They are
      part of the epoch's samples.
    - `finish`: last epochs on real images only, which may train the head alone.
    - `fingerprint`: identifies what is trained on what. It is stored with the checkpoint and the
      classifier, so that another training does not go on with them.
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
    steps: StepConfig = field(default_factory=StepConfig)
    probe_samples: int = 0
    finish: Finish | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class TrainingJob:
    """What is trained, on what, and how.

    - `pool`: real and synthetic samples; `pixels`: their images, row by row.
    - `strategy`: which levels an epoch draws; `sampling`: how many images it draws of each kind.
    - `objective`: the loss, by name, as `{name: focal, gamma: 2}` or ready; `class_counts`: its
      class prior, `[classes]`.
    - `classifier`: the network and its input; `settings`: optimization.
    - `make_model`: returns the initial network, by default `build_classifier(classifier)`.
    - `guidance`: V, for strategies that measure progress.
    - `hook`: another system that takes part.
    - `validate`: returns the figure of a model by which `select="validation"` chooses an epoch.
    """

    pool: Pool
    pixels: ImageCache
    strategy: Strategy
    sampling: SamplingConfig
    objective: str | Mapping[str, Any] | Objective
    class_counts: np.ndarray
    classifier: ClassifierConfig
    settings: TrainSettings
    make_model: Callable[[], nn.Module] | None = None
    guidance: GuidanceSet | None = None
    hook: TrainingHook | None = None
    validate: Callable[[nn.Module], float] | None = None


def train_classifier(
    job: TrainingJob,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    processes: Processes | None = None,
    on_epoch: Callable[[Record], None] = lambda record: None,
    until: int | None = None,
    at_pause: Callable[[nn.Module], None] = lambda model: None,
) -> list[Record]:
    """Trains a classifier into a folder and returns its history, one record per epoch.

    The folder then holds `model.safetensors`, `config.json` and `history.jsonl`. Every random draw
    is a function of (seed, epoch), so a killed training that is called again ends with the same
    weights.

    - `workers`: processes that decode images which do not fit in memory.
    - `processes`: those that train together, by default all that were started together.
    - `on_epoch`: gets the record of each epoch, also of those before a kill.
    - `until`: number of epochs after which training pauses. Then the folder holds a checkpoint
      only, from which the same call with a greater `until`, or none, goes on. The pool may have
      more rows by then, if those before stay as they are (`Pool.since`).
    - `at_pause`: gets the model at a pause.

    Raises TrainingError where the loss or a weight is not finite; it names epoch, step and the last
    good checkpoint.
    """
    settings, checkpoint = job.settings, folder / paths.CHECKPOINT
    if settings.select == "validation" and job.validate is None:
        raise TrainingError(
            "select is 'validation', but there is nothing to validate on; use select: last.",
            argument="validate",
        )

    # Schedule, model, loss and optimizer
    schedule = make_schedule(job.pool, job.strategy, job.sampling, settings, guidance=job.guidance)
    make_folder(folder)
    state = make_state(job, device, processes or current_processes())
    context = TrainingContext(
        job.pool, job.pixels, state, settings.seed, settings.batch_size, settings.epochs, workers
    )
    state.hook.begin(context)

    # Resume after a kill, which may have left half a file
    state.write(lambda: clear_unfinished(folder, older_than=0))
    history: list[Record] = []
    if checkpoint.exists():
        history = load_checkpoint(checkpoint, state, settings.fingerprint)
    loader = state.loader(job.pixels, settings.batch_size, workers)
    for record in history:
        on_epoch(record)

    # Epochs: draw, train, validate, save
    epochs = _Epochs(job, schedule, context, loader, checkpoint)
    saved, end = time.monotonic(), settings.epochs if until is None else until
    for epoch in range(len(history), end):
        started, busy = time.monotonic(), time.process_time()
        record = epochs.train(epoch, history)
        if epoch == 0 and state.footprint is not None:
            record |= state.footprint.plain()
        _validate(job, state, epoch, record, history, folder)
        record["seconds"] = round(time.monotonic() - started, 3)
        record["processor_seconds"] = round(time.process_time() - busy, 3)
        history.append(record)
        due = epoch + 1 == end or time.monotonic() - saved > settings.save_seconds
        if state.processes.broadcast(due):
            state.write(lambda: save_checkpoint(checkpoint, state, history, settings.fingerprint))
            saved = time.monotonic()
        on_epoch(record)

    # Classifier
    if until is not None:
        at_pause(state.evaluated)
        return history
    state.write(lambda: _finish(job, context, history, folder))
    return history


def make_state(job: TrainingJob, device: torch.device | str, processes: Processes) -> TrainState:
    """Returns the initial network of a job with its optimizer; a function of the seed."""
    settings = job.settings
    torch.manual_seed(derive_seed("init", settings.seed))
    model = _initial_model(job).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainState(
        model,
        settings.make_optimizer,
        objective=make_objective(job.objective),
        class_counts=job.class_counts,
        config=job.classifier,
        steps=settings.steps,
        augment=settings.augment,
        precision=settings.precision,
        device=device,
        hook=job.hook,
        processes=processes,
        finish=settings.finish,
    )


def _initial_model(job: TrainingJob) -> nn.Module:
    return (job.make_model or partial(build_classifier, job.classifier))()


def _initial_head(job: TrainingJob) -> dict[str, torch.Tensor]:
    """The state of the head at the start of training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("init", job.settings.seed))
        return head_of(_initial_model(job)).state_dict()


def make_schedule(
    pool: Pool,
    strategy: Strategy,
    sampling: SamplingConfig,
    settings: TrainSettings,
    *,
    guidance: GuidanceSet | None = None,
) -> EpochSchedule:
    """Returns what training draws, with the probe in whole batches.

    Raises TrainingError where the probe would leave an epoch no step.
    """
    samples, probe = settings.steps_per_epoch * settings.batch_size, 0
    if strategy.measures(0) == "probe":
        steps = max(round(settings.probe_samples / settings.batch_size), 1)
        if steps >= settings.steps_per_epoch:
            raise TrainingError(
                f"a probe of {settings.probe_samples} samples takes {steps} of the epoch's "
                f"{settings.steps_per_epoch} steps and leaves none for the chosen level; use fewer "
                "samples or more steps per epoch.",
                argument="probe_samples",
            )
        probe = steps * settings.batch_size
    return EpochSchedule(
        pool,
        strategy,
        sampling,
        samples=samples,
        seed=settings.seed,
        guidance=guidance,
        probe_samples=probe,
        finish=settings.finish,
    )


def check_batch_size(pool: Pool, batch_size: int) -> None:
    """Raises TrainingError where a batch is larger than the real images.

    An update without synthetic images would then see some images twice.
    """
    rows = int((~pool.synthetic & ~pool.held_out).sum())
    if rows < batch_size:
        raise TrainingError(
            f"{batch_size} exceeds the {rows} real images to train on, so a batch would hold "
            f"images twice; use at most {rows}.",
            argument="batch_size",
        )


class _GuidanceScorer:
    """Measures the true-class probability of every image of V, in evaluation mode.

    V is decoded once. It is measured in float32 whatever the precision of training: bfloat16 does
    not resolve the change that a few steps bring. The result of rank 0 is broadcast.
    """

    def __init__(self, state: TrainState, pixels: ImageCache, guidance: GuidanceSet) -> None:
        self.state, self.guidance = state, guidance
        self.pixels = pixels.of_rows(guidance.rows)

    def __call__(self) -> np.ndarray:
        state, rows = self.state, np.arange(len(self.guidance))
        logits = predict_logits(state.model, self.pixels, rows, state.config, device=state.device)
        return state.processes.broadcast(true_class_probability(logits, self.guidance.labels))


class _Epochs:
    """Trains epoch by epoch, in parts where a strategy measures progress within an epoch."""

    def __init__(
        self,
        job: TrainingJob,
        schedule: EpochSchedule,
        context: TrainingContext,
        loader: EpochLoader,
        checkpoint: Path,
    ) -> None:
        self.job, self.schedule, self.context = job, schedule, context
        self.loader, self.checkpoint = loader, checkpoint
        self.scorer = (
            _GuidanceScorer(context.state, job.pixels, job.guidance)
            if job.guidance is not None
            else None
        )

    def train(self, epoch: int, history: list[Record]) -> Record:
        """Trains one epoch; returns what was chosen, measured and drawn, as plain values."""
        settings, state, pool = self.job.settings, self.context.state, self.job.pool
        chosen: Record = {}
        drawn: list[np.ndarray] = []
        total = 0.0
        finish = settings.finish
        of_head = finish is not None and finish.of_head(epoch)
        if finish is not None and of_head and epoch == finish.start:
            state.begin_finish(_initial_head(self.job) if finish.new_head else None)
        state.hook.begin_epoch(self.context, epoch)
        for number in range(self.schedule.parts(epoch)):
            past = [*history, chosen] if chosen else history
            rows, choice = self.schedule.draw(epoch, number, past)
            if not of_head:
                rows = state.hook.draw(self.context, epoch, rows)
            before = self.schedule.measure_before(epoch, number, self.scorer)
            part = EpochPart(
                rows,
                epoch,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                seed=settings.seed,
                first_step=sum(map(len, drawn)) // settings.batch_size,
                steps_per_epoch=settings.steps_per_epoch,
                synthetic=pool.synthetic,
            )
            total += len(rows) * state.train_epoch(
                self.loader, part, pool.labels, settings.learning_rate, self.checkpoint
            )
            chosen |= {**choice, **self.schedule.measure_after(before, self.scorer)}
            drawn.append(rows)
        rows = np.concatenate(drawn)
        class_samples = np.bincount(pool.labels[rows], minlength=pool.num_classes)
        record = {
            "epoch": epoch,
            **chosen,
            "loss": total / len(rows),
            "samples": len(rows),
            "synthetic_share": float(pool.synthetic[rows].mean()),
            "hard_share": float((pool.synthetic | pool.hard)[rows].mean()),
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "class_samples": class_samples.tolist(),
        }
        if of_head:  # the samples that the head ends with
            shown = history[-1].get(LAST_LAYER, 0) if history else 0
            record[LAST_LAYER] = (class_samples + shown).tolist()
        return record


def _validate(
    job: TrainingJob,
    state: TrainState,
    epoch: int,
    record: Record,
    history: list[Record],
    folder: Path,
) -> None:
    """Adds the figure on validation where it is due, and keeps the classifier if it is the best."""
    settings, select = job.settings, job.settings.select == "validation"
    due = epoch + 1 == settings.epochs or (epoch + 1) % settings.validate_every == 0
    if job.validate is None or not (select or due):
        return
    figure = state.processes.broadcast(job.validate(state.evaluated))
    record["validation_accuracy"] = figure
    best = max((past["validation_accuracy"] for past in history), default=-1.0) if select else None
    if best is not None and figure > best:
        state.write(lambda: save_classifier(state.evaluated, job.classifier, folder / paths.BEST))


def _finish(
    job: TrainingJob, context: TrainingContext, history: list[Record], folder: Path
) -> None:
    """Writes the chosen classifier; after a kill it can run again, as `best` is deleted last."""
    model, best = context.state.evaluated, folder / paths.BEST
    if job.settings.select == "validation" and best.exists():
        chosen = best / paths.WEIGHTS
        with reading(chosen, TRAINED_AGAIN):
            model.load_state_dict(read_tensors(chosen, TRAINED_AGAIN))
    started, busy = time.monotonic(), time.process_time()
    counts = context.state.hook.finish(context, model)
    if history:  # what a hook does at the end is training too
        last = history[-1]
        last["seconds"] = round(last["seconds"] + time.monotonic() - started, 3)
        seconds = last.get("processor_seconds", 0.0) + time.process_time() - busy
        last["processor_seconds"] = round(seconds, 3)
        if counts is not None:
            last[LAST_LAYER] = counts.tolist()
    write_history(history, folder / paths.HISTORY)
    save_classifier(model, job.classifier, folder, job.settings.fingerprint)
    (folder / paths.CHECKPOINT).unlink(missing_ok=True)
    shutil.rmtree(best, ignore_errors=True)
