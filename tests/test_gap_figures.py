"""The figures of the results page are those of the committed figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_figures_are_drawn_from_the_committed_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gap_figures", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 3
    for file in drawn:
        assert file.read_text() == (ROOT / "docs" / file.name).read_text(), file.name
