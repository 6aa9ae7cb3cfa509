"""`discl plan`: the images to make, and what they cost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..data import to_size
from ..errors import DataError, arguments_named
from ..recipe import check_own_pieces
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.clip_filter import find_clip
from ..spectrum.encoding import encode_image
from ..spectrum.models import check_generator
from ..spectrum.plan import plan_requests, write_plan
from ..spectrum.store import Shards
from ..utils.atomic import whole
from .classifiers import describe_classifier
from .engine import make_engine
from .pending import count_rows, missing_images, planned_sources
from .prompts import check_prompts, texts_by_label
from .train import check_training

TRAINING = frozenset({"train", "evaluate", "report", "compare"})
"""What is to be done only when classifiers have been trained."""
GENERATOR_KEYS = {
    "config": "spectrum.config",
    "fixed": "spectrum.steps",
    "guidance_interval": "spectrum.guidance_interval",
    "levels": "spectrum.levels",
    "num_inference_steps": "spectrum.num_inference_steps",
    "size": "spectrum.size",
}
"""The recipe's keys of the arguments of `check_generator`."""


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
    Shards(run.location(paths.SPECTRUM), pa.schema([])).files()
    check_prompts(run)
    find_clip(run.recipe.filter.checkpoint)
    asked = run.recipe.spectrum
    with arguments_named(**GENERATOR_KEYS):
        check_generator(
            run.address,
            asked.num_inference_steps,
            asked.size,
            asked.levels,
            fixed=asked.steps == "fixed",
            guidance_interval=asked.guidance_interval,
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
    path, recipe = run.path(paths.PLAN), run.recipe
    if for_training:
        _check_course(run)
    hard, prompts = planned_sources(run), texts_by_label(run)
    requests = plan_requests(
        hard,
        recipe.spectrum.levels,
        recipe.spectrum.seeds,
        prompts,
        negative_prompt=recipe.prompts.negative,
        sampling=run.sampling,
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
        "seconds": rows / make_engine(run).rows_per_second(height, width) if missing else 0.0,
        "bytes": len(missing) * float(np.mean(encoded)),
        "further_images": len(further), "further_rows": count_rows(run, further),
    }  # fmt: skip


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
