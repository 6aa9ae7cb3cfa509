"""Commands on a whole run: run, demo, compare, report."""

from __future__ import annotations

from . import options as given
from .command import RunOptions, echo, on_run


@on_run
def run(options: RunOptions) -> None:
    """Run all steps of a recipe and write `report.html`.

    The same command resumes and does only what is missing.

    Examples: `discl run fashion-lt` · `discl run mine.yaml --set spectrum.seeds=4 --out runs/four`
    """
    from ..pipeline import results_table

    finished, path = options.run("report")
    echo(results_table(finished))
    echo(path)


def demo(out: given.RunFolder = None) -> None:
    """Run the embedded example: ten classes of clothes, three of them rare.

    Example: `discl demo` does `discl run fashion-lt`
    """
    run(recipe="fashion-lt", folder=out)


@on_run
def compare(
    options: RunOptions, seeds: given.TrainingSeeds = None, tune: given.Tune = False
) -> None:
    """Train every method with several seeds; write one table: mean ± std, differences, cost.

    Images are generated once for all seeds. The same command resumes and does only what is
    missing. With --tune the table and the trials are in `tuned/`.

    Example: `discl compare fashion-lt --seeds 0,1,2`
    """
    from ..pipeline import compare as compare_methods

    opened = options.open("compare")
    chosen = given.whole_numbers("--seeds", seeds, "0,1,2") if seeds else None
    path = compare_methods(opened, chosen, tune=tune)
    echo(path.read_text())
    echo(path)


@on_run
def report(options: RunOptions) -> None:
    """Write the run as one self-contained HTML page.

    Example: `discl report mine.yaml`
    """
    echo(options.run("report")[1])
