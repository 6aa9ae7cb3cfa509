"""Descriptions of classes by a language model: requested, parsed, checked, stored.

The request is the paper's (arXiv 2410.13674, phase 1): a number of descriptions of a class, each of
at least fifteen words, that show only this class.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from ..errors import EndpointError, RecipeError
from ..utils.stored import write_text
from ..utils.yaml_text import LISTS, parse_yaml, read_text
from .chat_client import ChatClient, whole_characters
from .templates import by_any_name, read_phrases

HEADER = """\
# Texts that images are generated from, by class. You may edit them. A class that is listed here is
# not requested again; remove it to have it rewritten. A changed text makes new images.
"""
MAX_FAILED = 3
"""Classes without enough usable texts after which no other class is tried."""
MAX_SHOWN = 3


class Chat(Protocol):
    """A language model, such as a `ChatClient`."""

    def complete(self, messages: Sequence[Mapping[str, str]]) -> str: ...


@dataclass(frozen=True)
class TextRules:
    """What the texts of a class have to be.

    - `count`: different texts per class.
    - `words`: words in a text, at least.
    - `only_class`: whether a text may name no other class.
    - `tries`: requests per class, at most.
    """

    count: int = 10
    words: int = 15
    only_class: bool = True
    tries: int = 4


def write_missing(
    path: Path,
    names: Mapping[str, str],
    client: ChatClient,
    rules: TextRules,
    *,
    parallel: int = 1,
    advance: Callable[[int], None] | None = None,
    needed: Collection[str] | None = None,
) -> None:
    """Adds the missing classes to a YAML file `{class: texts}`, written by a language model.

    - `path`: the file. Its classes and comments stay. Each finished class is stored at once.
    - `names`: `{class: name to use in texts}` of all classes of the data set.
    - `client`: the language model.
    - `rules`: what the texts have to be.
    - `parallel`: requests at the same time.
    - `advance`: called with 1 after each finished class.
    - `needed`: the classes to write; None: all.

    Raises EndpointError where the server fails or its texts cannot be used. Finished classes stay.
    """
    missing = missing_classes(path, names, needed)
    if not missing:
        return
    _make_appendable(path)
    failed: list[str] = []
    written: set[str] = set()

    def keep(answer: Future[list[str]]) -> None:
        name = classes[answer]
        _append(path, name, answer.result())
        written.add(name)
        if advance:
            advance(1)

    with ThreadPoolExecutor(min(parallel, len(missing))) as workers:
        classes = {
            workers.submit(describe_class, names[name], _others(name, names), client, rules): name
            for name in missing
        }
        try:
            for answer in as_completed(classes):
                if isinstance(error := answer.exception(), UnusableError):
                    failed.append(f"{classes[answer]}: {error}")
                    if len(failed) >= MAX_FAILED:
                        break
                else:
                    keep(answer)
        finally:
            client.stopped.set()
            workers.shutdown(cancel_futures=True)
            client.stopped.clear()
            for answer in classes:  # those in progress when another one failed
                if (
                    classes[answer] not in written
                    and not answer.cancelled()
                    and answer.exception() is None
                ):
                    keep(answer)
    if failed:
        listing = "\n".join(f"  {each}" for each in failed)
        raise EndpointError(
            f"{client.model} at {client.url} wrote too few usable texts for {len(failed)} "
            f"classes:\n{listing}\n"
            f"Write them into {path} yourself, use another model, or require less (count, words, "
            "only_class, tries). Finished classes are stored.",
            argument="rules",
        )


def missing_classes(
    path: Path, names: Iterable[str], needed: Collection[str] | None = None
) -> list[str]:
    """The needed classes (None: all) without any text in the file, in their order."""
    known = by_any_name(read_phrases(path)) if path.exists() else {}
    return [name for name in names if name not in known and (needed is None or name in needed)]


class UnusableError(Exception):
    """A model's texts cannot be used."""


def describe_class(name: str, others: Sequence[str], client: Chat, rules: TextRules) -> list[str]:
    """`rules.count` different texts about a class.

    - `name`: the name to use in texts.
    - `others`: names of the other classes.

    Usable texts are kept, and only the rest is requested again. Raises UnusableError, with what was
    wrong and what came back, after `rules.tries` tries.
    """

    def problem(text: str) -> str | None:
        return find_problem(text, name, others if rules.only_class else (), rules.words)

    return gather_texts(
        lambda count: _request(name, rules, count),
        problem,
        client,
        count=rules.count,
        tries=rules.tries,
    )


def gather_texts(
    request: Callable[[int], str],
    problem: Callable[[str], str | None],
    client: Chat,
    *,
    count: int,
    tries: int,
    enough: int | None = None,
) -> list[str]:
    """At most `count` different texts of a language model.

    - `request`: the request for a number of texts.
    - `problem`: why a text cannot be used, or None.
    - `tries`: requests, at most.
    - `enough`: texts after which no more are requested; None: `count`.

    Usable texts are kept, and only the rest is requested again. Raises UnusableError, with what was
    wrong and what came back, after `tries` tries.
    """
    enough = count if enough is None else enough
    texts: list[str] = []
    first = {"role": "user", "content": request(count)}
    messages = [first]
    rejected: list[str] = []
    for _ in range(tries):
        answer = client.complete(messages)
        rejected = []
        for text in parse_texts(answer):
            wrong = problem(text)
            if wrong is not None:
                rejected.append(f"'{_short(text)}' {wrong}")
            elif text not in texts:
                texts.append(text)
        if len(texts) >= enough:
            return texts[:count]
        if not rejected and not texts:
            rejected = [
                f"'{_short(answer)}' is no list of texts"
                if answer.strip()
                else "the answer was empty"
            ]
        again = f"{request(count - len(texts))} They have to differ from those before."
        if rejected:
            again = f"These cannot be used: {'; '.join(rejected[:MAX_SHOWN])}. {again}"
        messages = [
            first,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": again},
        ]
    wrong = "; ".join(rejected[:MAX_SHOWN]) or "the same ones came again"
    raise UnusableError(f"{len(texts)} of {enough} after {tries} tries; {wrong}")


