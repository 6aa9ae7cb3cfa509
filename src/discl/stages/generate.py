"""`discl generate`: makes the images that the store lacks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from ..errors import RecipeError
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.plan import WHOLE_PLAN, PlanShard, Request, read_plan
from ..spectrum.stats import Work
from ..utils.console import progress
from ..utils.logging import get_logger
from .budget import describe_cap, find_cap, unit_of
from .pending import (
    draws_so_far,
    next_images,
    planned_sources,
    score_and_list_missing,
    summarise_rejections,
)
from .rejection import look_store
from .workers.base import InProcessWorker, Workers
from .workers.local import LocalWorkerPool, list_devices
from .workers.ray import RayWorkerPool

logger = get_logger(__name__)


def generate(run: Run, shard: PlanShard = WHOLE_PLAN, ray: str | None = None) -> Path:
    """Makes and scores the missing images of a plan; returns the folder of the store.

    - `shard`: the part of the plan to make. Processes that make the same part wait for each other.
    - `ray`: the address of a Ray cluster whose workers make the images. By default one process
      works on each visible GPU of this machine, or `runtime.processes` of them.

    With `spectrum.tries` > 1, images that the filter drops are drawn again, all in one round, until
    none is left to draw, or until the budget is spent. Ctrl-C and SIGTERM end it; finished images
    are written.
    """
    if run.recipe.spectrum.makes_none:
        return run.spectrum.folder
    with ended_by_sigterm(), run.lock("generate", shard):
        run.spectrum.clear_unfinished()
        run.scores.clear_unfinished()
        if run.recipe.spectrum.early_rejection is not None:
            _check_whole(shard)
            look_store(run).clear_unfinished()
        plan = read_plan(run.path(paths.PLAN))
        requests = shard.select(plan)
        tried, missing = score_and_list_missing(run, requests)
        if missing:
            _warn_of_unused(run)
            with open_workers(run, missing, ray) as workers:
                while missing:
                    if len(missing) < len(tried):
                        present = len(tried) - len(missing)
                        logger.info(f"generate: {present} of {len(tried)} images are present")
                    part = next_images(run, plan, missing)
                    with _progress(run, tried, missing, part) as advance:
                        workers.make(part, advance)
                    tried, missing = score_and_list_missing(run, requests)
            logger.info(f"generate: {describe_work(workers.work)}")
        if summary := summarise_rejections(run):
            logger.info(f"generate: {summary}")
        if shard != WHOLE_PLAN:
            tried, stored = draws_so_far(run, plan)[0], run.spectrum.ids()
            left = sum(request.id not in stored for request in tried)
            logger.info(
                f"generate: shard {shard} is done; {left} of {len(tried)} images of the whole plan "
                "are still to be made"
            )
        return run.spectrum.folder


@contextmanager
def _progress(
    run: Run, drawn: Sequence[Request], missing: Sequence[Request], part: Sequence[Request]
) -> Iterator[Callable[[int], None]]:
    """A bar over the images that are made now, or over the budget in its own unit.

    - `part`: what is made now of `missing`.
    """
    cap = None
    if run.recipe.spectrum.budget is not None:
        cap = find_cap(run, planned_sources(run))
    if cap is None:
        with progress("generate", len(part)) as advance:
            yield advance
        return
    prices = iter([cap.prices[request.level] for request in part])
    spent, total = cap.cost(drawn) - cap.cost(missing), cap.cost(drawn)
    logger.info(
        f"generate: {describe_cap(run, cap)}: {unit_of(run, spent)} are made, "
        f"{unit_of(run, total - spent)} follow"
    )
    with progress(f"generate, {unit_of(run, 2).partition(' ')[2]}", total) as advance:
        advance(spent)
        yield lambda count: advance(sum(islice(prices, count)))


def describe_work(work: Work) -> str:
    """Calls, rows and encodings of all engines in words."""
    return (
        f"{work.unet_rows} UNet rows in {work.unet_calls} calls, {work.slot_fill:.1%} of the slots "
        f"filled, {work.vae_encodes} VAE and {work.text_encodes} text encodes"
    )


def _check_whole(shard: PlanShard) -> None:
    """Raises RecipeError for a part of a plan, from which no bound can be learnt."""
    if shard != WHOLE_PLAN:
        raise RecipeError(
            f"spectrum.early_rejection learns from the whole plan, so --shard {shard} cannot be "
            "used with it. Use one command with runtime.processes or --ray, or remove it.",
            argument="spectrum.early_rejection",
        )


def _warn_of_unused(run: Run) -> None:
    """Says if the negative prompt has no effect."""
    generator = run.generator
    guided = run.sampling.guidance_scale != 1 and not generator.distilled
    if run.recipe.prompts.negative and not generator.plain and not guided:
        why = (
            f"{generator.family} has its guidance built in"
            if generator.distilled
            else "spectrum.guidance_scale is 1"
        )
        logger.warning(f"generate: prompts.negative has no effect, because {why}")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into a KeyboardInterrupt; schedulers send it some time before they kill.

    Only the main thread handles signals, so it does nothing in others.
    """

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def open_workers(run: Run, requests: Sequence[Request], ray: str | None = None) -> Workers:
    """Returns a Ray cluster's workers, this machine's, or this process if one device is enough.

    There are never more workers on this machine than sources in `requests`.
    """
    if ray:
        return RayWorkerPool(run, ray)
    devices = list_devices(run)[: len({request.source_id for request in requests})]
    return LocalWorkerPool(run, devices) if len(devices) > 1 else InProcessWorker(run)
