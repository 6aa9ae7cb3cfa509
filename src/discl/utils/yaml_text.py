"""Reads YAML within limits.

The rules are those of YAML 1.1 in PyYAML, with these differences:

- Keys are texts as written: `no:`, `on:`, `001:`, `null:` and `2024-01-01:` are the keys `no`,
  `on`, `001`, …
- A key occurs once in a mapping.
- Dates are texts. Numbers with a leading zero or in base 60 (`010`, `1:30`), which YAML reads as 8
  and 90, are refused.
- Values are texts as written where the caller requires it (`as_written`); see `Written`.
- Tags other than `!!str`, NUL and unpaired surrogates are refused.

PyYAML parses; the tree is built by hand, because its loaders neither limit aliases and depth nor
notice keys that occur twice.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import DisclError, RecipeError, shorten

Written = Callable[[tuple[str, ...]], bool]
"""Gets the keys of a list or mapping (a list item is `ITEM`); returns whether its scalars are texts
as written.

Nulls as values of a mapping, and empty list items, stay null.
"""
ITEM = "[]"


@dataclass(frozen=True)
class Limits:
    """Limits of a file: bytes, values, levels of nesting, characters of one text.

    The target of an alias counts at every use.
    """

    size: int = 4_000_000
    values: int = 100_000
    depth: int = 32
    text: int = 100_000


RECIPE = Limits()
LISTS = Limits(64_000_000, 1_000_000)
"""For lists of texts of many classes."""
LONGEST_KEY = 1000
"""Maximum number of characters of a key."""
LARGEST = 2**63 - 1
"""Integers are between this and its negative, as in every table."""

UNFIT = re.compile(r"[\x00\ud800-\udfff]")
"""Characters that neither file names nor UTF-8 can hold."""
_TRUTH = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
_NULLS = {"", "~", "null", "Null", "NULL"}
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)")
_FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_AMBIGUOUS = re.compile(r"[-+]?(?:0[0-7_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)")
"""Numbers in base 8 and base 60."""
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""Written in C, for what is written often. It escapes emoji, so texts for people are left to the
other one."""


def read_yaml(
    path: Path,
    limits: Limits = RECIPE,
    as_written: Written = lambda keys: False,
    error: type[DisclError] = RecipeError,
    what: str = "",
) -> Any:
    """The plain value (dict, list, str, int, float, bool, None) of a YAML file.

    - `as_written`: see `Written`.
    - `error`: the class of errors, for a file that is not regular, unreadable, or refused by
      `parse_yaml`.
    - `what`: the beginning of their messages.
    """
    return parse_yaml(
        read_text(path, limits.size, error, what), f"{what}{path}", limits, as_written, error
    )


def read_text(path: Path, most: int, error: type[DisclError] = RecipeError, what: str = "") -> str:
    """The text of a regular UTF-8 file of at most `most` bytes; raises `error` for others.

    It never waits for a pipe or a device.
    """
    name = f"{what}{shorten(str(path), 200, quoted=False)}"
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(most + 1) if regular else b""
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"{name} cannot be read: {reason}.") from failure
    if not regular:
        raise error(f"{name} is a pipe, a device or a folder; a regular file is expected.")
    if len(data) > most:
        raise error(f"{name} is larger than {most:,} bytes, which is the most that is read.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(
            f"{name} is not valid YAML: byte {failure.start + 1} is not in UTF-8; save the file in "
            "that encoding."
        ) from failure


def parse_yaml(
    text: str,
    what: str,
    limits: Limits = RECIPE,
    as_written: Written = lambda keys: False,
    error: type[DisclError] = RecipeError,
    above: tuple[str, ...] = (),
) -> Any:
    """The plain value of a YAML text.

    - `what`: name of the text in messages.
    - `above`: keys above the value.

    Raises `error`, with the line, for invalid YAML, for a key that occurs twice, and for everything
    that this module or `limits` refuse.
    """
    what = shorten(what, 200, quoted=False)
    try:
        root = _Composer(limits).compose(text)
        if root is None:
            return None
        if root.kind == "text" and root.text not in _NULLS and above and as_written(above[:-1]):
            return root.text
        return _build(root, above, as_written)
    except _Refused as refusal:
        where = f" (line {refusal.line})" if refusal.line else ""
        raise error(f"{what}{where}: {refusal}") from None
    except yaml.YAMLError as failure:
        raise error(f"{what} is not valid YAML: {_told(failure)}") from failure
    except UnicodeError as failure:
        raise error(f"{what} is not valid YAML: it holds unpaired surrogates.") from failure
    except (ValueError, OverflowError, RecursionError) as failure:
        raise error(
            f"{what} is not valid YAML: {shorten(str(failure), 200, quoted=False)}."
        ) from failure


