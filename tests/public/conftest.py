"""A folder as a user has it: photos, and a small run of the demo made by the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import discl

COUNTS = {"Trouser": 30, "Bag": 8}
"""Photos of each class."""
MINIATURE = (
    "data.splits={test: null}",
    "data.long_tail.n_max=40",
    "data.long_tail.imbalance_ratio=10",
    "hard.fewer_than=6",
    "spectrum.levels=[0,50]",
    "spectrum.seeds=2",
    "spectrum.num_inference_steps=2",
    "filter.threshold=-1",
    "train.epochs=2",
    "train.curriculum_epochs=2",
    "train.batch_size=32",
    "train.model.width=4",
)
"""The demo with a handful of images."""
RUN = "runs/fashion-lt"


@pytest.fixture(scope="session")
def command() -> Callable[..., str]:
    """A function that runs `discl` with some words in a folder and returns what it prints."""

    def run(folder: Path, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "discl.cli", *words], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., str]) -> Path:
    """A working folder with `photos/CLASS/000.png` and the run folder `runs/fashion-lt`."""
    folder = tmp_path_factory.mktemp("workspace")
    shipped = discl.read_tables("embedded:fashion-mnist/data")["train"]
    for name, count in COUNTS.items():
        (folder / "photos" / name).mkdir(parents=True)
        label = shipped.class_names.index(name)
        rows = [row for row, other in enumerate(shipped.labels) if other == label]
        for number, row in enumerate(rows[:count]):
            shipped.image(row).save(folder / "photos" / name / f"{number:03d}.png")
    changes = [word for change in MINIATURE for word in ("--set", change)]
    command(folder, "run", "fashion-lt", "--out", RUN, *changes)
    return folder


@pytest.fixture
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which is the current one during a test."""
    monkeypatch.chdir(workspace)
    return workspace
