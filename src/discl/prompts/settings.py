"""Settings to edit images to, written by a language model.

The caller makes the request, such as ALIA's (arXiv 2305.16289), which condenses captions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from ..errors import EndpointError, RecipeError
from ..utils.stored import write_text
from ..utils.yaml_text import LISTS, read_yaml
from .chat_client import ChatClient
from .class_descriptions import UnusableError, find_name, gather_texts

HEADER = """\
# Settings of the images: each replaces {setting} in prompts.templates. You may edit them. Nothing
# is requested while this file exists; delete it to have them rewritten. A changed setting makes new
# images.
"""
MIN_SETTINGS = 2
"""A single line is more likely a refusal than a list."""
MAX_WORDS = 15


def write_settings(
    path: Path,
    request: Callable[[int], str],
    names: Sequence[str],
    client: ChatClient,
    *,
    count: int,
    tries: int,
) -> None:
    """Writes two to `count` settings of a language model, a list of phrases, to a YAML file.

    - `path`: the file. It is not written where anything fails.
    - `request`: the request for a number of settings.
    - `names`: names that no setting may hold.
    - `client`: the language model.
    - `count`: settings, at most.
    - `tries`: requests, at most.

    Raises EndpointError where the server fails or its answers cannot be used.
    """
    try:
        texts = gather_texts(
            request,
            lambda text: find_fault(text, names),
            client,
            count=count,
            tries=tries,
            enough=MIN_SETTINGS,
        )
    except UnusableError as error:
        raise EndpointError(
            f"{client.model} at {client.url} wrote no usable settings: {error}.\n"
            f"Write them into {path} yourself, a list in YAML such as '- in a meadow at dusk', or "
            "use another model.",
            argument="model",
        ) from error
    settings = list(dict.fromkeys(_as_phrase(text) for text in texts))
    write_text(path, HEADER + yaml.safe_dump(settings, allow_unicode=True, width=10_000))


def read_settings(path: Path) -> list[str]:
    """The settings in a YAML file, at least one.

    Raises RecipeError for a file that holds no list of texts.
    """
    settings = read_yaml(path, LISTS, lambda keys: True, what="settings: ")
    if (
        not isinstance(settings, list)
        or not settings
        or not all(isinstance(each, str) and each.strip() for each in settings)
    ):
        raise RecipeError(
            f"{path} holds no list of settings; write one per line, such as "
            "'- in a meadow at dusk' (in quotes if it holds a colon), or delete the file to have "
            "them rewritten.",
            argument="settings",
        )
    return settings


def find_fault(text: str, names: Sequence[str]) -> str | None:
    """Why a text is no setting; None if it is one.

    A setting has at most 15 words, is a phrase, not a sentence or heading, and holds none of
    `names`.
    """
    words = len(text.split())
    if words > MAX_WORDS:
        return f"has {words} words, at most {MAX_WORDS} are allowed"
    if re.search(r"[.!?:;](?:\s|$)", text.removesuffix(".")) or re.search(
        r"\bI\b|\b(?i:me|my|you|your|sorry)\b", text
    ):
        return "is a sentence or a heading, not a phrase"
    if "{" in text or "}" in text:
        return "holds a brace"
    name = find_name(text, names)
    return None if name is None else f"names '{name}'"


def _as_phrase(text: str) -> str:
    """The text as it continues "a photo of …": no full stop, and a small first letter.

    An abbreviation at its beginning stays.
    """
    text = text.removesuffix(".")
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]
