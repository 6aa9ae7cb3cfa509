"""Golden values: plans, images, verdicts, losses and results equal the pinned ones."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "compare_golden.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = spec_from_file_location("compare_golden", TOOL)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MEASURED = ("diverse-to-specific", "adaptive", "system-ldmlr")
"""Methods whose results are compared here. `tools/compare_golden.py` compares those of all."""


@pytest.mark.slow
@pytest.mark.parametrize(("part", "measured"), [("plans", ()), ("short", MEASURED)])
def test_golden_values_hold(tool: ModuleType, part: str, measured: tuple[str, ...]) -> None:
    """Only a change that is meant to change results may pin new values, with the reason."""
    assert tool.check(part, measured) == []


def test_the_plan_of_the_example_holds(tool: ModuleType) -> None:
    pinned = json.loads((tool.GOLDEN / "plans.json").read_text())["values"]
    assert tool.plans(["fashion-lt"]) == {"fashion-lt": pinned["fashion-lt"]}


def test_every_shipped_recipe_is_pinned(tool: ModuleType) -> None:
    pinned = json.loads((tool.GOLDEN / "plans.json").read_text())["values"]
    assert sorted(pinned) == tool.shipped_names()


def test_the_documented_table_of_the_example_is_the_pinned_one(tool: ModuleType) -> None:
    """Each row of docs/getting-started.md, and the differences in its text."""
    results = json.loads((tool.GOLDEN / "demo.json").read_text())["values"]["results"]
    page = (tool.ROOT / "docs" / "getting-started.md").read_text()
    keys = ("accuracy", "many", "medium", "few")
    for row, splits in results.items():
        figures = [f"{100 * splits['test'][key]:.1f}" for key in keys]
        assert f"| {row} | {' | '.join(figures)} |" in page
    few = {row: round(100 * splits["test"]["few"], 1) for row, splits in results.items()}
    for control, method in (("ce-undersampled", "discl"), ("ce-balanced", "discl-balanced")):
        for variant in ("", "+la"):
            gain = few[method + variant] - few[control + variant]
            assert f"{gain:+.1f} for `{method}{variant}`" in " ".join(page.split())
    for row in ("discl", "ce-undersampled", "ce"):
        assert f"{few[row]} %" in (tool.ROOT / "README.md").read_text()


def test_every_strategy_objective_and_system_is_pinned(tool: ModuleType) -> None:
    from discl.baselines import SYSTEMS
    from discl.curriculum.strategies import STRATEGIES
    from discl.training.objectives import OBJECTIVES

    losses = json.loads((tool.GOLDEN / "short.json").read_text())["values"]["losses"]
    pinned = {name.removeprefix("objective-").removeprefix("system-") for name in losses}
    assert {*STRATEGIES, *OBJECTIVES, *SYSTEMS} - {"cross-entropy"} <= pinned


def test_new_values_are_added_and_old_ones_left(tool: ModuleType) -> None:
    golden = {"losses": {"ce": [1.0]}, "images": {}}
    now = {"losses": {"ce": [2.0], "falling": [3.0]}, "images": {}, "verdicts": {"a": True}}
    assert tool.add_missing(golden, now) == ["/losses/falling", "/verdicts"]
    assert golden == now | {"losses": {"ce": [1.0], "falling": [3.0]}}


def test_a_difference_is_found(tool: ModuleType) -> None:
    golden = {"images": {"a": ["00ff", 10.0]}, "losses": {"ce": [[1.0, []], [0.5, [30]]]}}
    moved = {"images": {"a": ["00fe", 10.0]}, "losses": {"ce": [[1.0, []], [0.51, [50]]]}}
    assert tool.compare(golden, golden, None) == []
    assert len(tool.compare(golden, moved, None)) == 3
    (level,) = tool.compare(golden, moved, 0.02)  # within the tolerance, except the level drawn
    assert "30 -> 50" in level
