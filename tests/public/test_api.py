"""Every public name has a docstring with all arguments, and an example; see `test_stories`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

import discl


def argument_names(public: Any) -> list[str]:
    """Arguments that a public name takes; of a class those of the constructor that it defines."""
    if not inspect.isclass(public):
        return list(inspect.signature(public).parameters)
    if issubclass(public, BaseModel):
        return list(public.model_fields)
    if dataclasses.is_dataclass(public):
        return [field.name for field in dataclasses.fields(public) if field.init]
    if "__init__" not in vars(public) or getattr(public, "_is_protocol", False):
        return []
    return list(inspect.signature(public.__init__).parameters)[1:]


def described(documentation: str) -> set[str]:
    """Names in the bullets of a docstring: "- `a`, `b`: …; `c`: …"."""
    text = re.sub(r"```.*?```", "", documentation, flags=re.DOTALL)
    bullets = re.findall(r"^- (.+?)(?=^\S|^$|\Z)", text, re.MULTILINE | re.DOTALL)
    return {name for bullet in bullets for name in re.findall(r"`(\w+)`(?=[,:])", bullet)}


def examples(documentation: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", documentation, re.MULTILINE | re.DOTALL)


def modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


@pytest.mark.parametrize("name", discl.__all__)
def test_a_docstring_describes_every_argument(name: str) -> None:
    public = getattr(discl, name)
    documentation = inspect.cleandoc(public.__doc__ or "")
    assert documentation.partition("\n")[0].rstrip().endswith("."), "a first line, a sentence"
    assert set(argument_names(public)) <= described(documentation)
    assert all(len(line) <= 100 for line in documentation.splitlines())


@pytest.mark.parametrize("name", discl.__all__)
def test_an_example_compiles_and_imports_public_names_only(name: str) -> None:
    blocks = examples(inspect.getdoc(getattr(discl, name)) or "")
    assert blocks, f"{name} has no example"
    for block in blocks:
        tree = ast.parse(block)
        compile(tree, name, "exec")
        own = {module for module in modules(tree) if module.partition(".")[0] == "discl"}
        assert own == {"discl"}
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "discl"
        }
        assert used <= set(discl.__all__), "an example uses a name that is not public"
        assert used, "an example does not use the package"
