"""The script of the CIFAR100-LT table on synthetic trainings, and the measures of the generator."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file

from discl.data import read_tables
from discl.mixtures import LONG_FORM, in_long_form, name_mixture, read_mixture
from discl.pipeline import run_until
from discl.recipe import load_recipe
from discl.run_folder.open import open_run
from helpers import miniatures

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("cifar100_lt")


def test_light_tuning_has_the_rows_that_it_expects_something_of(script: Any) -> None:
    light = load_script("light")
    job = script.Job(
        None, Path("work"), Path("results"), {}, light.RECIPE, oracle=False, filters=light.FILTERS
    )
    methods = job.recipe.methods
    assert {row for expected in light.EXPECTED for row in expected[1:3]} <= set(job.rows)
    assert script.ORACLE not in job.rows and {len(each) for each in job.trials.values()} == {1, 3}
    twins = [
        script.Unit("seed-0/x", name, {}, 0).identity(job)
        for name in ("light-levels-la", "light-levels-difficulty")
    ]
    assert twins[0] != twins[1]
    for name, method in methods.items():
        train = job.recipe.training(name)
        if name.startswith("light-levels-") and name != "light-levels-balanced":
            assert (method.mixture, method.prior, method.strategy) == (
                "all",
                "effective",
                "all-levels",
            )
        assert (train.epochs, train.steps_per_epoch, train.batch_size) == (6, 60, 128)


def test_the_table_of_light_tuning_has_no_published_figures(script: Any, tmp_path: Path) -> None:
    light = load_script("light")
    job = script.Job(
        None, Path("work"), tmp_path, {}, light.RECIPE, oracle=False, filters=light.FILTERS,
        expected=light.EXPECTED, families={}, methods=("flyp", "light", "light-levels-la"),
        seeds=(0,),
    )  # fmt: skip
    make_up(script, job, script.trial_units(job))
    make_up(script, job, script.edge_units(job))
    make_up(script, job, script.seed_units(job))
    told = script.write_table(job)
    assert "| light-levels-la |" in told and "published" not in told
    assert "few, light − flyp: +" in told


LABELS = np.repeat(np.arange(100, dtype=np.uint8), 2)
GROUPS = {"many": list(range(35)), "medium": list(range(35, 70)), "few": list(range(70, 100))}


def make_up(script: Any, job: Any, units: Sequence[Any]) -> None:
    """The files of these units.

    Method number n is right about the last 10·n images, and about more with each seed.
    """
    job.results.mkdir(parents=True, exist_ok=True)
    facts = {
        "judged_on": "a part",
        "groups": GROUPS,
        "unet_rows": {"0": 78000, "20": 62400, "50": 39000, "90": 7800},
    }
    (job.results / script.FACTS).write_text(json.dumps(facts))
    save_file({"test": LABELS}, job.results / "labels.safetensors")
    order = [*job.recipe.methods, script.ORACLE]
    for unit in units:
        path = job.results / f"{unit.place}.json"
        path.parent.mkdir(exist_ok=True)
        told = {
            "identity": unit.identity(job),
            "settings": dict(unit.settings),
            "cost": {"training, core-s": 100.0},
        }
        told["measured"] = unit.method == "ce-adaptive"
        told["levels"] = [[0], [50], []] if unit.method == "ce-discl" else [[]]
        rows = [unit.method] if unit.method.startswith("bs") else [unit.method, f"{unit.method}+la"]
        if unit.seed is None:
            la = {} if len(rows) == 1 else {"adjustment.prior": "real", "adjustment.tau": 1.5}
            path.write_text(
                json.dumps(
                    told
                    | {
                        "figure": 0.2 + 0.1 * (unit.settings == {"train.optimizer.lr": 0.03}),
                        "adjustment": la,
                    }
                )
            )
            continue
        predicted = np.where(
            np.arange(200)[::-1] < 10 * order.index(unit.method) + unit.seed, LABELS, 255
        ).astype(np.uint8)
        right = predicted == LABELS
        means = {
            name: float(right[np.isin(LABELS, members)].mean()) for name, members in GROUPS.items()
        }
        path.write_text(
            json.dumps(
                told | {"rows": {row: {**means, "accuracy": float(right.mean())} for row in rows}}
            )
        )
        save_file(dict.fromkeys(rows, predicted), path.with_suffix(".safetensors"))


def test_the_table_of_complete_seeds(script: Any, tmp_path: Path) -> None:
    job = script.Job(None, tmp_path / "work", tmp_path / "results", {})
    assert script.chosen_settings(job) == {} and script.edge_units(job) == []
    with pytest.raises(SystemExit, match="no row is complete"):
        script.write_table(job)
    ends = ("square-root", "-balanced", "-retrieval", script.ADAPTED, script.SHUFFLED)
    later = {name for name in job.recipe.methods if name.endswith(ends)}
    names = [name for name in job.recipe.methods if name not in later]
    make_up(script, job, [unit for unit in script.trial_units(job) if unit.method in names])
    beyond = script.edge_units(job)  # .03 is best, and the least of three rates
    assert [unit.place for unit in beyond] == [f"trials/{name}.3" for name in names]
    assert {unit.settings["train.optimizer.lr"] for unit in beyond} == {0.01}
    assert script.chosen_settings(job) == {}
    make_up(script, job, beyond)
    chosen = script.chosen_settings(job)
    assert chosen["ce"] == {
        "train.optimizer.lr": 0.03,
        "adjustment.prior": "real",
        "adjustment.tau": 1.5,
    }
    assert chosen["bs"] == {"train.optimizer.lr": 0.03} and chosen["oracle"] == chosen["ce-discl"]
    units = script.seed_units(job)
    assert len(units) == 3 * (len(names) + 1)
    make_up(script, job, units[:-1])  # of the last seed the oracle is missing
    (job.results / "seed-2" / "text-all.json").unlink()
    for path in job.results.glob("trials/levels-all.*"):
        path.unlink()
    told = script.write_table(job)
    plain = json.loads((job.results / "comparison.json").read_text())
    assert plain["seeds"] == [0, 1, 2] and plain["baseline"] == "ce"
    still = [name for name in job.recipe.methods if name in later]
    still += ["text-all (seed 2)", "levels-all"]
    *others, last = sorted(still, key=lambda name: list(job.recipe.methods).index(name.split()[0]))
    assert told.splitlines()[-1] == f"- open: {', '.join([*others, last, 'oracle (seed 2)'])}"
    assert not {"text-all", "levels-all", "oracle"} & set(plain["rows"])
    discl, names = plain["rows"]["ce-discl"], list(job.recipe.methods)
    assert discl["figures"]["all"] == pytest.approx(
        [(10 * names.index("ce-discl") + seed) / 200 for seed in range(3)]
    )
    assert discl["costs"] == {"UNet rows": 78000 + 39000, "training, core-s": 100}
    assert (
        plain["rows"]["ce-adaptive"]["costs"]["UNet rows"] == 78000 + 62400 + 39000 + 7800
    )  # every level is measured
    assert plain["rows"]["ce"]["costs"]["UNet rows"] == 0
    assert discl["intervals"]["all"][0] == pytest.approx(100 * 10 * names.index("ce-discl") / 200)
    assert discl["published"]["few"] == 10.65 and not plain["rows"]["ce-discl+la"]["published"]
    assert "ce" not in plain["rows"]["ce"]["intervals"] and plain["rows"]["ce-cuda+la"]["intervals"]
    assert "few, ce-discl − ce: +" in told and "more than +5: as expected" in told
    assert (
        "few, ce-all-levels − ce-text-only: +0.0 [+0.0, +0.0], more than +0: not as expected"
        in told
    )
    assert (
        "train.optimizer.lr = 0.03" in told
        and "ce-cuda" in (job.results / "comparison.html").read_text()
    )


def test_a_selection_is_trained_and_printed_alone(script: Any, tmp_path: Path) -> None:
    whole = script.Job(None, tmp_path / "work", tmp_path / "results", {})
    job = replace(whole, methods=("ce-balanced", "text-balanced", "oracle"), seeds=(0,))
    make_up(script, job, script.trial_units(job))
    make_up(script, job, script.edge_units(job))
    assert {path.name.partition(".")[0] for path in (job.results / "trials").iterdir()} == {
        "ce-balanced", "text-balanced", "ce-discl",
    }  # fmt: skip
    units = script.seed_units(job)
    assert [unit.place for unit in units] == [f"seed-0/{name}" for name in job.rows]
    make_up(script, job, units[:-1])
    told = script.write_table(job)  # the baseline is missing, so there are no differences
    assert "| text-balanced |" in told and told.splitlines()[-1] == "- open: ce, oracle"
    assert "all, text-balanced − ce-balanced: +5.0 [+5.0, +5.0], more than +0: as expected" in told
    assert not (job.results / "comparison.md").exists()
    with pytest.raises(SystemExit, match="no row is called cee; there are ce, "):
        script.trial_units(replace(job, methods=("cee",)))


def test_a_mixture_is_chosen_by_trials(script: Any, tmp_path: Path) -> None:
    """Test figures play no part; a family with a missing search has no choice."""
    best = {"ce-discl": [{"figure": 0.1}, {"figure": 0.2}]}
    tried = {name: [{"figure": 0.15}] for names in script.FAMILIES.values() for name in names}
    del tried["levels-all"]
    found = script.family_figures(tried | best | {"discl-all": [{"figure": 0.3}]})
    assert set(found) == {"real", "text", "discl"}
    assert found["discl"] == {
        "ce-discl": 0.2, "discl-balanced": 0.15, "discl-square-root": 0.15, "discl-all": 0.3,
    }  # fmt: skip
    assert script.resolve("discl-chosen+la", {"discl-chosen": "discl-all"}) == "discl-all+la"
    assert script.resolve("ce+la", {"discl-chosen": "discl-all"}) == "ce+la"


def test_rows_of_a_family_differ_in_their_mixture_alone(script: Any, tmp_path: Path) -> None:
    methods = script.Job(None, tmp_path, tmp_path, {}).recipe.plain()["methods"]
    for names in script.FAMILIES.values():
        rows = [in_long_form(methods[name], by_tail=True) for name in names]
        pairs = [read_mixture(methods[name], by_tail=True) for name in names]
        assert [name_mixture(*pair) for pair in pairs] == [
            "undersampled", "class-balanced", "square-root", "all",
        ]  # fmt: skip
        others = [{key: row[key] for key in row if key not in LONG_FORM} for row in rows]
        assert all(other == others[0] for other in others)


def test_an_adapted_row_has_the_settings_of_the_row_without(script: Any, tmp_path: Path) -> None:
    """Another identity, but no trial: its generator has seen what a trial holds out."""
    whole = script.Job(None, tmp_path / "work", tmp_path / "results", {})
    adapted = [name for name in whole.recipe.methods if name.endswith(script.ADAPTED)]
    job = replace(whole, methods=(*adapted, *map(script.settings_of, adapted)), seeds=(0,))
    methods = job.recipe.methods
    assert adapted and not set(adapted) & set(job.trials)
    make_up(script, job, script.trial_units(job))
    make_up(script, job, script.edge_units(job))
    chosen = script.chosen_settings(job)
    for name in adapted:
        plain = script.settings_of(name)
        assert chosen[name] == chosen[plain] and methods[name] == methods[plain]
        one, other = (script.Unit("seed-0/x", name, {}, 0) for _ in range(2))
        same = replace(one, method=plain)
        assert one.identity(job) == other.identity(job) != same.identity(job)


def test_the_committed_table_is_printed_again(script: Any) -> None:
    """No committed training has lost its identity."""
    job = script.Job(None, script.RESULTS, script.RESULTS, {})
    committed = json.loads((script.RESULTS / "comparison.json").read_text())
    found = script.read_results(job)
    assert set(found.predicted) == set(committed["rows"]) and found.seeds == committed["seeds"]


def test_the_committed_table_of_light_tuning_is_printed_again(script: Any) -> None:
    """Wherever the repository lies: identities hold no paths of its checkpoints."""
    light = load_script("light")
    job = script.Job(
        None, light.RESULTS, light.RESULTS, {}, light.RECIPE, oracle=False, filters=light.FILTERS
    )
    committed = json.loads((light.RESULTS / "comparison.json").read_text())
    assert set(script.read_results(job).predicted) == set(committed["rows"])
    page = (BENCHMARKS.parent / "docs" / "results.md").read_text()
    _, _, section = page.partition("## Light tuning of a CLIP")
    table = (light.RESULTS / "comparison.md").read_text().splitlines()
    printed = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in table}
    shown = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(shown) == len(committed["rows"])
    for line in shown:
        assert set(line.strip("| ").split(" | ")) <= set(printed[line.split(" | ")[0]])


def test_the_long_recipe_searches_as_much_for_every_method(script: Any, tmp_path: Path) -> None:
    job = script.Job(None, tmp_path, tmp_path, {}, BENCHMARKS / "cifar100_lt_full.yaml")
    trials = [unit.method for unit in script.trial_units(job)]
    assert set(trials) > {"ce", "bs-cuda", "ce-discl-scale-5"} and {
        trials.count(name) for name in trials
    } == {3}


def test_a_training_of_other_settings_is_carried_out_again(script: Any, tmp_path: Path) -> None:
    job = script.Job(None, tmp_path / "work", tmp_path / "results", {})
    (unit, *_) = script.trial_units(job)
    make_up(script, job, [unit])
    assert unit.done(job)
    elsewhere = replace(job, data=tmp_path, overrides={"runtime.threads": 2})
    assert unit.done(elsewhere)
    for change in (
        {"train.batch_size": 64},
        {"filter.threshold": 0.4},
        {"compare.tune.train": {"epochs": 4, "curriculum_epochs": 4}},
        {"compare.tune.hold_out": 0.5},
    ):
        assert not unit.done(replace(job, overrides=change))
    assert not replace(unit, settings={"train.optimizer.lr": 0.2}).done(job)


def test_the_oracle_has_real_images_that_training_lacks(script: Any, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for number in range(90):
        miniatures.draw(root / "abc"[number % 3] / f"{number}.png", number % 3, number)
    asked = {
        "name": "short",
        "data": {
            "root": str(root),
            "long_tail": {"n_max": 20, "imbalance_ratio": 10},
            "own_split": {"test": 0.1},
        },
        "hard": {"rule": "tail", "fewer_than": 8},
        "methods": {"ce-discl": {"strategy": "all-levels", "synthetic_scale": 2}},
        "spectrum": {"checkpoint": "nowhere", "levels": [0, 50]},
        "filter": {"checkpoint": "nowhere", "threshold": 0.2},
    }
    run = open_run(load_recipe(asked), tmp_path / "run")
    run_until(run, "data")
    script.make_oracle(run, tmp_path / "oracle")
    verdicts = pq.read_table(tmp_path / "oracle" / "filter.parquet").to_pylist()
    ids = [verdict["id"].removeprefix("oracle-") for verdict in verdicts]
    assert ids and len(set(ids)) == len(ids) and not set(ids) & set(run.train.ids)
    counts = run.train.class_counts
    tail = np.flatnonzero(counts < 8)
    assert {verdict["label"] for verdict in verdicts} == set(tail.tolist())
    wanted = {
        label: min(
            2 * counts[label],
            (read_tables(str(root))["train"].labels == label).sum() - counts[label],
        )
        for label in tail
    }
    assert {
        label: sum(verdict["label"] == label for verdict in verdicts) for label in tail
    } == wanted


@pytest.mark.slow
def test_the_whole_of_it_in_miniature(
    script: Any,
    tmp_path: Path,
    tiny_diffusion: Path,
    tiny_clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script, "ADAPT", {"rank": 2, "steps": 2, "batch_size": 2})
    for split, count in (("train", 72), ("test", 12)):
        for number in range(count):
            miniatures.draw(
                tmp_path / "pictures" / split / "abc"[number % 3] / f"{number}.png",
                number % 3,
                number + 100 * (split == "test"),
            )
    for number in range(20):
        miniatures.draw(tmp_path / "archive" / f"{number}.png", number % 3, number + 200)
    asked = {
        "name": "short",
        "data": {
            "root": str(tmp_path / "pictures"),
            "long_tail": {"n_max": 20, "imbalance_ratio": 5},
        },
        "groups": {"many": 15, "few": 8},
        "hard": {"fewer_than": 8},
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [0, 50],
            "seeds": 2,
            "num_inference_steps": 4,
        },
        "train": {
            "epochs": 2,
            "curriculum_epochs": 1,
            "batch_size": 8,
            "image_size": 32,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "model": {"architecture": "resnet10", "width": 4, "stem": "3x3"},
            "precision": "float32",
        },
        "methods": {
            "ce": {"strategy": "real-only"},
            "ce-discl": {"strategy": "all-levels", "synthetic_scale": 2},
            "ce-discl-adapted": {"strategy": "all-levels", "synthetic_scale": 2},
            "ce-retrieval": {"images": "retrieved", "synthetic_scale": 2},
            "ce-retrieval-shuffled": {"images": "retrieved", "synthetic_scale": 2},
        },
        "retrieval": {"archive": "ARCHIVE", "threshold": -1, "copy_cosine": 1},
        "baseline": "ce",
        "compare": {
            "published": "cifar100-lt-ir100-resnet10",
            "seeds": [0],
            "tune": {
                "trials": 2,
                "hold_out": 0.3,
                "space": {"train.optimizer.lr": [0.1, 0.01]},
                "train": {"epochs": 1},
            },
        },
    }
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(asked))
    job = script.Job(
        tmp_path / "pictures", tmp_path / "work", tmp_path / "results", {}, tmp_path / "short.yaml"
    )
    with pytest.raises(
        SystemExit,
        match="ce-retrieval, ce-retrieval-shuffled: these rows take images of an archive",
    ):
        script.open_data(job)
    job = replace(job, archive=tmp_path / "archive")
    script.prepare(script.open_data(job), job)
    for plan in (script.trial_units, script.edge_units, script.seed_units):
        units = plan(job)
        assert units and not any(unit.done(job) for unit in units)
        for unit in units:
            assert unit.place in script.carry_out(unit, job)
        assert all(unit.done(job) for unit in units)
    held = {
        row["id"]
        for row in pq.read_table(job.work / "trials" / "data.parquet").to_pylist()
        if row["split"] == "validation"
    }
    sources = set(pq.read_table(job.work / "trials" / "filter.parquet")["source_id"].to_pylist())
    assert held and sources and not held & sources
    table = script.write_table(job)
    told = json.loads((job.results / "comparison.json").read_text())
    names = (
        "ce",
        "ce-discl",
        "ce-discl-adapted",
        "ce-retrieval",
        "ce-retrieval-shuffled",
        "oracle",
    )
    assert set(told["rows"]) == {name + la for name in names for la in ("", "+la")}
    made = {
        folder: set(pq.read_table(job.work / folder / "filter.parquet")["id"].to_pylist())
        for folder in ("spectrum", "spectrum-adapted")
    }
    assert all(made.values()) and not made["spectrum"] & made["spectrum-adapted"]
    assert not list(job.work.glob("trials/ce-discl-adapted*"))
    for folder in ("spectrum", "retrieved-shuffled"):
        assert len(pq.read_table(job.work / folder / "retrieved.parquet"))
    assert not list(job.work.glob("trials/*shuffled*"))
    assert told["rows"]["ce-retrieval"]["costs"]["UNet rows"] == 0
    alone = replace(job, archive=None, methods=("ce",), work=tmp_path / "other")
    assert "ce-retrieval" not in script.open_data(alone).recipe.methods
    assert (
        told["rows"]["ce"]["costs"]["UNet rows"]
        == 0
        < told["rows"]["ce-discl"]["costs"]["UNet rows"]
    )
    oracle = job.read("seed-0/oracle")
    assert (
        oracle["levels"] == [[100], [100]]
        and oracle["settings"] == job.read("seed-0/ce-discl")["settings"]
    )
    assert all(each["costs"]["training, core-s"] > 0 for each in told["rows"].values())
    assert "few, ce-discl − ce:" in table and "ce-all-levels" not in table


def test_retrieved_images_are_shuffled_among_their_classes(script: Any, tmp_path: Path) -> None:
    """A unit of such a row trains on the shuffled table."""
    table = pa.table({"id": [str(number) for number in range(30)], "label": [4, 7, 9] * 10})
    pq.write_table(table, tmp_path / "retrieved.parquet")
    run = SimpleNamespace(path=lambda name: tmp_path / name)
    for folder in ("one", "two"):
        script.shuffle_retrieved(run, tmp_path / folder)
    first, second = (
        pq.read_table(tmp_path / folder / "retrieved.parquet") for folder in ("one", "two")
    )
    assert first.equals(second) and first["id"] == table["id"]
    assert first["label"] != table["label"]
    assert sorted(first["label"].to_pylist()) == sorted(table["label"].to_pylist())
    job = script.Job(None, tmp_path, tmp_path, {})
    unit = script.Unit("seed-0/x", f"ce-retrieval{script.SHUFFLED}", {}, 0)
    assert script.folder_of(unit, job) == "retrieved-shuffled"
    assert script.settings_of(unit.method) == "ce-retrieval"


def test_the_documents_hold_what_was_measured() -> None:
    """Every line of every table equals what the scripts print from the committed figures."""
    told = set((BENCHMARKS.parent / "docs" / "results.md").read_text().splitlines())
    printed = (BENCHMARKS / "results" / "cifar100_lt" / "comparison.md").read_text().splitlines()
    assert {line for line in printed if line.startswith(("|", "- few, "))} <= told
    told = {line.strip() for line in (BENCHMARKS / "README.md").read_text().splitlines()}
    fashion, lowlight = load_script("fashion_lt"), load_script("lowlight")
    figures = {
        name: json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
        for name in ("fashion_lt", "lowlight")
    }
    assert (
        set(fashion.table(fashion.summarise(figures["fashion_lt"]["test_by_seed"])).splitlines())
        <= told
    )
    assert {line.strip() for line in lowlight.table(figures["lowlight"]).splitlines()} <= told


def test_measures_of_a_generator() -> None:
    generator = load_script("generator")
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(4000, 3))
    moved = plain * 2 + np.array([3.0, 0, 0])  # |Δμ|² + Σ (1 − 2)² over the axes
    assert generator.frechet_distance(plain, plain) == pytest.approx(0, abs=1e-6)
    assert generator.frechet_distance(plain, moved) == pytest.approx(9 + 3, rel=0.1)
    ring = np.stack([np.cos(np.arange(0, 6.28, 0.1)), np.sin(np.arange(0, 6.28, 0.1))], 1)
    half = ring[: len(ring) // 2]
    assert generator.covered(half, ring) == 1
    assert 0.5 <= generator.covered(ring, half) < 0.65
    distance, row = generator.nearest(ring[[3, 9]], ring)
    assert distance == pytest.approx([0, 0]) and row.tolist() == [3, 9]
