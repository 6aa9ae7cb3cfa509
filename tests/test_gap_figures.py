"""Figures and tables of the results page are those of the committed figures."""

from __future__ import annotations

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


@pytest.mark.slow
@pytest.mark.parametrize(("script", "blocks"), [("gap", None), ("pilot", 1)])
def test_the_page_has_the_tables_as_they_are_printed(script: str, blocks: int | None) -> None:
    """All tables of `gap`; of `pilot` the first, its others have a line for each arm."""
    command = [sys.executable, "-m", f"benchmarks.{script}", "--table"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = "\n".join(printed.split("\n\n")[:blocks]).splitlines()
    tables = {line for line in lines if line.startswith("|")}
    assert tables and tables <= set((ROOT / "docs/results.md").read_text().splitlines())
