"""Accuracy against UNet rows: what a budget buys, and whether a loop's policy spends it better.

    python -m benchmarks.budget --work build/budget               # all settings but CIFAR100-LT
    python -m benchmarks.budget --work build/budget --settings cifar100 --data DIR
    python -m benchmarks.budget --work build/budget --only 'vague/*/entropy-*' --minutes 30
    python -m benchmarks.budget --list                             # units and costs
    python -m benchmarks.budget --table                            # from the committed figures

The one-shot plan has every hard image at every level with all seeds. A row of the table may spend
1/8, 1/4, 1/2 or all of its UNet rows. `uniform` spends them in one round, evenly: it has fewer
seeds. `deficit`, `entropy` and `progress` are policies of a loop with as many rounds as levels,
so that a round is a stage of diverse-to-specific. All train the recipe's network as long.

Settings are those of `gap.py` (Fashion-MNIST-LT, and gaps of prompts and style), each draw another
long-tailed sample. On `cifar100` a draw is a training seed; its network, rates and the rows
`uniform-1`, `ce` and `ce-undersampled` are those of `cifar100_lt.py`.

A unit is a setting, draw, policy and budget. It writes one file to `results/budget`. A unit whose
file exists is not run again; call it again after a kill. The one-shot spectrum of a setting and
draw is made first, and all units share its store: what a loop asks for is made only if it is not
there. What is expected was written down before the first unit was run:
`results/budget/expected.yaml`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import gap
from benchmarks.gap import SETTINGS, write_json
from benchmarks.gap_tables import in_points, verdict

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "budget"
CIFAR_RESULTS = HERE / "results" / "cifar100_lt"
CIFAR = "cifar100"
NAMES = ("plain", "vague", "half", "dim", CIFAR)
PARTS = (8, 4, 2, 1)
"""A budget is the UNet rows of the one-shot plan, divided by one of these."""
POLICIES = ("uniform", "deficit", "entropy", "progress")
CONTROLS = "controls"
LEARNER = "discl"
REAL: dict[str, dict[str, str]] = {
    "ce": {"strategy": "real-only"},
    "ce-undersampled": {"strategy": "real-only", "mixture": "undersampled"},
    "ce-balanced": {"strategy": "real-only", "mixture": "class-balanced"},
}
"""Rows without synthetic images; ce-undersampled has the mixture of the others."""
TRAIN = {"train.model.width": 8, "train.epochs": 24, "train.curriculum_epochs": 20}
METRICS = {"all": "accuracy", "many": "many", "medium": "medium", "few": "few"}
SECONDS = {"fashion": 25, CIFAR: 430}
"""Seconds of a processor for one training, measured on the first units."""


@dataclass(frozen=True)
class Unit:
    """One training with at most 1 / `parts` of the one-shot plan's UNet rows.

    `policy` is one of `POLICIES`, or `controls` for the rows without synthetic images.
    """

    setting: str
    draw: int
    policy: str
    parts: int = 1

    @property
    def row(self) -> str:
        """Name of the row in tables: `entropy-1/4`."""
        return f"{self.policy}-1/{self.parts}".removesuffix("/1")

    @property
    def name(self) -> str:
        """Path of its file without the suffix: `vague/0/entropy-1of4`.

        Settings with the same real images share the rows without synthetic ones.
        """
        if self.policy == CONTROLS:
            return f"real-{SETTINGS[self.setting].domain}/{self.draw}"
        return f"{self.setting}/{self.draw}/{self.row.replace('1/', '1of')}"

    @property
    def seconds(self) -> int:
        """Estimated seconds of a processor."""
        one = SECONDS[CIFAR if self.setting == CIFAR else "fashion"]
        return one * (len(REAL) if self.policy == CONTROLS else 1)


def list_units(
    settings: Sequence[str], draws: Sequence[int], policies: Sequence[str]
) -> list[Unit]:
    """All units, those that decide most first: a quarter and the whole, then the others."""
    found: dict[str, tuple[int, Unit]] = {}
    for draw in draws:
        for setting in settings:
            if setting != CIFAR:
                unit = Unit(setting, draw, CONTROLS)
                found.setdefault(unit.name, (0, unit))
            for policy in policies:
                for parts in PARTS:
                    unit = Unit(setting, draw, policy, parts)
                    if setting == CIFAR and unit.row == "uniform-1":
                        continue  # that of cifar100_lt.py
                    first = parts == 4 or unit.row == "uniform-1"
                    rank = 0 if first else 1 if policy == "uniform" else 3 if parts == 1 else 2
                    found[unit.name] = (rank, unit)
    return [unit for _, unit in sorted(found.values(), key=lambda each: each[0])]


# ------------------------------------------------------------------------------------ one unit


def base_recipe(unit: Unit, work: Path, data: Path | None) -> Any:
    """The recipe of the one-shot plan, with the learner as its only method."""
    from discl import load_recipe
    from discl.stages.tune import with_methods

    if unit.setting != CIFAR:
        overrides = gap.recipe_of(SETTINGS[unit.setting], unit.draw, work, None)
        overrides |= {
            **TRAIN,
            "filter.threshold": SETTINGS[unit.setting].threshold,
            "evaluate.logit_adjustment": list(gap.TEMPERATURES),
            "train.seed": unit.draw,
            "methods": {LEARNER: {"strategy": "diverse-to-specific", "missing": "nearest"}},
        }
        return load_recipe("fashion-lt", overrides)
    if data is None:
        raise SystemExit("cifar100 needs --data DIR, with train.parquet and test.parquet")
    here = {"data.root": str(data.resolve()), "runtime.device": "cpu", "runtime.threads": 1}
    recipe = load_recipe(HERE / "cifar100_lt.yaml", here)
    settings = read_json(CIFAR_RESULTS / f"seed-{unit.draw}" / "ce-discl.json")["settings"]
    return with_methods(recipe, {LEARNER: ("ce-discl", settings)}, {"seed": unit.draw})


def unit_recipe(unit: Unit, base: Any, rows: int) -> Any:
    """The recipe of a unit.

    - `base`: that of the one-shot plan.
    - `rows`: UNet rows of the one-shot plan.
    """
    from discl import load_recipe

    if unit.policy == CONTROLS:
        return load_recipe(base, {"methods": REAL})
    changes: dict[str, Any] = {"spectrum.budget": {"unet_rows": rows // unit.parts}}
    if unit.policy != "uniform":
        changes["loop"] = {"rounds": len(base.spectrum.levels), "policy": unit.policy}
    return load_recipe(base, changes)


def open_whole(unit: Unit, base: Any, work: Path, results: Path) -> tuple[Any, int]:
    """The run of the one-shot spectrum, made where it is missing, and its UNet rows."""
    from discl import open_run, run_until
    from discl.spectrum.plan import read_plan
    from discl.stages.budget import count_rows

    place = unit.setting if unit.setting == CIFAR else f"{unit.setting}-{unit.draw}"
    run = open_run(base, work / "whole" / place, amend=True)
    run_until(run, "plan")
    before, started = len(run.spectrum.ids()), time.process_time()
    run_until(run, "filter")
    plan = read_plan(run.path("plan.parquet"))
    rows, seconds = count_rows(run, plan), time.process_time() - started
    file = results / unit.setting / f"{unit.draw}" / "spectrum.json"
    if not file.exists():
        made = len(run.spectrum.ids()) - before
        cost = {"processor_seconds": round(seconds, 1)} if made == len(plan) else {}
        write_json(file, {"unet_rows": rows, "images": len(plan), **cost})
    return run, rows


def run_unit(unit: Unit, work: Path, results: Path, data: Path | None) -> str:
    """Trains and measures a unit and writes its file; returns a line about it."""
    import torch

    from discl import run_until
    from discl.run_folder.run import Run

    torch.set_num_threads(1)
    base = base_recipe(unit, work, data)
    whole, rows = open_whole(unit, base, work, results)
    folder = work / "units" / unit.name
    folder.mkdir(parents=True, exist_ok=True)
    shared = {name: whole.path(name) for name in ("data.parquet", "hard.parquet", "spectrum")}
    shared |= {name: whole.path(name) for name in ("scores", "cache")}
    run = Run(unit_recipe(unit, base, rows), folder, shared)
    present, started = len(run.spectrum.ids()), time.process_time()
    run_until(run, "evaluate")
    found = {
        "rows": read_figures(json.loads(run.path("results.json").read_text())),
        "processor_seconds": round(time.process_time() - started, 1),
    }
    if unit.policy != CONTROLS:
        found = {**count_images(run), "made": len(run.spectrum.ids()) - present, **found}
    write_json(results / f"{unit.name}.json", found)
    few = {name: row["test"]["few"] for name, row in found["rows"].items()}
    return ", ".join(f"{name} {value:.1f} on few" for name, value in few.items())


def count_images(run: Any) -> dict[str, Any]:
    """UNet rows of the unit's images, made or shared, and images by class: asked for and kept."""
    from discl.spectrum.plan import read_plan
    from discl.stages.budget import count_rows
    from discl.utils.stored import read_table

    plan, names = read_plan(run.path("plan.parquet")), run.train.class_names
    verdicts = read_table(run.path("filter.parquet"), ["label", "keep"]).to_pylist()
    asked = Counter(names[row["label"]] for row in verdicts)
    kept = Counter(names[row["label"]] for row in verdicts if row["keep"])
    return {"unet_rows": count_rows(run, plan), "asked": asked, "kept": kept}


