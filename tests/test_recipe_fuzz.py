"""Recipes that were mutated 5,000 times, seeded: each is refused in a few lines, or valid and kept
as it is."""

from __future__ import annotations

import copy
import inspect
import math
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from discl.baselines import SYSTEMS, find_system
from discl.cli import app
from discl.errors import DisclError, RecipeError
from discl.recipe import RECIPES, Recipe, load_recipe, parse_override, shipped_recipes

PARTS = [
    range(100),
    *(
        pytest.param(range(first, min(first + 500, 5000)), marks=pytest.mark.slow)
        for first in range(100, 5000, 500)
    ),
]
"""Numbers of mutations per test; the first part is the quick one."""
LONGEST = 4000
"""Characters of a message, at most."""
SLOWEST = 2.0
"""Seconds that a recipe may take, at most; a machine that is busy with other things takes some of
it."""

SMALL = """\
name: small
data: {root: images, long_tail: {n_max: 50, imbalance_ratio: 10, class_order: [no, on, 001]}}
prompts: {names: {yes: "y", 2024-01-01: a day}, templates: ["a {class}"]}
spectrum: {checkpoint: owner/diffusion, levels: &levels [0, 50]}
filter: {checkpoint: owner/clip}
methods:
  ce: {}
  half: &half {strategy: fixed, level: 50}
  other: {<<: *half, objective: {name: focal, gamma: 2}}
compare: {tune: {space: {train.optimizer.lr: [0.1, 0.2]}}}
"""


def plain_tree(text: str) -> Any:
    """What `yaml.safe_load` makes, in C."""
    return yaml.CSafeLoader(text).get_single_data()


def small_tree() -> dict[str, Any]:
    return plain_tree(SMALL)


STRANGE: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    10**9,
    10**18,
    2**63,
    -(2**63),
    10**40,
    0.5,
    -0.5,
    1.5,
    1e-320,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    " ",
    "a",
    "on",
    "no",
    "null",
    "001",
    "1e3",
    "2024-01-01",
    "embedded:fashion-mnist",
    "embedded:nothing",
    "os:system",
    "~nobody/x",
    "..",
    "../../etc",
    "/dev/zero",
    "CON",
    "a/b",
    "a\\b",
    "ä" * 300,
    "x" * 50_000,
    "{class}",
    "{caption}",
    "{class} {setting}",
    "\x1b[2J",
    "\u202e",
    "\ufeff",
    "\n",
    "http://[",
    "http://a" + "a" * 70,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"name": "focal"},
    {"name": []},
    [1, "a", None],
    list(range(200)),
    {f"k{each}": each for each in range(200)},
    ["x" * 5000] * 20,
]


@cache
def texts() -> list[str]:
    """What is mutated: the files that ship, the flat trees of some of them, and a small recipe with
    aliases."""
    names = shipped_recipes()
    flat = [load_recipe(name).to_yaml() for name in names[::8]]
    return [*[(RECIPES / f"{name}.yaml").read_text() for name in names], *flat * 3, *[SMALL] * 12]


