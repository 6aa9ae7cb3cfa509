"""`discl levels`: a spectrum over all of λ, measured; levels and threshold proposed.

It is a separate run in `levels/` of the run folder, with the same plan, engine, store and filter.
So it resumes like any run.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from ..checkpoints import checkpoint_digest, public_name
from ..data import ImageTable, decode_image
from ..errors import RecipeError, arguments_named
from ..escaping import for_markdown
from ..levels import REAL, check_level, check_levels, start_step
from ..run_folder import paths
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer, find_clip
from ..spectrum.level_selection import Measured, Proposal, propose
from ..spectrum.models import check_generator
from ..spectrum.store import Shards
from ..utils.atomic import make_folder
from ..utils.console import progress
from ..utils.hashing import digest
from ..utils.stored import read_table, write_table, write_text
from .engine import GENERATOR_KEYS
from .filter import filter_spectrum
from .generate import generate
from .pending import filter_texts, is_cosine
from .plan import make_plan

SHARED = (
    paths.DATA,
    paths.PROMPTS,
    paths.SETTINGS,
    paths.CAPTIONS,
    paths.ADAPTER,
    paths.ADAPTED,
)
"""Files that the survey shares with its run."""
AT_ONCE = 512


def default_grid(num_inference_steps: int, fixed: bool = False) -> tuple[int, ...]:
    """The levels 0, 10, …, 90 per cent that leave at least one denoising step.

    - `fixed`: whether every level takes all steps, from the last (1 − λ) of 1,000 training steps.
    """
    return tuple(
        level
        for level in range(0, 100, 10)
        if (
            start_step(level, 1000) >= num_inference_steps
            if fixed
            else start_step(level, num_inference_steps)
        )
    )


def survey_levels(
    run: Run, sources: int = 32, grid: Sequence[int] | None = None, seeds: int = 1
) -> Path:
    """Measures a spectrum over λ; writes `levels/levels.{json,md,csv}`; returns the first.

    - `run`: a run with hard images and prompts.
    - `sources`: maximum number of hard images.
    - `grid`: levels in per cent; default `default_grid`.
    - `seeds`: seeds per image and level.

    Raises RecipeError for an empty grid, for level 100, and for a level without a denoising step.
    """
    config = run.recipe.spectrum
    steps, fixed = config.num_inference_steps, config.steps == "fixed"
    levels = sorted(set(default_grid(steps, fixed) if grid is None else map(check_level, grid)))
    if not levels or sources < 1 or seeds < 1:
        raise RecipeError(
            f"a survey needs at least one level, source and seed; got {len(levels)}, {sources} and "
            f"{seeds}."
        )
    with arguments_named(levels="grid"):
        check_levels(levels, 100 * steps if fixed else steps)
    with arguments_named(**GENERATOR_KEYS | {"levels": "grid"}):
        check_generator(
            run.base_address,
            steps,
            config.size,
            levels,
            fixed=fixed,
            guidance_interval=config.guidance_interval,
        )
    survey = survey_run(run, levels, seeds)
    make_folder(survey.folder)
    hard = read_table(run.path(paths.HARD))
    write_table(
        hard.take(choose_sample(hard["id"].to_pylist(), hard["label"].to_pylist(), sources)),
        survey.path(paths.HARD),
    )
    make_plan(survey, for_training=False)
    generate(survey)
    filter_spectrum(survey)
    found = _summary(run, survey, *_measure(survey))
    write_text(survey.path(paths.LEVELS_DATA), json.dumps(found, indent=2, ensure_ascii=False))
    write_text(survey.path(paths.LEVELS_CSV), as_csv(found))
    write_text(survey.path(paths.LEVELS_TABLE), as_markdown(found))
    return survey.path(paths.LEVELS_DATA)


def survey_run(run: Run, levels: Sequence[int], seeds: int) -> Run:
    """The run of the survey, in `levels/`, with data and prompts of `run`.

    Every image has one try, because the survey measures the kept fraction. The filter uses the
    threshold whatever the recipe's rule is, because the survey proposes a threshold.
    """
    spectrum = run.recipe.spectrum.model_copy(
        update={
            "levels": list(levels),
            "seeds": seeds,
            "tries": 1,
            "wanted": None,
            "budget": None,
        }
    )
    store = None if run.recipe.runtime.store is None else str(run.location(paths.LEVELS))
    runtime = run.recipe.runtime.model_copy(update={"store": store})
    threshold = run.recipe.filter.model_copy(update={"rule": "threshold"})
    recipe = run.recipe.model_copy(
        update={"spectrum": spectrum, "runtime": runtime, "filter": threshold}
    )
    return replace(
        run,
        recipe=recipe,
        folder=run.folder / paths.LEVELS,
        overrides={name: run.path(name) for name in SHARED},
    )


def choose_sample(ids: Sequence[str], labels: Sequence[int], count: int) -> list[int]:
    """Up to `count` rows, ascending, taken from the classes in turn.

    The choice depends on ids alone. A larger `count` only adds rows.
    """
    of_class: dict[int, list[int]] = {}
    for row in sorted(range(len(ids)), key=lambda row: digest("survey", ids[row])):
        of_class.setdefault(labels[row], []).append(row)
    turns = [
        (turn, place, row)
        for place, rows in enumerate(of_class.values())
        for turn, row in enumerate(rows)
    ]
    return sorted(row for _, _, row in sorted(turns)[:count])


def _measure(survey: Run) -> tuple[dict[int, Measured], np.ndarray, float | None]:
    """(cosines per level, cosines of the sources with their texts, mean cosine within a class)."""
    train = survey.train
    scorer = ClipScorer(survey.recipe.filter.checkpoint, filter_texts(survey), survey.device)
    places = {name: row for row, name in enumerate(train.ids)}
    hard = read_table(survey.path(paths.HARD)).to_pylist()
    pictures = [train.image(places[row["id"]]) for row in hard]
    real = dict(zip((row["id"] for row in hard), scorer.embed(pictures), strict=True))
    real_text = scorer(pictures, [row["label"] for row in hard])
    verdicts = read_table(survey.path(paths.FILTER)).to_pylist()
    cosines = _image_similarities(survey, scorer, verdicts, real)
    measured = {}
    for level in sorted({row["level"] for row in verdicts}):
        rows = [row for row in verdicts if row["level"] == level]
        measured[level] = Measured(
            np.asarray([cosines[row["id"]] for row in rows]),
            np.asarray([row["clip_similarity"] for row in rows], np.float64),
        )
    return (
        measured,
        real_text,
        _pair_similarity(train, [places[row["id"]] for row in hard], scorer, list(real.values())),
    )


def _image_similarities(
    survey: Run,
    scorer: ClipScorer,
    verdicts: Sequence[Mapping[str, Any]],
    real: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """`{id: cosine with its source}`; missing ones are measured and stored."""
    columns = [("id", pa.string()), ("clip", pa.string()), ("image_similarity", pa.float32())]
    store = Shards(survey.path(paths.SIMILARITY), pa.schema(columns), ("id", "clip"))
    store.clear_unfinished()
    clip = checkpoint_digest(find_clip(survey.recipe.filter.checkpoint))
    known = {
        row["id"]: row["image_similarity"]
        for row in store.read().to_pylist()
        if row["clip"] == clip and is_cosine(row["image_similarity"])
    }
    missing = [row for row in verdicts if row["id"] not in known]
    if not missing:
        return known
    images = stored_images(survey, [row["id"] for row in missing])
    with progress("image similarity", len(missing)) as advance:
        for first in range(0, len(missing), AT_ONCE):
            part = missing[first : first + AT_ONCE]
            embedded = scorer.embed(
                [decode_image(images[row]["image"]) for row in range(first, first + len(part))]
            )
            found = [
                float(each @ real[row["source_id"]])
                for row, each in zip(part, embedded, strict=True)
            ]
            store.append(
                [
                    {"id": row["id"], "clip": clip, "image_similarity": cosine}
                    for row, cosine in zip(part, found, strict=True)
                ]
            )
            known |= {row["id"]: cosine for row, cosine in zip(part, found, strict=True)}
            advance(len(part))
    return known


def _pair_similarity(
    train: ImageTable, rows: Sequence[int], scorer: ClipScorer, embedded: Sequence[np.ndarray]
) -> float | None:
    """Mean cosine of these images with another one of their class; None if no class has two."""
    of_class: dict[int, list[int]] = {}
    for row in sorted(range(len(train)), key=lambda row: digest("pair", train.ids[row])):
        of_class.setdefault(int(train.labels[row]), []).append(row)
    partners = {}
    for row in rows:
        others = of_class[int(train.labels[row])]
        if len(others) > 1:
            partners[row] = others[(others.index(row) + 1) % len(others)]
    if not partners:
        return None
    theirs = scorer.embed([train.image(partner) for partner in partners.values()])
    mine = dict(zip(rows, embedded, strict=True))
    return float(np.mean([mine[row] @ other for row, other in zip(partners, theirs, strict=True)]))


def _summary(
    run: Run,
    survey: Run,
    measured: Mapping[int, Measured],
    real_text: np.ndarray,
    pair: float | None,
) -> dict[str, Any]:
    recipe = run.recipe
    proposal = propose(
        measured,
        real_text,
        pair,
        scale=recipe.synthetic_scale,
        seeds=recipe.spectrum.seeds,
        tries=recipe.spectrum.tries,
    )
    config, steps, fixed = (
        recipe.filter.threshold,
        recipe.spectrum.num_inference_steps,
        recipe.spectrum.steps == "fixed",
    )
    rows = [
        {
            "level": level,
            "steps": steps if fixed else start_step(level, steps),
            "images": len(each.text_similarity),
            "image_similarity": _spread(each.image_similarity),
            "text_similarity": _spread(each.text_similarity),
            "kept": each.kept(config),
            "kept_at_proposal": each.kept(proposal.threshold),
        }
        for level, each in measured.items()
    ]
    return {
        "name": recipe.name,
        "sources": len(real_text),
        "seeds": survey.recipe.spectrum.seeds,
        "threshold": config,
        "generator": public_name(recipe.spectrum.checkpoint),
        "clip": public_name(recipe.filter.checkpoint),
        "real": {
            "text_similarity": _spread(real_text),
            "pair_similarity": pair,
            "kept": float((real_text >= config).mean()),
        },
        "levels": rows,
        "proposal": _plain(proposal, recipe.hard.rule == "probability"),
    }


def _plain(proposal: Proposal, poor: bool) -> dict[str, Any]:
    reasons = list(proposal.reasons)
    if poor:
        reasons.append(
            "the hard images are poor ones: for these the paper used high levels (50, 70, 90), "
            "which this rule does not consider; look at the pictures."
        )
    return {
        "levels": list(proposal.levels),
        "threshold": proposal.threshold,
        "bound": proposal.bound,
        "reasons": reasons,
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {
        "mean": float(values.mean()),
        "quarter": float(low),
        "median": float(middle),
        "three_quarters": float(high),
    }


def as_csv(found: Mapping[str, Any]) -> str:
    """One line for each level; the real images are level 100."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        (
            "level",
            "steps",
            "images",
            "image_similarity",
            "text_similarity",
            f"kept_at_{found['threshold']:g}",
            f"kept_at_{found['proposal']['threshold']:g}",
        )
    )
    for row in found["levels"]:
        means = (f"{row[name]['mean']:.4f}" for name in ("image_similarity", "text_similarity"))
        writer.writerow(
            (
                row["level"],
                row["steps"],
                row["images"],
                *means,
                f"{row['kept']:.4f}",
                f"{row['kept_at_proposal']:.4f}",
            )
        )
    real = found["real"]
    writer.writerow(
        (
            REAL,
            0,
            found["sources"],
            "1.0000",
            f"{real['text_similarity']['mean']:.4f}",
            f"{real['kept']:.4f}",
            "",
        )
    )
    return text.getvalue()


