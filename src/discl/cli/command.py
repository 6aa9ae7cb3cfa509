"""What commands share: the options of a run, and how a result is printed."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..escaping import for_terminal
from .options import AllowPlugins, Amend, RecipeName, RunFolder, Set

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..run_folder.run import Run


def echo(text: object) -> None:
    """Prints a result; names in it that would steer the terminal are shown as text."""
    typer.echo(for_terminal(str(text)))


@dataclass(frozen=True)
class RunOptions:
    """The options that all commands on a run share."""

    recipe: RecipeName
    set_: Set = None
    folder: RunFolder = None
    amend: Amend = False
    allow_plugins: AllowPlugins = False

    def load(self) -> Recipe:
        from ..recipe import load_recipe, parse_override

        return load_recipe(self.recipe, dict(parse_override(text) for text in self.set_ or []))

    def open(self, stage: str) -> Run:
        """The run, opened and checked for everything up to `stage`.

        Plugins without permission are refused before anything is written. An amended recipe whose
        models do not fit is refused before anything changes.
        """
        from ..recipe import check_own_pieces
        from ..run_folder.open import open_run
        from ..stages import plan as plan_stage

        check = functools.partial(plan_stage.check_models, stage=stage)
        recipe, plugins = self.load(), self.allow_plugins
        if stage in plan_stage.TRAINING:
            check_own_pieces(recipe, plugins)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun or accelerate launch
            from ..pipeline import open_together
            from ..training.distributed import current_processes

            run = open_together(recipe, self.folder, self.amend, check, allow_plugins=plugins)
            if not current_processes().first:  # rank 0 prints the results
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
            return run
        return open_run(recipe, self.folder, self.amend, check, allow_plugins=plugins)

    def run(self, stage: str) -> tuple[Run, Path]:
        """The run after everything up to `stage`, and what that stage wrote."""
        from ..pipeline import run_until

        run = self.open(stage)
        return run, run_until(run, stage)


def on_run(command: Callable[..., None], folder: Any = RunFolder) -> Callable[..., None]:
    """A command with the options of `RunOptions`, which it gets as one argument before its own.

    - `folder`: the option of the run folder.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    recipe, *shared = inspect.signature(RunOptions, eval_str=True).parameters.values()

    @functools.wraps(command)
    def called(**values: Any) -> None:
        more = {each.name: values.pop(each.name) for each in own}
        command(RunOptions(**values), **more)

    called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            each.replace(
                kind=inspect.Parameter.KEYWORD_ONLY,
                annotation=folder if each.name == "folder" else each.annotation,
            )
            for each in (recipe, *own, *shared)
        ]
    )
    return called
