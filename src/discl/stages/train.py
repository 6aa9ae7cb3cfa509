"""`discl train`: the classifier of every method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..baselines import make_system
from ..curriculum.progress import GuidanceSet
from ..curriculum.sampling import Pool, SamplingConfig
from ..curriculum.schedule import hold_out_guidance, make_sampling
from ..curriculum.strategies import RealOnly, Strategy, follows_progress, make_strategy
from ..data import ImageTable
from ..errors import TrainingError, arguments_named
from ..evaluation import metrics
from ..models.classifier import ClassifierConfig, load_classifier
from ..recipe import Method, Train, check_own_pieces
from ..run_folder import paths
from ..run_folder.run import Run
from ..training.distributed import Processes, current_processes
from ..training.image_cache import ImageCache
from ..training.loop import (
    TrainSettings,
    check_batch_size,
    make_schedule,
    predict_logits,
    train_classifier,
)
from ..training.objectives import make_objective
from ..utils.console import progress
from ..utils.logging import get_logger
from ..utils.plugins import is_address
from .classifiers import describe_classifier, describe_training, starter_of
from .loggers import open_loggers
from .resize_data import prepared_table
from .sample_pool import hard_rows, kept_images, made_aspects, make_pool, real_aspects
from .trained import classifier_config, fingerprint, is_trained, mend_config, open_method

logger = get_logger(__name__)

CLASS_POWER = {"instance": 1.0, "square-root": 0.5, "class-balanced": 0.0}
"""Exponent of a class's share of an epoch, by the name that recipes use."""


def train(run: Run) -> Path:
    """Trains the classifier of every method into `train/METHOD`; a finished one is left alone, a half-finished one goes on.

    Raises TrainingError for what a method cannot be trained on before any other is trained, and before an old classifier is deleted.
    """
    methods = run.recipe.methods
    check_own_pieces(run.recipe, run.allow_plugins)
    kept = {
        threshold: kept_images(run, threshold)
        for threshold in dict.fromkeys(method.threshold for method in methods.values())
    }
    fingerprints = {
        name: fingerprint(run, name, method, kept[method.threshold])
        for name, method in methods.items()
    }
    waiting = {
        name: method
        for name, method in methods.items()
        if not is_trained(run, name, fingerprints[name])
    }
    hard = hard_rows(run)
    pools = {threshold: make_pool(run.train, hard, images) for threshold, images in kept.items()}
    asked = {}
    for name, method in waiting.items():
        with _named_by_method(name, " Nothing was trained."):
            wanted = _ask(run, name, method, pools[method.threshold])
        settings = replace(wanted.settings, fingerprint=fingerprints[name])
        asked[name] = replace(wanted, settings=settings)
    processes = current_processes()
    if processes.first:
        for name in methods.keys() - waiting.keys():
            mend_config(run, name)
    if processes.first and waiting:
        for name, method in waiting.items():
            open_method(run, name, method, fingerprints[name])
    processes.barrier()  # until the first has made the folders ready
    fed = {
        name: (
            classifier_config(run, name).resize,
            run.recipe.training(name).resize_mode,
            method.threshold,
        )
        for name, method in waiting.items()
    }
    for size, mode, threshold in dict.fromkeys(sorted(fed.values(), key=lambda each: each[:2])):
        pixels = _training_pixels(run, size, mode, kept[threshold])
        for name, method in waiting.items():
            if fed[name] == (size, mode, threshold):
                _train_method(run, name, method, asked[name], pixels)
    return run.path(paths.TRAIN)


def _training_pixels(run: Run, size: int, mode: str, synthetic: Dataset) -> ImageCache:
    """Real training images, then synthetic ones, at `size` pixels: their centres, or whole with
    their aspects."""
    real = prepared_table(run, "train", size, mode)
    aspects = (
        np.concatenate([real_aspects(run, "train"), made_aspects(run, synthetic["source_id"][:])])
        if mode == "whole"
        else None
    )
    with progress("decode training images", len(real) + len(synthetic)) as advance:
        return ImageCache([real, synthetic], size, advance, aspects)


