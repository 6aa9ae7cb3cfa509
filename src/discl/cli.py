"""The command line: one short command per stage; each parses, calls and prints the path of what it wrote."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from .utils.logging import get_logger

if TYPE_CHECKING:
    from .run_folder.run import Run

logger = get_logger("discl.cli")  # a module that is run is called __main__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Learn from scarce or poor images with a spectrum of diffusion-made ones (arXiv 2410.13674).",
    epilog="Examples: `discl demo` · `discl init photos/birds` · `discl plan birds.yaml` · `discl run birds.yaml`",
)


def _tell_version(asked: bool) -> None:
    if asked:
        from . import __version__

        _echo(f"discl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Errors and results only, no progress bars.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Debug messages, with time and logger.")
    ] = False,
) -> None:
    """Learn from scarce or poor images with a spectrum of synthetic ones (arXiv 2410.13674)."""
    import logging

    from .utils.console import show_messages

    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other; leave one out.")
    show_messages(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Replace a value of the recipe; may be given often."
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run folder; default runs/NAME.")
]
Amend = Annotated[
    bool,
    typer.Option(
        "--amend",
        help="Go on in a folder that was made with another recipe, keeping what still fits.",
    ),
]

AllowPlugins = Annotated[
    bool,
    typer.Option(
        "--allow-plugins",
        help="Import what this recipe names as `module:attribute`, to train with: code that you trust.",
    ),
]


def _echo(text: object) -> None:
    """Prints a result; names in it that would steer the terminal are shown as text."""
    from .escaping import for_terminal

    typer.echo(for_terminal(str(text)))


def _open(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    amend: bool,
    stage: str,
    allow_plugins: bool,
) -> Run:
    """The run, opened for what is to be done, up to `stage`.

    Pieces of your own that it needs are refused without leave before anything is written, and an amendment
    whose models are not fit for it before it changes anything.
    """
    from .recipe import check_own_pieces, load_recipe, parse_override
    from .run_folder.open import open_run
    from .stages import plan as plan_stage

    def check(run: Run) -> None:
        plan_stage.check_models(run, stage)

    loaded = load_recipe(recipe, dict(parse_override(text) for text in overrides or []))
    if stage in plan_stage.TRAINING:
        check_own_pieces(loaded, allow_plugins)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun or accelerate launch
        from .pipeline import open_together
        from .training.distributed import current_processes

        run = open_together(loaded, out, amend, check, allow_plugins=allow_plugins)
        if not current_processes().first:  # the first speaks for all
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        return run
    return open_run(loaded, out, amend, check, allow_plugins=allow_plugins)


def _stage(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    amend: bool,
    stage: str,
    allow_plugins: bool,
) -> None:
    from .pipeline import run_until

    _echo(run_until(_open(recipe, overrides, out, amend, stage, allow_plugins), stage))


def _whole_numbers(option: str, text: str, example: str, most: int = 2**53) -> list[int]:
    from .errors import RecipeError, shorten

    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"{option} takes whole numbers with commas between them, for example {example}; got "
            f"{shorten(text)}."
        ) from error
    for number in numbers:
        if not 0 <= number <= most:
            raise RecipeError(f"{option}: {shorten(number)} is out of range; allowed: 0 to {most}.")
    return numbers


@app.command()
def run(
    recipe: RecipeArgument,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Carry out the whole chain of a recipe and write `report.html`.

    The same command again does only what is missing.

    Examples: `discl run fashion-lt` · `discl run mine.yaml --set spectrum.seeds=4 --out runs/four`
    """
    from .pipeline import results_table, run_until

    opened = _open(recipe, set_, out, amend, "report", allow_plugins)
    path = run_until(opened, "report")
    _echo(results_table(opened))
    _echo(path)


@app.command()
def demo(out: Out = None) -> None:
    """Run the embedded example, `discl run fashion-lt`: ten classes of clothes, three of them rare.

    Example: `discl demo`
    """
    run("fashion-lt", None, out)


data_app = typer.Typer(
    no_args_is_help=True,
    help="Look at a data set, or bring it to the training size. Example: `discl data check mine.yaml`",
)
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(recipe: RecipeArgument, set_: Set = None) -> None:
    """Count images, classes and sizes of each split and list every problem; exit status 1 if one would stop a run.

    Example: `discl data check mine.yaml`
    """
    from .recipe import load_recipe, parse_override
    from .stages.check_data import check_data, describe_check

    loaded = load_recipe(recipe, dict(parse_override(text) for text in set_ or []))
    check = check_data(loaded.data)
    _echo(describe_check(check, loaded.groups))
    if check.fatal:
        raise typer.Exit(1)


