"""Benchmarks that no other test runs: they go through in small, and time what they say."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path

import pytest

from discl.stages.workers import local

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "parts", "figures"),
    [("training", ["small", "progress", "attention"], 9), ("engine", ["counters"], 9)],
)
def test_a_benchmark_goes_through(
    script: str,
    parts: list[str],
    figures: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "figures.json"
    words = [f"{script}.py", "--quick", "--json", str(file), "--parts", *parts]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert len(json.loads(file.read_text())["figures"]) == figures


@pytest.mark.slow
def test_a_unit_of_the_gap_and_its_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one image for each hard one and level, and networks that hardly train."""
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    from benchmarks import gap, pilot
    from benchmarks.gap_tables import read_results

    short = gap.Training(epochs=2, curriculum_epochs=2, samples=64)
    for name, value in {"SEEDS": 1, "LEVELS": (0, 50), "REFEREE_STEPS": 2}.items():
        monkeypatch.setattr(gap, name, value)
    monkeypatch.setattr("discl.evaluation.proxy.STEPS", 2)
    work, results = tmp_path / "work", tmp_path / "results"
    gap.run_unit("plain", 0, work, results, None, short)
    unit = read_results(results)["plain"][0]
    assert {"ce", "oracle", "text-only", "fixed-50", "d2s-filtered"} <= unit["rows"].keys()
    assert set(unit["gap"]) == {"0", "50"} and unit["rows"]["ce"]["test"]["all"] > 0
    found = pilot.estimate("plain", 0, work, {"levels": [0, 50], "images": 20})
    assert {kind: set(each) for kind, each in found.items()} == {
        "head": {"0", "50"}, "network": {"0", "50"},
    }  # fmt: skip


def test_the_worker_of_the_benchmark_is_called_like_that_of_a_run() -> None:
    names = runpy.run_path(str(BENCHMARKS / "workers.py"))
    ours, theirs = (inspect.signature(each) for each in (names["worker"], local.run_worker))
    assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize(("warm", "rounds"), [(False, 4), (True, 3)])
def test_arms_take_turns_in_alternating_order(warm: bool, rounds: int) -> None:
    turns = runpy.run_path(str(BENCHMARKS / "turns.py"))
    seen: list[str] = []
    arms = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = turns["take_turns"](arms, 0.0, least=3, most=3, warm=warm)
    assert "".join(seen) == ("ab" + "ba" + "ab" + "ba")[: 2 * rounds]
    assert all(len(each.wall) == len(each.processor) == 3 for each in times.values())


def test_an_interval_is_of_order_statistics_and_at_five_pairs_of_the_extremes() -> None:
    paired = runpy.run_path(str(BENCHMARKS / "turns.py"))["paired"]
    five = paired([3.0, 1.0, 5.0, 2.0, 4.0], [1.0] * 5)
    assert (five.median, five.low, five.high, five.pairs) == (3, 1, 5, 5)
    nine = paired([float(value) for value in range(1, 10)], [1.0] * 9)
    assert (nine.median, nine.low, nine.high) == (5, 2, 8)
