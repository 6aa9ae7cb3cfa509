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
from ..spectrum.models import check_generator, check_peft
from ..spectrum.plan import plan_requests, write_plan
from ..spectrum.store import Shards
from ..utils.atomic import whole
from ..utils.counts import count_of
from .classifiers import describe_classifier
from .engine import GENERATOR_KEYS, make_engine
from .pending import count_rows, planned_sources, score_and_list_missing
from .prompts import check_prompts, ensure_texts
from .train import check_training

TRAINING = frozenset({"train", "evaluate", "report", "compare"})
"""Stages that need classifiers."""
SAMPLED = 16
"""Sources that are encoded to estimate the size on disk."""


def check_models(run: Run, stage: str) -> None:
    """Finds the store and the checkpoints that `stage` needs, before any long work starts.

    Raises CheckpointError for a checkpoint that is missing, of another family, or cannot make
    pictures of this size; StoreError for a store that cannot be reached; and, if `stage` needs
    classifiers, RecipeError for custom pieces that are not allowed or do not exist.
    """
    if stage in TRAINING:
        check_own_pieces(run.recipe, run.allow_plugins)
    if stage in {"data", "hard"}:
        return
    Shards(run.location(paths.SPECTRUM), pa.schema([])).files()
    check_prompts(run)
    with arguments_named(address="filter.checkpoint"):
        find_clip(run.recipe.filter.checkpoint)
    spectrum = run.recipe.spectrum
    with arguments_named(**GENERATOR_KEYS):
        check_generator(
            run.base_address,
            spectrum.num_inference_steps,
            spectrum.size,
            spectrum.levels,
            fixed=spectrum.steps == "fixed",
            guidance_interval=spectrum.guidance_interval,
        )
    if spectrum.loras or spectrum.adapt is not None:
        check_peft()
    for name, method in run.recipe.methods.items():
        train = run.recipe.training(name)
        if train.model.checkpoint is not None:
            describe_classifier(train, ("a", "b"), None, method.loss.name)


def make_plan(run: Run, *, for_training: bool = True) -> Path:
    """Writes every image that the spectrum needs, in its first try, to `plan.parquet`.

    It is written each time: another checkpoint or phrase file gives other ids. Returns the path.

    - `for_training`: refuse what the data cannot give to training now, not after hours of images.

    Raises DataError or TrainingError for that.
    """
    path, recipe = run.path(paths.PLAN), run.recipe
    if for_training:
        _check_schedule(run)
    hard, prompts = planned_sources(run), ensure_texts(run)
    requests = plan_requests(
        hard,
        recipe.spectrum.levels,
        recipe.spectrum.seeds,
        prompts,
        negative_prompt=recipe.prompts.negative,
        sampling=run.sampling,
    )
    with whole(path) as unfinished:  # others may write the same plan at once
        write_plan(requests, unfinished)
    return path


def _check_schedule(run: Run) -> None:
    """Raises DataError or TrainingError if the real images cannot give what training needs."""
    recipe = run.recipe
    if len(run.tables) == 1:
        raise DataError(
            "there is neither a validation nor a test split to measure on; set data.own_split or "
            "name them in data.splits."
        )
    selecting = [name for name in recipe.methods if recipe.training(name).select == "validation"]
    if selecting and "validation" not in run.tables:
        raise DataError(
            f"train.select is 'validation' (of {', '.join(selecting)}), but there is no validation "
            "split; use select: last or set data.own_split."
        )
    check_training(run)


def estimate_cost(run: Run) -> dict[str, float]:
    """What generating the rest of the plan costs.

    Returns images, UNet rows, seconds (from two timed UNet calls) and bytes on disk.
    `further_images` and `further_rows` are an upper bound of what comes on top if the filter drops
    every try but the last of `spectrum.tries`.
    """
    requests, missing = score_and_list_missing(run)
    tries, encoding = run.recipe.spectrum.tries, run.recipe.spectrum.encoding
    further = [request for request in missing for _ in range(request.attempt + 1, tries)]
    rows = count_rows(run, missing)
    row_of = {name: row for row, name in enumerate(run.train.ids)}
    samples = list({request.source_id: request for request in requests}.values())[:SAMPLED]
    pictures = [
        to_size(run.train.image(row_of[each.source_id]), each.width, each.height)
        for each in samples
    ]
    encoded = [len(encode_image(picture, encoding)) for picture in pictures]
    shapes = Counter((request.height, request.width) for request in requests)
    height, width = shapes.most_common(1)[0][0]
    return {
        "images": len(missing),
        "images_planned": len(requests),
        "unet_rows": rows,
        "seconds": rows / make_engine(run).rows_per_second(height, width) if missing else 0.0,
        "bytes": len(missing) * float(np.mean(encoded)),
        "further_images": len(further),
        "further_rows": count_rows(run, further),
    }


def describe_cost(cost: dict[str, float]) -> str:
    """The estimate in one line."""
    hours, seconds = divmod(round(cost["seconds"]), 3600)
    time = f"{hours} h {seconds // 60} min" if hours else f"{seconds // 60} min {seconds % 60} s"
    planned, images, rows = (int(cost[name]) for name in ("images_planned", "images", "unet_rows"))
    present = f" ({planned - images:,} of {planned:,} are present)" if planned > images else ""
    text = (
        f"{count_of(images, 'image')} to generate{present}: {count_of(rows, 'UNet row')}, about "
        f"{time} on this machine, {cost['bytes'] / 1e6:.1f} MB on disk"
    )
    if further := int(cost.get("further_images", 0)):
        tries = count_of(further, "further try", "further tries")
        further_rows = count_of(int(cost["further_rows"]), "UNet row")
        text += f"; if the filter drops images, up to {tries} with {further_rows}"
    return text