def _request(name: str, rules: TextRules, count: int) -> str:
    alone = (
        " It shows nothing but this subject and its surroundings, no other kind of subject."
        if rules.only_class
        else ""
    )
    return (
        f'Write {count} descriptions of photographs of "{name}", each different in place, light, '
        f"viewpoint and action. Each is one English sentence of at least {rules.words} words that "
        f'contains the words "{name}".{alone} '
        f"Answer with the {count} sentences as a numbered list and with nothing else."
    )


def parse_texts(answer: str) -> list[str]:
    """The texts in a model's answer.

    They are the items of a JSON list (or of an object that holds one), or of a numbered or bulleted
    list; else the lines of the answer.
    """
    answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL).strip()
    listed = _json_list(answer)
    if listed is None:
        items = re.findall(
            r"^[ \t]*(?:\d+[.):]|[-*•])[ \t]+"
            r"(.*(?:\n(?![ \t]*(?:\d+[.):]|[-*•])[ \t])[ \t]*\S.*)*)",
            answer,
            re.MULTILINE,
        )
        listed = items or answer.splitlines()
    return [text for text in (_clean(item) for item in listed) if text]


def _json_list(answer: str) -> list[str] | None:
    fenced = re.search(r"```\w*\n(.*?)```", answer, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else answer)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = next((each for each in value.values() if isinstance(each, list)), None)
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else None


def _clean(item: str) -> str:
    text = " ".join(whole_characters(item).split()).replace("**", "")
    text = re.sub(r"^(?:\d+[.):]|[-*•])\s+", "", text)
    return text.strip("\"'“”` ").rstrip(",").strip("\"'“”` ")


def find_problem(text: str, name: str, others: Sequence[str], words: int) -> str | None:
    """Why a text cannot be used for a class; None if it can.

    A text needs enough words and the name of its class, and may name no other class.

    - `name`: the name of the class. Of a name with parts, such as "tench, Tinca tinca" or
      "T-shirt/top", one part is enough.
    - `others`: names of the other classes. A name within this class's own name is not found.
    - `words`: words that the text needs.

    Names are compared as whole words, ignoring case and plural.
    """
    if len(text.split()) < words:
        return f"has {len(text.split())} words, {words} are needed"
    plain = _plain(text)
    own = _aliases(name)
    if own and not any(_find(alias, plain) for alias in own):
        return f"does not name '{name}'"
    rest = plain
    for alias in sorted(own, key=len, reverse=True):
        rest = _pattern(alias).sub(" ", rest)
    other = find_name(rest, others)
    return None if other is None else f"names another class, '{other}'"


def find_name(text: str, names: Iterable[str]) -> str | None:
    """The first of `names` in a text, compared as by `find_problem`; None if there is none."""
    plain = _plain(text)
    return next(
        (name for name in names if any(_find(alias, plain) for alias in _aliases(name))), None
    )


def _others(name: str, names: Mapping[str, str]) -> list[str]:
    """Names of the other classes, except those with a name in common with this one."""
    own = set(_aliases(names[name]))
    return [
        spoken
        for other, spoken in names.items()
        if other != name and not own & set(_aliases(spoken))
    ]


@functools.cache
def _aliases(name: str) -> tuple[str, ...]:
    """The parts of a name in plain words: "T-shirt/top (red)" has "t shirt" and "top"."""
    parts = (_plain(part).strip() for part in re.split(r"[,;/]", re.sub(r"\(.*?\)", " ", name)))
    return tuple(part for part in parts if part)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w]|_", " ", text.casefold()).split())


@functools.cache
def _pattern(alias: str) -> re.Pattern[str]:
    *before, last = alias.split()
    plural = (
        rf"(?:{re.escape(last)}(?:s|es)?|{re.escape(last[:-1])}ies)"
        if last.endswith("y")
        else rf"{re.escape(last)}(?:s|es)?"
    )
    return re.compile(r"\b" + "".join(rf"{re.escape(word)}\s" for word in before) + plural + r"\b")


def _find(alias: str, plain: str) -> bool:
    return _pattern(alias).search(plain) is not None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def _make_appendable(path: Path) -> None:
    """Rewrites a file to whose end no class can be added: in flow style, or with empty entries."""
    text = read_text(path, LISTS.size, what="prompts: ") if path.exists() else HEADER
    known = read_phrases(path) if path.exists() else {}
    probe = "probe of the style"
    try:
        listed = parse_yaml(
            f"{text.rstrip()}\n{_block(probe, [probe])}", "", LISTS, lambda keys: True
        )
        fits = isinstance(listed, dict) and len(listed) == len(known) + 1 and all(listed.values())
    except RecipeError:
        fits = False
    write_text(
        path,
        text if fits else HEADER + "".join(_block(name, texts) for name, texts in known.items()),
    )


def _append(path: Path, name: str, texts: list[str]) -> None:
    """Adds a class to the file as it is now, so that edits made in the meantime stay."""
    before = read_text(path, LISTS.size, what="prompts: ")
    write_text(path, f"{before.rstrip()}\n{_block(name, texts)}")


def _block(name: str, texts: list[str]) -> str:
    return yaml.safe_dump({name: texts}, allow_unicode=True, width=10_000)
