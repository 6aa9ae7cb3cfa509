"""docs/fidelity.md: every published row with its recipe, every recipe, and keys that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from discl.assets import PUBLISHED
from discl.recipe import Recipe, load_recipe, shipped_recipes
from discl.stages.init import write_starter
from helpers.miniatures import draw

PAGE = Path(__file__).parents[1] / "docs" / "fidelity.md"
LIGHT = [name for name in shipped_recipes() if "-light" in name]
PAPER = [
    name
    for name in shipped_recipes()
    if name not in LIGHT and not name.startswith(("fashion", "cifar10-"))
]


def tables() -> dict[str, list[list[str]]]:
    """`{heading: rows of the table below it}`, the heading of the columns left out."""
    found: dict[str, list[list[str]]] = {}
    for part in re.split(r"^#+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        found[part.partition("\n")[0]] = cells[2:]
    return found


def test_every_published_row_stands_with_its_figures_and_recipe() -> None:
    published, shown = yaml.safe_load(PUBLISHED.read_text()), tables()
    for table, rows in published.items():
        columns = rows.pop("columns")
        assert [row[0] for row in shown[table]] == list(rows), table
        for row, figures, recipe, method in shown[table]:
            stated = [None if each == "–" else float(each) for each in figures.split(" / ")]
            assert stated == rows[row] and len(columns) == len(stated)
            found = load_recipe(recipe.strip("`"))
            method = method.strip("`")
            assert found.compare.published == table
            assert found.compare.rows.get(method, method) == row
            assert method in found.methods or method in found.compare.rows


def test_every_recipe_of_the_paper_is_named() -> None:
    named = set(re.findall(r"`([a-z0-9-]+)`", PAGE.read_text(encoding="utf-8")))
    missing = set(PAPER) - named
    assert not missing


@pytest.mark.parametrize("heading", ["Images", "Training"])
def test_differences_have_six_cells_and_keys_that_exist(heading: str) -> None:
    rows = tables()[heading]
    assert len(rows) > 15 and {len(row) for row in rows} == {6}
    dotted = [key for row in rows for key in re.findall(r"`([a-z]+\.[a-z_.]+)", row[4])]
    assert len(dotted) > 8
    for key in dotted:
        section: type[BaseModel] = Recipe
        for part in key.split("."):
            assert part in section.model_fields, key
            kind = section.model_fields[part].annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                section = kind


def test_the_starter_draws_from_the_same_scenes(tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        for number in range(3):
            draw(tmp_path / "photos" / name / f"{number}.png", label, number)
    written = load_recipe(write_starter(tmp_path / "photos", tmp_path / "photos.yaml"))
    assert written.prompts.templates == load_recipe("imagenet-lt-ce-discl").prompts.templates


@pytest.mark.parametrize("name", PAPER)
def test_headers_point_to_the_page(name: str) -> None:
    path = Path(__file__).parents[1] / "src" / "discl" / "recipes" / f"{name}.yaml"
    assert "docs/fidelity.md" in path.read_text(encoding="utf-8").split("extends:")[0]
