"""`discl compare`: methods × seeds on one spectrum, in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..assets import published_figures
from ..escaping import for_markdown, for_terminal
from ..evaluation.comparison import (
    Entry,
    Interval,
    as_csv,
    as_latex,
    as_markdown,
    paired_f1_interval,
    paired_interval,
)
from ..evaluation.controls import (
    ABSENT,
    BEST_HEADING,
    MIXTURE_HEADING,
    Controls,
    make_controls,
    split_variant,
)
from ..recipe import Recipe
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.plan import Request
from ..training.checkpoint import read_history
from ..training.distributed import current_processes
from ..utils.atomic import make_folder
from ..utils.logging import get_logger
from ..utils.stored import read_json, read_tensors, write_text
from .budget import count_rows
from .evaluate import evaluate
from .pending import draws_so_far
from .train import train
from .tune import describe_tuning, keep_mixtures, tune, tuned_run

logger = get_logger(__name__)

PHASE_1 = (
    paths.DATA,
    paths.HARD,
    paths.PLAN,
    paths.FILTER,
    paths.RETRIEVED,
    paths.SPECTRUM,
    paths.SCORES,
    paths.CACHE,
    paths.PREPARED,
)
Column = tuple[str, str, str]
"""(split, metric, heading)."""
Columns = Sequence[Column]


def seed_run(run: Run, seed: int) -> Run:
    """The run of a training seed. It uses the spectrum of `run`, and its folder is `seeds/SEED`.

    The recipe's own seed is `run` itself, so that what `discl run` has trained counts; unless an
    older version has trained it in `seeds/SEED`.
    """
    folder = run.folder / paths.SEEDS / str(seed)
    if seed == run.recipe.train.seed and not folder.exists():
        return run
    recipe = run.recipe.model_copy(
        update={"train": run.recipe.train.model_copy(update={"seed": seed})}
    )
    return replace(run, recipe=recipe, folder=folder, overrides=_phase_1(run))


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
    processes, recipe = current_processes(), run.recipe
    if tuned:
        chosen = tune(run)
        run, recipe = (
            tuned_run(replace(run, overrides=_phase_1(run)), chosen),
            keep_mixtures(recipe, chosen),
        )
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
        entries, controls = add_controls(make_entries(run, runs, metrics), recipe, runs, metrics)
        write_tables(
            run.folder,
            entries,
            [heading for _, _, heading in metrics],
            seeds=seeds,
            split=split,
            baseline=_baseline(run),
            notes=notes,
            controls=controls,
        )
        return run.path(paths.COMPARISON_TABLE)

    return processes.on_main(write)


def write_tables(
    folder: Path,
    entries: Sequence[Entry],
    columns: Sequence[str],
    *,
    seeds: Sequence[int],
    split: str,
    baseline: str,
    notes: Sequence[str],
    controls: Controls | None = None,
) -> None:
    """Writes `comparison.md`, `.csv`, `.tex`, and `.json` for the report.

    - `notes`: a sentence and a list.
    - `controls`: the rows of the differences in `Entry.controls`.
    """
    plain: dict[str, Any] = {
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
                **({"controls": _plain_controls(entry)} if entry.controls else {}),
            }
            for entry in entries
        },
    }
    below = _listed(notes)
    if controls is not None:
        plain["controls"] = {"notes": list(controls.notes), "lines": controls.lines}
        below = _controls_in_markdown(controls) + below
    for name, text in (
        (paths.COMPARISON_TABLE, as_markdown(entries, columns) + below),
        (paths.COMPARISON_CSV, as_csv(entries, columns, seeds)),
        (paths.COMPARISON_LATEX, as_latex(entries, columns)),
        (paths.COMPARISON_DATA, json.dumps(plain, indent=2, ensure_ascii=False) + "\n"),
    ):
        write_text(folder / name, text)


def measured_columns(run: Run) -> tuple[str, list[Column]]:
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


class _Rows:
    """The rows of `results.json` over several runs, and their paired differences."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.results = [read_json(each.path(paths.RESULTS)) for each in runs]
        self.predictions = cache(self._read)

    def _read(self, row: str, split: str) -> np.ndarray:
        """Predicted labels, int `[runs, images]`."""
        return np.stack([read_predictions(each, row, split) for each in self.runs])

    def differ(self, row: str, other: str | None, column: Column) -> Interval | None:
        """The paired interval of a column between two rows; None where one is not measured."""
        split, metric, _ = column
        if other is None or not all(
            split in result.get(name, {}) for name in (row, other) for result in self.results
        ):
            return None
        first, second = self.predictions(row, split), self.predictions(other, split)
        run = self.runs[0]
        return paired(first, second, run.tables[split].labels, metric, run.groups)


