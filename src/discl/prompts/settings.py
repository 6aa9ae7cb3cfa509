"""Settings to edit images to, from captions.

What it is asked is the caller's; ALIA's request (arXiv 2305.16289) condenses captions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from ..errors import EndpointError, RecipeError
from ..utils.yaml_text import LISTS, read_yaml
from .chat_client import Endpoint
from .class_descriptions import UnusableError, find_name, gather_texts, write_whole

HEADER = """\
# Settings that images are made in, in the place of {setting} in prompts.templates. Edit them as you like: nothing is asked for while this
# file is here; delete it to have them written anew. A changed setting makes new images.
"""
FEWEST = 2
"""One line alone is more likely a refusal than a list."""
LONGEST = 15


def write_settings(
    path: Path,
    request: Callable[[int], str],
    names: Sequence[str],
    endpoint: Endpoint,
    count: int,
    tries: int,
) -> None:
    """Writes two to `count` settings, a list of phrases, to the file at `path`.

    `request` says how so many settings are asked for; no setting may hold one of `names`. Raises EndpointError if the endpoint fails or
    its answers cannot be used after `tries` tries; then there is no file.
    """
    try:
        texts = gather_texts(
            request, lambda text: find_fault(text, names), endpoint, count, tries, FEWEST
        )
    except UnusableError as error:
        raise EndpointError(
            f"{endpoint.model} at {endpoint.url} wrote no usable settings: {error}.\n"
            f"Write them into {path} yourself, a list in YAML such as '- in a meadow at dusk', or take another model ({endpoint.section})."
        ) from error
    settings = list(dict.fromkeys(_as_phrase(text) for text in texts))
    write_whole(path, HEADER + yaml.safe_dump(settings, allow_unicode=True, width=10_000))


def read_settings(path: Path) -> list[str]:
    """The settings in a file, at least one. Raises RecipeError for a file that holds no list of texts."""
    settings = read_yaml(path, LISTS, lambda keys: True, what="prompts.settings: ")
    if (
        not isinstance(settings, list)
        or not settings
        or not all(isinstance(each, str) and each.strip() for each in settings)
    ):
        raise RecipeError(
            f"prompts.settings: {path} holds no list of settings; write one a line, such as '- in a meadow at dusk' (in quotes where it "
            "holds a colon), or delete the file to have them written anew."
        )
    return settings


def find_fault(text: str, names: Sequence[str]) -> str | None:
    """Why a text is no setting, None if it is one: too long, a sentence or a heading, one of `names` in it."""
    words = len(text.split())
    if words > LONGEST:
        return f"has {words} words, at most {LONGEST} are allowed"
    if re.search(r"[.!?:;](?:\s|$)", text.removesuffix(".")) or re.search(
        r"\bI\b|\b(?i:me|my|you|your|sorry)\b", text
    ):
        return "is a sentence or a heading, not a phrase"
    if "{" in text or "}" in text:
        return "holds a brace"
    name = find_name(text, names)
    return None if name is None else f"names '{name}'"


def _as_phrase(text: str) -> str:
    """As it continues "a photo of …": no full stop, and a small letter first unless an abbreviation begins it."""
    text = text.removesuffix(".")
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]
