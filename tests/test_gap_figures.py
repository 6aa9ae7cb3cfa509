"""The figures of the results page are those of the committed figures."""

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
