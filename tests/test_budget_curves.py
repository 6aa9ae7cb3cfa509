"""The benchmark of budgets: its units, and its tables from made-up figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import budget

METRICS = ("all", "many", "medium", "few", "all+la", "many+la", "medium+la", "few+la")


def figures(value: float) -> dict[str, dict[str, float]]:
    return {split: dict.fromkeys(METRICS, value) for split in ("test", "validation")}


def write(results: Path, unit: budget.Unit, rows: dict[str, float]) -> None:
    file = results / f"{unit.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": {name: figures(value) for name, value in rows.items()}}))


def test_units_come_in_the_order_of_what_they_decide() -> None:
    units = budget.list_units(["plain", "vague"], [0, 1], budget.POLICIES)
    names = [unit.name for unit in units]
    assert len(names) == len(set(names)) == 2 * 2 * 16 + 2  # vague has the real images of plain
    first = {unit.row for unit in units[:22]}
    assert first == {"controls-1", "uniform-1"} | {f"{each}-1/4" for each in budget.POLICIES}
    assert {unit.row for unit in units[-12:]} == {f"{each}-1" for each in budget.POLICIES[1:]}
    assert not any(
        unit.row in {"uniform-1", "controls-1"}
        for unit in budget.list_units(["cifar100"], [0], budget.POLICIES)
    )


def test_gains_are_paired_over_draws_and_against_the_chosen_control(tmp_path: Path) -> None:
    for draw in (0, 1, 2):
        controls = {"ce": 10.0, "ce-undersampled": 20.0 + draw, "ce-balanced": 30.0}
        write(tmp_path, budget.Unit("plain", draw, budget.CONTROLS), controls)
        write(tmp_path, budget.Unit("plain", draw, "uniform", 4), {"discl": 25.0 + draw})
        write(tmp_path, budget.Unit("plain", draw, "uniform", 1), {"discl": 40.0})
    write(tmp_path, budget.Unit("plain", 1, "deficit", 4), {"discl": 28.0})
    units = budget.read_results(tmp_path)["plain"]
    assert budget.curves(units)["uniform"] == [(0.25, [5, 5, 5]), (1.0, [20, 19, 18])]
    assert budget.differences(units, "deficit-1/4", "uniform-1/4", "few") == [2]
    assert budget.differences(units, "uniform-1", "best-real", "few") == [10, 10, 10]
    text = budget.tables(tmp_path)
    assert "| plain (3) | uniform | – | +5.0 ± .0 | – | +19.0 ± 2.5 |" in text
    assert "| plain | few, uniform-1 − ce-undersampled | + | +19.0 ± 2.5 | as expected |" in text


def test_the_mean_over_settings_has_the_draws_that_all_have(tmp_path: Path) -> None:
    for setting, draw, few in (("plain", 0, 5.0), ("plain", 1, 9.0), ("vague", 0, 7.0)):
        write(tmp_path, budget.Unit(setting, draw, "deficit", 4), {"discl": few})
        write(tmp_path, budget.Unit(setting, draw, "uniform", 4), {"discl": 4.0})
    found = budget.read_results(tmp_path)
    pairs = budget.together(found, "deficit-1/4", "uniform-1/4", "few")
    assert pairs == ([2.0], ["plain", "vague"])


def test_unfinished_units_are_listed_with_their_cost(tmp_path: Path) -> None:
    units = budget.list_units(["plain"], [0], ("uniform",))
    assert budget.cost_table(units) == "plain: 5 units, 3 minutes of a processor"


@pytest.mark.parametrize("policy", budget.POLICIES)
def test_a_unit_states_what_it_may_spend(policy: str) -> None:
    from discl import load_recipe

    base = load_recipe("fashion-lt", {"methods": {"discl": {"strategy": "diverse-to-specific"}}})
    recipe = budget.unit_recipe(budget.Unit("plain", 0, policy, 4), base, 1000)
    assert recipe.spectrum.budget is not None and recipe.spectrum.budget.unet_rows == 250
    assert (recipe.loop is None) == (policy == "uniform")
    if recipe.loop is not None:
        assert (recipe.loop.rounds, recipe.loop.policy) == (4, policy)
