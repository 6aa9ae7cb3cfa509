"""The low-light recipes and the script of their table, on CIFAR-10 in miniature."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from discl.recipe import load_recipe
from helpers import miniatures

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "lowlight.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("lowlight", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory, tiny_diffusion: Path, tiny_clip: Path
) -> dict[str, Any]:
    """Overrides of data, checkpoints and sizes, and of nothing that the recipes are about."""
    return {
        "data.root": str(miniatures.cifar10(tmp_path_factory.mktemp("cifar10"))),
        "data.cameras.validation": 20,
        "data.cameras.most": {"train": 60, "test": 30, "test-ood": 20},
        "hard.below": 1.0,
        "hard.folds": 2,
        "hard.epochs": 1,
        "spectrum.checkpoint": str(tiny_diffusion),
        "spectrum.num_inference_steps": 10,
        "spectrum.seeds": 1,
        "filter.checkpoint": str(tiny_clip),
        "filter.threshold": -1,
        "train.model.checkpoint": str(tiny_clip),
        "train.batch_size": 16,
        "train.steps_per_epoch": 2,
        "train.epochs": 5,
        "train.curriculum_epochs": 4,
        "train.optimizer.warm_up_steps": 1,
        "evaluate.weight_ensembling": [0.5, 1.0],
        "runtime.slots": 16,
        "runtime.device": "cpu",
    }


def test_every_row_of_the_table_is_a_method_and_every_method_a_row(script: Any) -> None:
    methods = {name for recipe in script.RECIPES for name in load_recipe(recipe).methods}
    assert {row.partition("+")[0] for row in script.ROWS} == methods
    assert set(script.EXPECTED) <= set(script.ROWS)


def test_settings(script: Any) -> None:
    recipe, alia = (load_recipe(name) for name in script.RECIPES)
    assert recipe.data == alia.data and recipe.train == alia.train.model_copy(
        update={"curriculum_epochs": 8}
    )
    assert recipe.data.cameras is not None and recipe.data.cameras.most["train"] <= 10_000
    thresholds = [
        recipe.methods[f"adaptive-{name}-threshold"].threshold for name in ("no", "lower", "higher")
    ]
    assert thresholds[0] == -1 and -1 < thresholds[1] < recipe.filter.threshold < thresholds[2]
    assert alia.train.curriculum_epochs == alia.train.epochs


@pytest.mark.slow
def test_the_table_in_miniature(script: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """All stages of both recipes; the second call trains nothing and gives the same table."""
    few = {"base": {}, "zero-shot": {"fine_tune": "zero-shot"}}
    few["adaptive"] = {
        "strategy": "adaptive",
        "objective": "flyp",
        "missing": "nearest",
        "guidance_images": 12,
        "probe_samples": 16,
    }
    few["adaptive-higher-threshold"] = {**few["adaptive"], "threshold": -0.5}
    alia = {
        "strategy": "fixed",
        "level": 50,
        "synthetic_scale": 1,
        "undersample": False,
        "missing": "nearest",
    }
    chosen = {
        script.RECIPES[0]: {"methods": few, "baseline": None},
        script.RECIPES[1]: {"methods": {"alia": alia}, "train.curriculum_epochs": 5},
    }
    figures = script.carry_out(settings, tmp_path, [3], 1, chosen)
    assert set(figures["rows"]) == {
        "base",
        "base+we",
        "zero-shot",
        "adaptive",
        "adaptive+we",
        "adaptive-higher-threshold",
        "alia",
    }
    rows = figures["rows"]
    assert all(
        0 <= value <= 1
        for row in rows.values()
        for values in row["figures"].values()
        for value in values
    )
    assert not rows["base"]["intervals"] and not rows["base+we"]["intervals"]
    for row in (
        "adaptive",
        "alia",
        "adaptive+we",
    ):  # against the baseline, here the first method, whatever the recipe
        base = rows["base+we" if row.endswith("+we") else "base"]["figures"]["OOD macro F1"][0]
        difference, low, high = rows[row]["intervals"]["OOD macro F1"]
        assert (
            difference == pytest.approx(100 * (rows[row]["figures"]["OOD macro F1"][0] - base))
            and low <= high
        )
    assert rows["alia"]["costs"]["UNet rows"] > 0 and rows["adaptive"]["costs"]["training, s"] > 0
    assert figures["images"] == {"train": 60, "validation": 20, "test": 30, "test-ood": 20}
    assert [len(levels) for levels in figures["levels"]["adaptive"][0]] == [1, 1, 1, 1, 0]
    assert figures["levels"]["alia"] == [[[50]] * 5] and figures["levels"]["base"] == [[[]] * 5]
    reasons = pq.read_table(tmp_path / script.RECIPES[1] / "filter.parquet")["reason"].to_pylist()
    assert len(reasons) == 60 and any(
        "any picture" in reason or "too easy" in reason or "mislabelled" in reason
        for reason in reasons
    )
    lines = script.table(json.loads(json.dumps(figures))).splitlines()
    assert (
        lines[0].startswith(
            "| method | ID macro F1 | OOD macro F1 | ID macro F1, difference [95 %] |"
        )
        and sum("DisCL, adaptive" in line for line in lines) == 2
    )
    trained = [*tmp_path.rglob("model.safetensors")]
    times = [path.stat().st_mtime_ns for path in trained]
    assert script.carry_out(settings, tmp_path, [3], 1, chosen) == figures
    assert [path.stat().st_mtime_ns for path in trained] == times and len(trained) >= 5


@pytest.mark.slow
def test_a_search_in_miniature(
    script: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        script.SEARCHES, "scales", (("text-only", "fixed"), "synthetic_scale", (1, 3))
    )
    probing = {
        f"methods.{name}.probe_samples": 16
        for name in load_recipe(script.RECIPES[0]).methods
        if name.startswith("adaptive")
    }
    told = script.search(settings | probing, tmp_path, "scales")
    assert told["judged_on"] == "the validation split" and list(told["methods"]) == [
        "text-only",
        "fixed",
    ]
    assert [trial["settings"] for trial in told["mean"]] == [{}, {"synthetic_scale": 1}]
    figures = [told["methods"][name]["trials"][1]["figure"] for name in ("text-only", "fixed")]
    assert told["mean"][1]["figure"] == pytest.approx(sum(figures) / 2)
    assert not (tmp_path / "cifar10-lowlight" / "train").exists() and not [*tmp_path.rglob("we")]
