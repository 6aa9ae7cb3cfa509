"""The table of CIFAR100-LT, ratio 100: every system, three seeds, the same search for all.

    python benchmarks/cifar100_lt.py --data DIR --archive ARCHIVE   # all that is missing, the table
    python benchmarks/cifar100_lt.py                # the table, from results/cifar100_lt
    python benchmarks/cifar100_lt.py --data DIR --methods ce-balanced text-balanced --processes 1
                                                    # these rows only, searched like all others
    python benchmarks/cifar100_lt.py --data DIR --archive ARCHIVE --results build/try \\
        --set train.steps_per_epoch=4               # a small trial

DIR has CIFAR-100 as Parquet. ARCHIVE has CIFAR-10, whose labels are not read: its images take the
place of synthetic ones in `ce-retrieval`. Each training is a unit. Its figures and predictions are
written to `--results` when it ends. A unit with a file of this recipe and these settings is not run
again, on any machine.

- Trials come first (`compare.tune` in cifar100_lt.yaml): the same number for every method,
  evaluated on a held-out fifth of the long-tailed set. If the best rate is the first or the last,
  one more beyond it is tried.
- Then every method trains with its best settings on the whole set, and its last epoch counts. The
  prior and τ of its logit adjustment are those that were best for its best trial.
- The oracle gets real images of the tail classes instead of the spectrum, until the last epoch, as
  many as DisCL's synthetic scale. It has DisCL's settings. The generator has seen these images.
- A row `…-adapted` has the settings of the row without it. Its generator is tuned on all training
  images first (`ADAPT`), so it has no trial: that would have seen what the trial holds out.
- A row `…-shuffled` has the settings and the images of the row without it. Their classes are dealt
  out at random: it tells what is gained by images that know nothing of a class.
- The mixture of a family of rows (`FAMILIES`) is the one whose best trial is best.

The table has every row whose trainings are complete, and names the others. `--methods` and
`--seeds` select what is trained and printed; the files of the table are then left as they are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
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
FAMILIES = {
    "real": ("ce-undersampled", "ce-balanced", "ce-square-root", "ce"),
    "text": ("ce-text-only", "text-balanced", "text-square-root", "text-all"),
    "levels": ("ce-all-levels", "levels-balanced", "levels-square-root", "levels-all"),
    "discl": ("ce-discl", "discl-balanced", "discl-square-root", "discl-all"),
}
"""Rows that differ in their mixture alone: undersampled, class-balanced, square-root, all."""
CHOSEN = "-chosen"
"""`discl-chosen` is the row of the family `discl` with the best trial."""
ADAPTED = "-adapted"
"""The end of the name of a row whose generator is adapted."""
SHUFFLED = "-shuffled"
"""The end of the name of a row whose retrieved images have each other's classes."""
ADAPT = yaml.safe_load((HERE / "adapt.yaml").read_text())
"""How the generator is adapted; it is not searched here."""
EXPECTED = (
    ("few", "ce-discl", "ce", 5),
    ("few", "ce-discl", "ce-all-levels", 0),
    ("few", "ce-all-levels", "ce-text-only", 0),
    ("few", "ce-discl+la", "ce+la", 0),
    # Written before the mixtures were run. Known was seed 0 of ce-balanced, text-balanced,
    # discl-balanced and discl-square-root, with the rate .1 and without a search.
    ("few", "text-balanced", "ce-balanced", 5),
    ("few", "levels-balanced", "ce-balanced", 5),
    ("few", "discl-balanced", "ce-balanced", 5),
    ("all", "text-balanced", "ce-balanced", 0),
    ("all", "levels-balanced", "ce-balanced", 0),
    ("all", "discl-balanced", "ce-balanced", 0),
    ("few", "text-square-root", "repeat-square-root", 0),
    ("few", "levels-square-root", "repeat-square-root", 0),
    ("few", "discl-square-root", "repeat-square-root", 0),
    ("few", "text-all", "repeat-all", 0),
    ("few", "levels-all", "repeat-all", 0),
    ("few", "discl-all", "repeat-all", 0),
    ("all", "ce-discl+la", "discl-balanced+la", 0),
    ("all", "discl-square-root+la", "discl-balanced+la", 0),
    ("few", "text-balanced", "discl-balanced", 0),
    ("all", "ldmlr-text-all+la", "ce-ldmlr+la", 0),
    ("all", "ldmlr-discl-all+la", "ce-ldmlr+la", 0),
    # The goals: above LDMLR + LA overall, and two points above LA.
    ("all", "text-chosen+la", "ce-ldmlr+la", 0),
    ("all", "discl-chosen+la", "ce-ldmlr+la", 0),
    ("all", "discl-chosen+la", "ce+la", 2),
    # Written before an adapted generator was run here.
    ("few", "text-balanced-adapted", "text-balanced", 0),
    ("few", "discl-balanced-adapted", "discl-balanced", 0),
    ("few", "text-square-root-adapted", "text-square-root", 0),
    ("few", "discl-square-root-adapted", "discl-square-root", 0),
    ("all", "text-balanced-adapted+la", "ce-ldmlr+la", 0),
    ("all", "discl-balanced-adapted+la", "ce-ldmlr+la", 0),
    # Written before images were retrieved. The archive has few images of the rare classes.
    ("few", "ce-text-only", "ce-retrieval", 0),
    # Written when the first training of ce-retrieval had 22.2 on few, which its classes do not
    # explain: birds for spiders, cars for roses. Known were that and the rows above.
    ("few", "ce-retrieval-shuffled", "ce-undersampled", 0),
    ("few", "ce-retrieval", "ce-retrieval-shuffled", 0),
    ("few", "ce-text-only", "ce-retrieval-shuffled", 5),
    # Written when all rows above were known: with text-only images and logit adjustment, drawing
    # by the square root is 1.6 points above `all` overall.
    ("all", "ldmlr-text-square-root+la", "ce-ldmlr+la", 0),
    ("few", "ldmlr-text-square-root+la", "ldmlr-repeat-square-root+la", 5),
    ("all", "ldmlr-text-square-root+la", "ldmlr-repeat-square-root+la", 0),
)
"""(column, row, other row, points of expected gain); open if the interval contains them."""
GOAL = ("ce-ldmlr+la", 20.5)
"""Rows are wanted that are above this one overall, and above this value on few."""


