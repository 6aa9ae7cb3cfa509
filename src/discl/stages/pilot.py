"""`discl pilot`: what candidates of a spectrum are worth, measured on a few images before paying.

Each candidate is a run of its own in `pilot/` of the run folder, made by the same plan, engine,
store and filter, so that a killed pilot continues.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints import public_name
from ..data import decode_image
from ..errors import CheckpointError, DataError, DisclError, RecipeError, StoreError, TrainingError
from ..escaping import one_line
from ..evaluation.worth import Features, estimate_worth, precision_and_coverage
from ..recipe import Recipe, load_recipe
from ..run_folder import paths
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer
from ..spectrum.plan import read_plan
from ..utils.atomic import make_folder
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_table, write_text
from .adapt import ensure_adapter, name_adapter
from .budget import count_rows
from .filter import filter_spectrum
from .generate import generate
from .levels import choose_sample
from .pending import filter_texts
from .pilot_tables import FEWEST, Outcome, advise, as_csv, as_markdown
from .plan import check_models, make_plan

logger = get_logger(__name__)

SHARED = (paths.DATA, paths.PROMPTS, paths.SETTINGS, paths.CAPTIONS, paths.ADAPTED)
"""What the pilot takes from the run that it is made for."""
ALLOWED = ("spectrum.", "prompts.")
"""Keys that a candidate may set."""
FEATURES_AT_ONCE = 512


@dataclass(frozen=True)
class _Real:
    """Frozen features of real images: those to train on, and those held out."""

    train: Features
    rows: np.ndarray
    hard: np.ndarray
    held_out: Features | None


def run_pilot(run: Run) -> Path:
    """Makes and measures some images of each candidate; writes `pilot/pilot.{json,md,csv}`.

    `run` has its hard images and texts already. A candidate whose checkpoint cannot be loaded is
    reported, and the others continue. Returns the path of `pilot.json`.

    Raises RecipeError for a candidate that sets a wrong key or value, DataError if nothing can be
    held out, and the first candidate's error if all fail.
    """
    overrides = candidate_overrides(run.recipe)
    candidates = {name: _candidate_run(run, name, keys) for name, keys in overrides.items()}
    hard = read_table(run.path(paths.HARD), ["id", "label"]).to_pylist()
    labels = [row["label"] for row in hard]
    validation = run.tables["validation"].labels.tolist() if "validation" in run.tables else []
    if len(set(labels)) == len(labels) and not set(labels) & set(validation):
        raise DataError(
            "every class has one hard image and none in a validation split, so no image can be "
            "held out to measure on; add validation images of these classes (data.splits)."
        )
    outcomes: list[Outcome] = []
    failed: dict[str, DisclError] = {}
    folders: dict[str, list[Run]] = {}
    for name, candidate in candidates.items():
        try:
            check_models(candidate, "filter")
            folders[name] = _make_images(run, candidate, name)
        except (CheckpointError, StoreError, TrainingError) as error:
            failed[name] = error
            logger.warning(f"pilot: candidate '{one_line(name)}' is left out: {error}")
    if not folders:
        raise next(iter(failed.values()))
    real = _embed_real(run)
    for name, parts in folders.items():
        outcomes += _measure(run, name, parts, real)
    result = _summary(run, outcomes, failed, advise(run.recipe, overrides, outcomes))
    folder = run.folder / paths.PILOT
    write_text(folder / paths.PILOT_DATA, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / paths.PILOT_CSV, as_csv(result))
    write_text(folder / paths.PILOT_TABLE, as_markdown(result))
    return folder / paths.PILOT_DATA


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
    """The run of a candidate, in `pilot/KEY/`; data and texts are those of `run`.

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
        "filter.rule": "threshold",
        "methods": {"real": {"strategy": "real-only"}},
        "baseline": None,
    }
    recipe = load_recipe(run.recipe.plain(), {**overrides, **fixed})
    key = digest(recipe.plain()["spectrum"], recipe.plain()["prompts"])[:8]
    store = None
    if run.recipe.runtime.store is not None:
        store = str(run.location(f"{paths.PILOT}/{key}"))
    runtime = recipe.runtime.model_copy(update={"store": store})
    return replace(
        run,
        recipe=recipe.model_copy(update={"runtime": runtime}),
        folder=run.folder / paths.PILOT / key,
        overrides={each: run.path(each) for each in SHARED},
    )


