"""Tests in this folder use what users use: `import discl` and the command line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import discl


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("*.py")), ids=lambda f: f.name)
def test_nothing_deeper_is_imported(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert {each.name for each in node.names if each.name.startswith("discl.")} == set()
        elif isinstance(node, ast.ImportFrom):
            assert not str(node.module).startswith(("discl.", "helpers"))
            if node.module == "discl":
                assert {each.name for each in node.names} <= set(discl.__all__)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "discl":
            assert node.attr in {*discl.__all__, "__all__", "__version__"}
