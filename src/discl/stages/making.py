"""Phase 1 of a run: plan, generate, filter."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..console import progress, say
from ..data import decode_image, to_size
from ..errors import DataError
from ..files import whole
from ..prompts import fill
from ..recipe import check_own_pieces
from ..spectrum.encoding import encode_image
from ..spectrum.engine import Engine
from ..spectrum.fallback import PlainEngine
from ..spectrum.filter import ClipScorer, describe_scorer, find_clip, judge
from ..spectrum.models import check_generator, load_generator, load_plain
from ..spectrum.plan import (
    WHOLE,
    Planner,
    Request,
    Share,
    follow_tries,
    plan_requests,
    read_plan,
    unet_rows,
    write_plan,
)
from ..spectrum.store import Shards
from ..spectrum.worker import Worker
from ..stored import read_table, write_table
from ..workspace import Run, stored_images
from .alia import alia_verdicts
from .classifiers import describe_classifier
from .learning import check_training
from .prompting import check_prompts, texts_by_label, with_captions

if TYPE_CHECKING:
    from .cluster import RayCrew
    from .crew import Alone, Crew


TRAINING = frozenset({"train", "evaluate", "report", "compare"})
"""What is to be done only when classifiers have been trained."""

LARGEST_COSINE = 1.001
"""A cosine, with what rounding may add to it."""
PAYS = 1000
"""Calls of the network from which on compiling it first takes less time than it saves."""


def check_models(run: Run, stage: str) -> None:
    """Looks for the store, the generator, the CLIP and the classifiers' checkpoints before any long work starts, if `stage` needs them.

    Raises CheckpointError for a folder that is missing, of another family, or cannot make pictures of the size asked for,
    StoreError for a store that cannot be reached, and where `stage` needs classifiers RecipeError for pieces of
    your own without leave, or that are none.
    """
    if stage in TRAINING:
        check_own_pieces(run.recipe, run.allow_plugins)
    if stage in {"data", "hard"}:
        return
    Shards(run.place("spectrum"), pa.schema([])).files()
    check_prompts(run)
    find_clip(run.recipe.filter.checkpoint)
    asked = run.recipe.spectrum
    check_generator(
        run.address,
        asked.num_inference_steps,
        asked.size,
        asked.levels,
        asked.steps == "fixed",
        asked.guidance_interval,
    )
    for name, method in run.recipe.methods.items():
        train = run.recipe.training(name)
        if train.model.checkpoint is not None:
            describe_classifier(train, ("a", "b"), None, method.loss.name)


def make_plan(run: Run, *, for_training: bool = True) -> Path:
    """Writes every image that the spectrum needs to `plan.parquet`; of those that may be drawn several times the first try.

    It is made anew each time, for it is quick: a checkpoint or a phrase file that has changed meanwhile gives other ids. Where it is
    made `for_training`, whatever the data alone do not allow is refused now, with DataError or TrainingError, not after hours of images.
    """
    path, recipe = run.path("plan.parquet"), run.recipe
    if for_training:
        _check_course(run)
    hard, prompts = _planned_sources(run), texts_by_label(run)
    requests = plan_requests(
        hard,
        recipe.spectrum.levels,
        recipe.spectrum.seeds,
        prompts,
        recipe.prompts.negative,
        run.sampling,
    )
    with whole(path) as unfinished:  # others may plan at once, and come to the same
        write_plan(requests, unfinished)
    return path


def _check_course(run: Run) -> None:
    """Raises DataError or TrainingError where the splits or the training images cannot give what training and measuring want."""
    recipe = run.recipe
    if len(run.tables) == 1:
        raise DataError(
            "there is neither a validation nor a test split to measure on; set data.own_split or name them in data.splits."
        )
    choosing = [name for name in recipe.methods if recipe.training(name).select == "validation"]
    if choosing and "validation" not in run.tables:
        raise DataError(
            f"train.select is 'validation' (of {', '.join(choosing)}), but there is no validation split; use select: last or set "
            "data.own_split."
        )
    check_training(run)


def estimate_cost(run: Run) -> dict[str, float]:
    """What generating the rest of the plan costs: images, UNet rows, seconds (from two timed UNet calls) and bytes on disk.

    `further_images` and `further_rows` are what may come on top, if the filter drops every try but the last of `spectrum.tries`.
    """
    requests, missing = missing_images(run)
    further = [
        request
        for request in missing
        for _ in range(request.attempt + 1, run.recipe.spectrum.tries)
    ]
    rows = count_rows(run, missing)
    places = {name: row for row, name in enumerate(run.train.ids)}
    samples = list({request.source_id: request for request in requests}.values())[:16]
    pictures = [
        to_size(run.train.image(places[each.source_id]), each.width, each.height).transpose(1, 2, 0)
        for each in samples
    ]
    encoded = [len(encode_image(picture, run.recipe.spectrum.encoding)) for picture in pictures]
    height, width = Counter((request.height, request.width) for request in requests).most_common(1)[
        0
    ][0]
    return {
        "images": len(missing), "images_planned": len(requests), "unet_rows": rows,
        "seconds": rows / _engine(run).rows_per_second(height, width) if missing else 0.0, "bytes": len(missing) * float(np.mean(encoded)),
        "further_images": len(further), "further_rows": count_rows(run, further),
    }  # fmt: skip


def count_rows(run: Run, requests: Sequence[Request]) -> int:
    """Rows that the network computes for these requests at the recipe's setting."""
    sampling = run.sampling
    scale = 1 if run.generator.distilled else sampling.guidance_scale
    return unet_rows(
        requests, sampling.num_inference_steps, scale, sampling.fixed, sampling.guidance_interval
    )


