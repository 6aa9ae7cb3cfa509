"""The evidence on CIFAR100-LT, imbalance ratio 100: every compared system, tuned alike, three seeds, one table.

    python benchmarks/cifar100_lt.py --data DIR            # everything that is missing, then the table
    python benchmarks/cifar100_lt.py                       # the table alone, from what lies in results/cifar100_lt
    python benchmarks/cifar100_lt.py --data DIR --results build/try --set train.epochs=3 --set train.curriculum_epochs=3   # a miniature

DIR holds CIFAR-100 as Parquet. Each training is a unit of its own: its figures and predictions are written to `--results` as soon as it
is done, and a unit whose file is there is not carried out again, on whatever machine. First the trials (compare.tune in cifar100_lt.yaml:
as many for every method, judged on a fifth of the long-tailed set that is held out from them), then every method at its best
settings on the whole set, last epoch. The oracle gets real images of the tail classes, as many as DisCL's synthetic scale asks
for, in the place of the spectrum; the generator has seen them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Job:
    """What all units share: where the data, the runs and the results lie, and what is laid over the recipe."""

    data: Path | None
    work: Path
    results: Path
    overrides: Mapping[str, Any]

    def recipe(self) -> Any:
        from discl.recipe import load_recipe

        root = {"data.root": str(self.data.resolve())} if self.data else {}
        return load_recipe(RECIPE, {**root, "runtime.device": "cpu", "runtime.threads": 1, **self.overrides})


@dataclass(frozen=True)
class Unit:
    """One training: of `method` with `settings` laid over it; its files are `place`.json and, for a seed, `place`.safetensors."""

    place: str
    method: str
    settings: Mapping[str, Any]
    seed: int | None = None  # None: a trial

    def done(self, job: Job) -> bool:
        return (job.results / f"{self.place}.json").is_file()


def trial_units(job: Job) -> list[Unit]:
    from discl.stages.tuning import plan_trials

    recipe = job.recipe()
    planned = {name: plan_trials(recipe, name) for name in recipe.methods}
    return [Unit(f"trials/{name}.{number}", name, each) for name, trials in planned.items() for number, each in enumerate(trials)]


def chosen_settings(job: Job) -> dict[str, Mapping[str, Any]]:
    """The settings of each method's best trial; the earlier of two equals. The oracle takes those of DisCL's own training."""
    best: dict[str, tuple[float, Mapping[str, Any]]] = {}
    for unit in trial_units(job):
        figure = json.loads((job.results / f"{unit.place}.json").read_text())["figure"]
        if unit.method not in best or figure > best[unit.method][0]:
            best[unit.method] = figure, unit.settings
    chosen = {name: settings for name, (_, settings) in best.items()}
    return {**chosen, ORACLE: chosen["ce-discl"]}


def seed_units(job: Job) -> list[Unit]:
    seeds, chosen = job.recipe().compare.seeds, chosen_settings(job)
    return [Unit(f"seed-{seed}/{name}", name, each, seed) for seed in seeds for name, each in chosen.items()]


def open_data(job: Job) -> Any:
    """The run whose data and spectrum all units share, made where it is not there."""
    from discl.chain import run_until
    from discl.workspace import open_run

    run = open_run(job.recipe(), job.work / "spectrum", amend=True)
    run_until(run, "filter")
    return run


def carry_out(unit: Unit, job: Job) -> str:
    """Trains and measures a unit and writes its files; returns a line about it."""
    import torch

    from discl.curriculum.training import read_history
    from discl.recipe import load_recipe
    from discl.stages.learning import evaluate, train
    from discl.stages.tuning import judge_trial, with_methods
    from discl.workspace import Run

    torch.set_num_threads(1)
    recipe, work, results = job.recipe(), job.work, job.results
    metric, overlay = recipe.compare.tune.metric, dict(recipe.compare.tune.train) if unit.seed is None else {"seed": unit.seed}
    if unit.method == ORACLE:
        extra = {"methods": {ORACLE: {"strategy": "fixed", "level": 100}}, "baseline": None, "train.curriculum_epochs": recipe.train.epochs}
        recipe = load_recipe(recipe, {**extra, "compare.tune": {}})
    shared = work / ("trials" if unit.seed is None else ORACLE if unit.method == ORACLE else "spectrum")
    names = ("data.parquet", "hard.parquet", "plan.parquet", "filter.parquet", "spectrum", "scores", "cache")
    borrowed = {name: (shared if (shared / name).exists() else work / "spectrum") / name for name in names}
    folder = work / unit.place
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(with_methods(recipe, {unit.method: (unit.method, unit.settings)}, overlay), folder, borrowed)
    started = time.time()
    train(run)
    evaluate(run)
    rows = json.loads(run.path("results.json").read_text())
    history = read_history(run.path("train") / unit.method / "history.jsonl")
    told: dict[str, Any] = {
        "settings": dict(unit.settings), "seconds": round(sum(record["seconds"] for record in history), 1), "epochs": len(history),
        "levels": [record["levels"] for record in history],
    }  # fmt: skip
    if unit.seed is None:
        told["figure"] = judge_trial(rows[unit.method], metric)
        line = f"{100 * told['figure']:.1f} balanced on what is held out"
    else:
        told["rows"] = {row: {name: split["test"][key] for name, key in COLUMNS.items()} for row, split in rows.items()}
        predictions = load_file(run.path("predictions.safetensors"))
        write_whole(
            results / f"{unit.place}.safetensors",
            lambda file: save_file({row: predictions[f"{row}/test"].astype(np.uint8) for row in rows}, file),
        )
        line = ", ".join(f"{name} {100 * value:.1f}" for name, value in told["rows"][unit.method].items())
    write_whole(results / f"{unit.place}.json", lambda file: file.write_text(json.dumps(told)))
    return f"{unit.place}: {line} ({time.time() - started:.0f} s)"


def write_whole(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    write(unfinished)
    unfinished.replace(path)


def prepare(run: Any, job: Job) -> None:
    """What units share besides the spectrum: the tables of the trials, the oracle's images, and the facts that the table needs."""
    from discl.spectrum.plan import read_plan
    from discl.stages.making import count_rows
    from discl.stages.tuning import divide

    work, results = job.work, job.results
    trials = replace(run, folder=work / "trials", borrowed={})
    trials.folder.mkdir(parents=True, exist_ok=True)
    judged = divide(run, trials)
    make_oracle(run, work / ORACLE)
    by_level: dict[int, list[Any]] = {}
    for request in read_plan(run.path("plan.parquet")):
        by_level.setdefault(request.level, []).append(request)
    facts = {
        "judged_on": judged, "groups": run.groups, "class_counts": run.train.class_counts.tolist(),
        "unet_rows": {level: count_rows(run, requests) for level, requests in by_level.items()},
    }  # fmt: skip
    write_whole(results / FACTS, lambda file: file.write_text(json.dumps(facts)))
    labels = run.tables["test"].labels.astype(np.uint8)
    write_whole(results / "labels.safetensors", lambda file: save_file({"test": labels}, file))


