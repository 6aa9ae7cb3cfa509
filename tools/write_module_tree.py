"""Writes the list of modules in ARCHITECTURE.md from the first lines of the modules' docstrings.

    python tools/write_module_tree.py            # update the page
    python tools/write_module_tree.py --check    # exit status 1 if the page is out of date

Modules keep their order on the page. New ones are added at the end of their folder.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PAGE = ROOT / "src" / "discl", ROOT / "ARCHITECTURE.md"
TREE = re.compile(r"^    cli/ .*?(?=\n\n)", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^( +)([\w.]+(?:\.py|/))(?: |$)")
INDENT, COLUMN, WIDTH = 4, 30, 100


def modules() -> dict[str, str]:
    """`{path in the package: first line of its docstring}`; a folder's path ends with "/"."""
    result = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE).as_posix().removesuffix("__init__.py")
        if path:
            docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
            result[path] = docstring.partition("\n")[0]
    return result


def listed(tree: str) -> list[str]:
    """Paths of a tree, in their order."""
    result: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        if (found := LINE.match(line)) and len(found[1]) < COLUMN:
            folders = folders[: (len(found[1]) - INDENT) // 2]
            result.append("".join([*folders, found[2]]))
            if found[2].endswith("/"):
                folders.append(found[2])
    return result


def draw(order: list[str], lines: dict[str, str]) -> str:
    """The tree: files of a folder, then its folders."""
    paths = [path for path in dict.fromkeys(order) if path in lines]
    paths += [path for path in lines if path not in paths]

    def folder_of(path: str) -> str:
        return path.rstrip("/").rpartition("/")[0]

    def entry(path: str, depth: int) -> list[str]:
        name = path.rstrip("/").rpartition("/")[2] + ("/" if path.endswith("/") else "")
        head = (" " * (INDENT + 2 * depth) + name).ljust(COLUMN - 1) + " "
        drawn = textwrap.wrap(
            head + lines[path],
            WIDTH,
            subsequent_indent=" " * COLUMN,
            drop_whitespace=True,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        within = [other for other in paths if folder_of(other) == path.rstrip("/")]
        if path.endswith("/"):
            for other in sorted(within, key=lambda each: each.endswith("/")):
                drawn += entry(other, depth + 1)
        return drawn

    top = [path for path in paths if not folder_of(path)]
    return "\n".join(line for path in top for line in entry(path, 0))


def updated(page: str) -> str:
    """The page with the current tree."""
    tree = TREE.search(page)
    if tree is None:
        raise ValueError(f"{PAGE} has no list of modules that starts with cli/")
    return page.replace(tree[0], draw(listed(tree[0]), modules()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    page = PAGE.read_text()
    new = updated(page)
    if not check:
        PAGE.write_text(new)
    return int(check and new != page)


if __name__ == "__main__":
    sys.exit(main())
