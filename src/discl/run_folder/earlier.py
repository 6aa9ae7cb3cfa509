"""Tables and results of earlier recipes, kept beside those of the present one.

`--amend` moves the tables that no longer fit, and all results, to `earlier/KEY/`, next to a copy of
their recipe. A stage moves a table back if it was made from the same sections and inputs: every
table carries the digest of what it was made from. So nothing is deleted, and a return to an earlier
recipe finds its tables. A user may delete these folders at any time; nothing needs them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import BrokenFileError
from ..recipe import Recipe
from ..utils.atomic import make_folder, whole, writing
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import AGAIN, read_table
from . import paths

logger = get_logger(__name__)

FROM_PLAN = (paths.PLAN, paths.FILTER, paths.ALIA, paths.DIFFICULTY)
FROM_HARD = (paths.HARD, *FROM_PLAN, paths.RETRIEVED)
TABLES = {
    "data": (paths.DATA, *FROM_HARD),
    "hard": FROM_HARD,
    "prompts": (*FROM_PLAN, paths.RETRIEVED),
    "spectrum": FROM_PLAN,
    "filter": (paths.FILTER, paths.ALIA, paths.DIFFICULTY, paths.RETRIEVED),
    "retrieval": (paths.RETRIEVED,),
    "loop": FROM_PLAN,
}
"""Tables that depend on a section of the recipe."""
RESULTS = (paths.RESULTS, paths.PREDICTIONS, paths.REPORT)
NOT_FOR_HARD = ("epochs", "curriculum_epochs", "select")
"""Keys of the section `train` that the classifiers which find hard images do not use."""


def stale_files(recipe: Recipe, changed: Iterable[str]) -> list[str]:
    """Tables and results that depend on changed keys of the recipe."""
    stale = {*RESULTS}
    for key in changed:
        section, _, rest = key.partition(".")
        stale |= {*TABLES.get(section, ())}
        if section == "train" and recipe.hard.rule == "probability" and rest not in NOT_FOR_HARD:
            stale |= {*FROM_HARD}
        if section in ("train", "methods", "filter") and recipe.loop is not None:
            stale |= {*FROM_PLAN}  # what the learner makes of one round decides the next
        if section == "train" and recipe.filter.rule != "threshold":
            stale |= {paths.FILTER, paths.ALIA, paths.DIFFICULTY}
    return sorted(stale)


def folder_of(folder: Path, tree: Mapping[str, Any]) -> Path:
    """Where a run folder keeps the files of a recipe; its section `runtime` is ignored."""
    return folder / paths.EARLIER / digest({**tree, "runtime": None})[:16]


def move_to_earlier(folder: Path, tree: Mapping[str, Any], names: Iterable[str]) -> None:
    """Moves files of the folder's recipe, `tree`, to `earlier/KEY/`, with a copy of the recipe.

    If it is killed, a second call moves the rest.
    """
    target = make_folder(folder_of(folder, tree))
    kept = folder / paths.RECIPE
    if kept.is_file():
        with whole(target / paths.RECIPE) as unfinished:
            shutil.copyfile(kept, unfinished)
    for name in names:
        if (folder / name).is_file():
            _move(folder / name, target / name)


def adopt_former(folder: Path, tree: Mapping[str, Any]) -> None:
    """Renames `former/`, which an earlier version made for the recipe `tree`, to `earlier/KEY/`."""
    former, target = folder / paths.FORMER, folder_of(folder, tree)
    if target.exists():  # the same recipe was kept twice
        for file in former.iterdir():
            if file.is_file():
                _move(file, target / file.name)
        shutil.rmtree(former, ignore_errors=True)
    else:
        make_folder(target.parent)
        former.replace(target)


def restore_table(path: Path, key: str, otherwise: str) -> bool:
    """Whether a table is at `path`, moved there from `earlier/` if necessary.

    - `key`: digest of what the table is made from.
    - `otherwise`: what happens without it, for the warning that a table at `path` cannot be used.
    """
    problem = _problem(path, key) if path.exists() else None
    if path.exists() and problem is None:
        return True
    for file in sorted((path.parent / paths.EARLIER).glob(f"*/{path.name}")):
        if _problem(file, key) is None and _has_key(file, key):
            _move(file, path)
            return True
    if problem is not None:
        logger.warning(f"{problem} So {otherwise}.")
    return False


def _problem(path: Path, key: str) -> str | None:
    try:
        read_table(path, key=key)
    except BrokenFileError as error:
        return str(error).removesuffix(f" {AGAIN}")
    return None


def _has_key(path: Path, key: str) -> bool:
    """Whether a table states this key; those of early versions state none."""
    return (read_table(path).schema.metadata or {}).get(b"key") == key.encode()


def _move(file: Path, to: Path) -> None:
    with writing(to):
        file.replace(to)
