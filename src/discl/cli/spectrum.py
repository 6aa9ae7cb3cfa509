"""Commands on the spectrum: prompts, measurements, plan, images, filter, audit, export."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import typer

from . import options as given
from .command import RunOptions, echo, on_run


@on_run
def prompts(options: RunOptions) -> None:
    """Write the prompts with a language model, if the recipe names one; then you may edit them.

    Example: `discl prompts mine.yaml` writes `prompts.yaml`, or `settings.yaml`, in the run folder
    """
    echo(options.run("prompts")[1])


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
    from ..pipeline import levels as survey

    chosen = None if grid is None else given.whole_numbers("--grid", grid, "0,20,40", 100)
    path = survey(options.open("prompts"), sources, chosen, seeds)
    echo(path.with_suffix(".md").read_text())
    echo(path)


@on_run
def retrieve(options: RunOptions) -> None:
    """Choose real images of an unlabelled archive by CLIP, if a method trains on such images.

    Example: `discl retrieve mine.yaml --set retrieval.archive=photos-of-mine`
    """
    echo(options.run("retrieve")[1])


@on_run
def adapt(options: RunOptions) -> None:
    """Teach the generator the domain of the real training images, if the recipe says so.

    Example: `discl adapt mine.yaml --set spectrum.adapt.steps=1000`
    """
    echo(options.run("adapt")[1])


@on_run
def pilot(options: RunOptions) -> None:
    """Measure on a few images whether a spectrum will pay; recommend levels, or none.

    The page `pilot.html` shows the images. Example: `discl pilot mine.yaml --set pilot.images=256`
    """
    from ..pipeline import pilot as run_pilot

    path = run_pilot(options.open("prompts"))
    echo(path.with_suffix(".md").read_text())
    echo(path)


@on_run
def plan(options: RunOptions) -> None:
    """Write the plan of the spectrum and print what generating it costs.

    Example: `discl plan mine.yaml --set spectrum.seeds=4`
    """
    from ..stages.pending import scorer_of
    from ..stages.plan import describe_budget, describe_cost, estimate_cost
    from ..stages.rejection import describe_rule
    from ..stages.round_plan import describe_rounds

    opened, path = options.run("plan")
    echo(describe_cost(estimate_cost(opened)))
    rule = ""
    if not opened.recipe.spectrum.makes_none:
        rule = describe_rule(opened, scorer_of(opened))
    for line in filter(None, (describe_budget(opened), describe_rounds(opened), rule)):
        echo(line)
    echo(path)


@on_run
def generate(options: RunOptions, shard: given.Shard = None, ray: given.Ray = None) -> None:
    """Generate the missing images of the plan, on every GPU of this machine.

    Examples: `discl generate mine.yaml --set runtime.slots=32` ·
    in a job array `discl generate mine.yaml --shard $SLURM_ARRAY_TASK_ID/8` ·
    on a Ray cluster `discl generate mine.yaml --ray 10.0.0.1:6379`, or `--ray` for the one at hand
    """
    from ..pipeline import generate as generate_images
    from ..run_folder import paths
    from ..spectrum.plan import WHOLE_PLAN, parse_shard

    part = WHOLE_PLAN if shard is None else parse_shard(shard)
    opened = options.open("generate")
    generate_images(opened, part, ray)
    echo(opened.location(paths.SPECTRUM))


@on_run
def filter_(options: RunOptions) -> None:
    """Score the synthetic images with CLIP and drop those below the threshold.

    With a new threshold no image is scored again:
    `discl filter mine.yaml --set filter.threshold=0.28 --amend`
    """
    echo(options.run("filter")[1])


@on_run
def audit(options: RunOptions) -> None:
    """Check real and synthetic images: copies, leakage, poor images, classes that collapse.

    The findings are in `audit.parquet`, and on the page of the next `discl report`. The exit status
    is 1 if the filter keeps synthetic images that copy a validation or test image.

    Example: `discl audit mine.yaml`
    """
    from ..pipeline import audit as audit_run
    from ..stages.audit import describe_audit

    opened = options.open("data")
    path = audit_run(opened)
    text, fatal = describe_audit(opened)
    echo(text)
    echo(path)
    if fatal:
        raise typer.Exit(1)


def browse(
    run: given.BrowsedFolder, port: given.Port = None, no_open: given.NoOpen = False
) -> None:
    """Look at the images of a run in the browser: filter, threshold, keep or drop by hand.

    The page is served on this machine only, until Ctrl-C. It needs `pip install 'discl[browse]'`.

    Example: `discl browse runs/fashion-lt`
    """
    from ..browse.server import serve

    def amend(changes: Mapping[str, Any]) -> None:
        from ..pipeline import amend_filter

        amend_filter(run, changes)

    serve(run, amend, port=port, show=not no_open, on_start=echo)


@partial(on_run, folder=given.OtherRunFolder)
def export(
    options: RunOptions,
    to: given.Format,
    out: given.ExportFolder,
    everything: given.Everything = False,
    no_marks: given.NoMarks = False,
    c2pa: given.Credentials = None,
) -> None:
    """Write the kept synthetic images as a data set for other tools, with a data card.

    The XMP of each image says that it is synthetic. `--c2pa` also signs each image, which needs
    `pip install 'discl[c2pa]'`.

    Example: `discl export mine.yaml --to hub-folder --out mine-synthetic`
    """
    from ..stages.export import check_format, open_signer
    from ..stages.export import export as export_run

    check_format(to)
    signer = open_signer(*c2pa) if c2pa else None
    opened, _ = options.run("filter")
    echo(export_run(opened, to, out, everything, marks=not no_marks, signer=signer))
