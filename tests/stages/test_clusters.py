"""The commands of docs/clusters.md, in their order, as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from discl import cli
from discl.recipe import validate

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"


def commands() -> list[str]:
    """Commands of the shell blocks; that of a SLURM array once for each of its tasks."""
    found: list[str] = []
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL):
        array = re.search(r"--array=1-(\d+)", block)
        lines = [line for line in block.splitlines() if line.startswith("discl ")]
        for task in range(1, 1 + int(array[1]) if array else 2):
            found += [line.replace("$SLURM_ARRAY_TASK_ID", str(task)) for line in lines]
    return found


@pytest.mark.slow
def test_each_command_of_the_page(
    small_tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "birds.yaml").write_text(yaml.safe_dump(small_tree))
    monkeypatch.chdir(tmp_path)
    left = []
    assert len(commands()) == 1 + 4 + 1 + 1
    for line in commands():
        if line == "discl generate birds.yaml":
            continue  # would leave nothing to the others; `discl run` does the same in many a test
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, f"{line}: {capsys.readouterr().err}"
        told = capsys.readouterr()
        if "--shard" in line:
            found = re.search(r"is done; (\d+) of 40 images", " ".join(told.err.split()))
            assert found is not None, f"{line}: {told.err}"
            left.append(int(found[1]))
        assert told.out.strip() in {"runs/crew/spectrum", "runs/crew/filter.parquet"}
    assert left == [28, 16, 8, 0]  # ten sources in four shares


def test_the_recipe_of_the_page_is_one(small_tree: dict[str, Any]) -> None:
    lines = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert lines is not None
    assert validate(small_tree | yaml.safe_load(lines[1])).runtime.store == "s3://bucket/birds"
