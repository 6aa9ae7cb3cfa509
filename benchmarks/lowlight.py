"""The table of CIFAR-10 in low light: every method, several seeds, one spectrum.

    python benchmarks/lowlight.py --root DIR --json benchmarks/results/lowlight.json
    python benchmarks/lowlight.py --root DIR --estimate      # how many hours that takes
    python benchmarks/lowlight.py --root DIR --search rates \\
        --json benchmarks/results/lowlight_rates.json        # on validation
    python benchmarks/lowlight.py --root DIR --search scales \\
        --json benchmarks/results/lowlight_scales.json
    python benchmarks/lowlight.py --table benchmarks/results/lowlight.json

`--table` prints the table from the figures. After a kill, the same command resumes. The recipes
are `cifar10-lowlight` and, for the edits of ALIA, `cifar10-lowlight-alia`. Both have the same
images, network and number of updates. Phase 1 runs first. Then a pool of processes trains some
methods of a seed at a time. Without `--root` the images come from the hub. `--set` overrides a key
of both recipes, for a small trial.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

RECIPES = ("cifar10-lowlight", "cifar10-lowlight-alia")
ROWS = {
    "base": "CE",
    "base+we": "CE + WE",
    "zero-shot": "zero-shot",
    "lp-ft": "LP-FT",
    "lp-ft+we": "LP-FT + WE",
    "flyp": "FLYP",
    "flyp+we": "FLYP + WE",
    "docl": "CE + DoCL",
    "alia": "CE + ALIA",
    "flyp-alia": "FLYP + ALIA",
    "text-only": "text-only",
    "fixed": "fixed level",
    "all-levels": "all levels",
    "random": "random",
    "easy-to-hard": "easy-to-hard",
    "adaptive-no-threshold": "adaptive, no threshold",
    "adaptive-lower-threshold": "adaptive, lower threshold",
    "adaptive-higher-threshold": "adaptive, higher threshold",
    "adaptive": "DisCL, adaptive",
    "adaptive+we": "DisCL, adaptive + WE",
    "adaptive-per-class": "adaptive per class",
    "bandit": "bandit",
}
COLUMNS = {"ID macro F1": "test", "OOD macro F1": "test-ood"}
SEARCHES: dict[str, tuple[tuple[str, ...], str, tuple[float, ...]]] = {
    "rates": (("base", "lp-ft", "flyp"), "train.optimizer.lr", (0.0001, 0.0003, 0.001, 0.003)),
    "scales": (("text-only", "fixed", "all-levels", "adaptive"), "synthetic_scale", (0.5, 1, 3)),
}
"""Methods, a key and the values to try. A rate is searched with real images only, and used for all
methods that train in the same way. The scale that is best on average is used for all methods with
a spectrum."""
EXPECTED = ("adaptive", "all-levels", "fixed", "text-only")
"""By OOD macro F1, best first."""
CHUNK = 4


def open_recipe(name: str, settings: dict[str, Any], work: Path) -> Any:
    """The run of a recipe; that of ALIA takes the splits from the other one."""
    from dataclasses import replace

    from discl.recipe import load_recipe
    from discl.run_folder.open import open_run

    run = open_run(load_recipe(name, settings), work / name, amend=True)
    return (
        run
        if name == RECIPES[0]
        else replace(run, overrides={"data.parquet": work / RECIPES[0] / "data.parquet"})
    )


def train_some(
    name: str, seed: int, methods: list[str], settings: dict[str, Any], work: Path
) -> tuple[list[str], float]:
    """Trains and evaluates methods of a recipe with a seed; returns their names and the seconds."""
    from dataclasses import replace

    import torch

    from discl.stages.compare import seed_run
    from discl.stages.evaluate import measure_classifiers
    from discl.stages.train import train

    torch.set_num_threads(1)
    started = time.time()
    run = seed_run(open_recipe(name, settings, work), seed)
    run.folder.mkdir(parents=True, exist_ok=True)
    chosen = {method: run.recipe.methods[method] for method in methods}
    some = replace(run, recipe=run.recipe.model_copy(update={"methods": chosen, "baseline": None}))
    train(some)
    measure_classifiers(some)
    return methods, time.time() - started


def carry_out(
    settings: dict[str, Any],
    work: Path,
    seeds: list[int],
    processes: int,
    own: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Runs what is missing; returns the figures of all seeds. `own`: more settings per recipe."""
    from discl.pipeline import run_until
    from discl.stages.compare import make_entries, seed_run
    from discl.stages.evaluate import evaluate

    runs, jobs = {}, []
    asked = {name: settings | (own or {}).get(name, {}) for name in RECIPES}
    for name in RECIPES:
        runs[name] = open_recipe(name, asked[name], work)
        run_until(runs[name], "filter")
    for seed in seeds:
        for name, run in runs.items():
            methods = list(run.recipe.methods)
            jobs += [
                (name, seed, methods[first : first + CHUNK], asked[name], work)
                for first in range(0, len(methods), CHUNK)
            ]
    started = time.time()
    with (
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        if processes > 1
        else ThreadPoolExecutor(1) as pool
    ):
        waiting = [pool.submit(train_some, *job) for job in jobs]
        for done, job in enumerate(as_completed(waiting), 1):
            methods, seconds = job.result()
            print(
                f"{done} of {len(jobs)}, {time.time() - started:.0f} s:",
                f"{', '.join(methods)} ({seconds:.0f} s)",
                flush=True,
            )
    figures: dict[str, Any] = {"seeds": seeds, "rows": {}, "levels": {}, "kept": {}}
    seeded = {name: [seed_run(run, seed) for seed in seeds] for name, run in runs.items()}
    for name, run in runs.items():
        for each in seeded[name]:
            evaluate(each)
        for entry in make_entries(
            run,
            seeded[name],
            [(split, "macro_f1", heading) for heading, split in COLUMNS.items()],
        ):
            if entry.name in ROWS:
                figures["rows"][entry.name] = {
                    "figures": {heading: list(values) for heading, values in entry.figures.items()},
                    "costs": dict(entry.costs),
                    "intervals": intervals(
                        entry, seeded[name], runs[RECIPES[0]], seeded[RECIPES[0]]
                    ),
                }
        figures["kept"][name] = count_kept(run)
        figures["levels"] |= {
            method: [levels_of(each.path("train") / method) for each in seeded[name]]
            for method in run.recipe.methods
        }
    recipe = runs[RECIPES[0]].recipe
    figures["images"] = {split: len(table) for split, table in runs[RECIPES[0]].tables.items()}
    figures["settings"] = {
        "levels": list(recipe.spectrum.levels),
        "threshold": recipe.filter.threshold,
        "epochs": recipe.train.epochs,
        "batch_size": recipe.train.batch_size,
        "seeds_per_image": recipe.spectrum.seeds,
    }
    return figures


