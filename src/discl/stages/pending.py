"""Which images of a plan are still to be made or scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from ..data import decode_image
from ..prompts import fill
from ..run_folder import paths
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer, describe_scorer, judge
from ..spectrum.draws import follow_draws
from ..spectrum.embeddings import LARGEST_COSINE
from ..spectrum.plan import Planner, Request, read_plan
from ..spectrum.store import Shards
from ..utils.console import progress
from ..utils.stored import read_table
from .budget import count_first, draw_rule, find_cap, spread_order
from .prompts import add_captions, ensure_texts
from .rejection import count_rejections, describe_rejections, next_part, rejected_images

SCORED_AT_ONCE = 512


def score_and_list_missing(
    run: Run, plan: Sequence[Request] | None = None
) -> tuple[list[Request], list[Request]]:
    """(every draw so far, those to make now, sorted by shape and then as planned).

    Where scores decide what is drawn next, images of the store without a score are scored first.
    Call it again after the images are made; there may be further draws. With a budget sources of
    all classes take turns.

    - `plan`: a part of the plan, by default all of it.
    """
    plan = read_plan(run.path(paths.PLAN)) if plan is None else plan
    while True:
        drawn, unscored = draws_so_far(run, plan)
        present = run.spectrum.ids()
        if run.recipe.spectrum.tries == 1:
            gone = present | set(rejected_on_the_way(run))
            missing = [request for request in drawn if request.id not in gone]
            break
        missing = [request for request in unscored if request.id not in present]
        if len(missing) == len(unscored):
            break
        score_missing(run, [request for request in unscored if request.id in present])
    turns: Mapping[str, tuple[int, int]] = {}
    if run.recipe.spectrum.budget is not None:
        turns = spread_order(run, planned_sources(run)).turns
    return drawn, sorted(
        missing,
        key=lambda request: (request.width, request.height, turns.get(request.source_id, (0, 0))),
    )


def draws_so_far(
    run: Run, plan: Sequence[Request] | None = None
) -> tuple[list[Request], list[Request]]:
    """(every draw so far by the known scores, those without a score); see `follow_draws`.

    - `plan`: a part of the plan, whole sources each; by default all of it.
    """
    settings, spectrum = run.recipe.filter, run.recipe.spectrum
    planned = read_plan(run.path(paths.PLAN)) if plan is None or spectrum.budget else plan
    known = dict.fromkeys(rejected_on_the_way(run), math.nan) | known_scores(run)
    if spectrum.tries == 1:
        planned = planned if plan is None else plan
        return list(planned), [request for request in planned if request.id not in known]
    planner = Planner(ensure_texts(run), run.recipe.prompts.negative, run.sampling)
    rows = planned_sources(run)
    sources = {row["id"]: row for row in rows}
    found = follow_draws(
        planned,
        lambda first, seed, attempt: planner.request(
            sources[first.source_id], first.level, seed, attempt
        ),
        known,
        lambda cosine: judge(cosine, settings.threshold).keep,
        rule=draw_rule(run),
        cap=find_cap(run, rows),
        cut=spectrum.budget is not None and len(planned) < count_first(run, rows),
    )
    if plan is None or spectrum.budget is None:
        return found
    part = {request.source_id for request in plan}
    drawn, unscored = ([each for each in half if each.source_id in part] for half in found)
    return drawn, unscored


def planned_sources(run: Run) -> list[dict[str, Any]]:
    """Rows of `hard.parquet` with the size of their synthetic images, and captions if needed."""
    columns = ["id", "digest", "label", "width", "height"]
    hard = read_table(run.path(paths.HARD), columns).to_pylist()
    for row in hard:
        row["width"], row["height"] = run.made_size(row["width"], row["height"])
    return add_captions(run, hard)


def filter_texts(run: Run) -> dict[int, str]:
    """The plain prompt of each label that the filter compares images with."""
    template, names = run.recipe.filter.template, run.recipe.prompts.names
    return {
        label: fill(template, names.get(name, name))
        for label, name in enumerate(run.train.class_names)
    }


def score_missing(run: Run, requests: Sequence[Request]) -> None:
    """Scores images of the store. Raises StoreError if one is missing."""
    scorer = ClipScorer(run.recipe.filter.checkpoint, filter_texts(run), run.device)
    images = stored_images(run, [request.id for request in requests])
    with progress("filter", len(requests)) as advance:
        for first in range(0, len(requests), SCORED_AT_ONCE):
            part = requests[first : first + SCORED_AT_ONCE]
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


def scorer_of(run: Run) -> str:
    """Digest of the filter's CLIP and texts."""
    return describe_scorer(run.recipe.filter.checkpoint, filter_texts(run))


def known_scores(run: Run) -> dict[str, float]:
    """`{id: clip_similarity}` of all images that the filter's CLIP has scored."""
    return scores_by(run.scores, scorer_of(run))


def rejected_on_the_way(run: Run) -> dict[str, str]:
    """`{id: reason}` of the images that early rejection dropped."""
    if run.recipe.spectrum.early_rejection is None:
        return {}
    return rejected_images(run, scorer_of(run))


def summarise_rejections(run: Run) -> str:
    """What early rejection has done so far, in one sentence; empty where it is off."""
    if run.recipe.spectrum.early_rejection is None:
        return ""
    drawn = draws_so_far(run)[0]
    return describe_rejections(count_rejections(run, scorer_of(run), drawn, known_scores(run)))


def next_images(run: Run, plan: Sequence[Request], missing: Sequence[Request]) -> list[Request]:
    """Which of the missing images to make now: with early rejection first those that teach.

    - `plan`: the first draws of the whole plan.
    """
    while run.recipe.spectrum.early_rejection is not None:
        part = next_part(run, scorer_of(run), plan, missing, known_scores(run))
        if not part.score:
            return part.make
        score_missing(run, part.score)
    return list(missing)


def scores_by(scores: Shards, scorer: str) -> dict[str, float]:
    """`{id: clip_similarity}` by this scorer; a value that is no cosine is left out."""
    table = scores.read()
    table = table.filter(pc.equal(table["scorer"], scorer))
    pairs = zip(table["id"].to_pylist(), table["clip_similarity"].to_pylist(), strict=True)
    return {name: cosine for name, cosine in pairs if is_cosine(cosine)}


def is_cosine(value: float | None) -> bool:
    """Whether a stored score can be a cosine; NaN, null and values above 1 cannot."""
    return value is not None and abs(value) <= LARGEST_COSINE
