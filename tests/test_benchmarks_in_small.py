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