def fit_classifier(
    table: ImageTable,
    fitted: list[int],
    judged: list[int],
    train: Train,
    epochs: int,
    device: torch.device,
    aspects: np.ndarray | None = None,
) -> np.ndarray:
    """Probabilities `[judged, classes]` of a plain cross-entropy classifier that is trained on the
    `fitted` rows only.

    `aspects` is width / height of the images of `table`, which `train.resize_mode: whole` needs.
    """
    rows = table.select(fitted + judged)
    config = describe_classifier(train, table.class_names)
    pool, pixels = (
        make_pool(rows, np.zeros(len(rows), bool), _no_images()),
        ImageCache(
            [rows],
            config.resize,
            aspects=aspects[fitted + judged] if aspects is not None else None,
        ),
    )
    count = len(fitted)
    seen = Pool(
        pool.labels[:count],
        pool.levels[:count],
        pool.synthetic[:count],
        pool.hard[:count],
        pool.class_names,
    )
    settings = replace(describe_training(train, "full", len(fitted), device, epochs), select="last")
    with (
        tempfile.TemporaryDirectory() as folder,
        progress("judge training images", epochs) as advance,
    ):
        train_classifier(
            seen, pixels, RealOnly(), SamplingConfig(None, 0.0), "cross-entropy", seen.real_counts,
            config, settings, Path(folder), device=device,
            on_epoch=lambda record: advance(1), make_model=starter_of(config, train), processes=Processes(),
        )  # fmt: skip
        model, _ = load_classifier(Path(folder))
    logits = predict_logits(
        model.to(device), pixels, np.arange(len(fitted), len(rows)), config, device=device
    )
    return metrics.softmax_rows(logits).numpy()


@dataclass(frozen=True)
class _Asked:
    """What a method is trained on and how; `pool` without V, where there is one."""

    pool: Pool
    strategy: Strategy
    mixing: SamplingConfig
    settings: TrainSettings
    guidance: GuidanceSet | None


def check_training(run: Run) -> None:
    """Raises TrainingError for what a method cannot be trained on whatever its synthetic images are; `hard.parquet` is there already.

    A method whose strategy is `module:attribute` is passed over: that is imported by the stage that trains.
    """
    pool = make_pool(run.train, hard_rows(run), _no_images())
    for name, method in run.recipe.methods.items():
        if is_address(method.strategy):
            continue
        with _named_by_method(name):
            _ask_of_real(run, name, method, pool)


@contextmanager
def _named_by_method(name: str, outcome: str = "") -> Iterator[None]:
    """Errors raised inside name a key of this method; `outcome` is added to their messages."""
    keys = {key: f"methods.{name}.{key}" for key in ("missing", "undersample")}
    try:
        with arguments_named(curriculum_epochs="train.curriculum_epochs", **keys):
            yield
    except TrainingError as error:
        argument = error.argument or f"methods.{name}"
        raise TrainingError(f"{error.args[0]}{outcome}", argument=argument) from error


def _ask(run: Run, name: str, method: Method, pool: Pool) -> _Asked:
    """What a method asks for. Raises TrainingError where the pool or the processes cannot give it."""
    asked, levels = _ask_of_real(run, name, method, pool), run.recipe.spectrum.levels
    if follows_progress(method.strategy, asked.strategy):
        pool, guidance = hold_out_guidance(
            pool, levels, method.guidance_images, asked.settings.seed
        )
        _tell_guidance(name, method, pool, guidance)
        asked = replace(asked, pool=pool, guidance=guidance)
    if asked.settings.epochs:
        course = make_schedule(
            asked.pool, asked.strategy, asked.mixing, asked.settings, asked.guidance
        )
        course.check(levels, asked.settings.epochs)
    return asked


def _tell_guidance(name: str, method: Method, pool: Pool, guidance: GuidanceSet) -> None:
    """Says what V takes from training, and where it is smaller than the recipe asks for."""
    held, hard = int((pool.hard & pool.held_out).sum()), int(pool.hard.sum())
    sources = len(np.unique(pool.sources[guidance.rows]))
    less = (
        f", not {method.guidance_images}: no more have one and can be spared by their class"
        if method.guidance_images and sources < method.guidance_images
        else ""
    )
    logger.info(
        f"train {name}: progress is measured on {sources} hard image{'s' * (sources != 1)}, by one "
        f"synthetic image at every level{less}; "
        f"{held} of {hard} hard images are held out of training with all their synthetic images"
    )


