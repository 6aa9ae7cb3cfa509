"""What each method is trained on and how, checked before anything is generated or trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from ..curriculum.progress import GuidanceSet
from ..curriculum.sampling import Pool, SamplingConfig
from ..curriculum.schedule import hold_out_guidance, make_sampling
from ..curriculum.strategies import Strategy, follows_progress
from ..errors import TrainingError, arguments_named
from ..mixtures import read_mixture
from ..recipe import Method
from ..run_folder.run import Run
from ..spectrum.plan import Request
from ..training.distributed import current_processes
from ..training.loop import TrainSettings, check_batch_size, make_schedule
from ..utils.logging import get_logger
from ..utils.plugins import is_address
from .classifiers import describe_training
from .light_start import check_start
from .sample_pool import hard_rows, make_pool, no_images

logger = get_logger(__name__)

CLASS_POWER = {"instance": 1.0, "square-root": 0.5, "class-balanced": 0.0}
"""Exponent of a class's count in its fraction of an epoch, by the recipe's names."""


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
    images = no_images() if planned is None else _as_images(planned)
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
    strategy = method.make_strategy(train, levels, run.allow_plugins)
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
    steps = replace(settings.steps, synthetic_weight=method.synthetic_weight)
    settings = replace(settings, steps=steps)
    if method.fine_tune == "light":
        check_start(train.model.initial_head, pool, run.recipe.prompts.names)
    if follows_progress(method.strategy, strategy):
        samples = settings.steps_per_epoch * settings.batch_size
        probe_samples = method.probe_samples or min(30_000, samples // 4)
        settings = replace(settings, probe_samples=probe_samples)
    if settings.epochs:
        check_batch_size(pool, settings.batch_size)
        current_processes().check_batch_size(settings.batch_size, settings.steps.accumulate)
        make_schedule(pool, strategy, sampling, settings)
    return MethodPlan(pool, strategy, sampling, settings)


def _as_images(requests: Sequence[Request]) -> Dataset:
    """Requests as if they were made and kept, without pictures."""
    names = ("label", "level", "source_id")
    return Dataset.from_dict({name: [getattr(each, name) for each in requests] for name in names})
