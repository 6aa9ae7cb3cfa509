"""The table of CIFAR100-LT, ratio 100: every system, three seeds, the same search for all.

    python benchmarks/cifar100_lt.py --data DIR     # everything that is missing, then the table
    python benchmarks/cifar100_lt.py                # the table, from results/cifar100_lt
    python benchmarks/cifar100_lt.py --data DIR --results build/try \\
        --set train.steps_per_epoch=4               # a small trial

DIR has CIFAR-100 as Parquet. Each training is a unit. Its figures and predictions are written to
`--results` when it ends. A unit with a file of this recipe and these settings is not run again, on
any machine.

- Trials come first (`compare.tune` in cifar100_lt.yaml): the same number for every method,
  evaluated on a held-out fifth of the long-tailed set. If the best rate is the first or the last,
  one more beyond it is tried.
- Then every method trains with its best settings on the whole set, and its last epoch counts. The
  prior and τ of its logit adjustment are those that were best for its best trial.
- The oracle gets real images of the tail classes instead of the spectrum, until the last epoch, as
  many as DisCL's synthetic scale. It has DisCL's settings. The generator has seen these images.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
RECIPE = HERE / "cifar100_lt.yaml"
RESULTS = HERE / "results" / "cifar100_lt"
ORACLE = "oracle"
COLUMNS = {"many": "many", "medium": "medium", "few": "few", "all": "accuracy"}
FACTS = "facts.json"
RATE = "train.optimizer.lr"
BEYOND = 3
"""By how much a rate is multiplied or divided that lies beyond those of the search."""
EXPECTED = (
    ("ce-discl", "ce", 5),
    ("ce-discl", "ce-all-levels", 0),
    ("ce-all-levels", "ce-text-only", 0),
    ("ce-discl+la", "ce+la", 0),
)
"""(row, other row, points of expected gain on few); open if the interval contains them."""


@dataclass(frozen=True)
class Job:
    """What all units share: paths of data, runs and results, and overrides of the recipe."""

    data: Path | None
    work: Path
    results: Path
    overrides: Mapping[str, Any]
    source: Path = RECIPE
    device: str = "cpu"

    @cached_property
    def recipe(self) -> Any:
        from discl.recipe import load_recipe

        root = {"data.root": str(self.data.resolve())} if self.data else {}
        return load_recipe(
            self.source,
            {**root, "runtime.device": self.device, "runtime.threads": 1, **self.overrides},
        )

    def read(self, place: str) -> dict[str, Any]:
        return json.loads((self.results / f"{place}.json").read_text())


@dataclass(frozen=True)
class Unit:
    """One training of `method` with `settings`.

    Its files are `place`.json and, for a seed, `place`.safetensors.
    """

    place: str
    method: str
    settings: Mapping[str, Any]
    seed: int | None = None  # None: a trial

    def identity(self, job: Job) -> str:
        """A digest of everything that its figures depend on.

        The path of the data, other methods and the length of the search are not included.
        """
        from discl.utils.hashing import digest

        recipe = job.recipe.model_dump(
            mode="json", exclude_defaults=True
        )  # what is added to recipes later does not count either
        told = {
            name: recipe[name]
            for name in ("data", "hard", "prompts", "spectrum", "filter", "train", "evaluate")
            if name in recipe
        }
        for section in ("spectrum", "filter"):
            told[section]["checkpoint"] = Path(told[section]["checkpoint"]).name
        told["data"].pop("root")
        method = recipe["methods"]["ce-discl" if self.method == ORACLE else self.method]
        tune = job.recipe.compare.tune
        overlay = (
            [tune.train, tune.hold_out, tune.seed, tune.metric] if self.seed is None else self.seed
        )
        return digest(told, method, self.method, dict(self.settings), overlay)

    def done(self, job: Job) -> bool:
        return (job.results / f"{self.place}.json").is_file() and job.read(self.place)[
            "identity"
        ] == self.identity(job)


def trial_units(job: Job) -> list[Unit]:
    from discl.stages.tune import plan_trials

    planned = {name: plan_trials(job.recipe, name) for name in job.recipe.methods}
    return [
        Unit(f"trials/{name}.{number}", name, each)
        for name, trials in planned.items()
        for number, each in enumerate(trials)
    ]


def edge_units(job: Job) -> list[Unit]:
    """One more trial for each method whose best rate is at an end: a third, or three times."""
    units = []
    for name, tried in judged_trials(job, trial_units(job)).items():
        rates = [
            told["settings"].get(RATE, job.recipe.training(name).optimizer.lr) for told in tried
        ]
        best = rates[int(np.argmax([told["figure"] for told in tried]))]
        if len(rates) > 1 and best in (min(rates), max(rates)):
            beyond = best * BEYOND if best == max(rates) else best / BEYOND
            units.append(Unit(f"trials/{name}.{len(rates)}", name, {RATE: float(f"{beyond:.1g}")}))
    return units


def judged_trials(job: Job, units: Sequence[Unit]) -> dict[str, list[dict[str, Any]]]:
    """Results of the trials of each method, in order. Raises SystemExit if one is missing."""
    told: dict[str, list[dict[str, Any]]] = {}
    for unit in units:
        if not unit.done(job):
            raise SystemExit(
                f"trial {unit.place} is missing or of another recipe; "
                "pass the data with --data to continue."
            )
        told.setdefault(unit.method, []).append(job.read(unit.place))
    return told


def chosen_settings(job: Job) -> dict[str, Mapping[str, Any]]:
    """Settings of each method's best trial, with its logit adjustment.

    Of two equal trials it is the first. The oracle has the settings of DisCL.
    """
    tried = judged_trials(job, [*trial_units(job), *edge_units(job)])
    best = {name: max(trials, key=lambda told: told["figure"]) for name, trials in tried.items()}
    chosen: dict[str, Mapping[str, Any]] = {
        name: {**told["settings"], **told["adjustment"]} for name, told in best.items()
    }
    return {**chosen, ORACLE: chosen["ce-discl"]}


def seed_units(job: Job) -> list[Unit]:
    chosen = chosen_settings(job)
    return [
        Unit(f"seed-{seed}/{name}", name, each, seed)
        for seed in job.recipe.compare.seeds
        for name, each in chosen.items()
    ]


def open_data(job: Job) -> Any:
    """The run whose data and spectrum all units share, made where it is not there."""
    from discl.pipeline import run_until
    from discl.run_folder.open import open_run

    run = open_run(job.recipe, job.work / "spectrum", amend=True)
    run_until(run, "filter")
    return run


def carry_out(unit: Unit, job: Job) -> str:
    """Trains and measures a unit and writes its files; returns a line about it."""
    import torch

    from discl.recipe import load_recipe
    from discl.run_folder.run import Run
    from discl.stages.evaluate import evaluate
    from discl.stages.train import train
    from discl.stages.tune import adjustment_of, score_trial, with_methods
    from discl.training.checkpoint import read_history

    torch.set_num_threads(1)
    recipe, work, results = job.recipe, job.work, job.results
    metric, overlay = (
        recipe.compare.tune.metric,
        dict(recipe.compare.tune.train) if unit.seed is None else {"seed": unit.seed},
    )
    if unit.method == ORACLE:
        oracle = recipe.plain()["methods"]["ce-discl"] | {"strategy": "fixed", "level": 100}
        extra = {
            "methods": {ORACLE: oracle},
            "baseline": None,
            "train.curriculum_epochs": recipe.train.epochs,
        }
        recipe = load_recipe(recipe, {**extra, "compare.tune": {}})
    shared = work / (
        "trials"
        if unit.seed is None
        else oracle_folder(job.recipe)
        if unit.method == ORACLE
        else "spectrum"
    )
    names = (
        "data.parquet",
        "hard.parquet",
        "plan.parquet",
        "filter.parquet",
        "spectrum",
        "scores",
        "cache",
    )
    borrowed = {
        name: (shared if (shared / name).exists() else work / "spectrum") / name for name in names
    }
    folder = work / unit.place
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(
        with_methods(recipe, {unit.method: (unit.method, unit.settings)}, overlay), folder, borrowed
    )
    started = time.time()
    train(run)
    evaluate(run)
    rows = json.loads(run.path("results.json").read_text())
    history = read_history(run.path("train") / unit.method / "history.jsonl")
    told: dict[str, Any] = {
        "identity": unit.identity(job),
        "settings": dict(unit.settings),
        "epochs": len(history),
        "levels": [record["levels"] for record in history],
        "measured": any("progress" in record for record in history),
        "effective_scale": [round(record["effective_scale"], 3) for record in history],
    }
    if unit.seed is None:
        told |= {
            "figure": score_trial(rows[unit.method], metric),
            "adjustment": adjustment_of(rows, unit.method),
        }
        line = f"{100 * told['figure']:.1f} balanced on what is held out"
    else:
        clock, of_clock = (
            ("processor_seconds", "core-s") if run.device.type == "cpu" else ("seconds", "s")
        )
        told["cost"] = {f"training, {of_clock}": round(sum(record[clock] for record in history), 1)}
        told["rows"] = {row: split["test"] for row, split in rows.items()}
        predictions = load_file(run.path("predictions.safetensors"))
        write_whole(
            results / f"{unit.place}.safetensors",
            lambda file: save_file(
                {row: predictions[f"{row}/test"].astype(np.uint8) for row in rows}, file
            ),
        )
        line = ", ".join(
            f"{name} {100 * told['rows'][unit.method][key]:.1f}" for name, key in COLUMNS.items()
        )
    write_whole(results / f"{unit.place}.json", lambda file: file.write_text(json.dumps(told)))
    return f"{unit.place}: {line} ({time.time() - started:.0f} s)"


def write_whole(path: Path, write: Any) -> None:
    from discl.utils.atomic import whole

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished:
        write(unfinished)


def prepare(run: Any, job: Job) -> None:
    """What units share besides the spectrum: tables of trials, images of the oracle, facts."""
    from discl.spectrum.plan import read_plan
    from discl.stages.budget import count_rows
    from discl.stages.tune import divide

    work, results = job.work, job.results
    trials = replace(run, folder=work / "trials", overrides={})
    trials.folder.mkdir(parents=True, exist_ok=True)
    judged = divide(run, trials)
    make_oracle(run, work / oracle_folder(run.recipe))
    by_level: dict[int, list[Any]] = {}
    for request in read_plan(run.path("plan.parquet")):
        by_level.setdefault(request.level, []).append(request)
    facts = {
        "judged_on": judged,
        "groups": run.groups,
        "class_counts": run.train.class_counts.tolist(),
        "unet_rows": {level: count_rows(run, requests) for level, requests in by_level.items()},
    }
    write_whole(results / FACTS, lambda file: file.write_text(json.dumps(facts)))
    labels = run.tables["test"].labels.astype(np.uint8)
    write_whole(results / "labels.safetensors", lambda file: save_file({"test": labels}, file))


def oracle_folder(recipe: Any) -> str:
    """By what its images follow from."""
    return f"{ORACLE}-{recipe.methods['ce-discl'].synthetic_scale:g}-{recipe.hard.fewer_than}"


def make_oracle(run: Any, folder: Path) -> None:
    """A folder like that of a filtered spectrum, for the oracle.

    It has real tail images from outside the long-tailed set, at level 100.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from discl.data import read_tables
    from discl.spectrum.encoding import encode_image
    from discl.utils.hashing import derive_seed

    if (folder / "filter.parquet").exists():
        return
    pool, real, recipe = read_tables(run.recipe.data.root)["train"], run.train, run.recipe
    taken, counts, labels, names = set(real.ids), real.class_counts, pool.labels, pool.ids
    free = [
        row
        for row, name in enumerate(names)
        if name not in taken and counts[labels[row]] < recipe.hard.fewer_than
    ]
    free.sort(key=lambda row: derive_seed("oracle", names[row]))
    chosen: list[int] = []
    for label in np.flatnonzero(counts < recipe.hard.fewer_than):
        wanted = round(recipe.methods["ce-discl"].synthetic_scale * counts[label])
        chosen += [row for row in free if labels[row] == label][:wanted]
    folder.mkdir(parents=True, exist_ok=True)
    store = replace(
        run, folder=folder, overrides={"data.parquet": run.path("data.parquet")}
    ).spectrum
    ids = [f"oracle-{names[row]}" for row in chosen]
    images = [
        {"bytes": encode_image(np.asarray(pool.image(row)), "webp-lossless"), "path": None}
        for row in chosen
    ]
    store.append(
        [
            {"id": name, "image": image, "label": int(labels[row]), "level": 100}
            for name, image, row in zip(ids, images, chosen, strict=True)
        ]
    )
    verdicts = pa.table(
        {
            "id": ids,
            "source_id": ids,
            "label": [int(labels[row]) for row in chosen],
            "level": [100] * len(ids),
            "seed": [0] * len(ids),
            "attempt": [0] * len(ids),
            "keep": [True] * len(ids),
            "clip_similarity": [1.0] * len(ids),
            "reason": [""] * len(ids),
        }
    )
    write_whole(folder / "filter.parquet", lambda file: pq.write_table(verdicts, file))