@dataclass(frozen=True)
class Job:
    """What all units share: paths of data, runs and results, and overrides of the recipe.

    `methods` and `seeds` select rows and training seeds; empty: all. `filters` are changes of the
    section `filter` for single rows. `archive` holds the images that rows with `images: retrieved`
    choose from. `light.py` has other expectations, and neither families nor an oracle or archive.
    """

    data: Path | None
    work: Path
    results: Path
    overrides: Mapping[str, Any]
    source: Path = RECIPE
    device: str = "cpu"
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    expected: tuple[tuple[str, str, str, int], ...] = EXPECTED
    families: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FAMILIES)
    oracle: bool = True
    filters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    archive: Path | None = None

    @cached_property
    def recipe(self) -> Any:
        from discl.recipe import load_recipe

        places = {"data.root": self.data, "retrieval.archive": self.archive}
        named = {key: str(place.resolve()) for key, place in places.items() if place}
        return load_recipe(
            self.source,
            {**named, "runtime.device": self.device, "runtime.threads": 1, **self.overrides},
        )

    @cached_property
    def stated(self) -> dict[str, Any]:
        """The recipe without defaults: what is added to recipes later does not count."""
        return self.recipe.model_dump(mode="json", exclude_defaults=True)

    @cached_property
    def trials(self) -> dict[str, list[Mapping[str, Any]]]:
        """Settings of the trials of the selected methods; some rows have those of another."""
        from discl.stages.tune import plan_trials

        names = dict.fromkeys(settings_of(name) for name in self.rows)
        return {name: plan_trials(self.recipe, name) for name in names}

    @property
    def selects(self) -> bool:
        return bool(self.methods or self.seeds)

    @property
    def rows(self) -> list[str]:
        """Names of the selected methods, with the oracle. Raises SystemExit for an unknown one."""
        known = [*self.recipe.methods, *([ORACLE] if self.oracle else [])]
        unknown = [name for name in self.methods if name not in known]
        if unknown:
            raise SystemExit(f"no row is called {', '.join(unknown)}; there are {', '.join(known)}")
        return [name for name in known if not self.methods or name in self.methods]

    @property
    def training_seeds(self) -> list[int]:
        return list(self.seeds or self.recipe.compare.seeds)

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

        Folders of the data and of checkpoints, other methods and the length of the search are not
        included.
        """
        from discl.utils.hashing import digest

        recipe = job.stated
        told = {
            name: dict(recipe[name])
            for name in ("data", "hard", "prompts", "spectrum", "filter", "train", "evaluate")
            if name in recipe
        }
        model = told["train"]["model"] = dict(told["train"]["model"])
        for section in (told["spectrum"], told["filter"], model):
            if section.get("checkpoint"):
                section["checkpoint"] = Path(section["checkpoint"]).name
        told["data"].pop("root")
        method = recipe["methods"]["ce-discl" if self.method == ORACLE else self.method]
        if self.method in job.filters:
            told["filter"] |= job.filters[self.method]
        if self.method.endswith(ADAPTED):
            told["spectrum"]["adapt"] = ADAPT
        if retrieves(job, self.method):
            told["retrieval"] = {**recipe["retrieval"], "archive": None}
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
    return [
        Unit(f"trials/{name}.{number}", name, each)
        for name, planned in job.trials.items()
        for number, each in enumerate(planned)
    ]


def settings_of(row: str) -> str:
    """The method whose settings a row has."""
    return "ce-discl" if row == ORACLE else row.removesuffix(ADAPTED).removesuffix(SHUFFLED)


def edge_units(job: Job) -> list[Unit]:
    """One more trial for each method whose best rate is at an end: a third, or three times.

    Methods with missing trials have none yet.
    """
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
    """Results of the trials of each method, in order, where none of its `units` is missing."""
    told: dict[str, list[dict[str, Any]]] = {}
    missing = {unit.method for unit in units if not unit.done(job)}
    for unit in units:
        if unit.method not in missing:
            told.setdefault(unit.method, []).append(job.read(unit.place))
    return told


def searched(job: Job) -> dict[str, list[dict[str, Any]]]:
    """Results of all trials of each method whose search is complete."""
    return judged_trials(job, [*trial_units(job), *edge_units(job)])


def chosen_settings(job: Job) -> dict[str, Mapping[str, Any]]:
    """Settings of the best trial of each row, with its logit adjustment.

    Of two equal trials it is the first. Rows whose search is not complete are left out.
    """
    tried = searched(job)
    best = {name: max(trials, key=lambda told: told["figure"]) for name, trials in tried.items()}
    return {
        row: {**best[name]["settings"], **best[name]["adjustment"]}
        for row in job.rows
        if (name := settings_of(row)) in best
    }


def seed_units(job: Job) -> list[Unit]:
    chosen = chosen_settings(job)
    return [
        Unit(f"seed-{seed}/{name}", name, each, seed)
        for seed in job.training_seeds
        for name, each in chosen.items()
    ]


def retrieves(job: Job, row: str) -> bool:
    """Whether a row takes images of the archive."""
    return row != ORACLE and job.recipe.methods[row].images == "retrieved"


def open_data(job: Job) -> Any:
    """The run whose data and spectrum units share, made where it is not there.

    Where a row needs an adapted generator, there is a second one beside it. Raises SystemExit if a
    row needs an archive and the job has none.
    """
    from discl.pipeline import run_until
    from discl.recipe import load_recipe
    from discl.run_folder.open import open_run

    retrieving = [row for row in job.rows if retrieves(job, row)]
    if retrieving and not job.archive:
        raise SystemExit(
            f"{', '.join(retrieving)}: these rows take images of an archive; name it with "
            "--archive, or others with --methods."
        )
    recipe = job.recipe
    if not retrieving:
        methods = recipe.plain()["methods"].items()
        others = {row: method for row, method in methods if not retrieves(job, row)}
        recipe = load_recipe(recipe, {"methods": others})
    if any(row.endswith(ADAPTED) for row in job.rows):
        adapted = load_recipe(recipe, {"spectrum.adapt": ADAPT})
        run_until(open_run(adapted, job.work / f"spectrum{ADAPTED}", amend=True), "filter")
    run = open_run(recipe, job.work / "spectrum", amend=True)
    run_until(run, "filter")
    return run


def folder_of(unit: Unit, job: Job) -> str:
    """Where the tables of a training are; what is not there is in `spectrum`."""
    if unit.seed is None:
        return "trials"
    if unit.method == ORACLE:
        return oracle_folder(job.recipe)
    if unit.method.endswith(SHUFFLED):
        return f"retrieved{SHUFFLED}"
    return f"spectrum{ADAPTED}" if unit.method.endswith(ADAPTED) else "spectrum"


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
    shared = work / folder_of(unit, job)
    names = (
        "data.parquet",
        "hard.parquet",
        "plan.parquet",
        "filter.parquet",
        "retrieved.parquet",
        "spectrum",
        "scores",
        "cache",
    )
    borrowed = {
        name: (shared if (shared / name).exists() else work / "spectrum") / name for name in names
    }
    if unit.method in job.filters:
        borrowed["filter.parquet"] = filtered_folder(shared, unit.method) / "filter.parquet"
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
    for name in job.filters.keys() & set(job.rows):
        for base in (run, trials):
            filter_alone(base, run, name, job.filters[name])
    if job.oracle:
        make_oracle(run, work / oracle_folder(run.recipe))
    if any(row.endswith(SHUFFLED) for row in job.rows):
        shuffle_retrieved(run, work / f"retrieved{SHUFFLED}")
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


def filtered_folder(base: Path, method: str) -> Path:
    """Where the verdicts of a row's own filter are, on the images of a folder."""
    return base.with_name(f"{base.name}-{method}")


