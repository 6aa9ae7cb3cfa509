"""`discl pilot`: what candidates of a spectrum are worth, measured on a few images before paying.

Each candidate is a trial of its own in `pilot/` of the run folder, made by the same plan, engine,
store and filter, so that a killed pilot continues.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints import public_name
from ..errors import CheckpointError, DataError, DisclError, RecipeError, StoreError, TrainingError
from ..escaping import one_line
from ..recipe import Recipe, load_recipe
from ..run_folder import paths
from ..run_folder.run import Run
from ..utils.counts import count_of
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_text
from .adapt import ensure_adapter, name_adapter
from .levels import describe_levels
from .pilot_advice import Outcome, Tried, advise, advise_mixture
from .pilot_judges import judge_of
from .pilot_measure import Measurer
from .pilot_tables import as_csv, as_markdown
from .plan import check_models
from .trial import Embedder, choose_sample, make_images, set_sample, trial_run

logger = get_logger(__name__)

ALLOWED = ("spectrum.", "prompts.")
"""Keys that a candidate may set."""


def run_pilot(run: Run) -> Path:
    """Makes and measures some images of each candidate; writes `pilot/pilot.{json,md,csv}`.

    `run` has its hard images and texts already. A candidate whose checkpoint cannot be loaded is
    reported, and the others continue. Returns the path of `pilot.json`.

    Raises RecipeError for a candidate that sets a wrong key or value, DataError if nothing can be
    held out, and the first candidate's error if all fail.
    """
    overrides = candidate_overrides(run.recipe)
    candidates = {name: _candidate_run(run, name, keys) for name, keys in overrides.items()}
    hard = _check_measurable(run)
    failed: dict[str, DisclError] = {}
    for name, candidate in candidates.items():
        with _left_out(name, failed):
            check_models(candidate, "filter")
    if len(failed) == len(candidates):
        raise next(iter(failed.values()))
    _warn_of_few_images(run, candidates.values())
    trials: dict[str, list[Run]] = {}
    for name, candidate in candidates.items():
        if name not in failed:
            with _left_out(name, failed):
                trials[name] = _make_trials(run, candidate, name)
    if not trials:
        raise next(iter(failed.values()))
    _warn_of_same_images(trials)
    embedder = Embedder(run)
    measurer = Measurer(run, embedder, judge_of(run, embedder))
    outcomes: list[Outcome] = []
    tried: list[Tried] = []
    levels = {}
    for name, parts in trials.items():
        rows, thresholds = measurer.candidate(name, parts)
        outcomes, tried = outcomes + rows, tried + thresholds
        levels[name] = describe_levels(parts, embedder)
    advice = advise(run.recipe, overrides, outcomes, tried, hard)
    best = trials.get(advice.get("candidate", ""), [])
    mixtures = measurer.mixtures(best, advice)
    result = {
        **_describe(run, measurer.judge.name, failed),
        "trials": {
            name: [part.folder.relative_to(run.folder / paths.PILOT).as_posix() for part in parts]
            for name, parts in trials.items()
        },
        "outcomes": [asdict(each) for each in outcomes],
        "thresholds": [asdict(each) for each in tried],
        "levels": levels,
        "mixtures": [asdict(each) for each in mixtures],
        "advice": advise_mixture(run.recipe, advice, mixtures),
    }
    folder = run.folder / paths.PILOT
    write_text(folder / paths.PILOT_DATA, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / paths.PILOT_CSV, as_csv(result))
    write_text(folder / paths.PILOT_TABLE, as_markdown(result))
    return folder / paths.PILOT_DATA


def _check_measurable(run: Run) -> int:
    """The number of hard images.

    Raises DataError if none can be held out to measure on, or no image to compare mixtures on.
    """
    mixtures = run.recipe.pilot.mixture
    if len(mixtures) > 1 and "validation" not in run.tables:
        raise DataError(
            f"{', '.join(mixtures)} are compared on validation images, and there are none; name "
            "one mixture, or set data.own_split.",
            argument="pilot.mixture",
        )
    labels = read_table(run.path(paths.HARD), ["label"])["label"].to_pylist()
    validation = run.tables["validation"].labels.tolist() if "validation" in run.tables else []
    if len(set(labels)) == len(labels) and not set(labels) & set(validation):
        raise DataError(
            "every class has one hard image and none in a validation split, so no image can be "
            "held out to measure on; add validation images of these classes (data.splits)."
        )
    return len(labels)


def _warn_of_few_images(run: Run, candidates: Iterable[Run]) -> None:
    """Warns where a class with hard images gets fewer than two images of a level."""
    labels = set(read_table(run.path(paths.HARD), ["label"])["label"].to_pylist())
    levels = max(len(each.recipe.spectrum.levels) for each in candidates)
    images, wanted = run.recipe.pilot.images, 2 * len(labels) * levels
    if images < wanted:
        logger.warning(
            f"pilot: {count_of(images, 'image')} of a candidate are fewer than two for each of "
            f"{count_of(len(labels), 'class', 'classes')} and {count_of(levels, 'level')}, so "
            f"estimates are low and their intervals wide; pilot.images={wanted} is enough"
        )


def _warn_of_same_images(trials: Mapping[str, Sequence[Run]]) -> None:
    """Warns of candidates that differ in name alone: what they set is the same or has no effect."""
    first: dict[frozenset[str], str] = {}
    for name, parts in trials.items():
        phrases = parts[0].recipe.prompts.phrases is not None
        hint = "; prompts.phrases takes the place of prompts.templates" if phrases else ""
        plans = [read_table(part.path(paths.PLAN), ["id"])["id"].to_pylist() for part in parts]
        other = first.setdefault(frozenset(chain(*plans)), name)
        if other != name:
            logger.warning(
                f"pilot: candidates '{one_line(other)}' and '{one_line(name)}' have the same "
                f"images: what they set is the same, or has no effect{hint}"
            )


@contextmanager
def _left_out(name: str, failed: dict[str, DisclError]) -> Iterator[None]:
    """Adds an error of a candidate to `failed`, so that the others continue."""
    try:
        yield
    except (CheckpointError, StoreError, TrainingError) as error:
        failed[name] = error
        logger.warning(f"pilot: candidate '{one_line(name)}' is left out: {error}")


def candidate_overrides(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """`{candidate: values by key}` of the section `pilot`.

    Without any, the spectrum as it is; with `spectrum.adapt`, with and without it.
    """
    if recipe.pilot.candidates:
        return dict(recipe.pilot.candidates)
    if recipe.spectrum.adapt is not None:
        return {"adapted": {}, "not adapted": {"spectrum.adapt": None}}
    return {"as it is": {}}


def _candidate_run(run: Run, name: str, overrides: Mapping[str, Any]) -> Run:
    """The trial of a candidate, in `pilot/KEY/`.

    Methods are left out, because they may need levels that a candidate does not have.
    """
    wrong = [key for key in overrides if not key.startswith(ALLOWED)]
    if wrong:
        raise RecipeError(
            f"'{wrong[0]}' cannot be set by a candidate; its keys begin with {', '.join(ALLOWED)}",
            argument=f"pilot.candidates.{one_line(name)}",
        )
    fixed = {
        "spectrum.tries": 1,
        "spectrum.wanted": None,
        "spectrum.budget": None,
        "loop": None,
        "methods": {"real": {"strategy": "real-only"}},
        "baseline": None,
        "compare": {},
    }
    recipe = load_recipe(run.recipe.plain(), {**overrides, **fixed})
    key = digest(recipe.plain()["spectrum"], recipe.plain()["prompts"])[:8]
    return trial_run(run, recipe, run.folder / paths.PILOT / key)


def _make_trials(run: Run, candidate: Run, name: str) -> list[Run]:
    """Makes and scores the images of a candidate; returns the trials that hold them.

    An adapted candidate has two: the weights that make images of one half of the sampled hard
    images are trained without that half.
    """
    settings, spectrum = run.recipe.pilot, candidate.recipe.spectrum
    hard = read_table(run.path(paths.HARD))
    wanted = max(1, settings.images // len(spectrum.levels))
    seeds = max(1, -(-wanted // len(hard)))
    rows = choose_sample(hard["id"].to_pylist(), hard["label"].to_pylist(), -(-wanted // seeds))
    recipe = candidate.recipe.model_copy(
        update={"spectrum": spectrum.model_copy(update={"seeds": seeds})}
    )
    logger.info(f"pilot: candidate '{one_line(name)}'")
    halves = [rows] if spectrum.adapt is None else [rows[0::2], rows[1::2]]
    trials = []
    for number, chosen in enumerate(halves):
        if not chosen:
            continue
        trial = replace(candidate, recipe=recipe, folder=candidate.folder / str(number))
        sample = hard.take(chosen)
        set_sample(trial, sample)
        if spectrum.adapt is not None:
            unseen = set(sample["id"].to_pylist())
            seen = [row for row, each in enumerate(run.train.ids) if each not in unseen]
            name_adapter(trial, ensure_adapter(trial, spectrum.adapt, np.asarray(seen)))
        make_images(trial)
        trials.append(trial)
    return trials


def _describe(run: Run, judge: str, failed: Mapping[str, DisclError]) -> dict[str, Any]:
    recipe = run.recipe
    return {
        "name": recipe.name,
        "generator": public_name(recipe.spectrum.checkpoint),
        "judge": judge,
        "threshold": recipe.filter.threshold,
        "mixture": recipe.pilot.mixture[0],
        "validation": "validation" in run.tables,
        "failed": {name: str(error) for name, error in failed.items()},
    }
