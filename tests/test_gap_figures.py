"""Figures and tables of the results page are those of the committed figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "count"), [("gap_figures", 3), ("budget_figures", 1)])
def test_the_figures_are_drawn_from_the_committed_results(
    script: str, count: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == count
    for file in drawn:
        assert file.read_text() == (ROOT / "docs" / file.name).read_text(), file.name


def printed(script: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--table"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("script", "blocks"), [("gap", None), ("pilot", 1)])
def test_the_page_has_the_tables_as_they_are_printed(script: str, blocks: int | None) -> None:
    """All tables of `gap`; of `pilot` the first, its others have a line for each arm."""
    lines = "\n".join(printed(script).split("\n\n")[:blocks]).splitlines()
    tables = {line for line in lines if line.startswith("|")}
    assert tables and tables <= set((ROOT / "docs/results.md").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "begin", "end"),
    [
        ("gap", "## What synthetic images are worth", "## What a budget"),
        ("budget", "## What a budget", "## CIFAR100-LT"),
    ],
)
def test_every_interval_of_the_text_is_printed(script: str, begin: str, end: str) -> None:
    """Also in sentences. Signs are left out, because a sentence may say "behind"."""
    page = (ROOT / "docs/results.md").read_text()
    told = page[page.index(begin) : page.index(end)]
    figures = re.compile(r"[\d.]+\s±\s[\d.]*\d")
    named, known = (
        {" ".join(each.split()) for each in figures.findall(text)}
        for text in (told, printed(script))
    )
    assert named and named <= known


def test_the_best_row_is_not_chosen_on_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows that are equal on validation images it is the first."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gap_tables import best_difference

    def row(validation: float, test: float) -> dict[str, dict[str, float]]:
        return {
            split: {"all": figure, "all+la": figure - 1}
            for split, figure in (("validation", validation), ("test", test))
        }

    rows = {
        "ce": row(70, 60),
        "ce-balanced": row(70, 65),
        "oracle": row(90, 90),
        "text-only": row(75, 64),
        "all": row(75, 69),
        "d2s": row(74, 80),
    }
    assert best_difference({0: {"rows": rows}}) == [4]
