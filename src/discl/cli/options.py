"""The options of the command line, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import RecipeError, shorten


def option(name: str, metavar: str | None, text: str, **more: Any) -> Any:
    """An option with its help text; `metavar` stands for its value on help pages."""
    return typer.Option(name, metavar=metavar, help=text, **more)


def argument(metavar: str, text: str) -> Any:
    """An argument with its help text."""
    return typer.Argument(metavar=metavar, help=text)


RecipeName = Annotated[str, argument("RECIPE", "Name of a shipped recipe, or a YAML file.")]
Set = Annotated[
    list[str] | None, option("--set", "KEY=VALUE", "Replace a value of the recipe; repeatable.")
]
RunFolder = Annotated[Path | None, option("--out", "DIR", "Run folder; default runs/NAME.")]
OtherRunFolder = Annotated[Path | None, option("--run", "DIR", "Run folder; default runs/NAME.")]
Amend = Annotated[
    bool, option("--amend", None, "Continue in a folder of another recipe; keep what still fits.")
]
AllowPlugins = Annotated[
    bool, option("--allow-plugins", None, "Import trusted code that the recipe names.")
]

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Errors and results only, no progress bars.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Debug messages, with time and logger.")
]

Sources = Annotated[int, option("--sources", "N", "Hard images to measure on.", min=1, max=10**6)]
Grid = Annotated[str | None, option("--grid", "LIST", "Levels in per cent; default 0,10,...,90.")]
Seeds = Annotated[int, option("--seeds", "N", "Seeds per image and level.", min=1, max=10_000)]
Shard = Annotated[str | None, option("--shard", "K/N", "Only shard K of N; N may change later.")]
Ray = Annotated[str | None, option("--ray", "[ADDRESS]", "On a Ray cluster, one worker per GPU.")]
TrainingSeeds = Annotated[
    str | None, option("--seeds", "LIST", "Training seeds, such as 0,1,2; default the recipe's.")
]
Tune = Annotated[
    bool, option("--tune", None, "First tune every method on validation, with equal trials.")
]

Format = Annotated[
    str,
    option(
        "--to",
        "FORMAT",
        "imagefolder, webdataset, hub-folder, yolo, coco, fiftyone or label-studio.",
    ),
]
ExportFolder = Annotated[
    Path, option("--out", "DIR", "Folder to write: new, empty or an older export.")
]
NoMarks = Annotated[
    bool, option("--no-marks", None, "Without the XMP that says an image is synthetic.")
]
Credentials = Annotated[
    tuple[Path, Path] | None,
    option("--c2pa", "CERTIFICATE KEY", "Sign each image, with a certificate and its key (PEM)."),
]
Everything = Annotated[bool, option("--all", None, "Also the images that the filter dropped.")]
Predictions = Annotated[Path, option("--out", "CSV", "Predictions to write.")]
MethodName = Annotated[
    str | None, option("--method", None, "Method of the classifier; default the recipe's last.")
]
Device = Annotated[str, option("--device", None, "cpu, cuda, cuda:1 or mps.")]
Unreadable = Annotated[
    str, option("--unreadable", None, "Unreadable images: skip (and name them) or error.")
]
Base = Annotated[
    str | None,
    option("--base", "FOLDER", "Checkpoint under a light classifier, if it has moved."),
]
Crops = Annotated[
    int, option("--crops", None, "Mean over 5 crops, as with evaluate.test_time_crops; default 1.")
]

Data = Annotated[
    Path, argument("FOLDER", "Folder of images by class; or a CSV, TSV or Parquet list.")
]
BrowsedFolder = Annotated[Path, argument("RUN", "A run folder.")]
Port = Annotated[
    int | None,
    option("--port", "N", "Port of 127.0.0.1; default 8421, or the next.", min=1, max=65535),
]
NoOpen = Annotated[bool, option("--no-open", None, "Print the address, open no browser.")]
RecipeFile = Annotated[Path | None, option("--out", "FILE", "Recipe to write; default NAME.yaml.")]
Columns = Annotated[
    list[str] | None,
    option("--column", "OURS=THEIRS", "A list's column, such as label=species; repeatable."),
]
BaseFolder = Annotated[
    Path | None, option("--images", "DIR", "Base of a list's paths; default the list's folder.")
]
Classifier = Annotated[Path, argument("RUN", "A run folder, or the folder of one classifier.")]
Images = Annotated[Path, argument("IMAGES", "An image, or a folder of images.")]
Checkpoint = Annotated[
    str, argument("NAME", "Folder, pickled file, or hub name such as owner/name.")
]
NewFolder = Annotated[Path, argument("DIR", "Folder to write, new or empty.")]


class WithAddress(TyperCommand):
    """A command whose option `--ray` may omit its value; the next word is one if it looks so."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], ""]
        for index, (word, value) in enumerate(zip(args, following, strict=True)):
            if word == "--ray" and ":" not in value and value not in {"auto", "local"}:
                args = [*args[:index], "--ray=auto", *args[index + 1 :]]
        return super().parse_args(ctx, args)


def whole_numbers(name: str, text: str, example: str, most: int = 2**53) -> list[int]:
    """The numbers of an option such as "0,1,2". Raises RecipeError outside 0 to `most`."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"{name} takes whole numbers with commas between them, for example {example}; got "
            f"{shorten(text)}."
        ) from error
    for number in numbers:
        if not 0 <= number <= most:
            raise RecipeError(f"{name}: {shorten(number)} is out of range; allowed: 0 to {most}.")
    return numbers


def column_pair(text: str) -> tuple[str, str]:
    """("label", "species") of "label=species". Raises RecipeError for anything else."""
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise RecipeError(
            f"--column takes ours=theirs, for example --column label=species; got '{text}'."
        )
    return ours, theirs
