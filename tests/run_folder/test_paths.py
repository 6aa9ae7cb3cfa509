"""File names of a run folder are in `run_folder/paths.py` alone."""

from __future__ import annotations

import ast
from pathlib import Path

import discl
from discl.run_folder import paths

ROOT = Path(discl.__file__).parent
NAMES = {
    name: value for name, value in vars(paths).items() if name.isupper() and isinstance(value, str)
}
FILES = {value for value in NAMES.values() if Path(value).suffix}
CHECKPOINTS = (
    *("checkpoints.py", "checkpoint_checks.py", "conversion.py", "models/pretrained.py"),
    *("prompts/captions.py", "spectrum/models/", "transformers_models.py"),
    "stages/classifiers.py",
)
"""Modules that read checkpoints of others, whose file names a trained classifier shares."""
OF_CHECKPOINTS = {paths.CONFIG, paths.WEIGHTS}
MODULES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.rglob("*.py"))
    if path != Path(paths.__file__)
]


def texts(tree: ast.Module) -> list[ast.Constant]:
    """Texts of a module's code, docstrings left out."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in statements
    ]


def test_a_name_is_stated_once() -> None:
    assert len({*NAMES.values()}) == len(NAMES) > 30


def strays(module: str) -> list[str]:
    """Lines of a module that state the name of a file or folder of a run folder."""
    allowed = OF_CHECKPOINTS if module.startswith(CHECKPOINTS) else set()
    tree = ast.parse((ROOT / module).read_text())
    named = [
        node
        for node in texts(tree)
        if Path(node.value.rstrip()).name in FILES - allowed or node.value.startswith("part-")
    ]
    located = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"path", "location"}
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ]
    folders = set(NAMES.values()) - FILES
    joined = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and isinstance(node.right, ast.Constant)
        and node.right.value in folders
        and not module.startswith(("data/", "export/"))  # names of other formats
    ]
    nodes = [*named, *located, *joined]
    return [f"{module}, line {node.lineno}: {ast.unparse(node)}" for node in nodes]


def test_file_names_come_from_paths() -> None:
    """No text of another module is, or ends with, the name of a file of a run folder."""
    assert [line for module in MODULES for line in strays(module)] == []