class _Refused(Exception):
    """The reason to refuse a text; `line` counts from 1, and is 0 if unknown."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


@dataclass(slots=True)
class _Node:
    """A value before it is built; `values` and `characters` count everything below it."""

    kind: str
    line: int
    text: str = ""
    plain: bool = False
    below: list[_Node] = field(default_factory=list)
    open: bool = False
    values: int = 1
    characters: int = 0
    height: int = 0


class _Composer:
    """The tree of a text, from the parser's events; limits apply before memory is used."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.values = 0
        self.characters = 0
        self.named: dict[str, _Node] = {}
        self.stack: list[_Node] = []
        self.root: _Node | None = None

    def compose(self, text: str) -> _Node | None:
        """The tree; None for an empty text."""
        if "\x00" in text:
            raise _Refused("it holds the character NUL; a text file is expected.")
        documents = 0
        events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _Refused("a second document begins ('---'); one is expected.", line)
            elif isinstance(event, yaml.AliasEvent):
                self._add(self._alias(event.anchor, line), line)
            elif isinstance(event, yaml.ScalarEvent):
                self._add(self._scalar(event, line), line, event.anchor)
            elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
                _check_tag(event.tag, line)
                kind = "list" if isinstance(event, yaml.SequenceStartEvent) else "mapping"
                node = _Node(kind, line, open=True, values=self.values, characters=self.characters)
                self._add(node, line, event.anchor)
                self.stack.append(node)
            elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
                self._close()
        return self.root

    def _scalar(self, event: Any, line: int) -> _Node:
        tagged = _check_tag(event.tag, line)
        if wrong := _wrong_scalar(event.value, self.limits):
            raise _Refused(wrong, line)
        plain = not event.style and not tagged
        return _Node("text", line, event.value, plain, characters=len(event.value))

    def _alias(self, name: str | None, line: int) -> _Node:
        node = self.named.get(str(name))
        if node is None:
            raise _Refused(f"the alias *{shorten(name)} has no anchor before it.", line)
        if node.open:
            raise _Refused(f"the alias *{shorten(name)} is inside its own anchor.", line)
        return node

    def _add(self, node: _Node, line: int, anchor: str | None = None) -> None:
        if len(self.stack) + node.height >= self.limits.depth:
            raise _Refused(f"it is nested more than {self.limits.depth} levels deep.", line)
        self.values += 1 if node.open else node.values
        self.characters += 0 if node.open else node.characters
        if self.values > self.limits.values:
            raise _Refused(
                f"it holds more than {self.limits.values:,} values (an alias counts as its "
                "target).",
                line,
            )
        if self.characters > self.limits.size:
            raise _Refused(
                f"it holds more than {self.limits.size:,} characters (an alias counts as its "
                "target).",
                line,
            )
        if anchor is not None:
            self.named[anchor] = node
        if self.stack:
            self.stack[-1].below.append(node)
        else:
            self.root = node

    def _close(self) -> None:
        node = self.stack.pop()
        node.open = False
        node.values = self.values - node.values
        node.characters = self.characters - node.characters
        node.height = 1 + max((each.height for each in node.below), default=0)


def _check_tag(tag: str | None, line: int) -> bool:
    """Whether a tag turns a value into a text. Raises _Refused for other tags."""
    if tag in (None, "!", "tag:yaml.org,2002:str"):
        return tag is not None
    raise _Refused(
        f"the tag {shorten(tag)} is refused; write the value without it, in quotes where a text "
        "is meant.",
        line,
    )


def _build(node: _Node, keys: tuple[str, ...], as_written: Written) -> Any:
    if node.kind == "text":
        return _value(node)
    written = as_written(keys)

    def built(each: _Node, key: str, is_null: bool) -> Any:
        if each.kind != "text":
            return _build(each, (*keys, key), as_written)
        return _value(each) if not written else None if is_null else each.text

    if node.kind == "list":
        return [built(each, ITEM, each.plain and not each.text) for each in node.below]
    return {
        key: built(each, key, each.plain and each.text in _NULLS)
        for key, each in _entries(node).items()
    }


