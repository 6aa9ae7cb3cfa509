"""All docs pages: commands exist, YAML blocks are parts of a recipe, the site lists the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

import discl
from discl import cli
from discl.recipe.merge import merge

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDED: dict[str, Any] = {
    "name": "page",
    "data": {"root": "photos"},
    "spectrum": {"checkpoint": "owner/diffusion", "levels": [0, 50]},
    "filter": {"checkpoint": "owner/clip"},
    "methods": {"ce": {}},
}


def commands(tool: click.Command, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], set[str]]:
    """`{command: options}` of the command line."""
    found = {words: {option for each in tool.params for option in each.opts} | {"--help"}}
    for name, below in getattr(tool, "commands", {}).items():
        found |= commands(below, (*words, name))
    return found


KNOWN = commands(typer.main.get_command(cli.app))


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def calls(page: Path) -> list[list[str]]:
    """Words of each command of `discl`, in blocks and in the text."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    spoken = re.findall(r"`(discl [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.split("#")[0].split() for line in [*lines, *spoken] if line.startswith("discl ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_options_exist(page: Path) -> None:
    for words in calls(page):
        name = tuple(words[1:3]) if tuple(words[1:3]) in KNOWN else tuple(words[1:2])
        assert name in KNOWN, " ".join(words)
        used = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
        assert used <= KNOWN[name], f"{' '.join(words)}: {used - KNOWN[name]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_blocks_are_parts_of_a_recipe(page: Path) -> None:
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if isinstance(tree, dict) and set(tree) <= set(discl.Recipe.model_fields):
            discl.load_recipe(merge(NEEDED, tree))
        elif "extends" not in tree:
            assert page.stem in {"your-own-data"}, f"no part of a recipe: {sorted(tree)[:3]}"


@pytest.mark.parametrize(
    "file",
    [ROOT / "README.md", *PAGES, *(ROOT / "examples").glob("*.py")],
    ids=lambda file: file.name,
)
def test_only_public_names_are_imported(file: Path) -> None:
    """From `discl` itself; the callbacks of frameworks are in `discl.integrations`."""
    lines = re.findall(
        r"^ *from (discl[\w.]*) import ([^\n(]+|\([^)]*\))", file.read_text(), re.MULTILINE
    )
    for module, names in lines:
        if module.startswith("discl.integrations."):
            continue
        assert module == "discl", f"{module} is not public"
        assert set(re.findall(r"\w+", names)) <= set(discl.__all__)


def test_the_site_lists_every_page() -> None:
    listed = re.findall(r"([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == [page.name for page in PAGES]


def test_the_reference_names_what_is_public() -> None:
    documented = re.findall(r"^::: ([\w.]+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    names = {address.rpartition(".")[2] for address in documented}
    errors = {name for name in discl.__all__ if name.endswith("Error")}
    assert set(discl.__all__) - errors == names - {"errors"}


def test_lines_of_prose_and_of_recipes_have_at_most_100_columns() -> None:
    """Tables, pictures, links and output of commands may be longer."""
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    recipes = [
        *(ROOT / "benchmarks").glob("*.yaml"),
        *(ROOT / "src" / "discl" / "recipes").glob("*.yaml"),
    ]
    long = [
        f"{file.name}:{number}"
        for file in [*pages, *(ROOT / "benchmarks" / "checkpoints").glob("*.md"), *recipes]
        for number, line in enumerate(
            re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S).splitlines(), 1
        )
        if len(line) > 100 and "http" not in line and not line.startswith(("|", "!", "    "))
    ]
    assert not long
