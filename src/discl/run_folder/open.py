"""Opens a run folder: a new one, the same recipe, or an amended one."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
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
from .changes import changed_values, compare_trees, read_tree, with_defaults
from .former import FOLDER, bring_back, former_recipe, set_aside
from .locks import lock
from .run import Run, stages_clash

logger = get_logger(__name__)

STALE = {
    "data": ("data", "hard", "plan"),
    "hard": ("hard", "plan"),
    "prompts": ("plan",),
    "spectrum": ("plan",),
}
"""Which tables a changed section of the recipe makes stale; images and scores are keyed by content and never are."""


NOT_FOR_JUDGES = ("train.epochs", "train.curriculum_epochs", "train.select")
"""What the classifiers that find hard images do not take from the section train."""


def open_run(
    recipe: Recipe | str | Path | dict[str, Any],
    folder: Path | str | None = None,
    amend: bool = False,
    check: Callable[[Run], None] = lambda run: None,
    *,
    allow_plugins: bool = False,
) -> Run:
    """Opens the folder of a run, or makes it.

    A folder of another recipe is refused. With `amend` the new recipe replaces it: images and scores
    that still fit are kept, and other tables and classifiers are made again. If an amended run fails
    before it has made anything, the previous command restores the previous state.

    - `recipe`: a recipe, a shipped name, a YAML file, or a plain tree.
    - `folder`: the run folder; default `runs/NAME`.
    - `amend`: whether the recipe may replace another one.
    - `check`: called with the run before anything is changed; may raise.
    - `allow_plugins`: whether stages may import code that this recipe names as `module:attribute`.

    Raises RecipeError for a wrong recipe, and RunError for a folder of another recipe with the list of
    differences.

    ```python
    import discl

    run = discl.open_run("fashion-lt", "runs/first")
    ```
    """
    recipe = load_recipe(recipe)
    folder = Path(folder) if folder is not None else Path("runs") / recipe.name
    changed = _changed_keys(recipe, folder, amend)
    if changed and not _is_former(recipe, folder):
        check(Run(recipe, folder, allow_plugins=allow_plugins))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if changed is None or changed or _is_former(recipe, folder):
            with lock(folder, "open", lambda other: stages_clash("open", other)):
                _take_over(recipe, folder, amend)
        else:
            _keep(recipe, folder)
        clear_unfinished(folder)
    except WriteError:
        raise
    except OSError as error:
        raise RunError(f"cannot write to the run folder {folder}: {error}.") from error
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)
    return Run(recipe, folder, allow_plugins=allow_plugins)


def _changed_keys(recipe: Recipe, folder: Path, amend: bool) -> list[str] | None:
    """Keys of the folder's recipe that have another value in this one; None for a folder that is no run yet.

    Raises RunError for what is no run folder and, without `amend`, for another recipe, unless it is the former one of an amendment.
    """
    kept = folder / paths.RECIPE
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; name a folder with --out.")
    if not kept.exists():
        written = (kept.name, f".{kept.name}.")  # the second while it is being written
        foreign = folder.exists() and [
            each
            for each in folder.iterdir()
            if each.name != "locks" and not each.name.startswith(written)
        ]
        if foreign and not kept.exists() and not (_is_ours(folder) and amend):
            remedy = " or, if it was one, go on in it with --amend" if _is_ours(folder) else ""
            raise RunError(
                f"{folder} is not empty and holds no recipe.yaml, so it is no run folder; choose another with --out{remedy}."
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
        old = {}  # so everything differs, and whatever does not fit the new recipe goes
    changed = changed_values(old, recipe)
    if changed and not amend and not _is_former(recipe, folder):
        lines = "\n".join(
            f"  {key}: {shorten(before, 120)} -> {shorten(after, 120)}"
            for key, before, after in changed[:12]
        )
        lines += f"\n  … and {len(changed) - 12} more" if len(changed) > 12 else ""
        raise RunError(
            f"{folder} was made with another recipe:\n{lines}\nChoose another folder with --out, or go on in this one with --amend "
            "(images that still fit are kept, what they no longer fit is made anew)."
        )
    return [key for key, _, _ in changed]


def _is_ours(folder: Path) -> bool:
    """Whether a folder without a recipe that can be read has been a run's."""
    return any((folder / name).exists() for name in (paths.ENVIRONMENT, paths.DATA, paths.TRAIN))


def _is_former(recipe: Recipe, folder: Path) -> bool:
    """Whether a recipe is the one that the folder had before an amendment that has made nothing yet."""
    former = former_recipe(folder / FOLDER)
    return former is not None and not changed_values(former, recipe)


def _take_over(recipe: Recipe, folder: Path, amend: bool) -> None:
    """Gives the folder this recipe; `open_run` says in which order and why."""
    kept, former = folder / paths.RECIPE, former_recipe(folder / FOLDER)
    if (
        former is not None
        and kept.exists()
        and not compare_trees(with_defaults(former), with_defaults(read_tree(kept)))
    ):
        bring_back(
            folder
        )  # a kill has ended an amendment before it had begun, or a way back before it was at its end
    changed = _changed_keys(recipe, folder, amend)
    back = bool(changed) and _is_former(recipe, folder)
    if changed and not back and read_tree(kept):
        set_aside(folder)
    _discard_stale(recipe, folder, changed or [])
    _keep(recipe, folder)
    if back:
        bring_back(folder)
        logger.warning(
            f"{folder} is back at its former recipe, with the tables and figures of then; the other recipe had made nothing yet"
        )


def _discard_stale(recipe: Recipe, folder: Path, changed: Sequence[str]) -> None:
    """Deletes the tables and pages that no longer fit the recipe."""
    for name in (paths.RESULTS, paths.REPORT):
        if changed:
            (folder / name).unlink(missing_ok=True)
    stale = {key.split(".")[0] for key in changed}
    if recipe.hard.rule == "probability" and any(
        key.startswith("train.") and key not in NOT_FOR_JUDGES for key in changed
    ):
        stale.add("hard")
    for section in stale:
        for name in STALE.get(section, ()):
            (folder / f"{name}.parquet").unlink(missing_ok=True)


def _keep(recipe: Recipe, folder: Path) -> None:
    kept, text = folder / paths.RECIPE, recipe.to_yaml()
    if not kept.is_file() or kept.read_bytes() != text.encode():
        write_text(kept, text)
    told = folder / paths.ENVIRONMENT
    try:
        if told.exists():
            read_json(told, "python", "packages")
            return
    except BrokenFileError as error:
        logger.warning(f"{str(error).removesuffix(f' {AGAIN}')} So it is written again.")
    write_text(told, json.dumps(_environment(), indent=2))


def _environment() -> dict[str, Any]:
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
        "python": platform.python_version(), "platform": platform.platform(), "processor": platform.machine(),
        "threads": torch.get_num_threads(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: version(name) for name in packages},
    }  # fmt: skip
