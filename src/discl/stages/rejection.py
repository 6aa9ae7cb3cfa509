"""Early rejection in a run: what it learns from, what is stored, what it saved and lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from torch import Tensor

from ..levels import format_level, start_step
from ..recipe.loop import learner_of
from ..recipe.rejection import EarlyRejection
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer
from ..spectrum.early_rejection import Inspector, Learnt, conformal_bound, look_steps
from ..spectrum.engine import Engine
from ..spectrum.plan import Request
from ..spectrum.store import Shards
from ..utils.atomic import make_folder
from ..utils.counts import count_of
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_json, read_table, write_text
from .budget import rows_by_level, rows_of_steps

logger = get_logger(__name__)

AGAIN = "Delete it and run the command again; the bound is then set by the same images again."
LOOKS = pa.schema(
    [
        ("id", pa.string()),
        ("level", pa.int32()),
        ("look", pa.int32()),
        ("similarity", pa.float64()),
        ("bound_key", pa.string()),
        ("bound", pa.float64()),
        ("audited", pa.bool_()),
    ]
)
"""A look at an image that the bound is learnt from (no key), or one at which it was rejected."""


@dataclass(frozen=True)
class Part:
    """What comes next of a plan: images to make, or images of the store to score first."""

    make: list[Request]
    score: list[Request]


@dataclass(frozen=True)
class Rejections:
    """What early rejection did to a run.

    - `rejected`: images below a bound; `audited`: those of them that were finished.
    - `audited_kept`: audited images that the filter keeps.
    - `rows_saved`, `rows_made`: UNet rows of all images that the run asked for.
    - `loss`: estimated fraction of the images that the filter would keep which are lost; None
      where nothing was audited.
    """

    rejected: int
    audited: int
    audited_kept: int
    rows_saved: int
    rows_made: int
    loss: float | None


# ---------------------------------------------------------------- bounds and looks


def look_store(run: Run) -> Shards:
    """The store of looks at images in progress."""
    return Shards(run.location(paths.LOOKS), LOOKS, ("id", "look", "bound_key"))


def bound_keys(run: Run, scorer: str) -> dict[int, str]:
    """`{level: digest of all that its bounds depend on}` for levels that are looked at.

    - `scorer`: id of the filter's CLIP and texts.
    """
    settings, threshold = run.recipe.spectrum.early_rejection, run.recipe.filter.threshold
    if settings is None:
        return {}
    rule, sampling = settings.model_dump(exclude={"audit"}), run.sampling.identity()
    return {
        level: digest("early rejection", level, rule, scorer, threshold, sampling)
        for level in run.recipe.spectrum.levels
        if look_steps(settings.at, _chain(run, level))
    }


def _chain(run: Run, level: int) -> int:
    steps = run.sampling.num_inference_steps
    return steps if run.sampling.fixed else start_step(level, steps)


def load_learnt(run: Run, scorer: str) -> dict[int, Learnt]:
    """What is known of the levels whose bounds are set.

    Raises BrokenFileError for a file that is cut off.
    """
    found = {}
    for level, key in bound_keys(run, scorer).items():
        path = run.path(paths.BOUNDS) / f"{key}.json"
        if path.exists():
            stored = read_json(path, "bounds", "teachers", advice=AGAIN)
            bounds = {
                int(look): -math.inf if bound is None else float(bound)
                for look, bound in stored["bounds"].items()
            }
            found[level] = Learnt(key, bounds, frozenset(stored["teachers"]))
    return found


def make_inspector(run: Run, engine: Engine, scorer: ClipScorer) -> Inspector | None:
    """Looks at the images of an engine; None without `spectrum.early_rejection`."""
    settings = run.recipe.spectrum.early_rejection
    if settings is None:
        return None
    return Inspector(
        settings.at,
        settings.audit,
        _score_clean(engine, scorer),
        lambda: load_learnt(run, scorer.id),
    )


def _score_clean(
    engine: Engine, scorer: ClipScorer
) -> Callable[[Sequence[Request], Tensor], np.ndarray]:
    """Scores the pictures of x̂0 as the filter scores finished ones.

    In a trial on the embedded generator, ridge regressions on the CLIP embedding, on x̂0, or on
    pooled features of the network's middle block found far fewer images to drop.
    """

    def score(requests: Sequence[Request], clean: Tensor) -> np.ndarray:
        shape = requests[0].height, requests[0].width
        pixels = engine.decode(clean, *shape).numpy()
        pictures = [Image.fromarray(picture) for picture in pixels]
        return scorer(pictures, [request.label for request in requests])

    return score


def rejected_images(run: Run, scorer: str) -> dict[str, str]:
    """`{id: reason}` of the images that were dropped on the way."""
    table = _rejections(run, scorer)
    table = table.filter(pc.invert(table["audited"]))
    return {
        row["id"]: f"rejected after {row['look']} of {_chain(run, row['level'])} steps: "
        f"clip_similarity {row['similarity']:.3f} of the image so far < {row['bound']:.3f}"
        for row in table.to_pylist()
    }


def _rejections(run: Run, scorer: str) -> pa.Table:
    """The looks at which images were rejected by the present bounds."""
    keys = sorted(bound_keys(run, scorer).values())
    if not keys:
        return LOOKS.empty_table()
    table = look_store(run).read()
    return table.filter(pc.is_in(table["bound_key"], pa.array(keys, pa.string())))


# ---------------------------------------------------------------- learning


def next_part(
    run: Run,
    scorer: str,
    plan: Sequence[Request],
    missing: Sequence[Request],
    known: Mapping[str, float],
) -> Part:
    """What to make next: of levels without bounds only the images that these are learnt from.

    Bounds that have all they need are set and written. The images to learn from depend on the plan
    alone, so a killed run learns the same.

    - `plan`: the first draws of the whole plan.
    - `missing`: the images to make.
    - `known`: scores by id.
    """
    settings = run.recipe.spectrum.early_rejection
    taught = load_learnt(run, scorer)
    waiting = {level: key for level, key in bound_keys(run, scorer).items() if level not in taught}
    if settings is None or not waiting or not missing:
        return Part(list(missing), [])
    present, seen, candidates = run.spectrum.ids(), _seen(run), _candidates(run, plan)
    teachers: dict[str, Request] = {}
    unscored: list[Request] = []
    for level, key in list(waiting.items()):
        of_level = [request for request in candidates if request.level == level]
        of_level.sort(key=lambda request: digest("teach", request.id))
        found = _learn(run, settings, level, of_level, present=present, seen=seen, known=known)
        if isinstance(found, Part):
            teachers |= {each.id: each for each in found.make}
            unscored += found.score
        else:
            _write_bounds(run, level, key, *found)
            del waiting[level]
    if unscored:
        return Part([], unscored)
    make = [each for each in missing if each.level not in waiting or each.id in teachers]
    listed = {each.id for each in make}
    make += [each for name, each in teachers.items() if name not in listed]
    return Part(sorted(make, key=lambda each: (each.width, each.height)), [])


def _candidates(run: Run, plan: Sequence[Request]) -> list[Request]:
    """Images that may teach. In a loop those of the first round that asks for their level.

    So what a level learns does not change with later rounds.
    """
    if learner_of(run.recipe) is None:
        return list(plan)
    asked = read_table(run.path(paths.PLAN), ["id", "level", "round"]).to_pylist()
    first: dict[int, int] = {}
    for row in asked:
        first[row["level"]] = min(row["round"], first.get(row["level"], row["round"]))
    early = {row["id"] for row in asked if row["round"] == first[row["level"]]}
    return [request for request in plan if request.id in early]


def _learn(
    run: Run,
    settings: EarlyRejection,
    level: int,
    candidates: Sequence[Request],
    *,
    present: Collection[str],
    seen: Mapping[tuple[str, int], float],
    known: Mapping[str, float],
) -> Part | tuple[dict[int, float], list[str], int]:
    """(bounds by look, ids of the images that they are learnt from, how many of them are kept).

    While these are not all there: what to make or to score first.

    - `candidates`: the images of the level, in the order in which they teach.
    - `present`: ids of finished images; `seen`: x̂0 of images at looks; `known`: scores by id.
    """
    looks, size = look_steps(settings.at, _chain(run, level)), settings.teach
    while True:
        chosen = candidates[:size]
        lacking = [
            each
            for each in chosen
            if each.id not in present or any((each.id, look) not in seen for look in looks)
        ]
        if lacking:
            return Part(lacking, [])
        if without := [each for each in chosen if each.id not in known]:
            return Part([], without)
        kept = [each.id for each in chosen if known[each.id] >= run.recipe.filter.threshold]
        bounds = {
            look: conformal_bound(
                np.array([seen[name, look] for name in kept]), settings.loss / len(looks)
            )
            for look in looks
        }
        if min(bounds.values()) > -math.inf or size >= len(candidates):
            return bounds, [each.id for each in chosen], len(kept)
        size *= 2


def _seen(run: Run) -> dict[tuple[str, int], float]:
    """`{(id, look): clip_similarity of x̂0}` of the images that bounds are learnt from."""
    table = look_store(run).read(["id", "look", "similarity", "bound_key"])
    table = table.filter(pc.equal(table["bound_key"], ""))
    return {(row["id"], row["look"]): row["similarity"] for row in table.to_pylist()}


def _write_bounds(
    run: Run, level: int, key: str, bounds: Mapping[int, float], teachers: list[str], kept: int
) -> None:
    """Keeps the bounds of a level, and says what they were learnt from."""
    plain = {str(look): None if bound == -math.inf else bound for look, bound in bounds.items()}
    values = {"level": level, "bounds": plain, "kept": kept, "teachers": teachers}
    make_folder(run.path(paths.BOUNDS))
    write_text(run.path(paths.BOUNDS) / f"{key}.json", json.dumps(values, indent=2) + "\n")
    text = f"{count_of(len(teachers), 'image')} at {format_level(level)}, {kept} of them kept"
    if max(bounds.values()) == -math.inf:
        text += ": too few for a bound, so no image of this level is rejected"
    logger.info(f"generate: early rejection has learnt from {text}")


# ---------------------------------------------------------------- what it does


def describe_rule(run: Run, scorer: str) -> str:
    """What early rejection will do, in one line for the plan; empty where it is off."""
    settings = run.recipe.spectrum.early_rejection
    if settings is None:
        return ""
    levels = sorted(bound_keys(run, scorer))
    if not levels:
        return "early rejection has no effect: images of all levels take too few steps"
    learnt = load_learnt(run, scorer)
    text = (
        "early rejection drops images on the way, so this is the most that it costs; it looks at "
        f"{', '.join(map(format_level, levels))}"
    )
    if waiting := [level for level in levels if level not in learnt]:
        text += (
            f", after {settings.teach} images of {', '.join(map(format_level, waiting))} are "
            "finished"
        )
    return text


def count_rejections(
    run: Run, scorer: str, drawn: Sequence[Request], known: Mapping[str, float]
) -> Rejections:
    """What early rejection saved, and what the audit says that it lost.

    - `drawn`: the images that the run asked for.
    - `known`: scores by id.
    """
    asked = {request.id for request in drawn}
    first: dict[str, dict[str, Any]] = {}
    for row in sorted(_rejections(run, scorer).to_pylist(), key=lambda row: row["look"]):
        if row["id"] in asked:
            first.setdefault(row["id"], row)
    dropped = [row for row in first.values() if not row["audited"]]
    audited = [name for name, row in first.items() if row["audited"]]
    rest = {
        (row["level"], row["look"]): sum(rows_of_steps(run, row["level"])[row["look"] :])
        for row in dropped
    }
    saved = sum(rest[row["level"], row["look"]] for row in dropped)
    prices = rows_by_level(run)
    made = sum(prices[request.level] for request in drawn) - saved

    threshold = run.recipe.filter.threshold
    passed = {name for name in asked if known.get(name, -math.inf) >= threshold}
    audited_kept, loss = len(passed.intersection(audited)), None
    if audited:
        lost = audited_kept / len(audited) * len(dropped)
        loss = lost / max(len(passed) + lost, 1)
    return Rejections(len(first), len(audited), audited_kept, saved, made, loss)


def describe_rejections(found: Rejections) -> str:
    """What early rejection did, in one sentence."""
    fraction = found.rows_saved / max(found.rows_saved + found.rows_made, 1)
    text = (
        f"early rejection dropped {count_of(found.rejected - found.audited, 'image')} on the way "
        f"and saved {count_of(found.rows_saved, 'UNet row')} ({fraction:.0%})"
    )
    if found.loss is None:
        return text
    audited = count_of(found.audited, "audited image")
    return (
        f"{text}; the filter keeps {found.audited_kept} of {audited}, so about {found.loss:.1%} of "
        "the images that it would keep are lost"
    )