@data_app.command("prepare")
def data_prepare(
    recipe: RecipeArgument,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Bring every real image to the training size once, into `prepared/` of the run folder: faster epochs, the same results.

    Example: `discl data prepare mine.yaml`
    """
    from .pipeline import run_until
    from .stages.resize_data import prepare_squares

    opened = _open(recipe, set_, out, amend, "data", allow_plugins)
    run_until(opened, "data")
    _echo(prepare_squares(opened))


@app.command()
def hard(
    recipe: RecipeArgument,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Find the hard training images, rare classes or a low true-class probability, and say how many. Does first whatever is missing before.

    Example: `discl hard mine.yaml`
    """
    from .pipeline import run_until
    from .run_folder import paths
    from .stages.hard import describe_hard

    opened = _open(recipe, set_, out, amend, "hard", allow_plugins)
    known = opened.path(paths.HARD).exists()  # what is found now is told when it is found
    path = run_until(opened, "hard")
    if known:
        logger.info(describe_hard(opened))
    _echo(path)


@app.command()
def prompts(
    recipe: RecipeArgument,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Have the texts written that images are generated from, where the recipe names a language model; edit them before you go on.

    Example: `discl prompts mine.yaml` leaves `prompts.yaml`, or `settings.yaml`, in the run folder
    """
    _stage(recipe, set_, out, amend, "prompts", allow_plugins)


@app.command()
def levels(
    recipe: RecipeArgument,
    sources: Annotated[
        int,
        typer.Option("--sources", metavar="N", min=1, max=10**6, help="Hard images to measure on."),
    ] = 32,
    grid: Annotated[
        str | None,
        typer.Option(
            "--grid",
            metavar="LIST",
            help="Levels in per cent; default 0,10,...,90 as the steps allow.",
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", metavar="N", min=1, max=10_000, help="Images per hard image and level."
        ),
    ] = 1,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Measure a spectrum over λ on some hard images and propose `spectrum.levels` and `filter.threshold`.

    Example: `discl levels mine.yaml --sources 64 --grid 0,20,40,60,80`
    """
    from .pipeline import levels as survey

    chosen = None if grid is None else _whole_numbers("--grid", grid, "0,20,40", 100)
    path = survey(_open(recipe, set_, out, amend, "prompts", allow_plugins), sources, chosen, seeds)
    _echo(path.with_suffix(".md").read_text())
    _echo(path)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Write the plan of the spectrum and print what generating it would cost.

    Example: `discl plan mine.yaml --set spectrum.seeds=4`
    """
    from .pipeline import run_until
    from .stages.plan import describe_cost, estimate_cost

    opened = _open(recipe, set_, out, amend, "plan", allow_plugins)
    path = run_until(opened, "plan")
    _echo(describe_cost(estimate_cost(opened)))
    _echo(path)


class WithAddress(TyperCommand):
    """A command whose option `--ray` may go without a value: what follows is its value if it looks like an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = [*args, ""]
        for place, word in enumerate(args):
            if word == "--ray" and not (
                ":" in given[place + 1] or given[place + 1] in {"auto", "local"}
            ):
                args = [*args[:place], "--ray=auto", *args[place + 1 :]]
        return super().parse_args(ctx, args)


@app.command(cls=WithAddress)
def generate(
    recipe: RecipeArgument,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="K/N",
            help="Only the K-th of N shares of the plan, such as 2/8; N may change later.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="On a Ray cluster, one worker per GPU; without an address on the one at hand.",
        ),
    ] = None,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Make the images of the plan that are missing, on every GPU of this machine. Does first whatever is missing before.

    Examples: `discl generate mine.yaml --set runtime.slots=32` · in a job array `discl generate mine.yaml --shard $SLURM_ARRAY_TASK_ID/8`
    · on a cluster `discl generate mine.yaml --ray 10.0.0.1:6379`
    """
    from .pipeline import generate as generate_images
    from .run_folder import paths
    from .spectrum.plan import WHOLE_PLAN, parse_shard

    part = WHOLE_PLAN if shard is None else parse_shard(shard)
    opened = _open(recipe, set_, out, amend, "generate", allow_plugins)
    generate_images(opened, part, ray)
    _echo(opened.location(paths.SPECTRUM))


@app.command("filter")
def filter_(
    recipe: RecipeArgument,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Score the synthetic images with CLIP and drop those below the threshold.

    Another threshold scores and writes no image again: `discl filter mine.yaml --set filter.threshold=0.28 --amend`
    """
    _stage(recipe, set_, out, amend, "filter", allow_plugins)


@app.command()
def train(
    recipe: RecipeArgument,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Train the classifier of every method. Does first whatever is missing before.

    Example: `discl train mine.yaml --set train.optimizer.lr=0.003 --amend`
    """
    _stage(recipe, set_, out, amend, "train", allow_plugins)


@app.command()
def evaluate(
    recipe: RecipeArgument,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Measure every method on validation and test and write `results.json`. Does first whatever is missing before.

    Example: `discl evaluate mine.yaml`
    """
    _stage(recipe, set_, out, amend, "evaluate", allow_plugins)


@app.command()
def report(
    recipe: RecipeArgument,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Write the run as one self-contained HTML page. Does first whatever is missing before.

    Example: `discl report mine.yaml`
    """
    _stage(recipe, set_, out, amend, "report", allow_plugins)


@app.command()
def compare(
    recipe: RecipeArgument,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", metavar="LIST", help="Training seeds, such as 0,1,2; default the recipe's."
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="First give every method the same number of trials on validation (section compare.tune).",
        ),
    ] = False,
    set_: Set = None,
    out: Out = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Train and measure every method with several seeds and write one table: mean ± std, paired difference with interval, cost.

    Phase 1 is done once; the same command again does only what is missing. With --tune table and trials lie in the folder's tuned/.

    Example: `discl compare fashion-lt --seeds 0,1,2`
    """
    from .pipeline import compare as compare_methods

    opened = _open(recipe, set_, out, amend, "compare", allow_plugins)
    chosen = _whole_numbers("--seeds", seeds, "0,1,2") if seeds else None
    path = compare_methods(opened, chosen, tune=tune)
    _echo(path.read_text())
    _echo(path)


@app.command()
def export(
    recipe: RecipeArgument,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="imagefolder, webdataset or hub-folder.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder to write, new or empty or an older export."
        ),
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="What the filter dropped as well.")
    ] = False,
    set_: Set = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Run folder; default runs/NAME.")
    ] = None,
    amend: Amend = False,
    allow_plugins: AllowPlugins = False,
) -> None:
    """Write the kept synthetic images as a data set for other tools, with a card that says how they were made.

    Example: `discl export mine.yaml --to hub-folder --out mine-synthetic`
    """
    from .pipeline import run_until
    from .stages.export import export as export_run

    opened = _open(recipe, set_, run, amend, "filter", allow_plugins)
    run_until(opened, "filter")
    _echo(export_run(opened, to, out, everything))