def search(settings: dict[str, Any], work: Path, what: str) -> dict[str, Any]:
    """Macro F1 on validation of some methods at each value of a key.

    Trainings have half of the recipe's epochs. For the scales the mean is added.
    """
    from dataclasses import replace

    import torch

    from discl.pipeline import run_until
    from discl.recipe.compare import Tune
    from discl.stages.compare import PHASE_1
    from discl.stages.tune import tune

    torch.set_num_threads(1)
    names, key, values = SEARCHES[what]
    run = open_recipe(RECIPES[0], settings, work)
    run_until(run, "filter")
    half = {
        "epochs": run.recipe.train.epochs // 2,
        "curriculum_epochs": run.recipe.train.curriculum_epochs // 2,
    }
    asked = Tune(trials=len(values), metric="macro_f1", space={key: list(values)}, train=half)
    methods = {name: run.recipe.methods[name] for name in names}
    recipe = run.recipe.model_copy(
        update={
            "methods": methods,
            "baseline": None,
            "compare": run.recipe.compare.model_copy(update={"tune": asked}),
        }
    )
    searched = replace(
        run, recipe=recipe, folder=work / what, overrides={name: run.path(name) for name in PHASE_1}
    )
    tune(searched)
    told = json.loads((searched.folder / "tuned" / "trials.json").read_text())
    tried = [
        [(trial["settings"], trial["figure"]) for trial in each["trials"]]
        for each in told["methods"].values()
    ]
    if what == "scales":
        told["mean"] = [
            {"settings": trials[0][0], "figure": statistics.mean(figure for _, figure in trials)}
            for trials in zip(*tried, strict=True)
        ]
    return told


