"""Names, files, `extends` and overrides to a validated recipe."""

from __future__ import annotations

import difflib
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..assets import RECIPES, shipped_recipes
from ..checkpoints import local_path
from ..errors import RecipeError, join_lines, shorten
from ..run_folder import paths
from ..utils.atomic import is_regular, path_exists
from ..utils.yaml_text import RECIPE as LIMITS
from ..utils.yaml_text import check_plain, parse_yaml, read_yaml
from .merge import get_value, merge, set_value
from .paths import LISTS, TEXTS, map_paths, matches
from .problems import explain
from .recipe import Recipe

EXTENDS = "extends"
"""A key of the file, not of the recipe."""
MOST_FILES = 32
"""Files of one recipe with `extends`, at most."""
MOST_COMPARED = 1000
"""Files that are compared with the name of a recipe that does not exist, at most."""
EXPLAINED = 50
"""Problems that are explained, at most. The others are counted."""


@lru_cache(4096)
def is_text(keys: tuple[str, ...]) -> bool:
    """Whether the values in the list or mapping at these keys of a recipe are texts as written."""
    return matches(keys, TEXTS)


def load_recipe(
    source: Recipe | str | Path | dict[str, Any], overrides: dict[str, Any] | None = None
) -> Recipe:
    """The recipe of a shipped name, a YAML file, a plain tree or another recipe.

    - `source`: the name of a shipped recipe, a path that ends in `.yaml`, a plain tree or a recipe.
    - `overrides`: values by their keys, such as `{"train.epochs": 5}`. Each replaces what is there.

    `extends: NAME` or `extends: path/to/base.yaml` lays a file over another recipe; a list lays
    later ones over earlier ones. Mappings are merged key by key, lists and values replaced, and a
    null removes what the base says. A file inherits everything but the name; without a name of its
    own it is called like the file.

    Relative paths are looked up beside the YAML file that states them, then in the working folder;
    those of `data.files` in `data.root` first. A path that does not exist stays as it is: it may be
    a name on the hub.

    Raises RecipeError for an unknown name, base, key or strategy, for bases that extend one
    another, and for every value out of range.

    ```python
    import discl

    recipe = discl.load_recipe("fashion-lt", {"train.epochs": 61})
    ```
    """
    folder = Path()
    if isinstance(source, Recipe):
        tree = source.plain()
    elif isinstance(source, dict):
        if wrong := check_plain(source):
            raise RecipeError(wrong)
        tree = _extended(source, folder, (), _Files())
    else:
        path = _recipe_path(source)
        folder = path.parent
        tree = _read(path, (), _Files())
    for key, value in (overrides or {}).items():
        tree = set_value(tree, key, value, f"--set {shorten(key, quoted=False)}: ")
    if overrides and (wrong := check_plain(tree)):
        raise RecipeError(wrong)
    return validate(_resolve_paths(tree, folder))


def validate(tree: dict[str, Any]) -> Recipe:
    """The recipe of a plain tree. Raises RecipeError with one line for each problem."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        misspelt = [
            each
            for each in problems
            if each["type"] == "extra_forbidden" and _nearest(str(each["loc"][0])) == EXTENDS
        ]
        # The base was not read, and may hold everything else that seems wrong.
        raise RecipeError(
            join_lines(
                [
                    explain(each, Recipe, more=[EXTENDS])
                    for each in (misspelt or problems)[:EXPLAINED]
                ],
                of=len(misspelt or problems),
            )
        ) from error


def _nearest(key: str) -> str:
    """The top-level key that is most similar to this one; empty if none is similar."""
    return next(iter(difflib.get_close_matches(key, [*Recipe.model_fields, EXTENDS], n=1)), "")


def parse_override(text: str) -> tuple[str, Any]:
    """`("train.epochs", 5)` of "train.epochs=5"; the value is read as YAML."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(
            "--set takes key=value, for example --set train.epochs=5; got "
            f"'{shorten(text, quoted=False)}'."
        )
    what = f"--set {shorten(key, quoted=False)}: {shorten(value)}"
    return key, parse_yaml(value, what, LIMITS, is_text, above=tuple(key.split(".")))


class _Files:
    """The files of one recipe. Each is read once."""

    def __init__(self) -> None:
        self.flat: dict[Path, dict[str, Any]] = {}
        self.read = 0

    def count(self, path: Path) -> None:
        self.read += 1
        if self.read > MOST_FILES:
            raise RecipeError(
                f"{path}: the recipe consists of more than {MOST_FILES} files; combine some of "
                "the files that it extends."
            )


