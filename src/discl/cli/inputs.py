"""Commands on what a run starts from: recipes, data, hard images, converted checkpoints."""

from __future__ import annotations

import typer

from ..utils.logging import get_logger
from . import options as given
from .command import RunOptions, echo, on_run

logger = get_logger(__name__)


def init(
    folder: given.Data,
    out: given.RecipeFile = None,
    column: given.Columns = None,
    images: given.BaseFolder = None,
) -> None:
    """Write a commented recipe for a folder of images, or for a list of them.

    Examples: `discl init photos/birds` writes `birds.yaml` ·
    `discl init birds.csv --images photos --column label=species`
    """
    from ..stages.init import write_starter

    columns = dict(given.column_pair(text) for text in column or [])
    echo(write_starter(folder, out, columns, images))


def recipes() -> None:
    """List the shipped recipes, one line each.

    Example: `discl recipes`
    """
    from ..assets import describe_shipped, shipped_recipes

    names = shipped_recipes()
    for name in names:
        echo(f"{name:<{max(map(len, names))}}  {describe_shipped(name)}")


def data_check(recipe: given.RecipeName, set_: given.Set = None) -> None:
    """Count images, classes and sizes, and list every problem.

    The exit status is 1 if a problem would stop a run.

    Example: `discl data check mine.yaml`
    """
    from ..stages.check_data import check_data, describe_check

    loaded = RunOptions(recipe, set_).load()
    check = check_data(loaded.data, loaded.audit.limits)
    echo(describe_check(check, loaded.groups))
    if check.fatal:
        raise typer.Exit(1)


@on_run
def data_prepare(options: RunOptions) -> None:
    """Resize every real image to the training size once: faster epochs, same results.

    The images are in `prepared/` of the run folder.

    Example: `discl data prepare mine.yaml`
    """
    from ..stages.resize_data import prepare_squares

    opened, _ = options.run("data")
    echo(prepare_squares(opened))


@on_run
def hard(options: RunOptions) -> None:
    """Find the hard training images: rare classes, or a low true-class probability.

    Example: `discl hard mine.yaml`
    """
    from ..pipeline import run_until
    from ..run_folder import paths
    from ..stages.hard import describe_hard

    opened = options.open("hard")
    known = opened.path(paths.HARD).exists()  # otherwise the stage itself describes them
    path = run_until(opened, "hard")
    if known:
        logger.info(describe_hard(opened))
    echo(path)


def convert(name: given.Checkpoint, folder: given.NewFolder) -> None:
    """Convert pickled weights to safetensors once, in a process that may run no code of theirs.

    Example: `discl convert openai/clip-vit-base-patch32 clip-b32`, then in the recipe
    `filter.checkpoint: clip-b32`
    """
    from ..conversion import convert_checkpoint

    echo(convert_checkpoint(name, folder))