def make_oracle(run: Any, folder: Path) -> None:
    """A folder like that of a filtered spectrum, with real tail images from outside the long-tailed set at level 100."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from discl.data import read_tables
    from discl.digests import derive_seed

    if (folder / "filter.parquet").exists():
        return
    pool, real, recipe = read_tables(run.recipe.data.root)["train"], run.train, run.recipe
    taken, counts, labels, names = set(real.ids), real.class_counts, pool.labels, pool.ids
    free = [row for row, name in enumerate(names) if name not in taken and counts[labels[row]] < recipe.hard.fewer_than]
    free.sort(key=lambda row: derive_seed("oracle", names[row]))
    chosen: list[int] = []
    for label in np.flatnonzero(counts < recipe.hard.fewer_than):
        wanted = round(recipe.methods["ce-discl"].synthetic_scale * counts[label])
        chosen += [row for row in free if labels[row] == label][:wanted]
    folder.mkdir(parents=True, exist_ok=True)
    store = replace(run, folder=folder, borrowed={"data.parquet": run.path("data.parquet")}).spectrum
    ids = [f"oracle-{names[row]}" for row in chosen]
    images = [pool.rows[row]["image"] for row in chosen]
    store.append(
        [
            {"id": name, "image": image, "label": int(labels[row]), "level": 100}
            for name, image, row in zip(ids, images, chosen, strict=True)
        ]
    )
    verdicts = pa.table({"id": ids, "label": [int(labels[row]) for row in chosen], "level": [100] * len(ids), "keep": [True] * len(ids)})
    write_whole(folder / "filter.parquet", lambda file: pq.write_table(verdicts, file))


def write_table(job: Job) -> str:
    """The table of all seeds that are complete, with paired intervals against CE, in Markdown; also `comparison.json` beside it."""
    from discl.comparison import Entry, as_csv, as_latex, as_markdown, paired_interval

    results = job.results
    facts = json.loads((results / FACTS).read_text())
    labels = load_file(results / "labels.safetensors")["test"].astype(np.int64)
    units = seed_units(job)
    seeds = [seed for seed in job.recipe().compare.seeds if all(unit.done(job) for unit in units if unit.seed == seed)]
    if not seeds:
        raise SystemExit("no seed is complete yet; name the data with --data to go on.")
    found: dict[str, list[dict[str, Any]]] = {}
    right: dict[str, list[np.ndarray]] = {}
    told_of: dict[str, list[dict[str, Any]]] = {}
    for unit in units:
        if unit.seed in seeds:
            told = json.loads((results / f"{unit.place}.json").read_text())
            predicted = load_file(results / f"{unit.place}.safetensors")
            for row, figures in told["rows"].items():
                found.setdefault(row, []).append(figures)
                right.setdefault(row, []).append(predicted[row] == labels)
                told_of.setdefault(row, []).append(told)
    entries = []
    for row, figures in found.items():
        against = "ce+la" if row.endswith("+la") else "ce"
        intervals = {}
        if row != against:
            for name in COLUMNS:
                interval = paired_interval(np.stack(right[row]), np.stack(right[against]), labels, facts["groups"].get(name))
                intervals |= {name: interval} if interval else {}
        levels = {level for told in told_of[row] for levels in told["levels"] for level in levels}
        rows = sum(facts["unet_rows"].get(str(level), 0) for level in levels)
        seconds = float(np.mean([told["seconds"] for told in told_of[row]]))
        columns = {name: [each[name] for each in figures] for name in COLUMNS}
        entries.append(Entry(row, columns, intervals, {"UNet rows": rows, "training, s": seconds}))
    for suffix, write in ((".md", as_markdown), (".csv", as_csv), (".tex", as_latex)):
        write_whole(results / f"table{suffix}", lambda file, write=write: file.write_text(write(entries, list(COLUMNS))))
    chosen = [
        f"- {name}: " + (", ".join(f"{key} = {value}" for key, value in each.items()) or "as it stands")
        for name, each in chosen_settings(job).items()
    ]
    return "\n".join(
        [as_markdown(entries, list(COLUMNS)), f"Seeds {', '.join(map(str, seeds))}. Chosen on {facts['judged_on']}:", "", *chosen]
    )


def carry_out_all(units: Sequence[Unit], job: Job, processes: int, until: float) -> bool:
    """Carries out what is missing, `processes` at a time; starts nothing after `until`. Returns whether all are done."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-100 as Parquet; without it only the table is made")
    parser.add_argument("--work", type=Path, default=Path("build/cifar100_lt"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, one CPU thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after this time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="lay a value over the recipe")
    arguments = parser.parse_args()
    from discl.recipe import parse_override

    until = time.time() + 60 * arguments.minutes
    job = Job(arguments.data, arguments.work, arguments.results, dict(map(parse_override, arguments.set)))
    if job.data:
        prepare(open_data(job), job)
        for plan in (trial_units, seed_units):
            if not carry_out_all(plan(job), job, arguments.processes, until):
                print("stopped for time; the same command goes on")
                return
    print(write_table(job))


if __name__ == "__main__":
    main()