def as_markdown(found: Mapping[str, Any]) -> str:
    """The table, the proposal with its reasons, and the lines for the recipe."""
    config, proposal = found["threshold"], found["proposal"]
    seeds = f"{found['seeds']} seed{'s' if found['seeds'] != 1 else ''}"
    lines = [
        f"# {for_markdown(found['name'])}: levels",
        "",
        f"{found['sources']} hard images, {seeds} at each level; mean CLIP cosines by "
        f"{for_markdown(found['clip'])}.",
        "",
        f"| λ, % | steps | image–image | image–text | kept at {config:g} "
        f"| kept at {proposal['threshold']:g} | |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in found["levels"]:
        chosen = "proposed" if row["level"] in proposal["levels"] else ""
        means = " | ".join(
            f"{row[name]['mean']:.3f}" for name in ("image_similarity", "text_similarity")
        )
        lines.append(
            f"| {row['level']} | {row['steps']} | {means} | {row['kept']:.0%} "
            f"| {row['kept_at_proposal']:.0%} | {chosen} |"
        )
    real = found["real"]
    lines.append(
        f"| real | – | 1 | {real['text_similarity']['mean']:.3f} | {real['kept']:.0%} | | |"
    )
    if real["pair_similarity"] is not None:
        lines += ["", f"Two real images of one class: {real['pair_similarity']:.3f}."]
    lines += [
        "",
        "## Proposal",
        "",
        *(f"- {for_markdown(reason)}" for reason in proposal["reasons"]),
    ]
    return "\n".join([*lines, "", "```yaml", snippet(found).rstrip(), "```", ""])


def snippet(found: Mapping[str, Any]) -> str:
    """The proposal as lines of a recipe."""
    proposal = found["proposal"]
    tree = {
        "spectrum": {"levels": proposal["levels"]},
        "filter": {"threshold": proposal["threshold"]},
    }
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