def places(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Keys of everything in a plain tree."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [each for key, value in items for each in ((*above, key), *places(value, (*above, key)))]


def at(tree: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def misspelt(key: Any, draw: random.Random) -> str:
    name = str(key)
    spot = draw.randrange(len(name) + 1)
    return draw.choice([name[:spot] + name[spot + 1 :], name.upper(), f"{name}é", f"{name}." * 40])


def change_tree(text: str, draw: random.Random) -> str:
    """Values replaced, moved, taken out, nested; keys misspelt."""
    tree = plain_tree(text)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        known = places(tree)
        if not known:
            break
        *above, key = draw.choice(known)
        parent, kind = at(tree, tuple(above)), draw.randrange(8)
        old = parent[key]
        if kind <= 1:
            parent[key] = copy.deepcopy(draw.choice(STRANGE))
        elif kind <= 3 and isinstance(old, (int, float)):
            parent[key] = draw.choice([old + 1, old * 2, old / 2, -old, old * 1000, str(old)])
        elif kind <= 4:
            parent[key] = copy.deepcopy(at(tree, draw.choice(known)))
        elif kind == 5:
            del parent[key]
        elif kind == 6 and isinstance(parent, dict):
            parent[misspelt(key, draw)] = parent.pop(key)
        else:
            for _ in range(draw.choice([1, 3, 40])):
                parent[key] = draw.choice([[parent[key]], {"a": parent[key]}])
    unicode = draw.random() < 0.5
    return yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=unicode)


ODD_VALUES = (
    "*levels", "&levels [*levels]", "!!int x", "!!python/name:os.system", "2024-13-45", "9" * 5000,
    "0o17", "010", "1:30", "0x" + "f" * 40, "'", '"\\ud800"', '"\\0"', ".nan", "<<", "[" * 500,
    "{a: " * 500, "|\n" + " x" * 60_000,
)  # fmt: skip
ODD_KEYS = (
    "no",
    "on",
    "yes",
    "null",
    "001",
    "~",
    "1e3",
    "2024-01-01",
    "<<",
    "[a]",
    "{a: 1}",
    "'",
    "k" * 2000,
)
ODD_LINES = (
    "---", "...", "%YAML 1.3", "# x", "<<: *half", "extends: paper", "name: twice", "a: &a [1]", "",
)  # fmt: skip
SEPARATORS = (":", " : ", ": &a ", ": *a ", ": - ")
INDENTS = (" ", "  ", "\t", "- ", "? ", ": ")


def change_lines(text: str, draw: random.Random) -> str:
    """Lines doubled, moved, indented, taken out; keys and values that only a text can hold."""
    lines = text.splitlines()
    for _ in range(draw.choice([1, 1, 2, 5])):
        spot, kind = draw.randrange(len(lines)), draw.randrange(8)
        line = lines[spot]
        if kind == 0:
            lines.insert(draw.randrange(len(lines)), line)
        elif kind == 1 and len(lines) > 1:
            del lines[spot]
        elif kind == 2:
            lines[spot] = draw.choice(INDENTS) + line
        elif kind == 3:
            lines[spot] = f"{line.partition(':')[0]}: {draw.choice(ODD_VALUES)}"
        elif kind == 4:
            lines[spot] = f"{line[: len(line) - len(line.lstrip())]}{draw.choice(ODD_KEYS)}: 1"
        elif kind == 5:
            lines[spot] = line.replace(": ", draw.choice(SEPARATORS))
        elif kind == 6:
            lines.insert(spot, draw.choice(ODD_LINES))
        else:
            lines[spot] = line * draw.choice([2, 50])
    return "\n".join(lines)


NOISE = b"\0\xff[]{}:-&*!'\"\n\t #%@`|>abcyz019.~"


def change_bytes(text: str, draw: random.Random) -> bytes:
    """Bytes replaced, put in, cut off."""
    data = bytearray(text.encode())
    for _ in range(draw.choice([1, 2, 8])):
        spot = draw.randrange(len(data))
        alphabet = draw.choice([NOISE[2:], NOISE[2:], NOISE, range(256)])
        noise = bytes(draw.choice(alphabet) for _ in range(draw.choice([1, 1, 4, 64])))
        data[spot : spot + draw.choice([0, 1, len(noise)])] = noise
    return bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data) + 1)])])


MUTATIONS: list[Callable[[str, random.Random], str | bytes]] = [
    change_tree,
    change_tree,
    change_lines,
    change_bytes,
]


def mutated(number: int) -> bytes:
    draw = random.Random(number)
    changed = draw.choice(MUTATIONS)(draw.choice(texts()), draw)
    return changed if isinstance(changed, bytes) else changed.encode(errors="surrogatepass")


def check(load: Callable[[], Recipe], what: Any) -> Recipe | None:
    """The recipe, None where it is refused as it should be."""
    start = time.perf_counter()
    recipe = None
    try:
        recipe = load()
    except RecipeError as error:
        assert 0 < len(str(error)) <= LONGEST, what
    except Exception as error:
        raise AssertionError(f"{what} ends in {error!r}") from error
    assert time.perf_counter() - start < SLOWEST, what
    return recipe