def write_table(job: Job) -> str:
    """Writes `comparison.md`, `.csv`, `.tex`, `.json` and `.html` of all complete seeds.

    Returns the text of `comparison.md`.

    Differences are against CE, adjusted against adjusted.
    """
    from discl.assets import published_figures
    from discl.evaluation.comparison import Entry
    from discl.report.comparison_page import write_comparison
    from discl.stages.compare import paired, split_variant, write_tables

    results, recipe, units = job.results, job.recipe, seed_units(job)
    facts = json.loads((results / FACTS).read_text())
    labels = load_file(results / "labels.safetensors")["test"].astype(np.int64)
    seeds = [
        seed
        for seed in recipe.compare.seeds
        if all(unit.done(job) for unit in units if unit.seed == seed)
    ]
    if not seeds:
        raise SystemExit("no seed is complete yet; name the data with --data to go on.")
    told: dict[str, list[dict[str, Any]]] = {}
    predicted: dict[str, list[np.ndarray]] = {}
    for unit in units:
        if unit.seed in seeds:
            told.setdefault(unit.method, []).append(job.read(unit.place))
            for row, names in load_file(results / f"{unit.place}.safetensors").items():
                predicted.setdefault(row, []).append(names.astype(np.int64))
    paper = published_figures(recipe.compare.published)
    entries = []
    for seen in told.values():
        levels = {level for each in seen for epoch in each["levels"] for level in epoch}
        if seen[0]["measured"]:
            levels = set(recipe.spectrum.levels)
        rows = sum(facts["unet_rows"].get(str(level), 0) for level in levels)
        costs = {"UNet rows": rows} | {
            name: float(np.mean([each["cost"][name] for each in seen])) for name in seen[0]["cost"]
        }
        for row in seen[0]["rows"]:
            against, intervals = recipe.baseline + split_variant(row)[1], {}
            for name, key in COLUMNS.items():
                found = paired(
                    np.stack(predicted[row]),
                    np.stack(predicted[against]),
                    labels,
                    key,
                    facts["groups"],
                )
                intervals |= {name: found} if found and row != against else {}
            figures = {
                name: [each["rows"][row][key] for each in seen] for name, key in COLUMNS.items()
            }
            entries.append(Entry(row, figures, intervals, costs, paper.get(row, {})))
    notes = [
        f"Chosen by {recipe.compare.tune.metric} on {facts['judged_on']}; "
        "a row +la has the learning rate of the row without."
    ]
    tried = judged_trials(job, [*trial_units(job), *edge_units(job)])
    for name, settings in chosen_settings(job).items():
        chosen = ", ".join(f"{key} = {value}" for key, value in settings.items()) or "as it stands"
        figures = [100 * told["figure"] for told in tried["ce-discl" if name == ORACLE else name]]
        all_trials = ", ".join(f"{figure:.1f}" for figure in figures)
        notes.append(f"{name}: {chosen} ({max(figures):.1f}; all trials {all_trials})")
    for row, other, least in EXPECTED:
        if row not in predicted or other not in predicted:
            continue
        gain = paired(
            np.stack(predicted[row]), np.stack(predicted[other]), labels, "few", facts["groups"]
        )
        came = (
            "as expected"
            if gain.low > least
            else "open"
            if gain.high > least
            else "not as expected"
        )
        notes.append(
            f"few, {row} − {other}: {gain.difference:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}], "
            f"more than {least:+d}: {came}"
        )
    write_tables(results, entries, list(COLUMNS), seeds, "test", recipe.baseline, notes)
    write_comparison(results, recipe.name)
    return (results / "comparison.md").read_text()


