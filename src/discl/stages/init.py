"""`discl init`: a commented recipe for a folder or a list of images."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ..data import ImageTable, read_tables
from ..data.readers import FILE_NAME, guess_columns, list_inside, too_few_classes
from ..data.readers import LIST_SUFFIXES as LISTS
from ..errors import DataError, arguments_named, unknown
from ..escaping import one_line
from ..recipe import load_recipe
from ..recipe.data import OwnSplit
from ..recipe.types import as_name
from ..run_folder.run import KEYS
from ..utils.atomic import make_folder
from ..utils.counts import count_have, count_of
from ..utils.logging import get_logger
from ..utils.stored import write_text

if TYPE_CHECKING:
    from jinja2 import Template

logger = get_logger(__name__)

EPOCHS = 65
UPDATES = 2000
"""Fewest updates of a network that is trained from scratch, however few the images are."""
LARGEST_BATCH = 128
COLUMNS = ("image", "label", "id", "split", "domain", "group")


def write_starter(
    folder: Path,
    out: Path | None = None,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
) -> Path:
    """Writes a commented recipe for a folder or a list of images, and returns its path.

    - `folder`: the folder or list.
    - `out`: the recipe, default `NAME.yaml`.
    - `columns`: `{our column: its name in the list}`, for names that are not usual ones.
    - `images`: the folder that the paths of a list are relative to.

    Raises DataError if there is no data set or only one class, if columns or the first image are
    missing, or if the recipe exists already.
    """
    for name in columns or {}:
        if name not in COLUMNS:
            raise DataError(unknown("column", name, COLUMNS))
    is_list = folder.is_file() and folder.suffix.lower() in LISTS
    beside = None if images is None else str(images)
    with arguments_named(**{name: f"data.{key}" for name, key in KEYS.items()}):
        columns = _guess_columns(folder, dict(columns or {}), is_list)
        tables = read_tables(
            str(folder), columns=columns, images=beside, on_left_out=logger.warning
        )
    table = tables["train"]
    if problem := too_few_classes(str(folder), table.class_names):
        raise DataError(problem)
    if is_list:
        _check_first_image(folder, table)
    whole_path = folder.resolve()
    name = as_name(whole_path.stem if folder.is_file() else whole_path.name)
    path = out if out is not None else Path(f"{name}.yaml")
    if path.exists():
        raise DataError(f"{path} exists already; name another file with --out.")
    make_folder(path.parent)
    facts = _facts(table, tables)
    text = _load_template().render(
        facts,
        folder=repr(one_line(folder.name)),
        file=one_line(shlex.quote(str(path))),
        name=name,
        root=_quoted(str(whole_path)),
        columns=_flow(columns) if columns else None,
        image_folder=None if images is None else _quoted(str(images.resolve())),
        is_list=is_list,
    )
    write_text(path, text)
    return path


def _guess_columns(folder: Path, columns: dict[str, str], is_list: bool) -> dict[str, str]:
    """The columns of a list, or of a list in the folder, completed by usual names."""
    if is_list:
        return guess_columns(folder, columns)
    if folder.is_dir() and (described := list_inside(str(folder), columns)) is not None:
        columns = guess_columns(described, {"image": FILE_NAME, **columns})
        if columns["image"] == FILE_NAME:
            del columns["image"]
    return columns


def _check_first_image(folder: Path, table: ImageTable) -> None:
    """Raises DataError if a list names a first image that does not exist."""
    if table.root is None:
        return
    first = Path(table.rows[0]["image"]["path"] or ".")
    if not first.exists():
        raise DataError(
            f"{folder} names {first.absolute()}, which does not exist; name the folder of the "
            "images with --images."
        )


def _facts(table: ImageTable, tables: Mapping[str, ImageTable]) -> dict[str, Any]:
    """Values of the template that follow from the images."""
    counts = table.class_counts
    empty = int((counts == 0).sum())
    counts = counts[counts > 0]
    few = max(20, int(counts.min()) + 1)  # at least the smallest class is a tail class
    batch = min(LARGEST_BATCH, max(len(table) // 2, 1))
    dtype, note = _dtype()
    return {
        "images": count_of(len(table), "training image" if "test" in tables else "image"),
        "classes": count_of(len(counts), "class", "classes"),
        "smallest": counts.min(),
        "largest": counts.max(),
        "empty_classes": count_have(empty, "listed class", "listed classes") if empty else None,
        "many": max(100, few),
        "few": few,
        "batch": batch,
        "epochs": EPOCHS,
        "steps": _steps(len(table), tables, batch),
        "least_steps": -(-UPDATES // EPOCHS),
        "scenes": load_recipe("imagenet-lt-ce-discl").prompts.templates,
        "dtype": dtype,
        "dtype_note": note,
    }


def _steps(images: int, tables: Mapping[str, ImageTable], batch: int) -> int:
    """Updates in an epoch of the images that own splits leave."""
    own = OwnSplit()
    left = 1 - own.validation * ("validation" not in tables) - own.test * ("test" not in tables)
    return max(math.ceil(left * images / batch), 1)


def _dtype() -> tuple[str, str]:
    """`spectrum.dtype` for the device of this machine, and why."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return (
            "float16",
            "For the GPU of this machine; bfloat16 for SD 3.x and FLUX.1, float32 on a CPU.",
        )
    return (
        "float32",
        "No GPU was found here; on one, float16 or bfloat16 takes half the memory and less time.",
    )


@cache
def _load_template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("discl", "stages"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
    )
    return templates.get_template("starter.yaml.j2")


def _flow(values: Mapping[str, str]) -> str:
    """A mapping in YAML, on one line."""
    return yaml.safe_dump(
        dict(values), default_flow_style=True, allow_unicode=True, width=1000
    ).strip()


def _quoted(text: str) -> str:
    """A text in YAML, on one line."""
    return "'" + text.replace("'", "''") + "'" if text.isprintable() else json.dumps(text)