def make_entries(run: Run, runs: Sequence[Run], metrics: Columns) -> list[Entry]:
    """One entry for each row of the runs' `results.json`."""
    rows = _Rows(runs)
    published = (
        published_figures(run.recipe.compare.published) if run.recipe.compare.published else {}
    )
    baseline, tried = _baseline(run), draws_so_far(run)[0]
    entries = []
    for row in rows.results[0]:
        method, variant = split_variant(row)
        figures = {
            heading: [result[row][where][metric] for result in rows.results]
            for where, metric, heading in metrics
            if all(metric in result[row].get(where, {}) for result in rows.results)
        }
        against = baseline + variant
        found = {each[2]: rows.differ(row, against, each) for each in metrics if row != against}
        intervals = {heading: each for heading, each in found.items() if each is not None}
        paper = published.get(run.recipe.compare.rows.get(row, row), {})
        entries.append(Entry(row, figures, intervals, _costs(run, runs, tried, method), paper))
    return entries


def add_controls(
    entries: Sequence[Entry], recipe: Recipe, runs: Sequence[Run], columns: Columns
) -> tuple[list[Entry], Controls | None]:
    """Entries with their differences from the two controls, and which rows these are.

    The same mixture is compared on the few classes, the best row overall. Without a column few
    both are compared overall. OOD tables compare both by the OOD macro F1.

    - `recipe`: the recipe before it was tuned, so that a control has the settings of its method;
      of what was chosen it has the mixtures.
    """
    rows = _Rows(runs)
    mixture_column, overall = control_columns(columns)
    where, metric, heading = overall
    chosen_on = where.replace("test", "validation")
    if not all(chosen_on in row for result in rows.results for row in result.values()):
        chosen_on = where
    scores = {
        row: float(np.mean([result[row][chosen_on][metric] for result in rows.results]))
        for row in rows.results[0]
    }
    controls = make_controls(
        recipe.plain(),
        [entry.name for entry in entries],
        scores,
        metric=heading if metric == "macro_f1" else "top-1",
        chosen_on=chosen_on,
        shown=where,
    )
    if controls is None:
        return list(entries), None

    mixture_heading = MIXTURE_HEADING.format(_overall(mixture_column[2]))
    best_heading = BEST_HEADING.format(_overall(heading))
    differing = {
        row: {
            mixture_heading: rows.differ(row, other, mixture_column),
            best_heading: rows.differ(row, controls.best, overall),
        }
        for row, other in controls.same_mixture.items()
    }
    return [
        replace(entry, controls=differing[entry.name]) if entry.name in differing else entry
        for entry in entries
    ], controls


def control_columns(columns: Columns) -> tuple[Column, Column]:
    """The column that the same mixture is compared on, and the one of the best row."""
    ood = next((each for each in columns if each[0].endswith("-ood")), None)
    if ood is not None:
        return ood, ood
    few = next((each for each in columns if each[1] == "few"), columns[-1])
    return few, columns[-1]


def _overall(heading: str) -> str:
    return "overall" if heading == "all" else heading


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


def _plain_controls(entry: Entry) -> dict[str, list[float] | None]:
    return {
        name: None if each is None else [each.difference, each.low, each.high]
        for name, each in entry.controls.items()
    }


def _controls_in_markdown(controls: Controls) -> str:
    """The notes on controls, and the lines that add absent ones."""
    text = "\n" + "\n".join(map(for_markdown, controls.notes)) + "\n"
    if controls.lines:
        text += f"\n{ABSENT}\n\n```yaml\nmethods:\n{for_terminal(controls.lines)}```\n"
    return text


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
