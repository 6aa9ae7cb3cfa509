"""Runs on a folder of images, without models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from discl import Run, load_recipe, open_run


def open_on(tmp_path: Path, amend: bool = False, **values: Any) -> Run:
    """The run in `tmp_path/run` on `tmp_path/images`; `__` in a name stands for the dot."""
    tree = {
        "name": "test",
        "data": {"root": str(tmp_path / "images")},
        "spectrum": {"checkpoint": "none", "levels": [0]},
        "filter": {"checkpoint": "none"},
        "methods": {"ce": {}},
    }
    return open_run(
        load_recipe(tree, {key.replace("__", "."): value for key, value in values.items()}),
        tmp_path / "run",
        amend,
    )