def _entries(node: _Node) -> dict[str, _Node]:
    """Keys and values of a mapping; its own keys win over those merged by `<<`."""
    own: dict[str, _Node] = {}
    lines: dict[str, int] = {}
    merged: list[_Node] = []
    for key, value in zip(node.below[::2], node.below[1::2], strict=True):
        if key.kind != "text":
            raise _Refused(
                f"a {key.kind} cannot be a key; a key is a text (in quotes where it begins with a "
                "bracket or a brace).",
                key.line,
            )
        if len(key.text) > LONGEST_KEY:
            raise _Refused(
                f"the key {shorten(key.text)} has {len(key.text):,} characters; at most "
                f"{LONGEST_KEY} are allowed.",
                key.line,
            )
        if key.plain and key.text == "<<":
            merged += value.below if value.kind == "list" else [value]
            continue
        if key.text in own:
            raise _Refused(
                f"the key {shorten(key.text)} occurs twice in one mapping, in lines "
                f"{lines[key.text]} and {key.line}; remove one.",
                key.line,
            )
        own[key.text], lines[key.text] = value, key.line
    inherited: dict[str, _Node] = {}
    for each in merged:
        if each.kind != "mapping":
            raise _Refused(
                "'<<' merges a mapping, or a list of mappings, and nothing else.", each.line
            )
        for name, value in _entries(each).items():
            inherited.setdefault(name, value)
    return {**inherited, **own}


def _value(node: _Node) -> Any:
    """The value of a scalar in YAML 1.1."""
    text = node.text
    if not node.plain:
        return text
    if text in _NULLS:
        return None
    if text.lower() in _TRUTH and text in (text.lower(), text.capitalize(), text.upper()):
        return _TRUTH[text.lower()]
    if _INTEGER.fullmatch(text):
        return _whole_number(text, node.line)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    if _AMBIGUOUS.fullmatch(text):
        raise _Refused(
            f"{shorten(text)} is a number in base 8 or 60 for YAML; write it in base 10, or in "
            "quotes where a text is meant.",
            node.line,
        )
    return text


def _whole_number(text: str, line: int) -> int:
    digits = text.replace("_", "")
    number = int(digits, 0) if len(digits) <= 70 else LARGEST + 1
    if abs(number) > LARGEST:
        raise _Refused(_out_of_range(text), line)
    return number


def _told(failure: yaml.YAMLError) -> str:
    """The message of a parser in one line."""
    problem = getattr(failure, "problem", None) or getattr(failure, "reason", None) or failure
    context = getattr(failure, "context", None)
    mark = getattr(failure, "problem_mark", None) or getattr(failure, "context_mark", None)
    said = " ".join(f"{context + ': ' if context else ''}{problem}".split())
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{shorten(said, 200, quoted=False)}{where}."


def check_plain(value: Any, limits: Limits = RECIPE) -> str | None:
    """What a plain tree holds that a YAML file may not, in a sentence; None if nothing.

    These are too many values, too deep or circular nesting, too long texts, too large numbers, and
    characters that UTF-8 cannot hold.
    """
    waiting: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    count = 0
    while waiting:
        each, keys = waiting.pop()
        count += 1
        if count > limits.values or len(keys) > limits.depth:
            return (
                f"it is nested more than {limits.depth} levels deep, or holds more than "
                f"{limits.values:,} values; a recipe needs neither."
            )
        if isinstance(each, dict):
            for key, below in each.items():
                waiting += ((key, keys), (below, (*keys, key)))
        elif isinstance(each, (list, tuple)):
            waiting += ((below, (*keys, place)) for place, below in enumerate(each))
        elif wrong := _wrong_scalar(each, limits):
            where = ".".join(shorten(str(key), 40, quoted=False) for key in keys)
            return f"{where or 'the recipe'}: {wrong}"
    return None


def _wrong_scalar(value: Any, limits: Limits) -> str | None:
    if isinstance(value, str):
        if len(value) > limits.text:
            return f"a text has {len(value):,} characters; at most {limits.text:,} are allowed."
        if found := UNFIT.search(value):
            return (
                f"the text {shorten(value)} holds the character U+{ord(found[0]):04X}; take it out."
            )
    elif isinstance(value, int) and abs(value) > LARGEST:
        return _out_of_range(value)
    return None


def _out_of_range(value: int | str) -> str:
    return f"the whole number {shorten(value)} is out of range; allowed: {-LARGEST} to {LARGEST}."