def read_figures(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """`{method: {split: {metric: per cent}}}`, with `+la` behind metrics of adjusted logits."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, splits in results.items():
        method, adjusted, _ = name.partition("+la")
        for split, figures in splits.items():
            own = found.setdefault(method, {}).setdefault(split, {})
            own |= {f"{key}{adjusted}": 100 * figures[stored] for key, stored in METRICS.items()}
    return found


# --------------------------------------------------------------------------------------- tables


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_results(results: Path) -> dict[str, dict[int, dict[str, dict[str, dict[str, float]]]]]:
    """`{setting: {draw: {row: {split: {metric: per cent}}}}}` of the finished units."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for setting in NAMES:
        for draw in range(100):
            units = list_units([setting], [draw], POLICIES)
            rows: dict[str, Any] = {}
            for unit in units:
                file = results / f"{unit.name}.json"
                if file.is_file():
                    trained = read_json(file)["rows"]
                    rows |= trained if unit.policy == CONTROLS else {unit.row: trained[LEARNER]}
            if setting == CIFAR and rows:
                rows |= _rows_of_table(draw)
            if set(rows) - set(REAL):
                found.setdefault(setting, {})[draw] = rows
    return found


def _rows_of_table(seed: int) -> dict[str, Any]:
    """Rows that `cifar100_lt.py` trained."""
    names = {"ce": "ce", "ce-undersampled": "ce-undersampled", "ce-discl": "uniform-1"}
    rows = {}
    for method, row in names.items():
        file = CIFAR_RESULTS / f"seed-{seed}" / f"{method}.json"
        if file.is_file():
            tested = {name: {"test": each} for name, each in read_json(file)["rows"].items()}
            rows[row] = read_figures(tested)[method]
    return rows


def differences(
    units: Mapping[int, Mapping[str, Any]],
    row: str,
    other: str,
    metric: str,
    split: str = "test",
) -> list[float]:
    """Points of one row over another on a split's images, one for each draw that has both.

    `best-real` is the row without synthetic images that is best on validation.
    """
    found = []
    for rows in units.values():
        minus, its = best_real(rows, metric) if other == "best-real" else (other, metric)
        if all(name in rows and split in rows[name] for name in (row, minus)):
            found.append(rows[row][split][metric] - rows[minus][split][its])
    return found


def best_real(rows: Mapping[str, Any], metric: str) -> tuple[str, str]:
    """(row, metric) of the best row without images by all validation images, adjusted or not.

    Without validation images it is the best on test, which favours it.
    """
    own = metric.removesuffix("+la")

    def figure(candidate: tuple[str, str]) -> float:
        splits, end = rows[candidate[0]], candidate[1]
        return float(splits.get("validation", splits["test"])[f"all{end}"])

    offered = [(name, end) for name in REAL if name in rows for end in ("", "+la")]
    name, end = max(offered, key=figure) if offered else ("", "")
    return name, own + end


def curves(
    units: Mapping[int, Mapping[str, Any]], metric: str = "few", control: str = "ce-undersampled"
) -> dict[str, list[tuple[float, list[float]]]]:
    """`{policy: [(fraction of the rows, points over a control, one a draw)]}`."""
    return {
        policy: [
            (1 / parts, values)
            for parts in PARTS
            if (values := differences(units, Unit("", 0, policy, parts).row, control, metric))
        ]
        for policy in POLICIES
    }


def tables(results: Path) -> str:
    """Gains by policy and budget, policies against `uniform`, and what was expected."""
    found, lines = read_results(results), []
    heads = [Unit("", 0, "", parts).row.removeprefix("-") for parts in PARTS]
    for metric in ("few", "all+la"):
        lines += [f"{metric}, row − the same mixture without synthetic images, points", ""]
        lines += [f"| setting (draws) | policy | {' | '.join(heads)} |", "|---|---|" + "---:|" * 4]
        for setting, units in found.items():
            for policy, points in curves(units, metric).items():
                cells = dict(points)
                values = [in_points(cells.get(1 / parts, [])) for parts in PARTS]
                lines.append(f"| {setting} ({len(units)}) | {policy} | {' | '.join(values)} |")
        lines.append("")
    lines += ["few, policy − uniform at the same budget, paired over the draws, points", ""]
    lines += [f"| setting | policy | {' | '.join(heads)} |", "|---|---|" + "---:|" * 4]
    for setting, units in found.items():
        for policy in POLICIES[1:]:
            rows = [
                (Unit("", 0, each, parts).row) for parts in PARTS for each in (policy, "uniform")
            ]
            pairs = zip(rows[::2], rows[1::2], strict=True)
            values = [in_points(differences(units, *pair, "few")) for pair in pairs]
            lines.append(f"| {setting} | {policy} | {' | '.join(values)} |")
    for policy in POLICIES[1:]:
        means = []
        for parts in PARTS:
            row, other = (Unit("", 0, each, parts).row for each in (policy, "uniform"))
            values, names = together(found, row, other, "few")
            means.append(in_points(values))
        if len(names) > 1:
            lines.append(f"| mean of {', '.join(names)} | {policy} | {' | '.join(means)} |")
    tail = [controls_table(found), whole_table(found), asked_table(results), expectations(found)]
    return "\n".join([*lines, *(line for table in tail for line in ("", *table))])


def controls_table(found: Mapping[str, Mapping[int, Any]]) -> list[str]:
    """The one-shot row and the rows without synthetic images, in per cent on test images."""
    names = [*REAL, "uniform-1/4", "uniform-1"]
    lines = [f"| setting, metric | {' | '.join(names)} | uniform-1 − best without images |"]
    lines.append("|---|" + "---:|" * (len(names) + 1))
    for setting, units in found.items():
        for metric in ("few", "few+la", "all", "all+la"):
            cells = []
            for name in names:
                values = [rows[name]["test"][metric] for rows in units.values() if name in rows]
                cells.append(f"{statistics.mean(values):.1f}" if values else "–")
            gain = in_points(differences(units, "uniform-1", "best-real", metric))
            lines.append(f"| {setting}, {metric} | {' | '.join(cells)} | {gain} |")
    return lines


def whole_table(found: Mapping[str, Mapping[int, Any]]) -> list[str]:
    """Parts of the UNet rows against all of them, spent evenly."""
    heads = ["few", "few on validation images", "all+la"]
    lines = [f"| uniform − all rows, points | {' | '.join(heads)} |", "|---|---:|---:|---:|"]
    for parts in PARTS[:-1]:
        row = Unit("", 0, "uniform", parts).row
        for setting, units in found.items():
            cells = [
                differences(units, row, "uniform-1", metric, split)
                for metric, split in (("few", "test"), ("few", "validation"), ("all+la", "test"))
            ]
            lines.append(f"| {setting}, {row} | {' | '.join(map(in_points, cells))} |")
        values, names = together(found, row, "uniform-1", "few")
        if len(names) > 1:
            lines.append(f"| mean of {', '.join(names)}, {row} | {in_points(values)} | – | – |")
    return lines


def asked_table(results: Path) -> list[str]:
    """Images of each rare class that a quarter of the UNet rows buys, mean over the draws."""
    lines = ["| images at a quarter | |", "|---|---|"]
    for setting in NAMES[:-1]:
        for policy in POLICIES:
            name = Unit(setting, 0, policy, 4).name.replace("/0/", "/*/")
            asked = [read_json(file).get("asked") for file in sorted(results.glob(f"{name}.json"))]
            if all(asked) and asked:
                means = {each: statistics.mean(one[each] for one in asked) for each in asked[0]}
                cells = ", ".join(f"{each} {mean:.0f}" for each, mean in means.items())
                lines.append(f"| {setting}, {policy} | {cells} |")
    return lines


def expectations(found: Mapping[str, Mapping[int, Any]]) -> list[str]:
    """What was written down beforehand, and what came; last the mean over the settings of `gap`."""
    import yaml

    lines = ["| setting | difference | expected | measured | |", "|---|---|---|---|---|"]
    expected = yaml.safe_load((RESULTS / "expected.yaml").read_text())["every setting"]
    for setting, units in found.items():
        for each in expected:
            values = differences(units, each["of"], each["minus"], "few")
            if len(values) > 1:
                what = f"{setting} | few, {each['of']} − {each['minus']}"
                lines.append(f"| {what} | {' | '.join(verdict(values, each['sign']))} |")
    for each in expected:
        values, names = together(found, each["of"], each["minus"], "few")
        if len(values) > 1 and len(names) > 1:
            what = f"mean of {', '.join(names)} | few, {each['of']} − {each['minus']}"
            lines.append(f"| {what} | {' | '.join(verdict(values, each['sign']))} |")
    return lines


def together(
    found: Mapping[str, Mapping[int, Any]], row: str, other: str, metric: str
) -> tuple[list[float], list[str]]:
    """(mean difference over the settings of `gap`, one for each draw that all have; the settings).

    Settings share the real images of a draw, so their differences are not independent.
    """
    names = [name for name in found if name != CIFAR]
    draws = set.intersection(*(set(found[name]) for name in names)) if names else set()
    values = []
    for draw in sorted(draws):
        own = [differences({draw: found[name][draw]}, row, other, metric) for name in names]
        if all(own):
            values.append(statistics.mean(each for one in own for each in one))
    return values, names


def cost_table(units: Sequence[Unit]) -> str:
    """Units and minutes of a processor of each setting."""
    lines, settings = [], dict.fromkeys(unit.setting for unit in units)
    for setting in settings:
        own = [unit for unit in units if unit.setting == setting]
        minutes = sum(unit.seconds for unit in own) / 60
        lines.append(f"{setting}: {len(own)} units, {minutes:.0f} minutes of a processor")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- main


def carry_out(unit: Unit, arguments: argparse.Namespace, until: float) -> str:
    """Runs a unit if there is time left; returns a line about it, empty where there is none."""
    if time.time() > until:
        return ""
    started = time.time()
    line = run_unit(unit, arguments.work, arguments.results, arguments.data)
    return f"{unit.name}: {line} ({time.time() - started:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/budget"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-100 as Parquet, for cifar100")
    parser.add_argument("--settings", nargs="+", choices=NAMES, default=NAMES[:-1])
    parser.add_argument("--draws", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of unit names")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start none later")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print missing units and their cost")
    parser.add_argument("--table", action="store_true", help="print the tables and do nothing else")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(arguments.results))
        return
    units = [
        unit
        for unit in list_units(arguments.settings, arguments.draws, arguments.policies)
        if any(fnmatch(unit.name, pattern) for pattern in arguments.only)
        and not (arguments.results / f"{unit.name}.json").exists()
    ]
    if arguments.list:
        print("\n".join([*(unit.name for unit in units), cost_table(units)]))
        return
    until = time.time() + 60 * arguments.minutes
    if arguments.processes == 1:
        for unit in units:
            print(carry_out(unit, arguments, until), flush=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context) as pool:
        for done in as_completed(
            [pool.submit(carry_out, each, arguments, until) for each in units]
        ):
            print(done.result(), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
