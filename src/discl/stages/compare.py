"""`discl compare`: methods × seeds on one spectrum, in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..assets import published_figures
from ..escaping import for_markdown
from ..evaluation.comparison import (
    Entry,
    Interval,
    as_csv,
    as_latex,
    as_markdown,
    paired_f1_interval,
    paired_interval,
)
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.plan import Request
from ..training.checkpoint import read_history
from ..training.distributed import current_processes
from ..utils.atomic import make_folder
from ..utils.logging import get_logger
from ..utils.stored import read_json, read_tensors, write_text
from .evaluate import evaluate
from .pending import count_rows, tries_so_far
from .train import train
from .tune import describe_tuning, tune, tuned_run

logger = get_logger(__name__)

PHASE_1 = (
    paths.DATA,
    paths.HARD,
    paths.PLAN,
    paths.FILTER,
    paths.SPECTRUM,
    paths.SCORES,
    paths.CACHE,
    paths.PREPARED,
)
VARIANTS = ("+la", "+we")
"""Suffixes of rows that are computed from a classifier after training."""


def seed_run(run: Run, seed: int) -> Run:
    """The run of another training seed, in `seeds/SEED`; it uses the spectrum of `run`."""
    recipe = run.recipe.model_copy(
        update={"train": run.recipe.train.model_copy(update={"seed": seed})}
    )
    return replace(
        run, recipe=recipe, folder=run.folder / paths.SEEDS / str(seed), overrides=_phase_1(run)
    )


def _phase_1(run: Run) -> dict[str, Path]:
    return {name: run.path(name) for name in PHASE_1}


def compare(run: Run, seeds: Sequence[int], tuned: bool = False) -> Path:
    """Trains and measures every method with every seed; writes `comparison.md`, `.csv`, `.tex` and
    `.json`; returns the path of the first.

    - `run`: a run whose spectrum is filtered.
    - `seeds`: training seeds. Only missing trainings are done.
    - `tuned`: whether each method first gets the same number of trials on validation. The results
      are then in `tuned/`.

    Differences are against the recipe's baseline; adjusted rows are compared with adjusted rows.
    All ranks train; rank 0 does the rest.
    """
    runs: list[Run] = []
    notes: list[str] = []
    processes = current_processes()
    if tuned:
        run = tuned_run(replace(run, overrides=_phase_1(run)), tune(run))
        notes = describe_tuning(run)
    for number, seed in enumerate(seeds, 1):
        logger.info(f"compare: seed {seed} ({number} of {len(seeds)})")
        each = seed_run(run, seed)
        make_folder(each.folder)
        train(each)
        processes.on_main(partial(evaluate, each))
        runs.append(each)

    def write() -> Path:
        split, metrics = measured_columns(runs[0])
        entries = make_entries(run, runs, split, metrics)
        write_tables(
            run.folder,
            entries,
            [heading for _, _, heading in metrics],
            seeds,
            split,
            _baseline(run),
            notes,
        )
        return run.path(paths.COMPARISON_TABLE)

    return processes.on_main(write)


def write_tables(
    folder: Path,
    entries: Sequence[Entry],
    columns: Sequence[str],
    seeds: Sequence[int],
    split: str,
    baseline: str,
    notes: Sequence[str],
) -> None:
    """Writes `comparison.md`, `.csv`, `.tex`, and `.json` for the report.

    - `notes`: a sentence and a list.
    """
    plain = {
        "seeds": list(seeds),
        "split": split,
        "baseline": baseline,
        "notes": list(notes),
        "rows": {
            entry.name: {
                "figures": {name: list(values) for name, values in entry.figures.items()},
                "intervals": {
                    name: [each.difference, each.low, each.high]
                    for name, each in entry.intervals.items()
                },
                "costs": dict(entry.costs),
                "published": dict(entry.published),
            }
            for entry in entries
        },
    }
    for name, text in (
        (paths.COMPARISON_TABLE, as_markdown(entries, columns) + _listed(notes)),
        (paths.COMPARISON_CSV, as_csv(entries, columns, seeds)),
        (paths.COMPARISON_LATEX, as_latex(entries, columns)),
        (paths.COMPARISON_DATA, json.dumps(plain, indent=2, ensure_ascii=False) + "\n"),
    ):
        write_text(folder / name, text)


def measured_columns(run: Run) -> tuple[str, list[tuple[str, str, str]]]:
    """(split of the intervals, [(split, metric, heading)]).

    The metrics are top-1 by group and over all, or macro F1 if there is an OOD split.
    """
    figures = read_json(run.path(paths.RESULTS))
    splits = set.intersection(*(set(row) for row in figures.values()))
    main = "test" if "test" in splits else "validation"
    if "test-ood" in splits:
        return main, [
            (main, "macro_f1", "ID macro F1"),
            ("test-ood", "macro_f1", "OOD macro F1"),
            (main, "accuracy", "ID top-1"),
        ]
    groups = [
        name
        for name in ("many", "medium", "few")
        if any(name in row[main] for row in figures.values())
    ]
    return main, [*((main, name, name) for name in groups), (main, "accuracy", "all")]


def make_entries(
    run: Run, runs: Sequence[Run], split: str, metrics: Sequence[tuple[str, str, str]]
) -> list[Entry]:
    """One entry for each row of the runs' `results.json`."""
    results = [read_json(each.path(paths.RESULTS)) for each in runs]
    predicted = {
        (row, where): np.stack([read_predictions(each, row, where) for each in runs])
        for row in results[0]
        for where in dict.fromkeys(where for where, _, _ in metrics)
        if all(where in result[row] for result in results)
    }
    published = (
        published_figures(run.recipe.compare.published) if run.recipe.compare.published else {}
    )
    baseline, tried = _baseline(run), tries_so_far(run)[0]
    entries = []
    for row in results[0]:
        method, variant = split_variant(row)
        figures = {
            heading: [result[row][where][metric] for result in results]
            for where, metric, heading in metrics
            if all(metric in result[row].get(where, {}) for result in results)
        }
        intervals: dict[str, Interval] = {}
        against = baseline + variant
        for where, metric, heading in metrics:
            if row != against and (row, where) in predicted and (against, where) in predicted:
                found = paired(
                    predicted[row, where],
                    predicted[against, where],
                    run.tables[where].labels,
                    metric,
                    run.groups,
                )
                if found is not None:
                    intervals[heading] = found
        paper = published.get(run.recipe.compare.rows.get(row, row), {})
        entries.append(Entry(row, figures, intervals, _costs(run, runs, tried, method), paper))
    return entries


