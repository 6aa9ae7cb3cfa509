"""From a recipe to an engine, and to a worker on one device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data import to_size
from ..errors import arguments_named
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer
from ..spectrum.diffusers_engine import PlainEngine
from ..spectrum.engine import Engine
from ..spectrum.models import check_generator, load_generator, load_plain
from ..spectrum.plan import Request, read_plan
from ..spectrum.worker import Worker
from ..utils.logging import get_logger
from ..utils.stored import read_table
from .budget import count_rows
from .pending import filter_texts
from .rejection import look_store, make_inspector

logger = get_logger(__name__)

GENERATOR_KEYS = {
    "config": "spectrum.config",
    "fixed": "spectrum.steps",
    "guidance_interval": "spectrum.guidance_interval",
    "guidance_scale": "spectrum.guidance_scale",
    "levels": "spectrum.levels",
    "negative_prompt": "prompts.negative",
    "num_inference_steps": "spectrum.num_inference_steps",
    "sampler": "spectrum.sampler",
    "size": "spectrum.size",
    "timestep_spacing": "spectrum.timestep_spacing",
}
"""The recipe's keys of a generator's arguments."""
COMPILE_FROM = 1000
"""Minimum number of network calls for torch.compile to pay off; SDXL on an H100 has about 900."""


def check_engine(run: Run, levels: Sequence[int], key: str = "spectrum.levels") -> None:
    """Raises CheckpointError where the recipe's generator cannot make images of these levels.

    - `key`: where the levels are stated.
    """
    spectrum = run.recipe.spectrum
    with arguments_named("spectrum.checkpoint", **GENERATOR_KEYS | {"levels": key}):
        check_generator(
            run.base_address,
            spectrum.num_inference_steps,
            spectrum.size,
            levels,
            fixed=spectrum.steps == "fixed",
            guidance_interval=spectrum.guidance_interval,
            sampler=spectrum.sampler,
            timestep_spacing=spectrum.timestep_spacing,
        )


def make_worker(run: Run) -> Worker:
    """Loads the recipe's engine and filter on the run's device; they write to the run's stores."""
    scorer = ClipScorer(run.recipe.filter.checkpoint, filter_texts(run), run.device)
    engine = make_engine(run)
    if isinstance(engine, Engine):
        engine.inspector = make_inspector(run, engine, scorer)
    _compile(run, engine)
    return Worker(
        engine,
        run.spectrum,
        run.sampling,
        scorer=scorer,
        scores=run.scores,
        looks=look_store(run),
        shard_rows=run.recipe.runtime.shard_rows,
    )


class Sources:
    """The source images of some requests, in the requests' shapes.

    Called with an id of `hard.parquet` it returns uint8 `[height, width, 3]`. It raises
    RunError for an image that has changed since it was checked. `sizes` are the images' own
    (width, height).
    """

    def __init__(self, run: Run, requests: Sequence[Request]) -> None:
        self.run = run
        self.rows = {name: row for row, name in enumerate(run.train.ids)}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.expect(requests)
        hard = read_table(run.path(paths.HARD), ["id", "digest", "width", "height"]).to_pylist()
        self.sizes = {row["id"]: (row["width"], row["height"]) for row in hard}
        self.digests = {row["id"]: row["digest"] for row in hard}

    def expect(self, requests: Sequence[Request]) -> None:
        """Adds requests to those with known shapes."""
        self.shapes |= {each.source_id: (each.width, each.height) for each in requests}

    def __call__(self, source: str) -> np.ndarray:
        image = self.run.checked_image(self.rows[source], self.digests[source])
        return to_size(image, *self.shapes[source])


def make_engine(run: Run) -> Engine | PlainEngine:
    """Loads the recipe's generator: the batched engine if it knows the family."""
    spectrum, sampling, slots = run.recipe.spectrum, run.sampling, run.recipe.runtime.slots
    if run.generator.plain:
        return _make_plain(run)
    with arguments_named(**GENERATOR_KEYS):
        model = load_generator(run.address, spectrum.dtype, run.device)
    engine = Engine(
        model,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        slots=1 if slots == "auto" else slots,
        fixed=sampling.fixed,
        guidance_interval=sampling.guidance_interval,
        sampler=sampling.sampler,
        timestep_spacing=sampling.timestep_spacing or None,
    )
    if slots == "auto":
        engine.fit_slots(sampling.size, sampling.size)
    return engine


def _make_plain(run: Run) -> PlainEngine:
    family = run.generator.family
    logger.warning(
        f"the engine does not know a {family}: diffusers' own pipeline makes its images one by "
        "one, which is slower"
    )
    with arguments_named(**GENERATOR_KEYS):
        pipelines = load_plain(run.address, run.recipe.spectrum.dtype, run.device)
    engine = PlainEngine(
        pipelines,
        num_inference_steps=run.sampling.num_inference_steps,
        guidance_scale=run.sampling.guidance_scale,
    )
    if unused := [GENERATOR_KEYS[name] for name in engine.unused()]:
        verb = "has" if len(unused) == 1 else "have"
        logger.warning(f"generate: {' and '.join(unused)} {verb} no effect: a {family} takes none")
    return engine


def _compile(run: Run, engine: Engine | PlainEngine) -> None:
    """Compiles the network if the recipe says so, or says nothing and it pays off.

    A compiler that fails does not stop the run.
    """
    wanted = run.recipe.runtime.compile
    if wanted is False or isinstance(engine, PlainEngine):
        return
    if wanted is None:
        if run.device.type != "cuda":
            return
        rows = count_rows(run, read_plan(run.path(paths.PLAN)))
        if rows < COMPILE_FROM * engine.rows:
            return
    logger.info("generate: compiling the network, which takes a minute or more")
    try:
        engine.compile(run.sampling.size, run.sampling.size)
    except Exception as error:  # compilers fail in many ways
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(
            f"torch.compile failed ({lines[0]}); the run goes on without it, which is slower. "
            "runtime.compile: false skips it."
        )