def _read(path: Path, above: tuple[Path, ...], files: _Files) -> dict[str, Any]:
    """The flat tree of a file; `above` are the files that extend it, outermost first."""
    here = path.resolve()
    if here in above:
        circle = " -> ".join(each.name for each in (*above[above.index(here) :], here))
        raise RecipeError(
            f"these recipes extend one another in a circle: {circle}; remove one `extends`."
        )
    if path.absolute() in files.flat:
        return files.flat[path.absolute()]
    files.count(path)
    tree = read_yaml(path, LIMITS, is_text)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds no recipe: a mapping of keys is expected at its top.")
    if "extends" in tree:
        tree = {"name": path.stem, **tree}
    flat = _extended(tree, path.parent, (*above, here), files)
    files.flat[path.absolute()] = flat
    return flat


def _extended(
    tree: dict[str, Any], folder: Path, above: tuple[Path, ...], files: _Files
) -> dict[str, Any]:
    """The tree merged over its bases, without `extends`.

    Relative paths are looked up in `folder`.
    """
    bases = tree.get("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(
            "extends: the name of a shipped recipe or the path of a YAML file is expected, or a "
            f"list of them; got {shorten(bases)}."
        )
    if len(bases) > MOST_FILES:
        raise RecipeError(f"extends names {len(bases)} recipes; at most {MOST_FILES} are allowed.")
    flat: dict[str, Any] = {}
    for base in bases:
        try:
            path = _recipe_path(folder / local_path(base) if _is_path(base) else base)
        except RecipeError as error:
            raise RecipeError(
                f"{above[-1] if above else 'the recipe'} extends {shorten(base)}: {error}"
            ) from error
        base_tree = _read(path, above, files)
        flat = merge(flat, {key: value for key, value in base_tree.items() if key != "name"})
    own = {key: value for key, value in tree.items() if key != "extends"}
    return merge(flat, _resolve_paths(own, folder, flat))


def _is_path(source: str | Path) -> bool:
    return Path(source).suffix in {".yaml", ".yml"} or Path(source).parent != Path()


def _recipe_path(source: str | Path) -> Path:
    path = Path(source)
    if _is_path(source) and is_regular(path):
        return path
    if not _is_path(source) and str(source) in shipped_recipes():
        return RECIPES / f"{source}.yaml"
    if is_regular(path / paths.RECIPE):
        raise RecipeError(
            f"{path} is a run folder, and its recipe is {path / paths.RECIPE}; to continue there, "
            f"add --out {path}."
        )
    name = shorten(str(path), 300, quoted=False)
    if _is_path(source) and path_exists(path):
        raise RecipeError(
            f"{name} is no regular file (a folder, a pipe or a device); name a recipe's YAML file."
        )
    problem = (
        f"there is no recipe file {name}."
        if _is_path(source)
        else f"unknown recipe '{name}'. A recipe file's name ends in .yaml."
    )
    near = _similar_recipes(path)
    hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    raise RecipeError(f"{problem}{hint} `discl recipes` lists all that ship.")


def _similar_recipes(path: Path) -> list[str]:
    """Files beside a recipe that does not exist, or else shipped recipes, of a similar name."""
    stem = path.stem[:200]
    beside = [file.stem for file in islice(path.parent.glob("*.yaml"), MOST_COMPARED)]
    near = [str(path.parent / f"{name}.yaml") for name in difflib.get_close_matches(stem, beside)]
    return near or difflib.get_close_matches(stem, shipped_recipes())


def _resolve_paths(
    tree: dict[str, Any], folder: Path, below: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The tree with absolute paths for what exists in `folder` or in the working folder.

    `below` is the tree that it is laid over, which may state `data.root`.
    """
    root = get_value(merge(below or {}, tree), "data.root")

    def resolved(text: str, keys: tuple[str, ...]) -> str:
        in_root = matches(keys, LISTS) and _holds(root, text, folder)
        if in_root or text.startswith("embedded:"):
            return text
        return next(
            (_whole_path(path) for path in _candidates(text, folder) if path_exists(path)), text
        )

    return map_paths(tree, resolved)


def _candidates(text: str, folder: Path) -> list[Path]:
    return [local_path(str(base / text)) for base in (folder, Path())]


def _holds(root: Any, name: str, folder: Path) -> bool:
    """Whether a folder that the recipe names has an entry of this name."""
    root = (
        next((path for path in _candidates(root, folder) if path_exists(path)), None)
        if isinstance(root, str)
        else None
    )
    return root is not None and path_exists(root / name)


def _whole_path(path: Path) -> str:
    """The path with links followed, except links to a file with another suffix.

    Links of the hub's cache lead to files without suffix.
    """
    there = path.resolve()
    return str(
        path.parent.resolve() / path.name
        if is_regular(path) and there.suffix != path.suffix
        else there
    )
