"""The table of Fashion-MNIST-LT: every method, several samples, one spectrum per sample.

    python benchmarks/fashion_lt.py --work build/fashion_lt \\
        --json benchmarks/results/fashion_lt.json
    python benchmarks/fashion_lt.py --table benchmarks/results/fashion_lt.json

`--table` prints the table from the figures. Each seed draws another long-tailed sample from the
shipped pool. All methods train on it with equal numbers of updates and are evaluated on the 10,000
test images. After a kill, the same command does only what is missing.

The oracle gets *real* extra tail images instead of synthetic ones, as many as DisCL's synthetic
scale. The generator has not seen them. `--tune` prints the validation figures that the settings
were chosen by, on a sample that is not in the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

RECIPE = "fashion-lt"
TUNING_SEED = 1000
SEARCHED_FROM = {"filter.threshold": 0.5}
"""Where the search stood before it changed the recipe, so that it prints the same figures again."""
TUNED = ("ce", "ce-undersampled", "balanced-softmax", "discl")
FIXED_LEVEL = 50
METHODS: dict[str, dict[str, Any]] = {
    "ce": {"strategy": "real-only"},
    "balanced-softmax": {"strategy": "real-only", "objective": "balanced-softmax"},
    "text-only": {"strategy": "text-only"},
    "fixed": {"strategy": "fixed", "level": FIXED_LEVEL},
    "all-levels": {"strategy": "all-levels"},
    "discl": {"strategy": "diverse-to-specific"},
    "balanced-softmax-discl": {
        "strategy": "diverse-to-specific",
        "objective": "balanced-softmax",
        "prior": "effective",
    },
}
OWN_RATE = {"ce-undersampled": {"strategy": "real-only", "undersample": True}}
"""Methods whose best learning rate was another one than the recipe's."""
OWN_LEARNING_RATE = 0.01
ORACLES = {"oracle": {"strategy": "fixed", "level": 100}}
ROWS = (
    ("ce", "CE"),
    ("ce+la", "CE + LA"),
    ("ce-undersampled", "CE, undersampled (lr .01)"),
    ("ce-undersampled+la", "CE, undersampled (lr .01) + LA"),
    ("balanced-softmax", "BS"),
    ("text-only", "CE + text-only"),
    ("text-only+la", "CE + text-only + LA"),
    ("fixed", f"CE + fixed level {FIXED_LEVEL} %"),
    ("fixed+la", f"CE + fixed level {FIXED_LEVEL} % + LA"),
    ("all-levels", "CE + all levels"),
    ("all-levels+la", "CE + all levels + LA"),
    ("discl", "**CE + DisCL**"),
    ("discl+la", "**CE + DisCL + LA**"),
    ("balanced-softmax-discl", "BS + DisCL"),
    ("oracle", "oracle: real extra images"),
    ("oracle+la", "oracle + LA"),
)
CONTROL = "ce-undersampled"
"""The same mixture without synthetic images."""
WITHOUT_IMAGES = ("ce", "ce+la", CONTROL, f"{CONTROL}+la", "balanced-softmax")


def run_seed(
    seed: int,
    work: Path,
    settings: dict[str, Any],
    methods: dict[str, Any] | None = None,
    stage: str = "evaluate",
) -> dict[str, Any]:
    """Results of one long-tailed sample, `{method: {split: {metric: value}}}`.

    Empty if the run ends at an earlier stage.
    """
    from discl.pipeline import run_until
    from discl.recipe import load_recipe
    from discl.run_folder.open import open_run

    shared = {
        **settings,
        "data.long_tail.seed": seed,
        "train.seed": seed,
        "runtime.threads": 1,
        "runtime.device": "cpu",
    }
    recipe = load_recipe(RECIPE, {**shared, "methods": methods or METHODS, "baseline": None})
    run = open_run(recipe, work / f"seed-{seed}", amend=True)
    run_until(run, stage)
    if stage != "evaluate":
        return {}
    results = json.loads(run.path("results.json").read_text())
    if methods is None:
        copy = work / "own-rate"
        share_spectrum(work / f"seed-{seed}", copy / f"seed-{seed}")
        results |= run_seed(
            seed, copy, {**settings, "train.optimizer.lr": OWN_LEARNING_RATE}, OWN_RATE
        )
        results |= run_oracle(seed, work, shared)
    return results


