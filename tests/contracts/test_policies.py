"""The contract of every policy in `POLICIES`, and what each of them is for."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from discl import RecipeError
from discl.curriculum.allocation import allocate
from discl.curriculum.policies import (
    POLICIES,
    Cell,
    Policy,
    Wish,
    check_wishes,
    make_policy,
)

ROUNDS = 4
ROWS = {0: 20, 50: 10, 90: 2}
SOURCES = {1: 12, 4: 5, 7: 1}
CELLS = [
    Cell(label, level, sources=count, rows=ROWS[level], real=count, largest=100)
    for label, count in SOURCES.items()
    for level in ROWS
]
SMALL = ("few cells", "one cell", "all cells")


def history_of(rounds: int, measures: bool) -> list[dict[str, Any]]:
    """Records of finished rounds, as a loop writes them."""
    rng = np.random.default_rng(rounds)
    records = []
    for number in range(rounds):
        asked = {
            str(label): {str(level): int(rng.integers(0, 9)) for level in ROWS}
            for label in list(SOURCES)[: 2 + number % 2]
        }
        record: dict[str, Any] = {"round": number, "asked": asked}
        record["kept"] = {
            label: {level: count // 2 for level, count in levels.items()}
            for label, levels in asked.items()
        }
        record["rows"] = {
            label: {level: count * ROWS[int(level)] for level, count in levels.items()}
            for label, levels in asked.items()
        }
        if measures:
            record["measured"] = {
                str(label): {
                    str(level): {
                        "entropy": rng.random(3).round(6).tolist(),
                        "probability": rng.random(3).round(6).tolist(),
                    }
                    for level in (*ROWS, 100)
                }
                for label in (1, 4)
            }
        records.append(json.loads(json.dumps(record)))
    return records


@pytest.fixture(params=sorted(POLICIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str) -> Policy:
    return make_policy(name, ROUNDS)


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize("some", SMALL)
def test_one_wish_for_each_cell(name: str, number: int, some: str) -> None:
    policy = build(name)
    cells = {"few cells": CELLS[1:5], "one cell": CELLS[4:5], "all cells": CELLS}[some]
    wishes = policy.weigh(number, cells, history_of(number, policy.measures))
    check_wishes(name, wishes, cells)
    assert all(each.why for each in wishes)
    assert number or any(each.weight > 0 for each in wishes)


def test_pure_in_round_and_history(name: str) -> None:
    """The same wishes twice, in any order and from a second instance; the history is unchanged."""
    policy, history = build(name), history_of(ROUNDS, True)
    kept = copy.deepcopy(history)
    forwards = [policy.weigh(number, CELLS, history[:number]) for number in range(ROUNDS)]
    backwards = [policy.weigh(n, CELLS, history[:n]) for n in reversed(range(ROUNDS))]
    second = [build(name).weigh(number, CELLS, history[:number]) for number in range(ROUNDS)]
    assert forwards == backwards[::-1] == second
    assert history == kept


@pytest.mark.parametrize("budget", [0, 30, 97, 1000, 4321])
def test_no_round_spends_more_than_its_budget(name: str, budget: int) -> None:
    policy, least = build(name), [int(cell.label == 7 and budget > 90) for cell in CELLS]
    wishes = policy.weigh(2, CELLS, history_of(2, policy.measures))
    prices, sources = [cell.rows for cell in CELLS], [cell.sources for cell in CELLS]
    counts = allocate(budget, prices, wishes, sources, explore=0.2, least=least)
    assert (counts >= least).all()
    assert counts @ prices <= budget
    again = allocate(budget, prices, wishes, sources, explore=0.2, least=least)
    assert (counts == again).all()
    if name != "deficit":
        assert budget - counts @ prices < 2 * max(prices) * len(CELLS)


# ---------------------------------------------------------------- what each is for


def test_uniform_is_the_plan_of_a_run_without_a_loop() -> None:
    sources = [cell.sources for cell in CELLS]
    for seeds in (1, 3, 7):
        budget = seeds * sum(cell.sources * cell.rows for cell in CELLS)
        wishes = build("uniform").weigh(0, CELLS, [])
        counts = allocate(budget, [cell.rows for cell in CELLS], wishes, sources)
        assert counts.tolist() == [seeds * count for count in sources]


def test_deficit_fills_each_class_to_its_target_and_no_further() -> None:
    policy = make_policy({"name": "deficit", "target": 20}, 2)
    first = policy.weigh(0, CELLS, [])
    assert sum(each.most for each in first if each.weight) == pytest.approx((8 + 15 + 19) / 2)
    none = {str(label): {"0": 10, "50": 10} for label in SOURCES}
    half = {str(label): {"0": 5, "50": 4} for label in SOURCES}
    last = policy.weigh(1, CELLS, [{"asked": none, "kept": half}])
    counts = allocate(10**6, [cell.rows for cell in CELLS], last, [1] * len(CELLS))
    of_class = {label: counts[[c.label == label for c in CELLS]].sum() for label in SOURCES}
    assert of_class[1] == 0  # 12 + 9 images are enough
    assert of_class[4] == pytest.approx((20 - 5 - 9) * 21 / 10, abs=1)  # half are dropped
    assert of_class[7] == pytest.approx((20 - 1 - 9) * 21 / 10, abs=1)


def measured(**levels: tuple[float, float]) -> dict[str, Any]:
    return {
        str(label): {
            level.removeprefix("at"): {"entropy": [value] * 40, "probability": [chance] * 40}
            for level, (value, chance) in levels.items()
        }
        for label in SOURCES
    }


def test_entropy_asks_where_the_learner_is_unsure_and_within_the_band() -> None:
    policy = make_policy({"name": "entropy", "low": 0.1, "high": 0.9}, ROUNDS)
    record = {"measured": measured(at0=(0.9, 0.02), at50=(0.6, 0.5), at90=(0.2, 0.8))}
    wishes = dict(zip(((c.label, c.level) for c in CELLS), policy.weigh(1, CELLS, [record]),
                      strict=True))  # fmt: skip
    assert wishes[1, 0].weight == 0  # too hard
    assert wishes[1, 50].weight == pytest.approx(3 * wishes[1, 90].weight)
    assert wishes[1, 50].weight == pytest.approx(12 * wishes[7, 50].weight)
    assert "0.600" in wishes[1, 50].why


def test_progress_asks_for_what_brought_most_per_row() -> None:
    policy = make_policy({"name": "progress", "exploration": 0}, ROUNDS)
    cells = [cell for cell in CELLS if cell.label in (1, 4)]

    def record(chance_1: float, chance_4: float, rows: dict[str, Any]) -> dict[str, Any]:
        real = {"1": chance_1, "4": chance_4}
        return {
            "rows": rows,
            "measured": {
                label: {"100": {"entropy": [0.5] * 400, "probability": [chance] * 400}}
                for label, chance in real.items()
            },
        }

    everything = {"1": {"0": 200, "50": 100, "90": 20}, "4": {"0": 200, "50": 100, "90": 20}}
    history = [record(0.2, 0.2, everything), record(0.25, 0.6, everything)]
    wishes = policy.weigh(2, cells, history)
    assert [wish.weight > 0 for wish in wishes] == [False] * 3 + [True] * 3
    assert all(wish.weight > 0 for wish in policy.weigh(1, cells, history[:1]))


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("wishes", "named"),
    [
        ([Wish(1)], "1 wishes for 9"),
        ([Wish(-1)] * 9, "-1"),
        ([Wish(float("nan"))] * 9, "nan"),
        ([Wish(1, most=float("nan"))] * 9, "nan"),
        ([1.0] * 9, "Wish"),
    ],
    ids=str,
)
def test_other_wishes_are_refused(wishes: Any, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        check_wishes("mine", wishes, CELLS)


@pytest.mark.parametrize(
    "config",
    [
        "unifrom",
        {"name": "progress", "discount": 0},
        {"name": "progress", "discount": True},
        {"name": "uniform", "target": 3},
        {"name": "deficit", "target": 2.5},
        {"low": 0.3},
        "my_package.mine:Policy",
    ],
    ids=str,
)
def test_policies_of_another_kind_are_refused(config: Any) -> None:
    with pytest.raises(RecipeError):
        make_policy(config, ROUNDS)
