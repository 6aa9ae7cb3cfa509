"""From a recipe to an engine, and to a worker on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data import to_size
from ..errors import arguments_named
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer
from ..spectrum.diffusers_engine import PlainEngine
from ..spectrum.engine import Engine
from ..spectrum.models import load_generator, load_plain
from ..spectrum.plan import Request, read_plan
from ..spectrum.worker import Worker
from ..utils.logging import get_logger
from ..utils.stored import read_table
from .pending import count_rows, filter_texts

logger = get_logger(__name__)

GENERATOR_KEYS = {
    "config": "spectrum.config",
    "fixed": "spectrum.steps",
    "guidance_interval": "spectrum.guidance_interval",
    "guidance_scale": "spectrum.guidance_scale",
    "levels": "spectrum.levels",
    "negative_prompt": "prompts.negative",
    "num_inference_steps": "spectrum.num_inference_steps",
    "size": "spectrum.size",
}
"""The recipe's keys of a generator's arguments."""
PAYS = 1000
"""Calls of the network from which on compiling it first takes less time than it saves."""


def make_worker(run: Run) -> Worker:
    """The recipe's engine and filter, loaded on the run's device, which write to the run's stores."""
    asked = run.recipe.filter
    scorer = ClipScorer(asked.checkpoint, filter_texts(run), run.device)
    engine = make_engine(run)
    _compile(run, engine)
    return Worker(
        engine,
        run.spectrum,
        run.sampling,
        scorer=scorer,
        scores=run.scores,
        shard_rows=run.recipe.runtime.shard_rows,
    )


class Sources:
    """ImageCache of the source images of some requests, in the requests' shapes; `sizes` are their own (width, height).

    Called with an id of `hard.parquet` it returns uint8 `[3, height, width]`, and raises RunError for an image that is another one than
    when it was checked.
    """

    def __init__(self, run: Run, requests: Sequence[Request]) -> None:
        self.run = run
        self.places = {name: row for row, name in enumerate(run.train.ids)}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.expect(requests)
        hard = read_table(run.path(paths.HARD), ["id", "digest", "width", "height"]).to_pylist()
        self.sizes = {row["id"]: (row["width"], row["height"]) for row in hard}
        self.digests = {row["id"]: row["digest"] for row in hard}

    def expect(self, requests: Sequence[Request]) -> None:
        """More requests, whose sources will be asked for."""
        self.shapes |= {request.source_id: (request.width, request.height) for request in requests}

    def __call__(self, source: str) -> np.ndarray:
        image = self.run.checked_image(self.places[source], self.digests[source])
        return to_size(image, *self.shapes[source])


def make_engine(run: Run) -> Engine | PlainEngine:
    asked, sampling = run.recipe.spectrum, run.sampling
    settings: dict[str, Any] = {
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
    }
    if run.generator.plain:
        logger.warning(
            f"the engine does not know a {run.generator.family}: diffusers' own pipeline makes its images one by one, which is slower"
        )
        with arguments_named(**GENERATOR_KEYS):
            pipelines = load_plain(run.address, asked.dtype, run.device)
        plain = PlainEngine(pipelines, **settings)
        if unused := [GENERATOR_KEYS[name] for name in plain.unused()]:
            logger.warning(
                f"generate: {' and '.join(unused)} ha{'s' if len(unused) == 1 else 've'} no effect: a {run.generator.family} takes none"
            )
        return plain
    slots = run.recipe.runtime.slots
    with arguments_named(**GENERATOR_KEYS):
        model = load_generator(run.address, asked.dtype, run.device)
    engine = Engine(
        model,
        **settings,
        slots=1 if slots == "auto" else slots,
        fixed=sampling.fixed,
        guidance_interval=sampling.guidance_interval,
    )
    if slots == "auto":
        engine.fit_slots(sampling.size, sampling.size)
    return engine


def _compile(run: Run, engine: Engine | PlainEngine) -> None:
    """Compiles the engine where the recipe asks for it, or leaves it open and it pays; goes on without where that fails."""
    asked = run.recipe.runtime.compile
    if asked is False or isinstance(engine, PlainEngine):
        return
    if asked is None and (
        run.device.type != "cuda"
        or count_rows(run, read_plan(run.path(paths.PLAN))) < PAYS * engine.rows
    ):
        return
    logger.info("generate: compiling the network, which takes a minute or more")
    try:
        engine.compile(run.sampling.size, run.sampling.size)
    except (
        Exception
    ) as error:  # compilers fail in many ways, and none of them is worth losing a run
        told = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(
            f"torch.compile failed ({told[0]}); going on without, which is slower; runtime.compile: false leaves it out"
        )