def _ask_of_real(run: Run, name: str, method: Method, pool: Pool) -> _Asked:
    """What a method asks for, without V: whatever does not depend on the synthetic images, which may be missing in the pool.

    Raises TrainingError where the real images or the processes cannot give it.
    """
    recipe = run.recipe
    strategy = make_strategy(
        method.strategy,
        levels=recipe.spectrum.levels,
        curriculum_epochs=recipe.training(name).curriculum_epochs,
        level=method.level,
        seed=recipe.training(name).seed,
        allow_plugins=run.allow_plugins,
    )
    undersample = (
        method.undersample
        if method.undersample is not None
        else method.strategy != "real-only" and recipe.hard.rule == "tail"
    )
    mixing = make_sampling(
        pool,
        strategy,
        undersample=undersample,
        synthetic_scale=method.synthetic_scale,
        shortage=method.shortage,
        missing=method.missing,
        class_power=CLASS_POWER[method.sampling],
    )
    train = recipe.training(name)
    settings = describe_training(
        train, method.fine_tune, int((~pool.synthetic).sum()), run.device, train.epochs
    )
    if follows_progress(method.strategy, strategy):
        samples = settings.steps_per_epoch * settings.batch_size
        settings = replace(
            settings, probe_samples=method.probe_samples or min(30_000, samples // 4)
        )
    if settings.epochs:
        check_batch_size(pool, settings.batch_size)
        current_processes().check_batch_size(settings.batch_size, settings.stepping.accumulate)
        make_schedule(pool, strategy, mixing, settings)
    return _Asked(pool, strategy, mixing, settings, None)


def _no_images() -> Dataset:
    """Synthetic images, where there are none."""
    return Dataset.from_dict({"image": [], "label": [], "level": []})


def _train_method(run: Run, name: str, method: Method, asked: _Asked, pixels: ImageCache) -> None:
    recipe, folder, train = run.recipe, run.path(paths.TRAIN) / name, run.recipe.training(name)
    pool, strategy, mixing, settings = asked.pool, asked.strategy, asked.mixing, asked.settings
    config = classifier_config(run, name)
    validate = _validator(run, config) if "validation" in run.tables else None
    loggers = recipe.runtime.loggers if current_processes().first else []
    logs = run.path(paths.LOGS)
    opened = open_loggers(loggers, logs, f"{recipe.name}-{name}", folder / paths.WANDB)
    with progress(f"train {name}", settings.epochs) as advance, opened as log:

        def on_epoch(record: dict[str, Any]) -> None:
            advance(1)
            log(record)

        counts = _prior_counts(pool, strategy, mixing, method, settings)
        objective = make_objective(method.objective, run.allow_plugins)
        history = train_classifier(
            pool, pixels, strategy, mixing, objective, counts, config, settings, folder, validate, run.device, 
            on_epoch=on_epoch, guidance=asked.guidance, make_model=starter_of(config, train, recipe.prompts.names),
            hook=make_system(method.system, run.allow_plugins) if method.system else None,
        )  # fmt: skip
    apart = [record["classes_apart"] for record in history if "classes_apart" in record]
    if apart:
        logger.info(
            f"train {name}: {min(apart)} to {max(apart)} of {pool.num_classes} classes took another level than the common one"
        )
    scales = [record["effective_scale"] for record in history if record["levels"]]
    if scales:
        wanted = f"(asked for {method.synthetic_scale:g})"
        logger.info(
            f"train {name}: {min(scales):.2f} to {max(scales):.2f} distinct synthetic images per real tail image {wanted}"
        )


def _prior_counts(
    pool: Pool, strategy: Any, mixing: SamplingConfig, method: Method, settings: TrainSettings
) -> np.ndarray:
    """Class counts of Balanced Softmax: real images, or the samples that all epochs draw together."""
    if method.prior == "real":
        return pool.real_counts
    total = np.zeros(pool.num_classes)
    course = make_schedule(pool, strategy, mixing, settings)
    for epoch in range(settings.epochs):
        rows, _ = course.draw(epoch, 0, [])
        total += np.bincount(pool.labels[rows], minlength=pool.num_classes)
    return total


def _validator(run: Run, config: ClassifierConfig) -> Callable[[nn.Module], float]:
    """Accuracy on validation, in float32 as `evaluate` has it: bfloat16 lets the highest logits of
    many images tie."""
    table = run.tables["validation"]
    pixels = ImageCache([prepared_table(run, "validation", config.resize)], config.resize)
    labels = torch.from_numpy(table.labels)

    def validate(model: nn.Module) -> float:
        logits = predict_logits(
            model,
            pixels,
            np.arange(len(table)),
            config,
            device=run.device,
            workers=run.recipe.runtime.workers,
        )
        return (logits.argmax(1) == labels).double().mean().item()

    return validate
