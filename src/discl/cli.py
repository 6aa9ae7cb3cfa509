"""The command line: one command per stage."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import typer

from . import options as given
from .options import RunOptions, on_run, whole_numbers
from .utils.logging import get_logger

logger = get_logger("discl.cli")  # a module that is run is called __main__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Learn from scarce or poor images with a curriculum of synthetic ones "
    "(arXiv 2410.13674). Each command first runs the steps it needs.",
    epilog="Examples: `discl demo` · `discl init photos/birds` · `discl plan birds.yaml` · "
    "`discl run birds.yaml`",
)
data_app = typer.Typer(
    no_args_is_help=True,
    help="Check a data set, or resize it once. Example: `discl data check mine.yaml`",
)


def _echo(text: object) -> None:
    """Prints a result; names in it that would steer the terminal are shown as text."""
    from .escaping import for_terminal

    typer.echo(for_terminal(str(text)))


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        _echo(f"discl {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
]


@app.callback()
def _set_up(
    version: Version = False, quiet: given.Quiet = False, verbose: given.Verbose = False
) -> None:
    from .utils.console import show_messages

    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other; leave one out.")
    show_messages(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


@app.command()
@on_run
def run(options: RunOptions) -> None:
    """Run all steps of a recipe and write `report.html`.

    The same command resumes and does only what is missing.

    Examples: `discl run fashion-lt` · `discl run mine.yaml --set spectrum.seeds=4 --out runs/four`
    """
    from .pipeline import results_table

    finished, path = options.run("report")
    _echo(results_table(finished))
    _echo(path)


@app.command()
def demo(out: given.RunFolder = None) -> None:
    """Run the embedded example: ten classes of clothes, three of them rare.

    Example: `discl demo` does `discl run fashion-lt`
    """
    run(recipe="fashion-lt", folder=out)


app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(recipe: given.RecipeName, set_: given.Set = None) -> None:
    """Count images, classes and sizes, and list every problem.

    The exit status is 1 if a problem would stop a run.

    Example: `discl data check mine.yaml`
    """
    from .stages.check_data import check_data, describe_check

    loaded = RunOptions(recipe, set_).load()
    check = check_data(loaded.data, loaded.audit.limits)
    _echo(describe_check(check, loaded.groups))
    if check.fatal:
        raise typer.Exit(1)


@data_app.command("prepare")
@on_run
def data_prepare(options: RunOptions) -> None:
    """Resize every real image to the training size once: faster epochs, same results.

    The images are in `prepared/` of the run folder.

    Example: `discl data prepare mine.yaml`
    """
    from .stages.resize_data import prepare_squares

    opened, _ = options.run("data")
    _echo(prepare_squares(opened))


@app.command()
@on_run
def hard(options: RunOptions) -> None:
    """Find the hard training images: rare classes, or a low true-class probability.

    Example: `discl hard mine.yaml`
    """
    from .pipeline import run_until
    from .run_folder import paths
    from .stages.hard import describe_hard

    opened = options.open("hard")
    known = opened.path(paths.HARD).exists()  # otherwise the stage itself describes them
    path = run_until(opened, "hard")
    if known:
        logger.info(describe_hard(opened))
    _echo(path)


@app.command()
@on_run
def prompts(options: RunOptions) -> None:
    """Write the prompts with a language model, if the recipe names one; then you may edit them.

    Example: `discl prompts mine.yaml` writes `prompts.yaml`, or `settings.yaml`, in the run folder
    """
    _echo(options.run("prompts")[1])


@app.command()
@on_run
def levels(
    options: RunOptions,
    sources: given.Sources = 32,
    grid: given.Grid = None,
    seeds: given.Seeds = 1,
) -> None:
    """Measure a spectrum over λ; propose `spectrum.levels` and `filter.threshold`.

    Example: `discl levels mine.yaml --sources 64 --grid 0,20,40,60,80`
    """
    from .pipeline import levels as survey

    chosen = None if grid is None else whole_numbers("--grid", grid, "0,20,40", 100)
    path = survey(options.open("prompts"), sources, chosen, seeds)
    _echo(path.with_suffix(".md").read_text())
    _echo(path)


@app.command()
@on_run
def adapt(options: RunOptions) -> None:
    """Teach the generator the domain of the real training images, if the recipe says so.

    Example: `discl adapt mine.yaml --set spectrum.adapt.steps=1000`
    """
    _echo(options.run("adapt")[1])


@app.command()
@on_run
def pilot(options: RunOptions) -> None:
    """Measure on a few images whether a spectrum will pay; recommend levels, or none.

    Example: `discl pilot mine.yaml --set pilot.images=256`
    """
    from .pipeline import pilot as run_pilot

    path = run_pilot(options.open("prompts"))
    _echo(path.read_text())
    _echo(path)


@app.command()
@on_run
def plan(options: RunOptions) -> None:
    """Write the plan of the spectrum and print what generating it costs.

    Example: `discl plan mine.yaml --set spectrum.seeds=4`
    """
    from .stages.pending import scorer_of
    from .stages.plan import describe_budget, describe_cost, estimate_cost
    from .stages.rejection import describe_rule
    from .stages.round_plan import describe_rounds

    opened, path = options.run("plan")
    _echo(describe_cost(estimate_cost(opened)))
    rule = ""
    if not opened.recipe.spectrum.makes_none:
        rule = describe_rule(opened, scorer_of(opened))
    for line in filter(None, (describe_budget(opened), describe_rounds(opened), rule)):
        _echo(line)
    _echo(path)


@app.command(cls=given.WithAddress)
@on_run
def generate(options: RunOptions, shard: given.Shard = None, ray: given.Ray = None) -> None:
    """Generate the missing images of the plan, on every GPU of this machine.

    Examples: `discl generate mine.yaml --set runtime.slots=32` ·
    in a job array `discl generate mine.yaml --shard $SLURM_ARRAY_TASK_ID/8` ·
    on a Ray cluster `discl generate mine.yaml --ray 10.0.0.1:6379`, or `--ray` for the one at hand
    """
    from .pipeline import generate as generate_images
    from .run_folder import paths
    from .spectrum.plan import WHOLE_PLAN, parse_shard

    part = WHOLE_PLAN if shard is None else parse_shard(shard)
    opened = options.open("generate")
    generate_images(opened, part, ray)
    _echo(opened.location(paths.SPECTRUM))


@app.command("filter")
@on_run
def filter_(options: RunOptions) -> None:
    """Score the synthetic images with CLIP and drop those below the threshold.

    With a new threshold no image is scored again:
    `discl filter mine.yaml --set filter.threshold=0.28 --amend`
    """
    _echo(options.run("filter")[1])


@app.command()
@on_run
def retrieve(options: RunOptions) -> None:
    """Choose real images of an unlabelled archive by CLIP, if a method trains on such images.

    Example: `discl retrieve mine.yaml --set retrieval.archive=photos-of-mine`
    """
    _echo(options.run("retrieve")[1])


@app.command()
@on_run
def audit(options: RunOptions) -> None:
    """Check real and synthetic images: copies, leakage, poor images, classes that collapse.

    The findings are in `audit.parquet`, and on the page of the next `discl report`. The exit status
    is 1 if the filter keeps synthetic images that copy a validation or test image.

    Example: `discl audit mine.yaml`
    """
    from .pipeline import audit as audit_run
    from .stages.audit import describe_audit

    opened = options.open("data")
    path = audit_run(opened)
    text, fatal = describe_audit(opened)
    _echo(text)
    _echo(path)
    if fatal:
        raise typer.Exit(1)


@app.command()
def browse(
    run: given.BrowsedFolder, port: given.Port = None, no_open: given.NoOpen = False
) -> None:
    """Look at the images of a run in the browser: filter, threshold, keep or drop by hand.

    The page is served on this machine only, until Ctrl-C. It needs `pip install 'discl[browse]'`.

    Example: `discl browse runs/fashion-lt`
    """
    from .browse.server import serve

    def amend(changes: Mapping[str, Any]) -> None:
        from .pipeline import amend_filter

        amend_filter(run, changes)

    serve(run, amend, port=port, show=not no_open, on_start=_echo)


@app.command()
@on_run
def train(options: RunOptions) -> None:
    """Train the classifier of every method.

    Example: `discl train mine.yaml --set train.optimizer.lr=0.003 --amend`
    """
    _echo(options.run("train")[1])


@app.command()
@on_run
def evaluate(options: RunOptions) -> None:
    """Measure every method on validation and test and write `results.json`.

    Example: `discl evaluate mine.yaml`
    """
    _echo(options.run("evaluate")[1])


@app.command()
@on_run
def report(options: RunOptions) -> None:
    """Write the run as one self-contained HTML page.

    Example: `discl report mine.yaml`
    """
    _echo(options.run("report")[1])


@app.command()
@on_run
def compare(
    options: RunOptions, seeds: given.TrainingSeeds = None, tune: given.Tune = False
) -> None:
    """Train every method with several seeds; write one table: mean ± std, differences, cost.

    Images are generated once for all seeds. The same command resumes and does only what is
    missing. With --tune the table and the trials are in `tuned/`.

    Example: `discl compare fashion-lt --seeds 0,1,2`
    """
    from .pipeline import compare as compare_methods

    opened = options.open("compare")
    chosen = whole_numbers("--seeds", seeds, "0,1,2") if seeds else None
    path = compare_methods(opened, chosen, tune=tune)
    _echo(path.read_text())
    _echo(path)


@app.command()
@partial(on_run, folder=given.OtherRunFolder)
def export(
    options: RunOptions,
    to: given.Format,
    out: given.ExportFolder,
    everything: given.Everything = False,
    no_marks: given.NoMarks = False,
) -> None:
    """Write the kept synthetic images as a data set for other tools, with a data card.

    The XMP of each image says that it is synthetic.

    Example: `discl export mine.yaml --to hub-folder --out mine-synthetic`
    """
    from .stages.export import export as export_run

    opened, _ = options.run("filter")
    _echo(export_run(opened, to, out, everything, marks=not no_marks))


@app.command()
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
    from .stages.init import write_starter

    columns = dict(given.column_pair(text) for text in column or [])
    _echo(write_starter(folder, out, columns, images))


@app.command()
def predict(
    run: given.Classifier,
    images: given.Images,
    out: given.Predictions,
    method: given.MethodName = None,
    device: given.Device = "cpu",
    unreadable: given.Unreadable = "skip",
    base: given.Base = None,
    crops: given.Crops = 1,
) -> None:
    """Classify images with a trained classifier.

    Example: `discl predict runs/fashion-lt photos --out predictions.csv`
    """
    from .stages.predict import predict as predict_images

    _echo(
        predict_images(
            run, images, out, method, device, unreadable=unreadable, base=base, crops=crops
        )
    )


@app.command()
def convert(name: given.Checkpoint, folder: given.NewFolder) -> None:
    """Convert pickled weights to safetensors once, in a process that may run no code of theirs.

    Example: `discl convert openai/clip-vit-base-patch32 clip-b32`, then in the recipe
    `filter.checkpoint: clip-b32`
    """
    from .conversion import convert_checkpoint

    _echo(convert_checkpoint(name, folder))


@app.command()
def recipes() -> None:
    """List the shipped recipes, one line each.

    Example: `discl recipes`
    """
    from .assets import describe_shipped, shipped_recipes

    names = shipped_recipes()
    for name in names:
        _echo(f"{name:<{max(map(len, names))}}  {describe_shipped(name)}")


def _show_end(text: str, colour: str | None = None) -> None:
    with suppress(OSError, ValueError):
        typer.secho(text, fg=colour, err=True)


def main() -> None:
    """Entry point of `discl`; an error that a user can fix ends it with status 1, no traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from .errors import DisclError
    from .escaping import message
    from .utils.console import flush_standard_error, open_standard_streams

    open_standard_streams()
    try:
        app()
    except DisclError as error:
        _show_end(message(f"error: {error}"), "red")
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as ended:
        # typer exits with 130 for a Ctrl-C during a command
        if isinstance(ended, SystemExit) and ended.code != 130:
            raise
        _show_end("stopped; run the same command again to continue")
        sys.exit(130)
    finally:
        flush_standard_error()


if __name__ == "__main__":
    main()
