"""The embedded data, phrases, names and checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from ..errors import RecipeError, shorten, unknown
from ..utils.atomic import is_regular, path_exists
from ..utils.yaml_text import LISTS, read_yaml

FOLDERS = {"fashion-mnist": "fashion_mnist"}
PHRASES = Path(__file__).parent / "phrases"
LONG_TAILS = Path(__file__).parent / "long_tails"
NAMES = Path(__file__).parent / "names"
PUBLISHED = Path(__file__).parent / "published.yaml"
RECIPES = Path(__file__).parents[1] / "recipes"


def embedded(address: str) -> Path:
    """Folder of an address such as `embedded:fashion-mnist/data`.

    Raises RecipeError for an unknown one.
    """
    name, _, below = address.removeprefix("embedded:").partition("/")
    if name not in FOLDERS:
        raise RecipeError(unknown("embedded asset", name, FOLDERS))
    root = Path(__file__).parent / FOLDERS[name]
    path = root / below
    if not path_exists(path):
        raise RecipeError(
            f"'{shorten(address, quoted=False)}' is not in the package; embedded:{name} holds "
            f"{', '.join(sorted(item.name for item in root.iterdir()))}."
        )
    return path


def embedded_phrases(name: str) -> Path:
    """File of the shipped phrase list `name`, such as `fashion-mnist`.

    Raises RecipeError for an unknown one.
    """
    path = PHRASES / f"{name}.yaml"
    if not is_regular(path):
        raise RecipeError(
            unknown("phrase list", name, (item.stem for item in PHRASES.glob("*.yaml")))
        )
    return path


def embedded_index(name: str) -> Path:
    """File of the shipped long-tail index `name`, such as `cifar100`.

    Raises RecipeError for an unknown one.
    """
    path = LONG_TAILS / f"{name}.txt"
    if not is_regular(path):
        raise RecipeError(
            unknown("long-tail index", name, (item.stem for item in LONG_TAILS.glob("*.txt")))
        )
    return path


def common_names(name: str) -> dict[str, list[str]]:
    """`{scientific name: common names}` of the shipped list `name`, such as `iwildcam`.

    A scientific name that occurs in several categories has several common names.
    """
    listed = read_yaml(NAMES / f"{name}.yaml", LISTS)
    return {
        scientific: common if isinstance(common, list) else [common]
        for scientific, common in listed.items()
    }


@cache
def _tables() -> dict[str, Any]:
    return dict(read_yaml(PUBLISHED, LISTS))


def published_figures(table: str) -> dict[str, dict[str, float]]:
    """`{row: {column: per cent}}` of a table of the paper (arXiv 2410.13674).

    - `table`: a name in `published.yaml`, such as `imagenet-lt-resnet10`. Values that the paper
      does not report are absent.

    Raises RecipeError for an unknown table.
    """
    tables = _tables()
    if table not in tables:
        raise RecipeError(unknown("published table", table, tables))
    rows = dict(tables[table])
    columns = rows.pop("columns")
    named = {row: zip(columns, figures, strict=True) for row, figures in rows.items()}
    return {
        row: {column: figure for column, figure in each if figure is not None}
        for row, each in named.items()
    }


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes, without those in `recipes/base`, which others extend."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def describe_shipped(name: str) -> str:
    """The first line of a shipped recipe's header."""
    first = (RECIPES / f"{name}.yaml").read_text().partition("\n")[0]
    return first.removeprefix("#").strip()
