"""The page on security names an existing test for each guarantee."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_each_guarantee_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(NAMED) > 5
    assert all(re.search(r"\| `tests/[\w/]+\.py::\w+` \|$", row) for row in rows)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_named_tests_exist(file: str, name: str) -> None:
    parsed = ast.parse((ROOT / file).read_text())
    functions = {node.name for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)}
    assert name in functions