def share_spectrum(source: Path, target: Path) -> None:
    """Copies what was generated and scored, so that another folder need not do it again."""
    if not target.exists():
        unfinished = target.with_name(target.name + ".new")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(
            source, unfinished, ignore=shutil.ignore_patterns("train", "cache", "results.json")
        )
        unfinished.replace(target)


def run_oracle(seed: int, work: Path, shared: dict[str, Any]) -> dict[str, Any]:
    """The same training with real extra tail images in the place of the spectrum, at level 100."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from discl.data import read_tables
    from discl.recipe import load_recipe
    from discl.run_folder.open import open_run
    from discl.stages.evaluate import evaluate
    from discl.stages.hard import ensure_hard
    from discl.stages.prepare_data import prepare_data
    from discl.stages.train import train
    from discl.utils.hashing import derive_seed

    epochs = load_recipe(
        RECIPE, shared
    ).train.epochs  # its extra images are real, so they stay to the end
    recipe = load_recipe(RECIPE, {**shared, "methods": ORACLES, "train.curriculum_epochs": epochs})
    run = open_run(recipe, work / f"seed-{seed}-oracle", amend=True)
    prepare_data(run)
    ensure_hard(run)
    if not run.path("filter.parquet").exists():
        pool, real = read_tables(recipe.data.root)["train"], run.tables["train"]
        taken, counts, labels = set(real.ids), real.class_counts, pool.labels
        rows = []
        for label in np.flatnonzero(counts < recipe.hard.fewer_than):
            free = [
                row
                for row in np.flatnonzero(labels == label).tolist()
                if pool.rows[row]["id"] not in taken
            ]
            free.sort(key=lambda row: derive_seed("oracle", seed, pool.rows[row]["id"]))
            rows += free[: round(recipe.methods["oracle"].synthetic_scale * counts[label])]
        chosen = [pool.rows[row] for row in rows]
        run.spectrum.append(
            [
                {
                    "id": f"oracle-{row['id']}",
                    "image": row["image"],
                    "label": row["label"],
                    "level": 100,
                }
                for row in chosen
            ]
        )
        ids, count = [f"oracle-{row['id']}" for row in chosen], len(chosen)
        kept = {
            "id": ids,
            "source_id": ids,
            "label": [row["label"] for row in chosen],
            "level": [100] * count,
            "seed": [0] * count,
            "attempt": [0] * count,
            "keep": [True] * count,
            "clip_similarity": [1.0] * count,
            "reason": [""] * count,
        }
        pq.write_table(pa.table(kept), run.path("filter.parquet"))
    train(run)
    evaluate(run)
    return json.loads(run.path("results.json").read_text())


def tune(work: Path, processes: int) -> dict[str, Any]:
    """Validation figures of the search: three learning rates; for DisCL four more settings."""
    grid = [
        (f"{method}, lr {lr:g}", {"train.optimizer.lr": lr}, method)
        for method in TUNED
        for lr in (0.001, 0.003, 0.01)
    ]
    grid += [
        (f"discl, threshold {threshold:g}", {"filter.threshold": threshold}, "discl")
        for threshold in (-1.0, 0.6)
    ]
    grid += [
        (f"discl, guidance_scale {scale:g}", {"spectrum.guidance_scale": scale}, "discl")
        for scale in (1.5, 6.0)
    ]
    grid = [(name, {**SEARCHED_FROM, **settings}, method) for name, settings, method in grid]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        pool.submit(
            run_seed,
            TUNING_SEED,
            work / "tune" / "spectrum",
            SEARCHED_FROM,
            {"discl": METHODS["discl"]},
            "filter",
        ).result()
        jobs = {
            name: pool.submit(try_settings, work / "tune", name, settings, method)
            for name, settings, method in grid
        }
        found = {name: job.result() for name, job in jobs.items()}
    for name, figures in found.items():
        print(
            f"{name:<36}"
            + "".join(f"{figures[key] * 100:8.1f}" for key in ("accuracy", "many", "medium", "few"))
        )
    return found


def try_settings(work: Path, name: str, settings: dict[str, Any], method: str) -> dict[str, float]:
    """Validation figures of one method at these settings; what was generated once is shared."""
    folder = work / name.replace(", ", "-").replace(" ", "-")
    share_spectrum(work / "spectrum" / f"seed-{TUNING_SEED}", folder / f"seed-{TUNING_SEED}")
    figures = run_seed(TUNING_SEED, folder, settings, {method: (METHODS | OWN_RATE)[method]})[
        method
    ]["validation"]
    return {key: figures[key] for key in ("accuracy", "many", "medium", "few")}


def summarise(by_seed: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds per method, of `{seed: {row: {metric: value}}}`.

    Two differences are paired over the seeds: `few_over_control`, to the same mixture without
    synthetic images (adjusted rows to the adjusted one), and `all_over_best`, to the row without
    synthetic images that has the highest mean accuracy.
    """

    def values(key: str, metric: str) -> list[float]:
        return [100 * results[key][metric] for results in by_seed.values()]

    best = max(WITHOUT_IMAGES, key=lambda key: statistics.mean(values(key, "accuracy")))
    rows = []
    for key, title in ROWS:
        row: dict[str, Any] = {"method": title, "key": key, "seeds": len(by_seed)}
        for metric in ("accuracy", "many", "medium", "few"):
            row[metric] = _mean_std(values(key, metric))
            row[metric]["gain"] = row[metric]["mean"] - statistics.mean(values("ce", metric))
        control = CONTROL + "+la" * key.endswith("+la")
        row["few_over_control"] = _paired(values(key, "few"), values(control, "few"))
        row["all_over_best"] = _paired(values(key, "accuracy"), values(best, "accuracy"))
        rows.append(row)
    return rows


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": spread}


