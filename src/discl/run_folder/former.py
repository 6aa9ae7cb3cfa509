"""The state before an amendment, kept until the new recipe has made something.

The folder is a snapshot: the former `recipe.yaml` and, under their names, the tables and pages that an amendment discards or a stage writes
anew (as hard links where the file system has them, for those files are replaced and never written into). Its recipe is written last and
deleted first, so a snapshot that a kill has left half done is none.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import BrokenFileError
from ..utils.atomic import make_folder, whole, writing
from ..utils.stored import read_recipe_tree
from . import paths

FOLDER = "former"
RECIPE = paths.RECIPE
KEPT = (
    paths.DATA,
    paths.HARD,
    paths.PLAN,
    paths.FILTER,
    paths.ALIA,
    paths.RESULTS,
    paths.REPORT,
)


def former_recipe(kept: Path) -> dict[str, Any] | None:
    """The recipe of a snapshot as a plain tree; None where there is no snapshot, or no whole one."""
    try:
        return read_recipe_tree(kept / RECIPE)
    except BrokenFileError:
        return None


def set_aside(folder: Path) -> None:
    """Makes the snapshot of a run folder; one that is there is left, for nothing was made since then that it would be a pity to lose."""
    kept = folder / FOLDER
    if (kept / RECIPE).exists():
        return
    shutil.rmtree(kept, ignore_errors=True)
    make_folder(kept)
    for name in KEPT:
        if (folder / name).is_file():
            with writing(kept / name):
                _copy(folder / name, kept / name)
    with whole(kept / RECIPE) as unfinished:
        shutil.copyfile(folder / RECIPE, unfinished)


def bring_back(folder: Path) -> None:
    """Puts the files of the snapshot, whose recipe the folder has again, in their places; killed anywhere, it can be done again."""
    kept = folder / FOLDER
    for name in KEPT:
        if (kept / name).exists():
            (kept / name).replace(folder / name)
    let_go(kept)


def let_go(kept: Path) -> None:
    """Deletes a snapshot, if there is one."""
    (kept / RECIPE).unlink(missing_ok=True)
    shutil.rmtree(kept, ignore_errors=True)


def _copy(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, to)
