"""`discl generate`: makes the images that the store lacks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..run_folder.run import Run
from ..spectrum.plan import WHOLE, Request, Share, read_plan
from ..utils.console import progress, say
from .pending import missing_images, tries_so_far

if TYPE_CHECKING:
    from .workers.local import InProcessWorker, LocalWorkerPool
    from .workers.ray import RayWorkerPool


def generate(run: Run, share: Share = WHOLE, ray: str | None = None) -> Path:
    """Makes the images of a share of the plan that the store lacks, and scores them for the filter on the way; returns the store's folder.

    With `spectrum.tries` > 1 those that the filter drops are drawn again, all that are due together, until there is nothing to draw.
    One process works on each visible GPU of this machine, or as many as `runtime.processes` says; with the address of a cluster in
    `ray` its workers do. Other processes that generate in this folder are waited for, unless they make another share. SIGTERM ends it as
    Ctrl-C does: what is finished is written.
    """
    with ended_by_sigterm(), run.lock("generate", share):
        run.spectrum.clear_unfinished()
        run.scores.clear_unfinished()
        plan = read_plan(run.path("plan.parquet"))
        mine = share.of_plan(plan)
        tried, missing = missing_images(run, mine)
        if missing:
            run.commit()
            _tell_unused(run)
            with _open_workers(run, missing, ray) as workers:
                while missing:
                    if len(missing) < len(tried):
                        say(
                            f"generate: {len(tried) - len(missing)} of {len(tried)} images are there already"
                        )
                    with progress("generate", len(missing)) as advance:
                        workers.make(missing, advance)
                    tried, missing = missing_images(run, mine)
            work = workers.done
            encodes = f"{work.vae_encodes} VAE and {work.text_encodes} text encodes"
            say(
                f"generate: {work.unet_rows} UNet rows in {work.unet_calls} calls, {work.slot_fill:.1%} of the slots filled, {encodes}"
            )
        if share != WHOLE:
            tried, present = tries_so_far(run, plan)[0], run.spectrum.ids()
            left = sum(request.id not in present for request in tried)
            say(
                f"generate: share {share} is done; {left} of {len(tried)} images of the whole plan are still to be made"
            )
        return run.spectrum.folder


def _tell_unused(run: Run) -> None:
    """Says which of the recipe's texts has no effect."""
    if (
        run.recipe.prompts.negative
        and not run.generator.plain
        and (run.generator.distilled or run.sampling.guidance_scale == 1)
    ):
        why = (
            f"{run.generator.family} has its guidance built in"
            if run.generator.distilled
            else "spectrum.guidance_scale is 1"
        )
        say(f"generate: prompts.negative has no effect, for {why}")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM, which schedulers send some time before they kill, becomes a KeyboardInterrupt; in the main thread only, as Python has it."""

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


def _open_workers(
    run: Run, requests: Sequence[Request], ray: str | None
) -> InProcessWorker | LocalWorkerPool | RayWorkerPool:
    """Who makes them: this process, several of this machine, or a cluster."""
    from .workers import local as local_workers
    from .workers import ray as ray_workers  # which make workers with what this module has

    if ray:
        return ray_workers.RayWorkerPool(run, ray)
    places = local_workers.devices(run)[: len({request.source_id for request in requests})]
    return (
        local_workers.LocalWorkerPool(run, places)
        if len(places) > 1
        else local_workers.InProcessWorker(run)
    )
