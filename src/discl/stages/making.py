"""Phase 1 of a run: plan, generate, filter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..console import progress, say
from ..data import decode_image, digest_image, to_square
from ..errors import DataError, RunError
from ..prompts import class_prompts, fill
from ..spectrum.encoding import encode_image
from ..spectrum.engine import Engine
from ..spectrum.filter import ClipScorer, describe_scorer, find_clip, judge
from ..spectrum.models import check_generator, load_generator
from ..spectrum.plan import Request, Sampling, plan_requests, read_plan, unet_rows, write_plan
from ..spectrum.store import Shards
from ..workspace import Run, stored_images, write_table
from .classifiers import describe_classifier


def check_models(run: Run, stage: str) -> None:
    """Looks for the generator, the CLIP and the classifiers' checkpoints before any long work starts, if `stage` needs them.

    Raises CheckpointError for a folder that is missing, of another family, or cannot make pictures of the size asked for.
    """
    if stage in {"data", "hard"}:
        return
    find_clip(run.recipe.filter.checkpoint)
    check_generator(run.recipe.spectrum.checkpoint, run.recipe.spectrum.num_inference_steps, run.recipe.spectrum.size)
    for name, method in run.recipe.methods.items():
        train = run.recipe.training(name)
        if train.model.checkpoint is not None:
            describe_classifier(train, ("a", "b"), None, method.loss.name)


def make_plan(run: Run) -> Path:
    """Writes every image that the spectrum needs to `plan.parquet`.

    It is made anew each time, for it is quick: a checkpoint or a phrase file that has changed meanwhile gives other ids.
    """
    path, recipe = run.path("plan.parquet"), run.recipe
    if len(run.tables) == 1:
        raise DataError("there is neither a validation nor a test split to measure on; set data.own_split or name them in data.splits.")
    if recipe.train.select == "validation" and "validation" not in run.tables:
        raise DataError("train.select is 'validation', but there is no validation split; use select: last or set data.own_split.")
    names = run.train.class_names
    texts = class_prompts(names, recipe.prompts.templates, recipe.prompts.phrases, recipe.prompts.names)
    hard = pq.read_table(run.path("hard.parquet"), columns=["id", "digest", "label"]).to_pylist()
    prompts = {label: texts[name] for label, name in enumerate(names)}
    requests = plan_requests(hard, recipe.spectrum.levels, recipe.spectrum.seeds, prompts, recipe.prompts.negative, run.sampling)
    unfinished = path.with_suffix(".new")
    write_plan(requests, unfinished)
    unfinished.replace(path)
    return path


def estimate_cost(run: Run, engine: Engine | None = None) -> dict[str, float]:
    """What generating the rest of the plan costs: images, UNet rows, seconds (from two timed UNet calls) and bytes on disk."""
    requests, missing = _missing(run)
    asked = run.recipe.spectrum
    rows = unet_rows(missing, asked.num_inference_steps, asked.guidance_scale)
    engine = engine or _engine(run)
    places = {name: row for row, name in enumerate(run.train.ids)}
    samples = [run.train.image(places[source]) for source in list(dict.fromkeys(request.source_id for request in requests))[:16]]
    size = run.sampling.size
    encoded = [len(encode_image(to_square(image, size).transpose(1, 2, 0), asked.encoding)) for image in samples]
    return {
        "images": len(missing), "images_planned": len(requests), "unet_rows": rows,
        "seconds": rows / engine.rows_per_second() if missing else 0.0, "bytes": len(missing) * float(np.mean(encoded)),
    }  # fmt: skip


def describe_cost(cost: dict[str, float]) -> str:
    """The estimate in one line."""
    hours, seconds = divmod(round(cost["seconds"]), 3600)
    time = f"{hours} h {seconds // 60} min" if hours else f"{seconds // 60} min {seconds % 60} s"
    made = int(cost["images_planned"] - cost["images"])
    there = f" ({made:,} of {int(cost['images_planned']):,} are there already)" if made else ""
    size = f"{cost['bytes'] / 1e6:.1f} MB on disk"
    return f"{int(cost['images']):,} images to generate{there}: {int(cost['unet_rows']):,} UNet rows, about {time} on this machine, {size}"


def generate(run: Run) -> Path:
    """Makes the images of the plan that the store lacks."""
    store = run.spectrum
    store.clear_unfinished()
    requests, missing = _missing(run)
    if not missing:
        return store.folder
    if len(missing) < len(requests):
        say(f"generate: {len(requests) - len(missing)} of {len(requests)} images are there already")
    engine, train, size = _engine(run), run.train, run.sampling.size
    places = {name: row for row, name in enumerate(train.ids)}
    hard = pq.read_table(run.path("hard.parquet"), columns=["id", "digest", "width", "height"]).to_pylist()
    sizes, digests = {row["id"]: (row["width"], row["height"]) for row in hard}, {row["id"]: row["digest"] for row in hard}
    encoding, shard_rows = run.recipe.spectrum.encoding, run.recipe.runtime.shard_rows

    def load_pixels(source: str) -> np.ndarray:
        image = train.image(places[source])
        if digest_image(image) != digests[source]:
            raise RunError(f"image '{source}' has changed since it was checked; delete data.parquet and hard.parquet in {run.folder}.")
        return to_square(image, size)

    buffer: list[dict[str, Any]] = []
    with progress("generate", len(missing)) as advance, ThreadPoolExecutor(2) as encoders:

        def write() -> None:
            encoded = encoders.map(lambda row: encode_image(row["image"], encoding), buffer)
            store.append([{**row, "image": {"bytes": data, "path": None}} for row, data in zip(buffer, encoded, strict=True)])
            buffer.clear()

        for request, picture in engine.generate(missing, load_pixels):
            buffer.append({**_stored(request, run.sampling, sizes[request.source_id]), "image": picture})
            advance(1)
            if len(buffer) >= shard_rows:
                write()
        write()
    work = engine.work
    encodes = f"{work.vae_encodes} VAE and {work.text_encodes} text encodes"
    say(f"generate: {work.unet_rows} UNet rows in {work.unet_calls} calls, {work.slot_fill:.1%} of the slots filled, {encodes}")
    return store.folder


def filter_spectrum(run: Run) -> Path:
    """Scores the images that have no score yet and writes keep, or drop with its reason, for each to `filter.parquet`."""
    names, asked = run.train.class_names, run.recipe.filter
    texts = {label: fill(asked.template, run.recipe.prompts.names.get(name, name)) for label, name in enumerate(names)}
    scorer_id, scores = describe_scorer(asked.checkpoint, texts), run.scores
    scores.clear_unfinished()
    requests = read_plan(run.path("plan.parquet"))
    known = _scores_by(scores, scorer_id)
    missing = [request for request in requests if request.id not in known]
    if missing:
        images = stored_images(run, [request.id for request in missing])
        scorer = ClipScorer(asked.checkpoint, texts, run.device)
        with progress("filter", len(missing)) as advance:
            for first in range(0, len(missing), 512):
                part = missing[first : first + 512]
                pictures = [decode_image(images[row]["image"]) for row in range(first, first + len(part))]
                cosines = scorer(pictures, [request.label for request in part])
                scores.append(
                    [
                        {"id": request.id, "scorer": scorer_id, "clip_similarity": float(cosine)}
                        for request, cosine in zip(part, cosines, strict=True)
                    ]
                )
                advance(len(part))
        known = _scores_by(scores, scorer_id)
    verdicts = [judge(known[request.id], asked.threshold) for request in requests]
    table = pa.table(
        {
            "id": [request.id for request in requests], "source_id": [request.source_id for request in requests],
            "label": [request.label for request in requests], "level": [request.level for request in requests],
            "seed": [request.seed for request in requests],
            "clip_similarity": pa.array([known[request.id] for request in requests], pa.float32()),
            "keep": [verdict.keep for verdict in verdicts], "reason": [verdict.reason for verdict in verdicts],
        }
    )  # fmt: skip
    write_table(table, run.path("filter.parquet"))
    say(f"filter: {sum(verdict.keep for verdict in verdicts)} of {len(verdicts)} images kept at clip_similarity >= {asked.threshold:g}")
    return run.path("filter.parquet")


def _missing(run: Run) -> tuple[list[Request], list[Request]]:
    requests = read_plan(run.path("plan.parquet"))
    present = run.spectrum.ids()
    return requests, [request for request in requests if request.id not in present]


def _engine(run: Run) -> Engine:
    asked, sampling = run.recipe.spectrum, run.sampling
    model = load_generator(asked.checkpoint, asked.dtype, run.device)
    return Engine(
        model,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        size=sampling.size,
        slots=run.recipe.runtime.slots,
    )


def _stored(request: Request, sampling: Sampling, size: tuple[int, int]) -> dict[str, Any]:
    shape = {"source_width": size[0], "source_height": size[1], "width": sampling.size, "height": sampling.size}
    return {**asdict(request), **{key: value for key, value in asdict(sampling).items() if key != "size"}, **shape}


def _scores_by(scores: Shards, scorer: str) -> dict[str, float]:
    return {row["id"]: row["clip_similarity"] for row in scores.read().to_pylist() if row["scorer"] == scorer}