def _make_images(run: Run, candidate: Run, name: str) -> list[Run]:
    """Makes and scores the images of a candidate; returns the runs that hold them.

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
    parts = []
    for number, chosen in enumerate(halves):
        if not chosen:
            continue
        part = replace(candidate, recipe=recipe, folder=candidate.folder / str(number))
        make_folder(part.folder)
        sample = hard.take(chosen)
        write_table(sample, part.path(paths.HARD))
        if spectrum.adapt is not None:
            unseen = set(sample["id"].to_pylist())
            seen = [row for row, each in enumerate(run.train.ids) if each not in unseen]
            name_adapter(part, ensure_adapter(part, spectrum.adapt, np.asarray(seen)))
        make_plan(part, for_training=False)
        generate(part)
        filter_spectrum(part)
        parts.append(part)
    return parts


def _embed_real(run: Run) -> _Real:
    """CLIP features of real images: all of the classes with hard images, some of the others."""
    most, train = run.recipe.pilot.real_per_class, run.train
    hard_ids = set(read_table(run.path(paths.HARD), ["id"])["id"].to_pylist())
    hard = np.asarray([name in hard_ids for name in train.ids])
    tail = set(train.labels[hard].tolist())
    scorer = _scorer(run)
    rows = _some_rows(train.ids, train.labels, most, tail)
    held_out = None
    if "validation" in run.tables:
        table = run.tables["validation"]
        chosen = _some_rows(table.ids, table.labels, most, tail)
        held_out = Features(_embed(scorer, table.image, chosen), table.labels[chosen])
    features = Features(_embed(scorer, train.image, rows), train.labels[rows])
    return _Real(features, rows, hard[rows], held_out)


def _scorer(run: Run) -> ClipScorer:
    return ClipScorer(run.recipe.filter.checkpoint, filter_texts(run), run.device)


def _some_rows(ids: Sequence[str], labels: np.ndarray, most: int, whole: set[int]) -> np.ndarray:
    """Up to `most` rows of each class, ascending, in an order of the ids alone; all of `whole`."""
    chosen: list[int] = []
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label).tolist()
        if label not in whole:
            rows = sorted(rows, key=lambda row: digest("pilot", ids[row]))[:most]
        chosen += rows
    return np.asarray(sorted(chosen))


def _embed(scorer: ClipScorer, image: Any, rows: np.ndarray) -> np.ndarray:
    parts = [
        scorer.embed([image(int(row)) for row in rows[first : first + FEATURES_AT_ONCE]])
        for first in range(0, len(rows), FEATURES_AT_ONCE)
    ]
    return np.concatenate(parts).astype(np.float32)


def _measure(run: Run, name: str, parts: Sequence[Run], real: _Real) -> list[Outcome]:
    """The outcomes of a candidate: all levels together, then level by level."""
    row_of = {each: row for row, each in enumerate(run.train.ids[row] for row in real.rows)}
    threshold = run.recipe.filter.threshold
    scorer = _scorer(run)
    labels, levels, kept, sources, features, cost = [], [], [], [], [], []
    for part in parts:
        verdicts = read_table(part.path(paths.FILTER)).to_pylist()
        images = stored_images(part, [verdict["id"] for verdict in verdicts])
        request_of = {request.id: request for request in read_plan(part.path(paths.PLAN))}
        labels += [verdict["label"] for verdict in verdicts]
        levels += [verdict["level"] for verdict in verdicts]
        kept += [verdict["clip_similarity"] >= threshold for verdict in verdicts]
        sources += [row_of[verdict["source_id"]] for verdict in verdicts]
        cost += [count_rows(part, [request_of[verdict["id"]]]) for verdict in verdicts]
        features.append(_embed(scorer, partial(_decode, images), np.arange(len(verdicts))))
    made = Features(np.concatenate(features), np.asarray(labels))
    table = _Made(made, np.asarray(levels), np.asarray(kept), np.asarray(sources), np.asarray(cost))
    outcomes = [_outcome(run, name, None, table, np.ones(len(levels), bool), real)]
    if len(set(levels)) > 1:
        outcomes += [
            _outcome(run, name, level, table, table.levels == level, real)
            for level in sorted(set(levels))
        ]
    return outcomes


@dataclass(frozen=True)
class _Made:
    """Synthetic images of a candidate: features, and for each its level, verdict, source, cost."""

    features: Features
    levels: np.ndarray
    kept: np.ndarray
    sources: np.ndarray
    cost: np.ndarray


def _decode(images: Any, row: int) -> Any:
    return decode_image(images[row]["image"])


def _outcome(
    run: Run, name: str, level: int | None, made: _Made, at: np.ndarray, real: _Real
) -> Outcome:
    """Measures the kept images among those `at` a level."""
    rows = np.flatnonzero(at & made.kept)
    settings = run.recipe.pilot
    basic = Outcome(
        name,
        level,
        int(at.sum()),
        float(made.kept[at].mean()),
        float(made.cost[at].sum() / len(rows)) if len(rows) else None,
    )
    if len(rows) < FEWEST:
        return basic
    worth = estimate_worth(
        real.train,
        real.hard,
        made.features.take(rows),
        made.sources[rows],
        held_out=real.held_out,
        class_counts=run.train.class_counts,
        mixture=settings.mixture,
        scale=run.recipe.synthetic_scale,
        folds=settings.folds,
    )
    precision, coverage = _fidelity(made.features.take(rows), real)
    return replace(basic, precision=precision, coverage=coverage, worth=worth)


def _fidelity(made: Features, real: _Real) -> tuple[float | None, float | None]:
    """Mean precision and coverage over classes, against held-out real images of the class.

    Without a validation split the training images take their place.
    """
    reference = real.held_out or real.train
    found = []
    for label in np.unique(made.labels).tolist():
        own = reference.values[reference.labels == label]
        if len(own) > 1:
            found.append(precision_and_coverage(own, made.values[made.labels == label]))
    if not found:
        return None, None
    precision, coverage = np.mean(found, axis=0).tolist()
    return precision, coverage


def _summary(
    run: Run,
    outcomes: Sequence[Outcome],
    failed: Mapping[str, DisclError],
    advice: Mapping[str, Any],
) -> dict[str, Any]:
    recipe = run.recipe
    return {
        "name": recipe.name,
        "generator": public_name(recipe.spectrum.checkpoint),
        "features": public_name(recipe.filter.checkpoint),
        "threshold": recipe.filter.threshold,
        "mixture": recipe.pilot.mixture,
        "validation": "validation" in run.tables,
        "outcomes": [asdict(each) for each in outcomes],
        "failed": {name: str(error) for name, error in failed.items()},
        "advice": advice,
    }