def describe_cost(cost: dict[str, float]) -> str:
    """The estimate in one line."""
    hours, seconds = divmod(round(cost["seconds"]), 3600)
    time = f"{hours} h {seconds // 60} min" if hours else f"{seconds // 60} min {seconds % 60} s"
    made = int(cost["images_planned"] - cost["images"])
    there = f" ({made:,} of {int(cost['images_planned']):,} are there already)" if made else ""
    size = f"{cost['bytes'] / 1e6:.1f} MB on disk"
    told = f"{int(cost['images']):,} images to generate{there}: {int(cost['unet_rows']):,} UNet rows, about {time} on this machine, {size}"
    if cost.get("further_images"):
        further = f"{int(cost['further_images']):,} further tries with {int(cost['further_rows']):,} UNet rows"
        told += f"; where the filter drops images up to {further}"
    return told


def generate(run: Run, share: Share = WHOLE, ray: str | None = None) -> Path:
    """Makes the images of a share of the plan that the store lacks, and scores them for the filter on the way; returns the store's folder.

    With `spectrum.tries` > 1 those that the filter drops are drawn again, all that are due together, until there is nothing to draw.
    One process works on each visible GPU of this machine, or as many as `runtime.processes` says; with the address of a cluster in
    `ray` its workers do. Other processes that generate in this folder are waited for, unless they make another share. SIGTERM ends it as
    Ctrl-C does: what is finished is written.
    """
    with ended_by_sigterm(), run.turn("generate", share):
        run.spectrum.clear_unfinished()
        run.scores.clear_unfinished()
        plan = read_plan(run.path("plan.parquet"))
        mine = share.of_plan(plan)
        tried, missing = missing_images(run, mine)
        if missing:
            run.settle()
            _tell_unused(run)
            with _crew(run, missing, ray) as crew:
                while missing:
                    if len(missing) < len(tried):
                        say(
                            f"generate: {len(tried) - len(missing)} of {len(tried)} images are there already"
                        )
                    with progress("generate", len(missing)) as advance:
                        crew.make(missing, advance)
                    tried, missing = missing_images(run, mine)
            work = crew.done
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


def _crew(run: Run, requests: Sequence[Request], ray: str | None) -> Alone | Crew | RayCrew:
    """Who makes them: this process, several of this machine, or a cluster."""
    from . import cluster, crew  # which make workers with what this module has

    if ray:
        return cluster.RayCrew(run, ray)
    places = crew.devices(run)[: len({request.source_id for request in requests})]
    return crew.Crew(run, places) if len(places) > 1 else crew.Alone(run)


