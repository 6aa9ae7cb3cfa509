"""`discl levels`: a spectrum over all of λ, measured; levels and threshold proposed.

`discl pilot` describes the levels of its candidates in the same way. Both share their images.
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
import yaml

from ..checkpoints import public_name
from ..errors import RecipeError, arguments_named
from ..escaping import for_markdown
from ..levels import REAL, check_level, check_levels, start_step
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.level_selection import Proposal, propose
from ..utils.stored import read_table, write_text
from .engine import check_engine
from .trial import (
    Embedder,
    choose_sample,
    make_images,
    measure_similarities,
    set_sample,
    trial_run,
)


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
    check_engine(run, levels, "grid")
    survey = _survey_run(run, levels, seeds)
    hard = read_table(run.path(paths.HARD))
    chosen = choose_sample(hard["id"].to_pylist(), hard["label"].to_pylist(), sources)
    set_sample(survey, hard.take(chosen))
    make_images(survey)
    found = describe_levels([survey], Embedder(run))
    write_text(survey.path(paths.LEVELS_DATA), json.dumps(found, indent=2, ensure_ascii=False))
    write_text(survey.path(paths.LEVELS_CSV), as_csv(found))
    write_text(survey.path(paths.LEVELS_TABLE), as_markdown(found))
    return survey.path(paths.LEVELS_DATA)


def _survey_run(run: Run, levels: Sequence[int], seeds: int) -> Run:
    """The trial of the survey, in `levels/`."""
    spectrum = run.recipe.spectrum.model_copy(update={"levels": list(levels), "seeds": seeds})
    recipe = run.recipe.model_copy(update={"spectrum": spectrum})
    trial = trial_run(run, recipe, run.folder / paths.LEVELS)
    return replace(trial, overrides={**trial.overrides, paths.ADAPTER: run.path(paths.ADAPTER)})


def describe_levels(trials: Sequence[Run], embedder: Embedder) -> dict[str, Any]:
    """Similarities and kept fractions of each level, and the proposal, as plain values.

    - `trials`: those of one spectrum, for example of the halves of a sample.
    """
    recipe, found = embedder.run.recipe, measure_similarities(trials, embedder)
    spectrum, real_text = trials[0].recipe.spectrum, found.real_text
    proposal = propose(
        found.measured,
        real_text,
        found.pair,
        scale=recipe.synthetic_scale,
        seeds=recipe.spectrum.seeds,
        tries=recipe.spectrum.tries,
    )
    config, steps = recipe.filter.threshold, spectrum.num_inference_steps
    fixed = spectrum.steps == "fixed"
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
        for level, each in found.measured.items()
    ]
    return {
        "name": recipe.name,
        "sources": len(real_text),
        "seeds": spectrum.seeds,
        "threshold": config,
        "generator": public_name(spectrum.checkpoint),
        "clip": public_name(recipe.filter.checkpoint),
        "real": {
            "text_similarity": _spread(real_text),
            "pair_similarity": found.pair,
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
    similarities = ("image_similarity", "text_similarity")
    kept = (f"kept_at_{each['threshold']:g}" for each in (found, found["proposal"]))
    text, real = io.StringIO(), found["real"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("level", "steps", "images", *similarities, *kept))
    for row in found["levels"]:
        figures = [row[name]["mean"] for name in similarities]
        figures += [row["kept"], row["kept_at_proposal"]]
        cells = (row[name] for name in ("level", "steps", "images"))
        writer.writerow((*cells, *(f"{value:.4f}" for value in figures)))
    figures = [1.0, real["text_similarity"]["mean"], real["kept"]]
    writer.writerow((REAL, 0, found["sources"], *(f"{value:.4f}" for value in figures), ""))
    return text.getvalue()


def as_markdown(found: Mapping[str, Any]) -> str:
    """The table, the proposal with its reasons, and the lines for the recipe."""
    lines = [f"# {for_markdown(found['name'])}: levels", "", *proposal_lines(found)]
    return "\n".join([*lines, "", "```yaml", snippet(found).rstrip(), "```", ""])


def proposal_lines(found: Mapping[str, Any]) -> list[str]:
    """The table of the levels and the proposal with its reasons, in Markdown."""
    config, proposal = found["threshold"], found["proposal"]
    seeds = f"{found['seeds']} seed{'s' if found['seeds'] != 1 else ''}"
    lines = [
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
    reasons = (f"- {for_markdown(reason)}" for reason in proposal["reasons"])
    return [*lines, "", "Proposal:", "", *reasons]


def snippet(found: Mapping[str, Any]) -> str:
    """The proposal as lines of a recipe."""
    proposal = found["proposal"]
    tree = {
        "spectrum": {"levels": proposal["levels"]},
        "filter": {"threshold": proposal["threshold"]},
    }
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