def _paired(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    return _mean_std([value - other for value, other in zip(values, others, strict=True)])


def table(rows: list[dict[str, Any]]) -> str:
    """The summary in Markdown."""
    lines = [
        "| method | all | many | medium | few | few − same mixture without synthetic images "
        "| all − best row without synthetic images |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[metric]['mean']:.1f} ± {row[metric]['std']:.1f}"
            for metric in ("accuracy", "many", "medium", "few")
        ]
        cells += [
            f"{row[key]['mean']:+.1f} ± {row[key]['std']:.1f}"
            for key in ("few_over_control", "all_over_best")
        ]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/fashion_lt"), help="folder for the runs"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--processes", type=int, default=2, help="seeds at a time, one CPU thread each"
    )
    parser.add_argument(
        "--tune", action="store_true", help="print the validation figures of the search instead"
    )
    parser.add_argument(
        "--table", type=Path, help="print the table of these figures and do nothing else"
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(summarise(json.loads(arguments.table.read_text())["test_by_seed"])))
        return
    started = time.time()
    if arguments.tune:
        figures: dict[str, Any] = {"validation": tune(arguments.work, arguments.processes)}
    else:
        with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
            jobs = {
                str(seed): pool.submit(run_seed, seed, arguments.work, {})
                for seed in range(arguments.seeds)
            }
            by_seed = {seed: job.result() for seed, job in jobs.items()}
        lean = {
            seed: {method: figures["test"] for method, figures in results.items()}
            for seed, results in by_seed.items()
        }
        rows = summarise(lean)
        print(table(rows))
        figures = {"rows": rows, "test_by_seed": lean, "goals": {"few, DisCL − CE": 10.0}}
    print(f"{time.time() - started:.0f} s")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
