"""The notebook of the demo is executed as it is, with a smaller run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import discl

NOTEBOOK = Path(__file__).parents[1] / "examples" / "demo.ipynb"
SMALL = {
    "data.splits": {"test": None},  # a few images instead of 10,000
    "data.long_tail.n_max": 60,
    "data.long_tail.imbalance_ratio": 20,
    "hard.fewer_than": 8,
    "groups.many": 30,
    "groups.few": 8,
    "spectrum.seeds": 1,
    "spectrum.num_inference_steps": 10,
    "train.epochs": 5,
    "train.curriculum_epochs": 4,
    "train.steps_per_epoch": 2,
    "train.model.width": 4,
}


def test_only_public_names_are_used() -> None:
    code = "\n".join(cell.source for cell in cells() if cell.cell_type == "code")
    assert "import discl\n" in code and not re.search(r"from discl|import discl\.", code)
    assert set(re.findall(r"\bdiscl\.(\w+)", code)) <= set(discl.__all__)


def test_outputs_are_stripped() -> None:
    assert not any(cell.get("outputs") for cell in cells())


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    setup = next(cell for cell in notebook.cells if "overrides = {}" in cell.source)
    setup.source = setup.source.replace("overrides = {}", f"overrides = {SMALL}")
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "level  0:" in printed and "epoch  4: real images only" in printed
    assert re.search(r"^discl .* few \d\.\d{3}$", printed, re.MULTILINE)
    images = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 1
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 10_000


def cells() -> list[nbformat.NotebookNode]:
    return nbformat.read(NOTEBOOK, as_version=4).cells
