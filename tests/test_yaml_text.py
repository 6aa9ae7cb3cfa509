"""YAML that others wrote: what is read as written, what is refused, and that nothing takes long."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import discl
from discl.errors import DisclError, RecipeError, RunError, join_lines, shorten, unknown
from discl.utils.yaml_text import LISTS, RECIPE, check_plain, parse_yaml, read_yaml

ASSETS = sorted(Path(discl.__file__).parent.rglob("*.yaml"))


def read(text: str, **given: Any) -> Any:
    return parse_yaml(text, "test.yaml", **given)


@pytest.mark.parametrize("path", ASSETS, ids=lambda path: path.stem)
def test_shipped_files_are_read_as_pyyaml_reads_them(path: Path) -> None:
    assert read_yaml(path, LISTS) == yaml.safe_load(path.read_text())


ORDINARY = """
numbers: [0, -7, +3, 1_000, 0x1F, 0b101, 1.5, -.5, 1., 1.0e+3, .inf, 1e3, 1e-4]
truth: [yes, No, ON, off, true, FALSE, y, n, yEs]
nothing: [~, null, Null, '', "null"]
texts: [a b, 'it''s', "tab\\t", !!str 5, "1"]
folded: >
  one
  two
kept: |
  three
 # no key
shared: &one {a: [1, 2], b: *two_}
"""


def test_values_are_those_of_yaml_1_1() -> None:
    text = ORDINARY.replace(", b: *two_", "") + "again: *one\nmerged: {<<: *one, b: 3}\n"
    assert read(text) == yaml.safe_load(text)
    assert read("") is None
    assert read("# nothing\n") is None
    assert read("--- 5\n...\n") == 5


def test_merged_keys_lie_below_their_own_and_earlier_mappings_above_later() -> None:
    text = "{a: &a {x: 1, y: 1}, b: &b {y: 2, z: 2}, c: {z: 3, <<: [*a, *b]}}"
    assert read(text)["c"] == yaml.safe_load(text)["c"] == {"x": 1, "y": 1, "z": 3}


NAMES = ["yes", "no", "on", "off", "y", "n", "001", "010", "1e3", "null", "~", "2024-01-01", "1:30"]


@pytest.mark.parametrize("name", NAMES)
def test_a_key_is_the_text_as_it_is_written(name: str) -> None:
    assert read(f"{name}: 1") == {name: 1}
    assert read(f"{{names: {{{name}: {{{name}: 1}}}}}}") == {"names": {name: {name: 1}}}


@pytest.mark.parametrize("name", NAMES)
def test_values_are_texts_where_the_reader_says_so(name: str) -> None:
    tree = read(f"a: [{name}, 7]\nb: [true]", as_written=lambda keys: keys == ("a",))
    assert tree == {"a": [name, "7"], "b": [True]}


def test_a_null_of_a_mapping_of_texts_stays_one() -> None:
    everywhere = {"as_written": lambda keys: True}
    assert read("a: null\nb: ~\nc:\nd: 'null'", **everywhere) == {
        "a": None,
        "b": None,
        "c": None,
        "d": "null",
    }
    assert read("[null, ~, '']", **everywhere) == ["null", "~", ""]
    assert read("- a\n-\n", **everywhere) == ["a", None]


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 3", "a", (1, 3)),
        ("a:\n  b:\n  - c: 1\n    d: 1\n    c: 1\n", "c", (3, 5)),
        ("{x: {no: 1, 'no': 2}}", "no", (1, 1)),
        ("a: 1\n? a\n: 2", "a", (1, 2)),
        ("k: {<<: {a: 1}, a: 2, a: 3}", "a", (1, 1)),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(
    text: str, key: str, lines: tuple[int, int]
) -> None:
    with pytest.raises(RecipeError, match=rf"'{key}' .*lines {lines[0]} and {lines[1]}"):
        read(text)


def doubling(count: int, inner: str = "x") -> str:
    """A list of lists of … of texts, each ten times the one before."""
    steps = [f"a0: &a0 [{', '.join([inner] * 10)}]"]
    steps += [
        f"a{step}: &a{step} [{', '.join([f'*a{step - 1}'] * 10)}]" for step in range(1, count)
    ]
    return "\n".join(steps)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (doubling(9), r"100,000 values"),
        (doubling(9).replace("[", "{k: [").replace("]", "]}"), r"100,000 values"),
        (doubling(4, "x" * 5000), r"4,000,000 characters"),
        ("[" * 50_000, "32 levels"),
        ("{a: " * 50_000, "32 levels"),
        ("- " * 50_000, "32 levels"),
        ("? " * 50_000, "32 levels"),
        ("a: &a [*a]", r"\*'a' is inside"),
        ("a: *b", r"\*'b' has no anchor"),
        ("a: " + "9" * 5000, "out of range"),
        ("a: 0x" + "f" * 17, "out of range"),
        ("a: -9223372036854775809", "out of range"),
        ("a: 010", "'010'"),
        ("a: 12:30:45", "'12:30:45'"),
        ("a: 1:30.5", "'1:30.5'"),
        ("a: !!int 5", "the tag"),
        ("a: !!binary aGk=", "the tag"),
        ("a: !!timestamp 2024-13-45", "the tag"),
        ("a: !!python/object/apply:os.system [ls]", "the tag"),
        ("!!set {a}", "the tag"),
        ("!wrong {a: 1}", "the tag"),
        ("a: " + "x" * 200_000, "200,000 characters"),
        ("k" * 1001 + ": 1", "1,001 characters"),
        ('a: "\\0"', r"U\+0000"),
        ("a: \0", "NUL"),
        ('a: "\\ud800"', "valid YAML"),
        ("a: \ud800", "surrogates"),
        ("[a, b]: 1", "list cannot be a key"),
        ("{a: 1}: 1", "mapping cannot be a key"),
        ("<<: 5", "merges a mapping"),
        ("---\na: 1\n---\nb: 2", "second document"),
        ("a: 'b", r"line 1"),
        ("a: [b", r"valid YAML"),
        ("\tb: 1", r"valid YAML"),
        ("%YAML 99999999999999999999.1\n---\na: 1", r"valid YAML"),
        ("\x07", "valid YAML"),
    ],
    ids=lambda text: text[:16].encode("ascii", "replace").decode(),
)
def test_what_is_over_a_limit_or_no_plain_yaml_is_refused_at_once(text: str, told: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RecipeError, match=told) as caught:
        read(text)
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 600


def test_a_date_is_a_text() -> None:
    assert read("a: 2024-01-01\nb: 2024-13-45") == {"a": "2024-01-01", "b": "2024-13-45"}


def test_what_is_no_regular_file_or_too_large_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe, large, there = tmp_path / "pipe.yaml", tmp_path / "large.yaml", tmp_path / "socket.yaml"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(2_000_000_000)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.relpath(there))
    for path in (pipe, large, there, tmp_path, Path("/dev/zero"), tmp_path / ("x" * 5000)):
        with pytest.raises(RunError) as caught:
            read_yaml(path, error=RunError)
        assert str(path)[:20] in str(caught.value)
        assert len(str(caught.value)) < 600
    listener.close()


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("\ufeffä: ö".encode())
    assert read_yaml(tmp_path / "a.yaml") == {"ä": "ö"}


def in_a_circle() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    tree["below"] = tree
    return tree


@pytest.mark.parametrize(
    "tree",
    [
        in_a_circle(),
        {"a": "\0"},
        {"a\0": 1},
        {"a": ["\ud800"]},
        {"a": 2**64},
        {"a": "x" * 200_000},
        {"a": [0] * 200_000},
    ],
)
def test_a_plain_tree_may_hold_what_a_file_may(tree: dict[str, Any]) -> None:
    told = check_plain(tree)
    assert told is not None
    assert len(told) < 600
    assert check_plain({"a": [1, 2.5, None, True, "ä"], "b": {"c": ("d",)}}) is None


def test_limits_are_those_of_the_reader() -> None:
    few = replace(RECIPE, values=1_000)
    many = "\n".join(f"class {number}: [a, b, c]" for number in range(300))
    assert len(read(many, limits=replace(few, values=2_000))) == 300
    with pytest.raises(DisclError, match="1,000 values"):
        read(many, limits=few)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("short", "'short'"),
        ("it's", '"it\'s"'),
        (["fixed", 1], "['fixed', 1]"),
        ({"b": 1, "a": 2}, "{'b': 1, 'a': 2}"),
        (None, "None"),
    ],
)
def test_a_short_value_is_shown_as_it_is(value: object, shown: str) -> None:
    assert shorten(value) == shown


@pytest.mark.parametrize(
    "value",
    ["x" * 50_000, 10**6000, ["y"] * 50_000, {"a": "z" * 50_000}, in_a_circle(), "\n" * 50_000],
    ids=["text", "number", "list", "mapping", "circle", "lines"],
)
def test_a_long_value_is_shown_in_short(value: object) -> None:
    assert len(shorten(value)) < 200
    assert "\n" not in shorten(value, quoted=False)
    assert len(unknown("kind", shorten(value), [f"name {number}" for number in range(9000)])) < 2000


def test_many_lines_are_cut_off_with_their_number() -> None:
    text = join_lines([f"problem {number}" for number in range(1000)])
    assert len(text) < 4000
    assert text.startswith("problem 0\n")
    assert text.endswith(" more problems.")
    assert len(join_lines(["x" * 10_000])) < 4000
