"""All stages in order; what `discl run` and `discl.run` do.

data -> hard -> prompts -> retrieve -> adapt -> plan -> loop -> generate -> filter -> train
-> evaluate -> report
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .errors import RunError
from .escaping import one_line
from .recipe import Recipe, check_own_pieces, load_recipe
from .recipe.loop import learner_of
from .report import audit_rows, write_comparison, write_pilot, write_report, write_survey
from .run_folder import paths
from .run_folder.open import open_run
from .run_folder.run import Run
from .spectrum.plan import WHOLE_PLAN, PlanShard
from .stages import audit as audit_stage
from .stages import compare as compare_stage
from .stages import generate as generate_stage
from .stages import levels as levels_stage
from .stages import pilot as pilot_stage
from .stages.adapt import adapt
from .stages.browse import amend_thresholds
from .stages.budget import rows_by_level
from .stages.evaluate import evaluate
from .stages.filter import filter_spectrum
from .stages.hard import ensure_hard
from .stages.leaks import current_findings
from .stages.pending import summarise_rejections
from .stages.plan import check_models, make_plan
from .stages.prepare_data import prepare_data
from .stages.prompts import write_prompts
from .stages.provenance import describe_making
from .stages.retrieve import retrieve
from .stages.rounds import check_whole, run_rounds
from .stages.train import train
from .training.distributed import current_processes, join_processes
from .utils.atomic import why
from .utils.logging import get_logger, silence
from .utils.stored import read_json

logger = get_logger(__name__)


def report(run: Run) -> Path:
    """Writes the run as one self-contained page, `report.html`; returns its path."""
    if run.recipe.spectrum.makes_none:
        making = {"synthetic images": "none: spectrum.budget.images is 0"}
    else:
        making = describe_making(run.recipe, run.generator, run.size)
    if summary := summarise_rejections(run):
        making["early rejection"] += f"; {summary}"
    prices = rows_by_level(run) if learner_of(run.recipe) is not None else None
    store, findings = run.location(paths.SPECTRUM), current_findings(run)
    return write_report(
        run.folder,
        run.tables["train"],
        run.groups,
        making,
        store,
        audited=None if findings is None else audit_rows(findings, run.tables, store),
        prices=prices,
    )


STAGES: dict[str, Callable[[Run], Path]] = {
    "data": prepare_data,
    "hard": ensure_hard,
    "prompts": write_prompts,
    "retrieve": retrieve,
    "adapt": adapt,
    "plan": make_plan,
    "loop": run_rounds,
    "generate": generate_stage.generate,
    "filter": filter_spectrum,
    "train": train,
    "evaluate": evaluate,
    "report": report,
}


SHARED = ("plan", "generate")
"""Stages that several processes may run at once in one folder.

`plan` gives all the same result, and `generate` divides its work.
"""


REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}
"""Error numbers of a full, read-only or broken disk."""


def open_together(
    recipe: Recipe,
    out: Path | str | None,
    amend: bool,
    check: Callable[[Run], None] = lambda run: None,
    *,
    allow_plugins: bool = False,
) -> Run:
    """As `open_run`, in several processes: rank 0 opens the folder first; others are silent."""
    processes = join_processes(cpu=recipe.runtime.device == "cpu" or not torch.cuda.is_available())
    if processes.first:
        run = open_run(recipe, out, amend, check, allow_plugins=allow_plugins)
        processes.barrier()
        return run
    processes.barrier()
    silence()
    return open_run(recipe, out, allow_plugins=allow_plugins)


def run_until(run: Run, stage: str) -> Path:
    """Runs the stages up to and including `stage`; returns the path that the last one wrote.

    Each stage does only what is missing. Processes in one folder wait for each other at each stage.
    Processes that `torchrun` or `accelerate launch` started train together; rank 0 does the rest.

    - `run`: an open run.
    - `stage`: a name in `STAGES`, such as `hard`, `plan`, `generate`, `filter` or `train`.

    ```python
    import discl

    run = discl.open_run("runs/fashion-lt/recipe.yaml", "runs/fashion-lt")
    discl.run_until(run, "filter")
    ```
    """
    check_models(run, stage)
    processes = join_processes(cpu=run.device.type == "cpu")
    path = run.folder
    for name, carry_out in STAGES.items():
        if name == "loop" and learner_of(run.recipe) is None:
            continue
        with run.lock(name) if processes.first and name not in SHARED else nullcontext():
            processes.barrier()
            if processes.first or name == "train":
                started = time.perf_counter()
                with _refusals(name):
                    path = carry_out(run)
                logger.debug(f"stage '{name}' took {time.perf_counter() - started:.1f} s")
            processes.barrier()
        if name == stage:
            break
    return path


@contextmanager
def _refusals(stage: str) -> Iterator[None]:
    """Turns the error of a full or read-only disk into a RunError with advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise RunError(
            f"stage '{stage}' cannot write: {why(error)}. Finished work is intact. Fix the cause "
            "and run the same command again."
        ) from error


def generate(run: Run, shard: PlanShard = WHOLE_PLAN, ray: str | None = None) -> Path:
    """Generates the missing images of the plan, after the stages before; returns their folder.

    - `shard`: only this part of the plan.
    - `ray`: the address of a Ray cluster, or "auto" for the one at hand.

    Raises RunError for a shard on a cluster, because a cluster divides the work itself.
    """
    if ray and shard != WHOLE_PLAN:
        raise RunError("--ray divides the work itself; leave out --shard.")
    run_until(run, "plan")
    if learner_of(run.recipe) is not None:
        if shard != WHOLE_PLAN:
            check_whole(run)
        with run.lock("loop"), _refusals("loop"):
            run_rounds(run, ray)
    with _refusals("generate"):
        return generate_stage.generate(run, shard, ray)


