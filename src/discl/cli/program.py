"""The program `discl`: its commands in the order of the help page, and how it ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from . import inputs, run, spectrum, training
from . import options as given
from .command import echo

INPUTS = "What a run starts from"
COMMANDS: dict[str, list[Callable[..., None]]] = {
    "Whole runs": [run.run, run.demo, run.compare, run.report],
    INPUTS: [inputs.init, inputs.recipes, inputs.hard, inputs.convert],
    "The spectrum": [
        spectrum.prompts,
        spectrum.levels,
        spectrum.retrieve,
        spectrum.adapt,
        spectrum.pilot,
        spectrum.plan,
        spectrum.generate,
        spectrum.filter_,
        spectrum.audit,
        spectrum.browse,
        spectrum.export,
    ],
    "Classifiers": [training.train, training.evaluate, training.predict],
}
"""The commands by the heading of the help page above them."""
KINDS: dict[Callable[..., None], Any] = {spectrum.generate: given.WithAddress}
"""The class of a command, where it is not that of typer."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        echo(f"discl {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
]


def _set_up(
    version: Version = False, quiet: given.Quiet = False, verbose: given.Verbose = False
) -> None:
    from ..utils.console import show_messages

    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other; leave one out.")
    show_messages(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


def _make_app() -> typer.Typer:
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
    for heading, commands in COMMANDS.items():
        for command in commands:
            name = command.__name__.removesuffix("_")
            app.command(name, cls=KINDS.get(command), rich_help_panel=heading)(command)
    data = typer.Typer(
        no_args_is_help=True,
        help="Check a data set, or resize it once. Example: `discl data check mine.yaml`",
    )
    data.command("check")(inputs.data_check)
    data.command("prepare")(inputs.data_prepare)
    app.add_typer(data, name="data", rich_help_panel=INPUTS)
    app.callback()(_set_up)
    return app


app = _make_app()


def _show_end(text: str, colour: str | None = None) -> None:
    with suppress(OSError, ValueError):
        typer.secho(text, fg=colour, err=True)


def main() -> None:
    """Entry point of `discl`; an error that a user can fix ends it with status 1, no traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from ..errors import DisclError
    from ..escaping import message
    from ..utils.console import flush_standard_error, open_standard_streams
    from ..utils.memory import keep_freed_memory

    open_standard_streams()
    keep_freed_memory()
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
