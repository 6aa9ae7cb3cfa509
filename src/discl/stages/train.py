"""`discl train`: the classifier of every method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..baselines import make_system
from ..curriculum.progress import GuidanceSet
from ..curriculum.sampling import Pool, SamplingConfig
from ..curriculum.schedule import Record, hold_out_guidance, make_sampling
from ..curriculum.strategies import RealOnly, Strategy, follows_progress, make_strategy
from ..data import ImageTable
from ..errors import TrainingError, arguments_named
from ..evaluation import metrics
from ..levels import REAL
from ..mixtures import read_mixture
from ..models.classifier import ClassifierConfig, load_classifier
from ..recipe import Method, Train, check_own_pieces
from ..recipe.loop import learner_of
from ..recipe.methods import RETRIEVED
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.plan import Request
from ..training.distributed import Processes, current_processes
from ..training.image_cache import ImageCache
from ..training.inference import predict_logits
from ..training.loop import (
    TrainingJob,
    TrainSettings,
    check_batch_size,
    make_schedule,
    train_classifier,
)
from ..training.objectives import make_objective
from ..utils.console import progress
from ..utils.logging import get_logger
from ..utils.plugins import is_address
from .classifiers import describe_classifier, describe_training, starter_of
from .light_start import LightStart, check_class_means, describe_footprint
from .loggers import open_loggers
from .resize_data import prepared_table
from .round_plan import adopt_rounds
from .sample_pool import (
    added_aspects,
    added_images,
    grow_pool,
    hard_rows,
    make_pool,
    real_aspects,
    rows_of,
)
from .trained import classifier_config, ensure_config, fingerprint, is_trained, open_method

logger = get_logger(__name__)

CLASS_POWER = {"instance": 1.0, "square-root": 0.5, "class-balanced": 0.0}
"""Exponent of a class's count in its fraction of an epoch, by the recipe's names."""


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
    pool, count = make_pool(rows, np.zeros(len(rows), bool), _no_images()), len(fitted)
    seen = Pool(
        pool.labels[:count],
        pool.levels[:count],
        pool.synthetic[:count],
        pool.hard[:count],
        pool.class_names,
    )
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


@dataclass(frozen=True)
class MethodPlan:
    """What a method is trained on and how, without the pixels; `pool` is without V's sources."""

    pool: Pool
    strategy: Strategy
    sampling: SamplingConfig
    settings: TrainSettings
    guidance: GuidanceSet | None = None


def check_training(run: Run, planned: Sequence[Request] | None = None) -> None:
    """Raises TrainingError for what a method cannot be trained on, whatever images are generated.

    It needs `hard.parquet`. A method with a strategy `module:attribute` is skipped, because only
    the stage that trains imports it.

    - `planned`: the only images that are generated. It is then an error if they are too few even
      if all of them are kept.
    """
    images = _no_images() if planned is None else _as_images(planned)
    pool = make_pool(run.train, hard_rows(run), images)
    for name, method in run.recipe.methods.items():
        if not is_address(method.strategy):
            with named_by_method(name):
                if planned is None:
                    _plan_real(run, name, method, pool)
                else:
                    plan_method(run, name, method, pool, silent=True)


@contextmanager
def named_by_method(name: str, outcome: str = "") -> Iterator[None]:
    """Errors raised inside name a key of this method; `outcome` is added to their messages."""
    own = ("missing", "probe_samples")
    keys = {key: f"methods.{name}.{key}" for key in own} | {
        "undersample": f"methods.{name}.mixture"
    }
    keys |= {key: f"train.{key}" for key in ("curriculum_epochs", "batch_size")}
    try:
        with arguments_named(**keys):
            yield
    except TrainingError as error:
        argument = error.argument or ""
        where = argument if argument.startswith("methods.") else f"methods.{name}"
        text = f"{argument}: " if argument and argument != where else ""
        raise TrainingError(f"{text}{error.args[0]}{outcome}", argument=where) from error


def plan_method(
    run: Run,
    name: str,
    method: Method,
    pool: Pool,
    *,
    silent: bool = False,
    until: int | None = None,
) -> MethodPlan:
    """Plans a method; raises TrainingError where the pool or the processes do not allow it.

    - `until`: number of epochs that the images of the pool have to suffice for; default all.
    """
    plan, levels = _plan_real(run, name, method, pool), run.recipe.spectrum.levels
    if follows_progress(method.strategy, plan.strategy):
        pool, guidance = hold_out_guidance(pool, levels, method.guidance_images, plan.settings.seed)
        if not silent:
            _report_guidance(name, method, pool, guidance)
        plan = replace(plan, pool=pool, guidance=guidance)
    if plan.settings.epochs:
        schedule = make_schedule(
            plan.pool, plan.strategy, plan.sampling, plan.settings, guidance=plan.guidance
        )
        schedule.check(levels, until or plan.settings.epochs)
    return plan


def _report_guidance(name: str, method: Method, pool: Pool, guidance: GuidanceSet) -> None:
    """Says what V takes from training, and where it is smaller than in the recipe."""
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


def _plan_real(run: Run, name: str, method: Method, pool: Pool) -> MethodPlan:
    """Plans what does not depend on synthetic images, which may be missing in the pool; without V.

    Raises TrainingError where the real images or the processes do not allow it.
    """
    train, levels = run.recipe.training(name), run.recipe.spectrum.levels
    strategy = make_strategy(
        method.strategy,
        levels=levels,
        curriculum_epochs=train.curriculum_epochs,
        level=method.level,
        seed=train.seed,
        allow_plugins=run.allow_plugins,
    )
    undersample, frequencies = read_mixture(
        method.model_dump(mode="json"), run.recipe.hard.rule == "tail"
    )
    sampling = make_sampling(
        pool,
        strategy,
        undersample=undersample,
        synthetic_scale=method.synthetic_scale,
        shortage=method.shortage,
        missing=method.missing,
        class_power=CLASS_POWER[frequencies],
    )
    real = int((~pool.synthetic).sum())
    settings = describe_training(
        train,
        method.fine_tune,
        real_images=real,
        device=run.device,
        epochs=train.epochs,
        finish=method.finish,
    )
    if (weight := method.synthetic_weight) is not None:
        ends = (weight, weight) if isinstance(weight, float) else weight
        settings = replace(settings, steps=replace(settings.steps, synthetic_weight=ends))
    if method.fine_tune == "light" and train.model.initial_head == "class-means":
        check_class_means(pool)
    if follows_progress(method.strategy, strategy):
        samples = settings.steps_per_epoch * settings.batch_size
        probe_samples = method.probe_samples or min(30_000, samples // 4)
        settings = replace(settings, probe_samples=probe_samples)
    if settings.epochs:
        check_batch_size(pool, settings.batch_size)
        current_processes().check_batch_size(settings.batch_size, settings.steps.accumulate)
        make_schedule(pool, strategy, sampling, settings)
    return MethodPlan(pool, strategy, sampling, settings)


def _no_images() -> Dataset:
    """An empty data set of synthetic images."""
    return Dataset.from_dict({"image": [], "label": [], "level": []})


def _as_images(requests: Sequence[Request]) -> Dataset:
    """Requests as if they were made and kept, without pictures."""
    names = ("label", "level", "source_id")
    return Dataset.from_dict({name: [getattr(each, name) for each in requests] for name in names})


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
        make_model=light.kept(make_model) if config.light is not None and start else make_model,
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