def missing_images(
    run: Run, plan: Sequence[Request] | None = None
) -> tuple[list[Request], list[Request]]:
    """(every try that the plan has come to, those that are to be made now), the second sorted by shape and otherwise as planned.

    `plan` is a part of the plan, by default all of it. When the second list is made, call again: with `spectrum.tries` > 1 there may be
    further tries. Images of the store that lack a score are then scored first, for that decides what is drawn again.
    """
    plan = read_plan(run.path("plan.parquet")) if plan is None else plan
    while True:
        tried, unscored = tries_so_far(run, plan)
        present = run.spectrum.ids()
        if run.recipe.spectrum.tries == 1:
            missing = [request for request in tried if request.id not in present]
            break
        missing = [request for request in unscored if request.id not in present]
        if len(missing) == len(unscored):
            break
        _score(run, [request for request in unscored if request.id in present])
    return tried, sorted(missing, key=lambda request: (request.width, request.height))


def tries_so_far(
    run: Run, plan: Sequence[Request] | None = None
) -> tuple[list[Request], list[Request]]:
    """(every try that the plan has come to by the scores that are known, those of them without a score); see `follow_tries`."""
    asked, spectrum = run.recipe.filter, run.recipe.spectrum
    plan = read_plan(run.path("plan.parquet")) if plan is None else plan
    known = _scores_by(run.scores, describe_scorer(asked.checkpoint, filter_texts(run)))
    if spectrum.tries == 1:
        return list(plan), [request for request in plan if request.id not in known]
    planner = Planner(texts_by_label(run), run.recipe.prompts.negative, run.sampling)
    sources = {row["id"]: row for row in _planned_sources(run)}

    def again(first: Request, attempt: int) -> Request:
        return planner.request(sources[first.source_id], first.level, first.seed, attempt)

    return follow_tries(
        plan, again, known, lambda cosine: judge(cosine, asked.threshold).keep, spectrum.tries
    )


def _planned_sources(run: Run) -> list[dict[str, Any]]:
    """Rows of `hard.parquet` as the plan wants them: with the size of what is made of them, and captions where texts take them."""
    hard = read_table(
        run.path("hard.parquet"), ["id", "digest", "label", "width", "height"]
    ).to_pylist()
    for row in hard:
        row["width"], row["height"] = run.made_size(row["width"], row["height"])
    return with_captions(run, hard)


def make_worker(run: Run) -> Worker:
    """The recipe's engine and filter, loaded on the run's device, which write to the run's stores."""
    asked = run.recipe.filter
    scorer = ClipScorer(asked.checkpoint, filter_texts(run), run.device)
    engine = _engine(run)
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
    """Pixels of the source images of some requests, in the requests' shapes; `sizes` are their own (width, height).

    Called with an id of `hard.parquet` it returns uint8 `[3, height, width]`, and raises RunError for an image that is another one than
    when it was checked.
    """

    def __init__(self, run: Run, requests: Sequence[Request]) -> None:
        self.run = run
        self.places = {name: row for row, name in enumerate(run.train.ids)}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.expect(requests)
        hard = read_table(run.path("hard.parquet"), ["id", "digest", "width", "height"]).to_pylist()
        self.sizes = {row["id"]: (row["width"], row["height"]) for row in hard}
        self.digests = {row["id"]: row["digest"] for row in hard}

    def expect(self, requests: Sequence[Request]) -> None:
        """More requests, whose sources will be asked for."""
        self.shapes |= {request.source_id: (request.width, request.height) for request in requests}

    def __call__(self, source: str) -> np.ndarray:
        image = self.run.checked_image(self.places[source], self.digests[source])
        return to_size(image, *self.shapes[source])


def filter_texts(run: Run) -> dict[int, str]:
    """The plain prompt of each label that the filter compares images with."""
    asked, names = run.recipe.filter, run.recipe.prompts.names
    return {
        label: fill(asked.template, names.get(name, name))
        for label, name in enumerate(run.train.class_names)
    }