def filter_alone(base: Any, run: Any, method: str, changes: Mapping[str, Any]) -> None:
    """Writes the verdicts of a row's own filter on the tables of `base` and the images of `run`."""
    from discl.recipe import load_recipe
    from discl.stages.filter import filter_spectrum

    folder = filtered_folder(base.folder, method)
    folder.mkdir(parents=True, exist_ok=True)
    overrides = {name: base.path(name) for name in ("data.parquet", "hard.parquet", "plan.parquet")}
    overrides |= {name: run.path(name) for name in ("spectrum", "scores", "cache")}
    changed = {f"filter.{key}": value for key, value in changes.items()}
    recipe = load_recipe(base.recipe, {**changed, "compare.tune": {}})
    filter_spectrum(replace(base, recipe=recipe, folder=folder, overrides=overrides))


def shuffle_retrieved(run: Any, folder: Path) -> None:
    """The images that the run has retrieved, with the classes of each other at random."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = pq.read_table(run.path("retrieved.parquet"))
    labels = np.random.default_rng(0).permutation(chosen["label"].to_numpy())
    place = chosen.column_names.index("label")
    shuffled = chosen.set_column(place, "label", pa.array(labels))
    write_whole(folder / "retrieved.parquet", lambda file: pq.write_table(shuffled, file))


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
    """Writes `comparison.md`, `.csv`, `.tex`, `.json` and `.html` of all complete rows.

    Returns the text of `comparison.md`. Where the job selects rows or seeds, no file is written.

    Differences are against CE, adjusted against adjusted, and against the two controls.
    """
    from discl.report.comparison_page import write_comparison
    from discl.stages.compare import write_tables

    baseline, whole = job.recipe.baseline, job
    if job.methods and baseline not in job.methods:
        whole = replace(job, methods=(*job.methods, baseline))
    found = read_results(whole)
    if not found.seeds:
        raise SystemExit("no row is complete yet; name the data with --data to go on.")
    entries, controls = add_controls(whole, found, make_entries(whole, found))
    notes = [*search_notes(whole), *sign_notes(whole, found)]
    if found.open:
        notes.append(f"open: {', '.join(found.open)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if job.selects else job.results
        columns = list(COLUMNS)
        write_tables(
            folder,
            entries,
            columns,
            seeds=found.seeds,
            split="test",
            baseline=baseline,
            notes=notes,
            controls=controls,
        )
        if not job.selects:
            write_comparison(folder, job.recipe.name)
        return (folder / "comparison.md").read_text()


@dataclass(frozen=True)
class Results:
    """What is complete: rows with a training for each of `seeds`.

    - `told`: figures of a method's trainings.
    - `predicted`: labels `[seeds, images]` of a row, such as ce+la.
    - `labels`: true labels `[images]`.
    - `open`: methods that lack something, and what.
    """

    seeds: list[int]
    told: dict[str, list[dict[str, Any]]]
    predicted: dict[str, np.ndarray]
    labels: np.ndarray
    open: list[str]


def read_results(job: Job) -> Results:
    """The complete rows at the seeds of the baseline, or of the first row without it."""
    units = {(unit.method, unit.seed): unit for unit in seed_units(job) if unit.done(job)}
    present = [name for name in job.rows if any(method == name for method, _ in units)]
    anchor = job.recipe.baseline if job.recipe.baseline in present else next(iter(present), "")
    seeds = [seed for seed in job.training_seeds if (anchor, seed) in units]
    told: dict[str, list[dict[str, Any]]] = {}
    predicted: dict[str, list[np.ndarray]] = {}
    still_open = []
    for name in job.rows:
        missing = [seed for seed in seeds if (name, seed) not in units]
        if not seeds or name not in present:
            still_open.append(name)
        elif missing:
            still_open.append(f"{name} (seed {', '.join(map(str, missing))})")
        else:
            for unit in (units[name, seed] for seed in seeds):
                told.setdefault(name, []).append(job.read(unit.place))
                for row, names in load_file(job.results / f"{unit.place}.safetensors").items():
                    predicted.setdefault(row, []).append(names.astype(np.int64))
    path = job.results / "labels.safetensors"
    labels = load_file(path)["test"] if seeds else np.zeros(0)
    stacked = {row: np.stack(each) for row, each in predicted.items()}
    return Results(seeds, told, stacked, labels.astype(np.int64), still_open)


def make_entries(job: Job, found: Results) -> list[Any]:
    """The rows of the table."""
    from discl.assets import published_figures
    from discl.evaluation.comparison import Entry
    from discl.stages.compare import split_variant

    recipe, facts = job.recipe, read_facts(job)
    published = recipe.compare.published
    paper = {} if published is None else published_figures(published)
    entries = []
    for seen in found.told.values():
        levels = {level for each in seen for epoch in each["levels"] for level in epoch}
        if seen[0]["measured"]:
            levels = set(recipe.spectrum.levels)
        rows = sum(facts["unet_rows"].get(str(level), 0) for level in levels)
        costs = {"UNet rows": rows} | {
            name: float(np.mean([each["cost"][name] for each in seen])) for name in seen[0]["cost"]
        }
        for row in seen[0]["rows"]:
            against, intervals = recipe.baseline + split_variant(row)[1], {}
            if row != against and against in found.predicted:
                intervals = {
                    name: interval
                    for name, key in COLUMNS.items()
                    if (interval := differ(found, row, against, key, facts["groups"]))
                }
            figures = {
                name: [each["rows"][row][key] for each in seen] for name, key in COLUMNS.items()
            }
            entries.append(Entry(row, figures, intervals, costs, paper.get(row, {})))
    return entries


def add_controls(job: Job, found: Results, entries: Sequence[Any]) -> tuple[list[Any], Any]:
    """Entries with their differences from the two controls, and which rows these are.

    The oracle has the control of DisCL. Its images are of no training set, so it is not the best
    row without synthetic images.
    """
    from discl.evaluation.controls import BEST_HEADING, MIXTURE_HEADING, make_controls

    means = {entry.name: float(np.mean(entry.figures["all"])) for entry in entries}
    scores = {row: mean for row, mean in means.items() if row.partition("+")[0] != ORACLE}
    controls = make_controls(
        job.recipe.plain(), list(scores), scores, metric="top-1", chosen_on="test", shown="test"
    )
    if controls is None:
        return list(entries), None
    same, groups = dict(controls.same_mixture), read_facts(job)["groups"]
    if job.oracle:
        same |= {ORACLE + row: same.get("ce-discl" + row) for row in ("", "+la")}
    columns = (
        (MIXTURE_HEADING.format("few"), same, "few"),
        (BEST_HEADING.format("overall"), dict.fromkeys(same, controls.best), "accuracy"),
    )
    compared = [
        replace(
            entry,
            controls={
                heading: differ(found, entry.name, other, key, groups) if other else None
                for heading, others, key in columns
                for other in [others[entry.name]]
            },
        )
        if entry.name in same
        else entry
        for entry in entries
    ]
    return compared, controls


def read_facts(job: Job) -> dict[str, Any]:
    return json.loads((job.results / FACTS).read_text())


def differ(found: Results, row: str, other: str, key: str, groups: Mapping[str, Any]) -> Any:
    from discl.stages.compare import paired

    return paired(found.predicted[row], found.predicted[other], found.labels, key, groups)


def search_notes(job: Job) -> list[str]:
    """How settings were chosen, those of each row, and the mixture of each family."""
    notes = [
        f"Chosen by {job.recipe.compare.tune.metric} on {read_facts(job)['judged_on']}; "
        "a row +la has the learning rate of the row without."
    ]
    tried = searched(job)
    for name, settings in chosen_settings(job).items():
        chosen = ", ".join(f"{key} = {value}" for key, value in settings.items()) or "as it stands"
        figures = [100 * told["figure"] for told in tried[settings_of(name)]]
        all_trials = ", ".join(f"{figure:.1f}" for figure in figures)
        notes.append(f"{name}: {chosen} ({max(figures):.1f}; all trials {all_trials})")
    for family, best in family_figures(tried, job.families).items():
        figures = ", ".join(f"{name} {100 * figure:.1f}" for name, figure in best.items())
        notes.append(f"{family}{CHOSEN} is {max(best, key=best.__getitem__)} ({figures})")
    return notes


def family_figures(
    tried: Mapping[str, Sequence[Mapping[str, Any]]],
    families: Mapping[str, tuple[str, ...]] = FAMILIES,
) -> dict[str, dict[str, float]]:
    """The best trial of each row of a family, for families whose search is complete."""
    return {
        family: {name: max(told["figure"] for told in tried[name]) for name in members}
        for family, members in families.items()
        if all(name in tried for name in members)
    }


def sign_notes(job: Job, found: Results) -> list[str]:
    """The expected signs, and the rows that reach the goal by their means."""
    groups = read_facts(job)["groups"]
    chosen = {
        family + CHOSEN: max(best, key=best.__getitem__)
        for family, best in family_figures(searched(job), job.families).items()
    }
    notes = []
    for column, row, other, least in job.expected:
        names = [resolve(each, chosen) for each in (row, other)]
        if any(name not in found.predicted for name in names):
            continue
        gain = differ(found, *names, COLUMNS[column], groups)
        came = (
            "as expected"
            if gain.low > least
            else "open"
            if gain.high > least
            else "not as expected"
        )
        shown = row if names[0] == row else f"{row} ({names[0]})"
        notes.append(
            f"{column}, {shown} − {other}: {gain.difference:+.1f} "
            f"[{gain.low:+.1f}, {gain.high:+.1f}], more than {least:+d}: {came}"
        )
    means = {
        row: {
            key: 100 * float(np.mean([each["rows"][row][key] for each in seen]))
            for key in ("accuracy", "few")
        }
        for seen in found.told.values()
        for row in seen[0]["rows"]
    }
    other, few = GOAL
    if other in means:
        reached = [
            row
            for row, mean in means.items()
            if row.partition("+")[0] != ORACLE
            and mean["accuracy"] > means[other]["accuracy"]
            and mean["few"] > few
        ]
        notes.append(
            f"above {other} overall and above {few} on few, by their means: "
            f"{', '.join(reached) or 'no row'}"
        )
    return notes


def resolve(row: str, chosen: Mapping[str, str]) -> str:
    """The row that `discl-chosen+la` stands for."""
    name, plus, variant = row.partition("+")
    return chosen.get(name, name) + plus + variant


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


def make_parser(doc: str, work: str, results: Path) -> argparse.ArgumentParser:
    """The options of a benchmark on CIFAR100-LT.

    - `doc`: of its module; `work`, `results`: default folders.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="CIFAR-100 as Parquet; without it only the table is made"
    )
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument(
        "--processes", type=int, default=2, help="trainings at a time, one CPU thread each"
    )
    parser.add_argument(
        "--methods", nargs="+", default=[], metavar="ROW", help="train and print these rows only"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], help="train and print these seeds only"
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
    return parser