def split_variant(row: str) -> tuple[str, str]:
    """("discl", "+la") of "discl+la"."""
    method, plus, variant = row.partition("+")
    return (method, plus + variant) if plus + variant in VARIANTS else (row, "")


def paired(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    metric: str,
    groups: Mapping[str, Sequence[int]],
) -> Interval | None:
    """The paired interval of a metric between two rows.

    - `first`, `second`: predicted labels, int `[seeds, images]`.
    - `labels`: true labels, int `[images]`.
    - `metric`: macro_f1, accuracy, or a key of `groups`.
    """
    if metric == "macro_f1":
        return paired_f1_interval(first, second, labels)
    if metric != "accuracy" and metric not in groups:
        return None
    return paired_interval(
        first == labels, second == labels, labels, None if metric == "accuracy" else groups[metric]
    )


def read_predictions(run: Run, row: str, split: str) -> np.ndarray:
    """Predicted labels of a row, int `[images]`, in the order of the split."""
    name = f"{row}/{split}"
    return read_tensors(run.path(paths.PREDICTIONS), fits=lambda each: name in each)[name].numpy()


def _costs(
    run: Run, runs: Sequence[Run], tried: Sequence[Request], method: str
) -> dict[str, float]:
    """UNet rows of the images at levels that the method used, and mean training seconds."""
    histories = [read_history(each.path(paths.TRAIN) / method / paths.HISTORY) for each in runs]
    if any("progress" in record for history in histories for record in history):
        levels = set(run.recipe.spectrum.levels)
    else:
        levels = {
            level for history in histories for record in history for level in record["levels"]
        }
    requests = [request for request in tried if request.level in levels]
    seconds = [sum(record["seconds"] for record in history) for history in histories]
    return {"UNet rows": count_rows(run, requests), "training, s": float(np.mean(seconds))}


def _baseline(run: Run) -> str:
    return run.recipe.baseline or next(iter(run.recipe.methods))


def _listed(notes: Sequence[str]) -> str:
    """A sentence and a list, in Markdown."""
    return (
        "\n"
        + "\n".join(
            [for_markdown(notes[0]), "", *(f"- {for_markdown(note)}" for note in notes[1:])]
        )
        + "\n"
        if notes
        else ""
    )