@app.command()
def init(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder with one sub-folder of images per class or of Parquet files, or a CSV, TSV or Parquet file.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where to write the recipe; default NAME.yaml."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="OURS=THEIRS",
            help="A list's column, such as label=species; may be given often.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Folder that a list's paths are relative to; default the list's own.",
        ),
    ] = None,
) -> None:
    """Write a commented recipe for a folder of images, or for a list of them.

    Examples: `discl init photos/birds` writes `birds.yaml` · `discl init birds.csv --images photos --column label=species`
    """
    from .errors import RecipeError
    from .stages.init import write_starter

    columns = {}
    for text in column or []:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise RecipeError(
                f"--column takes ours=theirs, for example --column label=species; got '{text}'."
            )
        columns[ours] = theirs
    _echo(write_starter(folder, out, columns, images))


@app.command()
def predict(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of one classifier.")
    ],
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="An image, or a folder of images.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="CSV", help="Where to write the predictions.")
    ],
    method: Annotated[
        str | None,
        typer.Option("--method", help="Which method's classifier; default the last of the recipe."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 or mps.")] = "cpu",
    unreadable: Annotated[
        str,
        typer.Option(
            "--unreadable", help="Images that cannot be read: skip (and name them) or error."
        ),
    ] = "skip",
) -> None:
    """Classify images with a trained classifier.

    Example: `discl predict runs/fashion-lt photos --out predictions.csv`
    """
    from .stages.predict import predict as predict_images

    _echo(predict_images(run, images, out, method, device, unreadable=unreadable))


@app.command()
def convert(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A folder, a pickled file, or a hub name such as owner/name."
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write, new or empty.")],
) -> None:
    """Convert a checkpoint with pickled weights to safetensors, once, in a process that may run no code of it.

    Example: `discl convert openai/clip-vit-base-patch32 clip-b32`, then `filter.checkpoint: clip-b32` in the recipe
    """
    from .conversion import convert_checkpoint

    _echo(convert_checkpoint(name, folder))


@app.command()
def recipes() -> None:
    """List the recipes that ship with the package, each with one line.

    Example: `discl recipes`
    """
    from .assets import describe_shipped, shipped_recipes

    names = shipped_recipes()
    for name in names:
        _echo(f"{name:<{max(map(len, names))}}  {describe_shipped(name)}")


def _open_standard_streams() -> None:
    """Opens closed standard streams on the null device: no file that is opened later, and written
    by libraries as standard error, gets their number."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)


def _flush_standard_error() -> None:
    """Drops what a full or closed standard error does not take, which would change the status."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)


def main() -> None:
    """Entry point of `discl`: an error that a user can mend is printed without a traceback, with exit status 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from .errors import DisclError
    from .escaping import message

    _open_standard_streams()
    try:
        app()
    except DisclError as error:
        with suppress(OSError, ValueError):
            typer.secho(message(f"error: {error}"), fg="red", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as ended:
        if (
            isinstance(ended, SystemExit) and ended.code != 130
        ):  # typer makes 130 of a Ctrl-C that comes while a command runs
            raise
        with suppress(OSError, ValueError):
            typer.secho("stopped; the same command goes on where this one ended", err=True)
        sys.exit(130)
    finally:
        _flush_standard_error()


if __name__ == "__main__":
    main()