def filter_spectrum(run: Run) -> Path:
    """Writes keep, or drop with its reason, for each image of the plan and each further try to `filter.parquet`.

    Images were scored while they were made; what has no score of this CLIP and these texts is read again and scored here.
    """
    asked, scores = run.recipe.filter, run.scores
    scores.clear_unfinished()
    requests, missing = tries_so_far(run)
    while missing:
        _score(run, missing)
        requests, missing = tries_so_far(run)
    known = _scores_by(scores, describe_scorer(asked.checkpoint, filter_texts(run)))
    if asked.rule == "alia":
        verdicts, told = alia_verdicts(run, requests, filter_texts(run)), "by ALIA's filters"
    else:
        verdicts, told = (
            [judge(known[request.id], asked.threshold) for request in requests],
            f"at clip_similarity >= {asked.threshold:g}",
        )
    table = pa.table(
        {
            "id": [request.id for request in requests], "source_id": [request.source_id for request in requests],
            "label": [request.label for request in requests], "level": [request.level for request in requests],
            "seed": [request.seed for request in requests], "attempt": [request.attempt for request in requests],
            "clip_similarity": pa.array([known[request.id] for request in requests], pa.float32()),
            "keep": [verdict.keep for verdict in verdicts], "reason": [verdict.reason for verdict in verdicts],
        }
    )  # fmt: skip
    write_table(table, run.path("filter.parquet"))
    say(
        f"filter: {sum(verdict.keep for verdict in verdicts)} of {len(verdicts)} images kept {told}"
    )
    return run.path("filter.parquet")


def _score(run: Run, requests: Sequence[Request]) -> None:
    """Scores images of the store. Raises StoreError where one is not there."""
    scorer = ClipScorer(run.recipe.filter.checkpoint, filter_texts(run), run.device)
    images = stored_images(run, [request.id for request in requests])
    with progress("filter", len(requests)) as advance:
        for first in range(0, len(requests), 512):
            part = requests[first : first + 512]
            pictures = [
                decode_image(images[row]["image"]) for row in range(first, first + len(part))
            ]
            cosines = scorer(pictures, [request.label for request in part])
            run.scores.append(
                [
                    {"id": request.id, "scorer": scorer.id, "clip_similarity": float(cosine)}
                    for request, cosine in zip(part, cosines, strict=True)
                ]
            )
            advance(len(part))


def _engine(run: Run) -> Engine | PlainEngine:
    asked, sampling = run.recipe.spectrum, run.sampling
    settings: dict[str, Any] = {
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
    }
    if run.generator.plain:
        say(
            f"the engine does not know a {run.generator.family}: diffusers' own pipeline makes its images one by one, which is slower"
        )
        plain = PlainEngine(load_plain(run.address, asked.dtype, run.device), **settings)
        if unused := plain.unused():
            say(
                f"generate: {' and '.join(unused)} ha{'s' if len(unused) == 1 else 've'} no effect: a {run.generator.family} takes none"
            )
        return plain
    slots = run.recipe.runtime.slots
    engine = Engine(
        load_generator(run.address, asked.dtype, run.device),
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
        or count_rows(run, read_plan(run.path("plan.parquet"))) < PAYS * engine.rows
    ):
        return
    say("generate: compiling the network, which takes a minute or more")
    try:
        engine.compile(run.sampling.size, run.sampling.size)
    except (
        Exception
    ) as error:  # compilers fail in many ways, and none of them is worth losing a run
        told = str(error).strip().splitlines() or [type(error).__name__]
        say(
            f"torch.compile failed ({told[0]}); going on without, which is slower; runtime.compile: false leaves it out"
        )


def _scores_by(scores: Shards, scorer: str) -> dict[str, float]:
    """`{id: clip_similarity}` of what a scorer has scored; what is no cosine counts as no score."""
    found = scores.read()
    found = found.filter(pc.equal(found["scorer"], scorer))
    pairs = zip(found["id"].to_pylist(), found["clip_similarity"].to_pylist(), strict=True)
    return {name: cosine for name, cosine in pairs if is_cosine(cosine)}


def is_cosine(value: float | None) -> bool:
    """Whether a score that was kept can be one; NaN, null and what lies beyond rounding cannot."""
    return value is not None and abs(value) <= LARGEST_COSINE