def read_job(arguments: argparse.Namespace, recipe: Path, **more: Any) -> Job:
    """The job of the options; `more` are further fields of it."""
    from discl.recipe import parse_override

    return Job(
        arguments.data,
        arguments.work,
        arguments.results,
        dict(map(parse_override, arguments.set)),
        recipe,
        arguments.device,
        tuple(arguments.methods),
        tuple(arguments.seeds),
        **more,
    )


def main() -> None:
    parser = make_parser(__doc__, "build/cifar100_lt", RESULTS)
    parser.add_argument(
        "--recipe",
        type=Path,
        default=RECIPE,
        help="cifar100_lt_full.yaml is the long one, for a GPU",
    )
    parser.add_argument(
        "--archive", type=Path, help="CIFAR-10 as Parquet, for rows with retrieved images"
    )
    arguments = parser.parse_args()
    job = read_job(arguments, arguments.recipe, archive=arguments.archive)
    carry_on(job, arguments.processes, arguments.minutes)


def carry_on(job: Job, processes: int, minutes: float) -> None:
    """Trains what is missing, if the job has the data, and prints the table.

    - `processes`: trainings at a time; `minutes`: after which none is started.
    """
    from discl.utils.counts import count_of

    until = time.time() + 60 * minutes
    if job.data:
        print(f"{count_of(len(job.rows), 'row')}: {', '.join(job.rows)}", flush=True)
        prepare(open_data(job), job)
        for plan in (trial_units, edge_units, seed_units):
            if not carry_out_all(plan(job), job, processes, until):
                print("stopped for time; the same command goes on")
                return
    print(write_table(job))


if __name__ == "__main__":
    main()