def carry_out_all(units: Sequence[Unit], job: Job, processes: int, until: float) -> bool:
    """Runs missing units, `processes` at a time, none after `until`; returns if all are done."""
    waiting = [unit for unit in units if not unit.done(job)]
    print(f"{len(units) - len(waiting)} of {len(units)} units are there", flush=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running: set[Future[str]] = set()
        while waiting or running:
            while waiting and len(running) < processes and time.time() < until:
                running.add(pool.submit(carry_out, waiting.pop(0), job))
            if not running:
                break
            ended = next(as_completed(running))
            running.remove(ended)
            print(ended.result(), flush=True)
    return all(unit.done(job) for unit in units)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="CIFAR-100 as Parquet; without it only the table is made"
    )
    parser.add_argument("--work", type=Path, default=Path("build/cifar100_lt"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--recipe",
        type=Path,
        default=RECIPE,
        help="cifar100_lt_full.yaml is the long one, for a GPU",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument(
        "--processes", type=int, default=2, help="trainings at a time, one CPU thread each"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no training after this time"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="lay a value over the recipe",
    )
    arguments = parser.parse_args()
    from discl.recipe import parse_override

    until = time.time() + 60 * arguments.minutes
    overrides = dict(map(parse_override, arguments.set))
    job = Job(
        arguments.data,
        arguments.work,
        arguments.results,
        overrides,
        arguments.recipe,
        arguments.device,
    )
    if job.data:
        prepare(open_data(job), job)
        for plan in (trial_units, edge_units, seed_units):
            if not carry_out_all(plan(job), job, arguments.processes, until):
                print("stopped for time; the same command goes on")
                return
    print(write_table(job))


if __name__ == "__main__":
    main()