def run(
    recipe: Recipe | str | Path | dict[str, Any],
    out: Path | str | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    amend: bool = False,
    allow_plugins: bool = False,
) -> Path:
    """Runs all stages of a recipe and returns the path of `report.html`.

    A second call with the same arguments does only what is missing.

    - `recipe`: a recipe, a shipped name, a YAML file, or a plain tree.
    - `out`: the run folder; default `runs/NAME`.
    - `overrides`: values by their keys, such as `{"train.epochs": 5}`.
    - `amend`: whether the recipe may replace another one of the folder.
    - `allow_plugins`: whether code that the recipe names as `module:attribute` may be imported.

    Raises RecipeError for a wrong recipe, and for a named plugin without `allow_plugins`. Raises
    RunError where the folder belongs to another recipe.

    ```python
    import discl

    report = discl.run("fashion-lt", "runs/fashion-lt", overrides={"train.epochs": 40})
    ```
    """
    loaded = load_recipe(recipe, overrides)
    check_own_pieces(loaded, allow_plugins)
    check = partial(check_models, stage="report")
    return run_until(open_run(loaded, out, amend, check, allow_plugins=allow_plugins), "report")


def compare(run: Run, seeds: Sequence[int] | None = None, *, tune: bool = False) -> Path:
    """Generates once, trains every method with every seed; returns the path of `comparison.md`.

    - `seeds`: training seeds; default the recipe's.
    - `tune`: whether every method first gets the same number of trials on validation (section
      `compare.tune`). The table is then in `tuned/`.

    `comparison.html` in the same folder draws the table.
    """
    check_own_pieces(run.recipe, run.allow_plugins, tuned=tune)
    run_until(run, "filter")
    processes = current_processes()
    with run.lock("compare") if processes.first else nullcontext(), _refusals("compare"):
        path = compare_stage.compare(run, seeds or run.recipe.compare.seeds, tune)
        processes.on_main(lambda: write_comparison(path.parent, run.recipe.name))
        return path


def levels(run: Run, sources: int = 32, grid: Sequence[int] | None = None, seeds: int = 1) -> Path:
    """Measures a spectrum over λ and proposes levels and a threshold; returns `levels.html`.

    - `sources`: number of hard images to measure on.
    - `grid`: levels in per cent; default 0, 10, …, 90.
    - `seeds`: seeds per image and level.

    `levels.md`, `levels.csv` and `levels.json` are in the same folder, `levels/` of the run folder.
    """
    run_until(run, "adapt")
    with run.lock("levels"), _refusals("levels"):
        path = levels_stage.survey_levels(run, sources, grid, seeds)
    with _refusals("levels"):
        proposed = levels_stage.snippet(read_json(path, "proposal"))
        return write_survey(
            path.parent, run.train, proposed, run.location(f"{paths.PILOT}/{paths.SPECTRUM}")
        )


def pilot(run: Run) -> Path:
    """Measures what each candidate of `pilot.candidates` is worth, before the spectrum is made.

    Returns the path of `pilot.html`, which also shows the images. `pilot.md`, `pilot.csv` and
    `pilot.json` are in the same folder, `pilot/` of the run folder.
    """
    run_until(run, "prompts")
    with run.lock("pilot"), _refusals("pilot"):
        pilot_stage.run_pilot(run)
        store = run.location(f"{paths.PILOT}/{paths.SPECTRUM}")
        return write_pilot(run.folder, run.train, store)


def audit(run: Run) -> Path:
    """Writes findings about the real images, and the synthetic ones so far, to `audit.parquet`.

    Returns its path. Nothing is generated.
    """
    run_until(run, "data")
    with run.lock("audit"), _refusals("audit"):
        return audit_stage.audit(run)


def amend_filter(folder: Path, changes: Mapping[str, Any]) -> None:
    """Filters a run again, with other values of its recipe; nothing is generated.

    Raises RunError where images of the plan are missing.
    """
    with _refusals("filter"):
        amend_thresholds(folder, changes, run_until)


TABLE = (
    ("accuracy", "all"),
    ("many", "many"),
    ("medium", "medium"),
    ("few", "few"),
    ("macro_f1", "F1"),
    ("worst_domain_accuracy", "worst dom."),
    ("calibration_error", "ECE"),
)
OUT_OF_DISTRIBUTION = (
    ("accuracy", "OOD all"),
    ("macro_f1", "OOD F1"),
    ("worst_domain_accuracy", "OOD worst dom."),
)


def results_table(run: Run) -> str:
    """The figures of `results.json` as an aligned text table, in per cent.

    They are on test and its OOD split, or on validation if there is no test. Columns without any
    figure are left out.
    """
    results = read_json(run.path(paths.RESULTS))
    split = "test" if all("test" in splits for splits in results.values()) else "validation"
    offered = [(split, *column) for column in TABLE] + [
        (f"{split}-ood", *column) for column in OUT_OF_DISTRIBUTION
    ]
    columns = [
        each
        for each in offered
        if any(each[1] in splits.get(each[0], {}) for splits in results.values())
    ]
    widths = [max(8, len(heading) + 2) for _, _, heading in columns]
    lines = [
        f"{'on ' + split + ', %':<28}"
        + "".join(f"{each[2]:>{width}}" for each, width in zip(columns, widths, strict=True))
    ]
    for method, splits in results.items():
        figures = [splits.get(where, {}).get(metric) for where, metric, _ in columns]
        shown = ["–" if value is None else f"{100 * value:.1f}" for value in figures]
        lines.append(
            f"{one_line(method):<28}"
            + "".join(f"{value:>{width}}" for value, width in zip(shown, widths, strict=True))
        )
    return "\n".join(lines)