def count_kept(run: Any) -> dict[str, list[int]]:
    """`{level: [images kept, images made]}`."""
    import pyarrow.parquet as pq

    counts: dict[str, list[int]] = {}
    for verdict in pq.read_table(run.path("filter.parquet"), columns=["level", "keep"]).to_pylist():
        of_level = counts.setdefault(str(verdict["level"]), [0, 0])
        of_level[0] += verdict["keep"]
        of_level[1] += 1
    return counts


def levels_of(folder: Path) -> list[list[int]]:
    """The levels of each epoch."""
    from discl.training.checkpoint import read_history

    return [record["levels"] for record in read_history(folder / "history.jsonl")]


def estimate(settings: dict[str, Any], seeds: int, processes: int) -> str:
    """Hours that the trainings take, from ten updates of FLYP timed on one thread."""
    import torch

    from discl.recipe import load_recipe

    torch.set_num_threads(1)
    whole = [load_recipe(name, settings) for name in RECIPES]
    with tempfile.TemporaryDirectory() as folder:
        short, long = (
            time_updates(settings, steps, Path(folder) / str(steps)) for steps in (2, 12)
        )
    wall, processor = ((after - before) / 10 for before, after in zip(short, long, strict=True))
    train, cameras = whole[0].train, whole[0].data.cameras
    updates = train.epochs * (
        train.steps_per_epoch or -(-cameras.most["train"] // train.batch_size)
    )
    trainings = seeds * sum(
        method.fine_tune != "zero-shot" for recipe in whole for method in recipe.methods.values()
    )
    hours = [seconds * updates * trainings / processes / 3600 for seconds in (processor, wall)]
    return (
        f"an update of FLYP on one thread: {processor:.2f} s of processor time, {wall:.2f} s by "
        f"the clock; {trainings} trainings of {updates} updates by {processes} processes: "
        f"{hours[0]:.1f} h on idle cores, {hours[1]:.1f} h as busy as they are now"
    )


def time_updates(settings: dict[str, Any], steps: int, folder: Path) -> tuple[float, float]:
    """(wall seconds, processor seconds) of training FLYP for some updates on a few images."""
    import pyarrow as pa

    from discl.recipe import load_recipe
    from discl.run_folder.open import open_run
    from discl.stages.prepare_data import prepare_data
    from discl.stages.train import train
    from discl.utils.stored import write_table

    one = {
        "methods": {"flyp": {"strategy": "real-only", "objective": "flyp"}},
        "baseline": None,
        "train.epochs": 1,
        "train.curriculum_epochs": 1,
        "train.steps_per_epoch": steps,
        "hard": {"rule": "tail"},
        "data.cameras.validation": 64,
        "data.cameras.most": {"train": 512, "test": 64, "test-ood": 64},
    }
    run = open_run(load_recipe(RECIPES[0], {**settings, **one}), folder)
    prepare_data(run)
    write_table(pa.table({"id": run.train.ids[:1]}), run.path("hard.parquet"))
    run.spectrum.append(
        [{"id": "none", "image": run.train.rows[0]["image"], "label": 0, "level": 0}]
    )
    verdict = {
        "id": ["none"],
        "source_id": ["none"],
        "label": [0],
        "level": [0],
        "seed": [0],
        "attempt": [0],
        "clip_similarity": [1.0],
        "keep": [True],
        "reason": [""],
    }
    write_table(pa.table(verdict), run.path("filter.parquet"))
    wall, processor = time.time(), time.process_time()
    train(run)
    return time.time() - wall, time.process_time() - processor


def intervals(
    entry: Any, runs: list[Any], main: Any, main_runs: list[Any]
) -> dict[str, list[float]]:
    """`{column: [difference, low, high]}` of a row against the baseline of the main recipe.

    Ensembled rows are compared with the ensembled baseline.
    """
    from discl.stages.compare import paired, read_predictions, split_variant

    if runs is main_runs:
        return {
            heading: [each.difference, each.low, each.high]
            for heading, each in entry.intervals.items()
        }
    row, against = (
        entry.name,
        (main.recipe.baseline or next(iter(main.recipe.methods))) + split_variant(entry.name)[1],
    )
    found = {}
    for heading, split in COLUMNS.items():
        ours, theirs = (
            np.stack([read_predictions(each, name, split) for each in own])
            for own, name in ((runs, row), (main_runs, against))
        )
        interval = paired(ours, theirs, main.tables[split].labels, "macro_f1", {})
        found[heading] = [interval.difference, interval.low, interval.high]
    return found


def without_images() -> set[str]:
    """The rows of the table that train on no synthetic image."""
    from discl.evaluation.controls import split_variant, takes_synthetic_images
    from discl.recipe import load_recipe

    methods = {
        name: method
        for recipe in reversed(RECIPES)
        for name, method in load_recipe(recipe).plain()["methods"].items()
    }
    return {row for row in ROWS if not takes_synthetic_images(methods[split_variant(row)[0]])}


def over_best(rows: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """(the best row without synthetic images by mean OOD macro F1, differences from it).

    Differences are of rows with synthetic images, in points, paired over seeds: mean ± standard
    deviation.
    """
    scores = {row: told["figures"]["OOD macro F1"] for row, told in rows.items()}
    plain = without_images()
    best = max(
        (row for row in scores if row in plain), key=lambda row: statistics.mean(scores[row])
    )
    differences = {}
    for row in scores:
        if row not in plain:
            gains = [100 * (a - b) for a, b in zip(scores[row], scores[best], strict=True)]
            spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
            differences[row] = f"{statistics.mean(gains):+.1f} ± {spread:.1f}"
    return best, differences


def table(figures: dict[str, Any]) -> str:
    """Mean ± standard deviation over seeds, in per cent, in Markdown, and the expected order.

    The last column is the difference from the best row without synthetic images.
    """
    from discl.evaluation.comparison import Entry, Interval, as_markdown

    entries = []
    for row, title in ROWS.items():
        if row in figures["rows"]:
            told = figures["rows"][row]
            entries.append(
                Entry(
                    title,
                    told["figures"],
                    {name: Interval(*each) for name, each in told["intervals"].items()},
                    told["costs"],
                )
            )
    best, gains = over_best(figures["rows"])
    heading, rule, *rows = as_markdown(entries, list(COLUMNS)).splitlines()
    cells = [gains.get(row, "–") for row in ROWS if row in figures["rows"]]
    lines = [
        f"{heading} OOD macro F1 − {ROWS[best]}, the best row without synthetic images |",
        f"{rule} ---: |",
        *(f"{row} {cell} |" for row, cell in zip(rows, cells, strict=True)),
        "",
    ]
    means = {
        row: statistics.mean(told["figures"]["OOD macro F1"])
        for row, told in figures["rows"].items()
    }
    for better, worse in pairwise(EXPECTED):
        if better in means and worse in means:
            came = "as expected" if means[better] >= means[worse] else "NOT as expected"
            points = 100 * (means[better] - means[worse])
            lines.append(f"{better} ≥ {worse} on OOD macro F1: {points:+.1f} points, {came}  ")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", help="CIFAR-10 as a folder of Parquet files; otherwise it comes from the hub"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/lowlight"), help="folder for the runs"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--processes", type=int, default=2, help="trainings at a time, one CPU thread each"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--estimate", action="store_true", help="time some updates and say how long all would take"
    )
    parser.add_argument(
        "--search", choices=SEARCHES, help="try values of a setting on validation instead"
    )
    parser.add_argument(
        "--table", type=Path, help="print the table of these figures and do nothing else"
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    from discl.recipe import parse_override

    settings: dict[str, Any] = {"runtime.device": "cpu"} | dict(
        parse_override(text) for text in arguments.overrides
    )
    if arguments.root:
        settings["data.root"] = str(Path(arguments.root).resolve())
    if arguments.estimate:
        print(estimate(settings, len(arguments.seeds), arguments.processes))
        return
    started = time.time()
    if arguments.search:
        figures = search(settings, arguments.work, arguments.search)
        print(json.dumps(figures, indent=1))
    else:
        figures = carry_out(settings, arguments.work, arguments.seeds, arguments.processes)
        print(table(figures))
    print(f"{time.time() - started:.0f} s")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
