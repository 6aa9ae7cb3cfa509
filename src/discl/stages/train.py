"""`discl train`: the classifier of every method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..baselines import make_system
from ..curriculum.sampling import Pool, SamplingConfig
from ..curriculum.schedule import Record
from ..curriculum.strategies import RealOnly
from ..data import ImageTable
from ..evaluation import metrics
from ..levels import REAL
from ..models.classifier import ClassifierConfig, load_classifier
from ..recipe import Method, Train, check_own_pieces
from ..recipe.loop import learner_of
from ..recipe.methods import RETRIEVED
from ..run_folder import paths
from ..run_folder.run import Run
from ..training.distributed import Processes, current_processes
from ..training.image_cache import ImageCache
from ..training.inference import predict_logits
from ..training.loop import TrainingJob, make_schedule, train_classifier
from ..training.objectives import make_objective
from ..utils.console import progress
from ..utils.logging import get_logger
from .classifiers import describe_classifier, describe_training, starter_of
from .light_start import LightStart, describe_footprint
from .loggers import open_loggers
from .method_plan import MethodPlan, named_by_method, plan_method
from .resize_data import prepared_table
from .round_plan import adopt_rounds
from .sample_pool import (
    added_aspects,
    added_images,
    grow_pool,
    hard_rows,
    make_pool,
    no_images,
    real_aspects,
    rows_of,
)
from .trained import classifier_config, ensure_config, fingerprint, is_trained, open_method

logger = get_logger(__name__)


def train(run: Run) -> Path:
    """Trains the classifier of every method into `train/METHOD`; returns the folder `train`.

    A finished classifier stays as it is, and a killed training goes on. Raises TrainingError for
    what a method cannot be trained on, before any is trained and before an old one is deleted.
    """
    methods, processes = run.recipe.methods, current_processes()
    check_own_pieces(run.recipe, run.allow_plugins)
    added = {_added_key(method): method for method in methods.values()}
    images = {key: added_images(run, method) for key, method in added.items()}
    fingerprints = {
        name: fingerprint(run, name, method, rows_of(images[_added_key(method)]))
        for name, method in methods.items()
    }
    missing = {
        name: method
        for name, method in methods.items()
        if not is_trained(run, name, fingerprints[name])
    }
    hard = hard_rows(run)
    pools = {key: make_pool(run.train, hard, rows_of(each)) for key, each in images.items()}
    learner = learner_of(run.recipe)
    plans = {}
    for name, method in missing.items():
        pool, added = pools[_added_key(method)], rows_of(images[_added_key(method)])
        with named_by_method(name, " Nothing was trained."):
            pool = grow_pool(run, name, pool, added) if name == learner else pool
            plan = plan_method(run, name, method, pool)
        settings = replace(plan.settings, fingerprint=fingerprints[name])
        plans[name] = replace(plan, settings=settings)
    if processes.first:
        for name in methods.keys() - missing.keys():
            ensure_config(run, name)
    if processes.first and missing:
        for name, method in missing.items():
            open_method(run, name, method, fingerprints[name])
            if name == learner:
                adopt_rounds(run, name, fingerprints[name], rows_of(images[_added_key(method)]))
    processes.barrier()  # until rank 0 has made the folders
    inputs = {name: input_of(run, name, method) for name, method in missing.items()}
    for each in dict.fromkeys(sorted(inputs.values(), key=lambda each: each[:2])):
        size, mode, key = each
        pixels = training_pixels(run, size, mode, images[key])
        for name, method in missing.items():
            if inputs[name] == each:
                _train_method(run, name, method, plans[name], pixels)
    return run.path(paths.TRAIN)


AddedKey = tuple[str, float | None]


def _added_key(method: Method) -> AddedKey:
    """What decides which images a method adds to the real ones."""
    return method.images, method.threshold


def input_of(run: Run, name: str, method: Method) -> tuple[int, str, AddedKey]:
    """(size, resize mode, added images): methods that share them decode images once."""
    size, mode = classifier_config(run, name).resize, run.recipe.training(name).resize_mode
    return size, mode, _added_key(method)


def training_pixels(run: Run, size: int, mode: str, added: Dataset | ImageTable) -> ImageCache:
    """Real training images, then added ones: centre squares, or whole with their aspects."""
    real = prepared_table(run, "train", size, mode)
    aspects = (
        np.concatenate([real_aspects(run, "train"), added_aspects(run, added)])
        if mode == "whole"
        else None
    )
    with progress("decode training images", len(real) + len(added)) as advance:
        return ImageCache([real, added], size, advance, aspects)


def fit_classifier(
    table: ImageTable,
    fitted: list[int],
    scored: list[int],
    train: Train,
    *,
    epochs: int,
    device: torch.device,
    aspects: np.ndarray | None = None,
) -> np.ndarray:
    """Trains a cross-entropy classifier on rows of a table; returns probabilities of others.

    - `fitted`: rows to train on; `scored`: rows of the result, `[scored, classes]`.
    - `aspects`: width / height of all images, which `train.resize_mode: whole` needs.
    """
    rows = table.select(fitted + scored)
    config = describe_classifier(train, table.class_names)
    pixels = ImageCache(
        [rows], config.resize, aspects=aspects[fitted + scored] if aspects is not None else None
    )
    count = len(fitted)
    seen = make_pool(table.select(fitted), np.zeros(count, bool), no_images())
    settings = describe_training(train, "full", real_images=count, device=device, epochs=epochs)
    job = TrainingJob(
        seen,
        pixels,
        RealOnly(),
        SamplingConfig(None, 0.0),
        objective="cross-entropy",
        class_counts=seen.real_counts,
        classifier=config,
        settings=replace(settings, select="last"),
        make_model=starter_of(config, train),
    )
    with (
        tempfile.TemporaryDirectory() as name,
        progress("score training images", epochs) as advance,
    ):
        folder = Path(name)
        train_classifier(
            job,
            folder,
            device=device,
            processes=Processes(),
            on_epoch=lambda record: advance(1),
        )
        model, _ = load_classifier(folder)
    others = np.arange(count, len(rows))
    logits = predict_logits(model.to(device), pixels, others, config, device=device)
    return metrics.softmax_rows(logits).numpy()


def make_job(
    run: Run,
    name: str,
    method: Method,
    plan: MethodPlan,
    pixels: ImageCache,
    *,
    processes: Processes | None = None,
    start: Path | None = None,
) -> TrainingJob:
    """What a method trains, on what, and how.

    - `processes`: those that train together, by default this one alone.
    - `start`: a file in which light tuning keeps its initial light part.
    """
    recipe, config = run.recipe, classifier_config(run, name)
    processes = processes or Processes()
    light = LightStart(run, plan.pool, pixels, config, processes, start, plan.settings.fingerprint)
    make_model = starter_of(config, recipe.training(name), recipe.prompts.names, light.class_means)
    return TrainingJob(
        plan.pool,
        pixels,
        plan.strategy,
        plan.sampling,
        objective=make_objective(method.objective, run.allow_plugins),
        class_counts=_prior_counts(plan, method),
        classifier=config,
        settings=plan.settings,
        make_model=light.kept(make_model) if config.light is not None else make_model,
        guidance=plan.guidance,
        hook=make_system(method.system, run.allow_plugins) if method.system else None,
        validate=_validator(run, config) if "validation" in run.tables else None,
    )


def _train_method(
    run: Run, name: str, method: Method, plan: MethodPlan, pixels: ImageCache
) -> None:
    recipe, folder = run.recipe, run.path(paths.TRAIN) / name
    processes = current_processes()
    start = folder / paths.START
    job = make_job(run, name, method, plan, pixels, processes=processes, start=start)
    loggers = recipe.runtime.loggers if processes.first else []
    opened = open_loggers(
        loggers, run.path(paths.LOGS), f"{recipe.name}-{name}", folder / paths.WANDB
    )
    with progress(f"train {name}", plan.settings.epochs) as advance, opened as log:

        def on_epoch(record: Record) -> None:
            advance(1)
            log(record)

        history = train_classifier(job, folder, device=run.device, on_epoch=on_epoch)
    _report_history(name, method, plan.pool, history)


def _report_history(name: str, method: Method, pool: Pool, history: list[Record]) -> None:
    """Says how far classes chose levels of their own, how many added images were drawn, and what
    light tuning trained."""
    if method.fine_tune == "light" and history:
        logger.info(f"train {name}: {describe_footprint(history)}")
    retrieved = method.images == RETRIEVED
    apart = [record["classes_apart"] for record in history if "classes_apart" in record]
    if apart:
        logger.info(
            f"train {name}: {min(apart)} to {max(apart)} of {pool.num_classes} classes took "
            "another level than the common one"
        )
    scales = [
        record["effective_scale"]
        for record in history
        if record["levels"] not in ([], [] if retrieved else [REAL])
    ]
    if scales:
        logger.info(
            f"train {name}: {min(scales):.2f} to {max(scales):.2f} distinct "
            f"{method.images} images per "
            f"real tail image (the recipe wants {method.synthetic_scale:g})"
        )


def _prior_counts(plan: MethodPlan, method: Method) -> np.ndarray:
    """Class counts of the loss: of real images, or of the samples that all epochs draw together."""
    pool = plan.pool
    if method.prior == "real":
        return pool.real_counts
    total = np.zeros(pool.num_classes)
    schedule = make_schedule(pool, plan.strategy, plan.sampling, plan.settings)
    for epoch in range(plan.settings.epochs):
        if plan.settings.finish is not None and plan.settings.finish.of_head(epoch):
            continue  # their loss has an even prior
        rows, _ = schedule.draw(epoch, 0, [])
        total += np.bincount(pool.labels[rows], minlength=pool.num_classes)
    return total


def _validator(run: Run, config: ClassifierConfig) -> Callable[[nn.Module], float]:
    """A function that measures accuracy on validation, in float32 as `evaluate` does.

    In bfloat16 the highest logits of many images are equal.
    """
    table = run.tables["validation"]
    pixels = ImageCache([prepared_table(run, "validation", config.resize)], config.resize)
    labels, rows = torch.from_numpy(table.labels), np.arange(len(table))
    workers = run.recipe.runtime.workers

    def validate(model: nn.Module) -> float:
        logits = predict_logits(model, pixels, rows, config, device=run.device, workers=workers)
        return (logits.argmax(1) == labels).double().mean().item()

    return validate
