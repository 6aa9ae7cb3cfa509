"""`discl plan`: the images to make, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data import to_size
from ..errors import DataError, RecipeError, TrainingError, arguments_named
from ..recipe import check_own_pieces
from ..recipe.loop import learner_of
from ..recipe.merge import get_value
from ..run_folder import paths
from ..run_folder.overrides import read_overrides
from ..run_folder.run import Run
from ..spectrum.clip_filter import find_clip
from ..spectrum.draws import Cap, count_further
from ..spectrum.encoding import encode_image
from ..spectrum.models import check_peft, describe_loras
from ..spectrum.plan import Request, plan_requests, write_plan
from ..spectrum.store import Shards
from ..utils.counts import count_of
from ..utils.logging import get_logger
from .adapt import check_adaptable
from .budget import (
    count_first,
    count_rows,
    describe_cap,
    draw_rule,
    find_cap,
    first_seeds,
    has_rows,
    keep_rows,
    unit_of,
)
from .classifiers import describe_classifier
from .engine import check_engine, make_engine
from .method_plan import check_training
from .pending import draws_so_far, planned_sources, score_and_list_missing
from .prompts import check_prompts, ensure_texts
from .retrieve import needs_archive
from .round_plan import plan_rounds
from .workers.local import list_devices

logger = get_logger(__name__)

TRAINING = frozenset({"train", "evaluate", "report", "compare"})
"""Stages that need classifiers."""
SAMPLED = 16
"""Sources that are encoded to estimate the size on disk."""


def check_models(run: Run, stage: str) -> None:
    """Finds the store, checkpoints and archive that `stage` needs, before any long work starts.

    Raises CheckpointError for a checkpoint that is missing, of another family, or cannot make
    pictures of this size; StoreError for a store that cannot be reached; DataError for an archive
    that is missing or empty; BrokenFileError for a broken `overrides.csv`; and, if `stage` needs
    classifiers, RecipeError for custom pieces that are not allowed or do not exist.
    """
    if stage in TRAINING or learner_of(run.recipe) is not None:
        check_own_pieces(run.recipe, run.allow_plugins)
    if stage in {"data", "hard"}:
        return
    read_overrides(run.folder)
    retrieves = stage != "prompts" and needs_archive(run)
    if retrieves:
        _ = run.archive
    if retrieves or not run.recipe.spectrum.makes_none:
        with arguments_named("filter.checkpoint", address="filter.checkpoint"):
            find_clip(run.recipe.filter.checkpoint)
    if run.recipe.spectrum.makes_none:
        _check_classifiers(run)
        return
    Shards(run.location(paths.SPECTRUM), pa.schema([])).files()
    check_prompts(run)
    if stage == "retrieve":
        return
    spectrum = run.recipe.spectrum
    with arguments_named("spectrum.loras"):
        describe_loras(run.base_address.loras)
    check_engine(run, spectrum.levels)
    if spectrum.early_rejection is not None and run.generator.plain:
        raise RecipeError(
            f"a {run.generator.family} is denoised by diffusers' own pipeline, which makes whole "
            "images; remove early_rejection.",
            argument="spectrum.early_rejection",
        )
    check_adaptable(run)
    if spectrum.loras or (spectrum.adapt is not None and spectrum.adapt.rank):
        check_peft()
    _check_classifiers(run)


def _check_classifiers(run: Run) -> None:
    """Raises CheckpointError for a checkpoint that a method cannot be trained from."""
    for name, method in run.recipe.methods.items():
        train = run.recipe.training(name)
        if train.model.checkpoint is not None:
            own = get_value(method.train, "model.checkpoint") is not None
            key = "train.model.checkpoint"
            with arguments_named(f"methods.{name}.{key}" if own else key):
                describe_classifier(train, ("a", "b"), None, method.loss.name, method.fine_tune)


def make_plan(run: Run, *, for_training: bool = True) -> Path:
    """Writes every image that the spectrum needs, in its first try, to `plan.parquet`.

    It is written each time: another checkpoint or phrase file gives other ids. Returns the path. A
    budget cuts the plan.

    - `for_training`: refuse what the data cannot give to training now, not after hours of images.

    Raises DataError or TrainingError for that, and RecipeError for a budget that buys no image, and
    for a threshold of a class that does not exist.
    """
    path, recipe = run.path(paths.PLAN), run.recipe
    recipe.filter.check_classes(run.train.class_names)
    if for_training:
        _check_schedule(run)
    if recipe.spectrum.makes_none:
        write_plan([], path)
        return path
    hard, prompts = planned_sources(run), ensure_texts(run)
    if recipe.spectrum.budget is not None:
        _ensure_rows(run, hard)
    learner = learner_of(recipe)
    if learner is not None:
        asked = plan_rounds(run, learner)
        numbers, reasons = [each.round for each in asked], [each.why for each in asked]
        write_plan([each.request for each in asked], path, round=numbers, why=reasons)
        return path
    requests = plan_requests(
        hard,
        recipe.spectrum.levels,
        first_seeds(run),
        prompts,
        negative_prompt=recipe.prompts.negative,
        sampling=run.sampling,
    )
    if recipe.spectrum.budget is not None:
        requests = _cut_plan(run, find_cap(run, hard), requests, for_training)
    if for_training and not any(method.takes_synthetic for method in recipe.methods.values()):
        logger.warning(
            f"plan: no method draws synthetic images, and {count_of(len(requests), 'image')} are "
            "planned; to generate none, set spectrum.budget: {images: 0}"
        )
    write_plan(requests, path)
    return path


def _ensure_rows(run: Run, sources: Sequence[Mapping[str, Any]]) -> None:
    """Turns a budget in hours into UNet rows, once for all processes of this folder."""
    budget = run.recipe.spectrum.budget
    if budget is None or budget.hours is None or has_rows(run):
        return
    with run.lock("budget"):
        if not has_rows(run):
            speed = _speed_of(run, [(row["height"], row["width"]) for row in sources])
            keep_rows(run, speed, len(list_devices(run)))


def _speed_of(run: Run, shapes: Sequence[tuple[int, int]]) -> float:
    """UNet rows per second on one device, from two timed calls at the most frequent shape.

    - `shapes`: (height, width) of images.
    """
    height, width = Counter(shapes).most_common(1)[0][0]
    return make_engine(run).rows_per_second(height, width)


def _cut_plan(
    run: Run, cap: Cap | None, requests: list[Request], for_training: bool
) -> list[Request]:
    """The requests that the budget pays, in their order."""
    if cap is None or cap.cost(requests) <= cap.amount:
        return requests
    bought = {request.id for request in cap.buy(requests)}
    if not bought:
        least = unit_of(run, min(cap.prices.values()))
        raise RecipeError(
            f"{describe_cap(run, cap)} buys no image; one costs {least} or more. Raise it.",
            argument="spectrum.budget",
        )
    left = [request for request in requests if request.id in bought]
    if for_training:
        try:
            check_training(run, left)
        except TrainingError as error:
            raise TrainingError(
                f"{describe_cap(run, cap)} buys {len(left):,} of {len(requests):,} images, too few "
                f"for training. {error} Or raise the budget.",
                argument="spectrum.budget",
            ) from error
    return left


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
    if run.recipe.spectrum.makes_none:
        return dict.fromkeys(("images", "images_planned", "unet_rows", "seconds", "bytes"), 0.0)
    requests, missing = score_and_list_missing(run)
    encoding = run.recipe.spectrum.encoding
    further = count_further(requests, missing, draw_rule(run))
    if run.recipe.spectrum.budget is not None:
        further = _payable(run, requests, further)
    rows = count_rows(run, missing)
    row_of = {name: row for row, name in enumerate(run.train.ids)}
    samples = list({request.source_id: request for request in requests}.values())[:SAMPLED]
    pictures = [
        to_size(run.train.image(row_of[each.source_id]), each.width, each.height)
        for each in samples
    ]
    encoded = [len(encode_image(picture, encoding)) for picture in pictures]
    shapes = [(request.height, request.width) for request in requests]
    return {
        "images": len(missing),
        "images_planned": len(requests),
        "unet_rows": rows,
        "seconds": rows / _speed_of(run, shapes) if missing else 0.0,
        "bytes": len(missing) * float(np.mean(encoded)),
        "further_images": len(further),
        "further_rows": count_rows(run, further),
    }


def _payable(run: Run, drawn: list[Request], further: list[Request]) -> list[Request]:
    """The further draws that the budget can pay at most, the cheapest first."""
    sources = planned_sources(run)
    cap = find_cap(run, sources)
    if cap is None:
        return further
    spent = cap.cost(drawn)
    if len(drawn) < count_first(run, sources):
        return []
    payable = []
    for request in sorted(further, key=lambda each: cap.prices[each.level]):
        spent += cap.prices[request.level]
        if spent > cap.amount:
            break
        payable.append(request)
    return payable


def describe_budget(run: Run) -> str:
    """What the budget buys, in one line; empty without a budget."""
    if run.recipe.spectrum.makes_none:
        return "spectrum.budget.images is 0: no spectrum is made"
    sources = planned_sources(run)
    cap = find_cap(run, sources)
    if cap is None or learner_of(run.recipe) is not None:
        return ""
    drawn = draws_so_far(run)[0]
    first = count_first(run, sources)
    whole = "the whole plan"
    if len(drawn) < first:
        whole = f"{len(drawn):,} of the {count_of(first, 'image')} of the whole plan"
    per_class = Counter(request.label for request in drawn)
    per_source = Counter(request.source_id for request in drawn)
    fewest, most = min(per_source.values()), max(per_source.values())
    each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    classes = count_of(len(per_class), "class", "classes")
    used = unit_of(run, cap.cost(drawn))
    return (
        f"{describe_cap(run, cap)} buys {whole}: {each} for each of "
        f"{count_of(len(per_source), 'hard image')} in {classes}; {used} planned so far"
    )


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
