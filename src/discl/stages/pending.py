"""What of a plan is still to be made or scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc

from ..data import decode_image
from ..prompts import fill
from ..run_folder import paths
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer, describe_scorer, judge
from ..spectrum.plan import Planner, Request, follow_tries, read_plan, unet_rows
from ..spectrum.store import Shards
from ..utils.console import progress
from ..utils.stored import read_table
from .prompts import texts_by_label, with_captions

LARGEST_COSINE = 1.001
"""A cosine, with what rounding may add to it."""


def count_rows(run: Run, requests: Sequence[Request]) -> int:
    """Rows that the network computes for these requests at the recipe's setting."""
    sampling = run.sampling
    scale = 1 if run.generator.distilled else sampling.guidance_scale
    return unet_rows(
        requests,
        sampling.num_inference_steps,
        scale,
        fixed=sampling.fixed,
        guidance_interval=sampling.guidance_interval,
    )


def missing_images(
    run: Run, plan: Sequence[Request] | None = None
) -> tuple[list[Request], list[Request]]:
    """(every try that the plan has come to, those that are to be made now), the second sorted by shape and otherwise as planned.

    `plan` is a part of the plan, by default all of it. When the second list is made, call again: with `spectrum.tries` > 1 there may be
    further tries. Images of the store that lack a score are then scored first, for that decides what is drawn again.
    """
    plan = read_plan(run.path(paths.PLAN)) if plan is None else plan
    while True:
        tried, unscored = tries_so_far(run, plan)
        present = run.spectrum.ids()
        if run.recipe.spectrum.tries == 1:
            missing = [request for request in tried if request.id not in present]
            break
        missing = [request for request in unscored if request.id not in present]
        if len(missing) == len(unscored):
            break
        score_missing(run, [request for request in unscored if request.id in present])
    return tried, sorted(missing, key=lambda request: (request.width, request.height))


def tries_so_far(
    run: Run, plan: Sequence[Request] | None = None
) -> tuple[list[Request], list[Request]]:
    """(every try that the plan has come to by the scores that are known, those of them without a score); see `follow_tries`."""
    asked, spectrum = run.recipe.filter, run.recipe.spectrum
    plan = read_plan(run.path(paths.PLAN)) if plan is None else plan
    known = scores_by(run.scores, describe_scorer(asked.checkpoint, filter_texts(run)))
    if spectrum.tries == 1:
        return list(plan), [request for request in plan if request.id not in known]
    planner = Planner(texts_by_label(run), run.recipe.prompts.negative, run.sampling)
    sources = {row["id"]: row for row in planned_sources(run)}

    def again(first: Request, attempt: int) -> Request:
        return planner.request(sources[first.source_id], first.level, first.seed, attempt)

    return follow_tries(
        plan,
        again,
        known,
        lambda cosine: judge(cosine, asked.threshold).keep,
        tries=spectrum.tries,
    )


def planned_sources(run: Run) -> list[dict[str, Any]]:
    """Rows of `hard.parquet` as the plan wants them: with the size of what is made of them, and captions where texts take them."""
    hard = read_table(
        run.path(paths.HARD), ["id", "digest", "label", "width", "height"]
    ).to_pylist()
    for row in hard:
        row["width"], row["height"] = run.made_size(row["width"], row["height"])
    return with_captions(run, hard)


def filter_texts(run: Run) -> dict[int, str]:
    """The plain prompt of each label that the filter compares images with."""
    asked, names = run.recipe.filter, run.recipe.prompts.names
    return {
        label: fill(asked.template, names.get(name, name))
        for label, name in enumerate(run.train.class_names)
    }


def score_missing(run: Run, requests: Sequence[Request]) -> None:
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


def scores_by(scores: Shards, scorer: str) -> dict[str, float]:
    """`{id: clip_similarity}` of what a scorer has scored; what is no cosine counts as no score."""
    found = scores.read()
    found = found.filter(pc.equal(found["scorer"], scorer))
    pairs = zip(found["id"].to_pylist(), found["clip_similarity"].to_pylist(), strict=True)
    return {name: cosine for name, cosine in pairs if is_cosine(cosine)}


def is_cosine(value: float | None) -> bool:
    """Whether a score that was kept can be one; NaN, null and what lies beyond rounding cannot."""
    return value is not None and abs(value) <= LARGEST_COSINE
