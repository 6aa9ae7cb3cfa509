"""Opens a run folder: a new one, the same recipe, or an amended one."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import BrokenFileError, RunError, WriteError, shorten
from ..recipe import Recipe, load_recipe
from ..utils.atomic import clear_unfinished
from ..utils.logging import get_logger
from ..utils.stored import AGAIN, read_json, read_recipe_tree, write_text
from . import paths
from .changes import changed_values, read_tree
from .earlier import adopt_former, move_to_earlier, stale_files
from .locks import lock
from .run import Run, stages_clash

logger = get_logger(__name__)

SHOWN = 12
"""Differences that a refusal lists."""
SHOWN_LENGTH = 120
"""Characters of a value in that list."""


def open_run(
    recipe: Recipe | str | Path | dict[str, Any],
    folder: Path | str | None = None,
    amend: bool = False,
    check: Callable[[Run], None] = lambda run: None,
    *,
    allow_plugins: bool = False,
) -> Run:
    """Opens the run of a recipe in its folder, which is created if it does not exist.

    With `amend` the recipe replaces another one. Results, and tables that do not fit, move to
    `earlier/`; a later return to the other recipe finds them there. They move before the new recipe
    is written, so no table is beside a recipe that it does not fit, even after a kill; the same
    command again does the rest.

    - `recipe`: a recipe, or what `load_recipe` takes.
    - `folder`: default `runs/NAME`.
    - `amend`: accept a recipe that differs from the folder's. The section `runtime` may always
      differ, and a checkpoint may have been copied elsewhere.
    - `check`: called before an amendment; it may raise, and then nothing is changed.
    - `allow_plugins`: let stages that train import what this recipe names as `module:attribute`.
      Nothing is imported here.

    Raises RecipeError for a wrong recipe, and RunError if the folder is no run folder, if it cannot
    be written to, or, without `amend`, if it was made with another recipe.

    ```python
    import discl

    run = discl.open_run("fashion-lt", "runs/first")
    ```
    """
    recipe = load_recipe(recipe)
    folder = Path(folder) if folder is not None else Path("runs") / recipe.name
    changed = _changed_keys(recipe, folder, amend)
    if changed:
        check(Run(recipe, folder, allow_plugins=allow_plugins))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if changed is None or changed or (folder / paths.FORMER).is_dir():
            with lock(folder, "open", lambda other: stages_clash("open", other)):
                _replace_recipe(recipe, folder, amend)
        else:
            _write_kept(recipe, folder)
        clear_unfinished(folder)
    except WriteError:
        raise
    except OSError as error:
        raise RunError(f"cannot write to the run folder {folder}: {error}.") from error
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)
    return Run(recipe, folder, allow_plugins=allow_plugins)


def _changed_keys(recipe: Recipe, folder: Path, amend: bool) -> list[str] | None:
    """Keys whose values differ from the folder's recipe; None for a folder that is no run yet.

    Raises RunError if it is no run folder and, without `amend`, if the recipe differs.
    """
    kept = folder / paths.RECIPE
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; name a folder with --out.")
    if not kept.exists():
        written = (kept.name, f".{kept.name}.")  # the second while it is being written
        foreign = folder.exists() and [
            each
            for each in folder.iterdir()
            if each.name != paths.LOCKS and not each.name.startswith(written)
        ]
        if foreign and not kept.exists() and not (_is_ours(folder) and amend):
            remedy = " or, if it was one, go on in it with --amend" if _is_ours(folder) else ""
            raise RunError(
                f"{folder} is not empty and holds no {kept.name}, so it is no run folder; "
                f"choose another with --out{remedy}."
            )
        if not foreign:
            return None
    try:
        old = read_recipe_tree(kept)
    except BrokenFileError as error:
        if not _is_ours(folder):
            raise RunError(
                f"{kept} holds no recipe, so {folder} is no run folder; choose another with --out."
            ) from error
        if not amend:
            raise
        old = {}  # so everything differs
    changed = changed_values(old, recipe)
    if changed and not amend:
        raise RunError(_describe_changes(folder, changed))
    return [key for key, _, _ in changed]


def _describe_changes(folder: Path, changed: list[tuple[str, Any, Any]]) -> str:
    lines = [
        f"  {key}: {shorten(before, SHOWN_LENGTH)} -> {shorten(after, SHOWN_LENGTH)}"
        for key, before, after in changed[:SHOWN]
    ]
    if len(changed) > SHOWN:
        lines.append(f"  … and {len(changed) - SHOWN} more")
    return "\n".join(
        [
            f"{folder} was made with another recipe:",
            *lines,
            "Choose another folder with --out, or go on in this one with --amend (what still fits "
            "is kept, the rest is made again, and nothing is deleted).",
        ]
    )


def _is_ours(folder: Path) -> bool:
    """Whether a folder without a readable recipe was a run folder."""
    names = (paths.ENVIRONMENT, paths.DATA, paths.TRAIN, paths.EARLIER)
    return any((folder / name).exists() for name in names)


def _replace_recipe(recipe: Recipe, folder: Path, amend: bool) -> None:
    """Gives the folder this recipe. The folder is locked."""
    if (folder / paths.FORMER).is_dir():
        adopt_former(folder, read_tree(folder / paths.FORMER / paths.RECIPE))
    if changed := _changed_keys(recipe, folder, amend):
        stale = stale_files(recipe, changed)
        move_to_earlier(folder, read_tree(folder / paths.RECIPE), stale)
    _write_kept(recipe, folder)


def _write_kept(recipe: Recipe, folder: Path) -> None:
    """Writes the recipe and a description of the environment, where they are missing or differ."""
    kept, text = folder / paths.RECIPE, recipe.to_yaml()
    if not kept.is_file() or kept.read_bytes() != text.encode():
        write_text(kept, text)
    environment = folder / paths.ENVIRONMENT
    try:
        if environment.exists():
            read_json(environment, "python", "packages")
            return
    except BrokenFileError as error:
        logger.warning(f"{str(error).removesuffix(f' {AGAIN}')} So it is written again.")
    write_text(environment, json.dumps(_describe_environment(), indent=2))


def _describe_environment() -> dict[str, Any]:
    packages = (
        "discl",
        "torch",
        "diffusers",
        "transformers",
        "datasets",
        "pyarrow",
        "kornia",
        "numpy",
        "pillow",
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: version(name) for name in packages},
    }
