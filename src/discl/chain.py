"""The whole chain as resumable stages: what `discl run` does.

data -> hard -> plan -> generate -> filter -> train -> evaluate -> report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .console import console
from .curriculum.processes import join_processes
from .recipe import Recipe, load_recipe
from .report import write_report
from .stages import comparing
from .stages.data import find_hard, prepare_data
from .stages.learning import evaluate, train
from .stages.making import check_models, filter_spectrum, generate, make_plan
from .workspace import Run, open_run


def report(run: Run) -> Path:
    """Writes the whole story of the run as one self-contained page, `report.html`."""
    return write_report(run.folder, run.tables["train"], run.groups)


STAGES: dict[str, Callable[[Run], Path]] = {
    "data": prepare_data,
    "hard": find_hard,
    "plan": make_plan,
    "generate": generate,
    "filter": filter_spectrum,
    "train": train,
    "evaluate": evaluate,
    "report": report,
}


def open_together(recipe: Recipe, out: Path | str | None, amend: bool) -> Run:
    """As `open_run`, by several processes: the first opens the folder alone, then the others, who stay silent from then on."""
    processes = join_processes(cpu=recipe.runtime.device == "cpu" or not torch.cuda.is_available())
    if processes.first:
        run = open_run(recipe, out, amend)
        processes.wait()
        return run
    processes.wait()
    console.quiet = True
    return open_run(recipe, out)


def run_until(run: Run, stage: str) -> Path:
    """Carries out the stages up to and including `stage`, each doing only what is missing; returns what the last one wrote.

    Where `torchrun` or `accelerate launch` started several processes they train together, and the first does the rest.
    """
    check_models(run, stage)
    processes = join_processes(cpu=run.device.type == "cpu")
    path = run.folder
    for name, carry_out in STAGES.items():
        if processes.first or name == "train":
            path = carry_out(run)
        processes.wait()
        if name == stage:
            break
    return path


def run(
    recipe: Recipe | str | Path | dict[str, Any],
    out: Path | str | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    amend: bool = False,
) -> Path:
    """The whole chain: from a recipe (an object, a shipped name, a YAML file or a plain tree) to the path of `report.html`.

    Called again with the same arguments it does only what is missing.
    """
    return run_until(open_run(load_recipe(recipe, overrides), out, amend), "report")


def compare(run: Run, seeds: Sequence[int] | None = None) -> Path:
    """Phase 1 once, then every method with every training seed (the recipe's unless given); returns the path of `comparison.md`."""
    run_until(run, "filter")
    return comparing.compare(run, seeds or run.recipe.compare.seeds)


def results_table(run: Run) -> str:
    """The figures of `results.json` as an aligned text table, in per cent; test where there is one, else validation."""
    results = json.loads(run.path("results.json").read_text())
    split = "test" if all("test" in splits for splits in results.values()) else "validation"
    groups = [name for name in ("many", "medium", "few") if any(name in splits[split] for splits in results.values())]
    lines = [f"{'top-1 on ' + split + ', %':<28}{'all':>8}" + "".join(f"{name:>8}" for name in groups)]
    for method, splits in results.items():
        figures = [splits[split].get(name) for name in ("accuracy", *groups)]
        lines.append(f"{method:<28}" + "".join(f"{'–' if value is None else format(100 * value, '.1f'):>8}" for value in figures))
    return "\n".join(lines)