@pytest.mark.parametrize("numbers", PARTS, ids=str)
def test_a_mutated_recipe_is_refused_or_kept_as_it_is(numbers: range, tmp_path: Path) -> None:
    path, kept = tmp_path / "mutated.yaml", tmp_path / "kept.yaml"
    (tmp_path / "base").symlink_to(RECIPES / "base")
    valid = 0
    for number in numbers:
        path.write_bytes(mutated(number))
        recipe = check(lambda: load_recipe(path), f"mutation {number}")
        if recipe is None:
            continue
        valid += 1
        kept.write_text(recipe.to_yaml())
        assert load_recipe(kept) == recipe, f"mutation {number}"
    assert 0.05 < valid / len(numbers) < 0.8


@pytest.mark.parametrize("numbers", PARTS[:2], ids=str)
def test_a_mutated_tree_is_refused_or_valid(numbers: range) -> None:
    """What no YAML file can hold, given from Python."""
    class_ = type("Odd", (), {})
    odd = [
        *STRANGE,
        class_(),
        object,
        b"bytes",
        {1, 2},
        {1: 2},
        {None: 1},
        {(1, 2): 3},
        "\ud800",
        "\0",
        10**5000,
        Path("x"),
        1j,
    ]
    for number in numbers:
        draw = random.Random(number)
        tree = small_tree()
        *above, key = draw.choice(places(tree))
        at(tree, tuple(above))[key] = copy.copy(draw.choice(odd))
        check(lambda tree=tree: load_recipe(tree), f"tree {number}")  # type: ignore[misc]


@pytest.mark.parametrize("numbers", PARTS[:2], ids=str)
def test_a_mutated_override_is_refused_or_valid(numbers: range) -> None:
    for number in numbers:
        draw = random.Random(number)
        key = ".".join(map(str, draw.choice(places(small_tree()))))
        key = draw.choice([key, key, key, key * 40, f"{key}.x", key.replace(".", "..")])
        value = draw.choice(STRANGE)
        texts = ["[" * 900, "*a", "&a [*a]", "!!x y", chr(0), chr(0xD800), "9" * 5000]
        text = f"{key}={draw.choice([value, *texts])}"
        check(
            lambda text=text: load_recipe(small_tree(), dict([parse_override(text)])),  # type: ignore[misc]
            f"override {number}",
        )


SYSTEM_PARAMETERS = [
    (name, parameter)
    for name in SYSTEMS
    for parameter in inspect.signature(find_system(name)[0]).parameters
]


@pytest.mark.parametrize(("name", "parameter"), SYSTEM_PARAMETERS)
def test_a_parameter_of_a_system_is_checked_as_the_recipe_is_read(
    name: str, parameter: str
) -> None:
    tree = small_tree()
    taken = []
    for value in STRANGE:
        tree["methods"] = {"ce": {"system": {"name": name, parameter: value}}}
        if check(lambda: load_recipe(tree), f"{name}, {parameter}: {value!r:.40}"):
            taken.append(value)
    assert all(isinstance(each, (int, float, str)) or each in (None, []) for each in taken)
    assert not any(isinstance(each, float) and not math.isfinite(each) for each in taken)
    assert not any(isinstance(each, int) and each > 10**9 for each in taken)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["plan"], ["data", "check"]], ids=["plan", "data check"])
def test_the_command_line_tells_what_is_wrong_with_a_mutated_recipe(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(5000, 5030):
        Path("mutated.yaml").write_bytes(mutated(number))
        out = ["--out", f"run{number}"] if command == ["plan"] else []
        failure = CliRunner().invoke(app, [*command, "mutated.yaml", *out]).exception
        assert failure is None or isinstance(failure, (DisclError, SystemExit)), number
        assert len(str(failure or "")) <= LONGEST, number
