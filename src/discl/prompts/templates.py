"""Class names, templates and phrase lists to prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..assets import embedded_phrases
from ..errors import RecipeError, shorten, unknown
from ..utils.hashing import derive_seed
from ..utils.yaml_text import LISTS, read_yaml

CAPTION = "{caption}"
"""What a template may hold beside `{class}`: the caption of the source image."""
SETTING = "{setting}"
"""What a template may hold beside `{class}`: a place or condition, the same for all images."""


def fill(template: str, name: str) -> str:
    """The template with `{class}` replaced by the name. Raises RecipeError where `{class}` is missing."""
    if "{class}" not in template:
        raise RecipeError(
            f"template '{shorten(template, quoted=False)}' lacks {{class}}, so every class would get the same text."
        )
    return template.replace("{class}", name)


def class_prompts(
    class_names: Sequence[str],
    templates: Sequence[str],
    phrases: str | None = None,
    names: Mapping[str, str] | None = None,
    needed: Collection[str] | None = None,
) -> dict[str, list[str]]:
    """`{class: texts}` for the classes that need texts.

    - `class_names`: all classes of the data set.
    - `templates`: texts that hold `{class}`.
    - `phrases`: a YAML file `{class: texts}` or `embedded:NAME`, used instead of the templates. A key
      may be several names of one class, separated by commas.
    - `names`: replaces class names in templates (scientific -> common).
    - `needed`: the classes that need texts, such as those that have hard images; None: all.

    Raises RecipeError for a needed class without phrases, and for a name that is no class.
    """
    spoken = spoken_names(class_names, names or {})
    needed = [name for name in class_names if needed is None or name in needed]
    if phrases is None:
        return {name: [fill(template, spoken[name]) for template in templates] for name in needed}
    path = (
        embedded_phrases(phrases.removeprefix("embedded:"))
        if phrases.startswith("embedded:")
        else Path(phrases)
    )
    if not path.is_file():
        raise RecipeError(f"prompts.phrases: there is no file {path}.")
    texts = by_any_name(read_phrases(path))
    missing = [name for name in needed if name not in texts]
    if missing:
        raise RecipeError(
            f"prompts.phrases: {path} has no texts for {len(missing)} of the {len(needed)} classes that need "
            f"them: {', '.join(missing[:8])}. Add them, or take out prompts.phrases to use the templates."
        )
    return {name: texts[name] for name in needed}


def by_any_name(texts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """`{name: texts}` with each of the names in a key such as "robin, American robin" beside the key.

    A whole key goes before a part of another. A name in several keys is left out.
    """
    parts: dict[str, list[str]] = {}
    for key in texts:
        for part in {each.strip() for each in key.split(",")}:
            parts.setdefault(part, []).append(key)
    single = {part: texts[keys[0]] for part, keys in parts.items() if part and len(keys) == 1}
    return single | dict(texts)


def with_settings(templates: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Each template that holds `{setting}` once with each setting, the others as they are."""
    return [
        template.replace(SETTING, each)
        for template in templates
        for each in (settings if SETTING in template else ("",))
    ]


def spoken_names(class_names: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """`{class: the name to use in texts}`. Raises RecipeError where `names` names no class."""
    for name in names:
        if name not in class_names:
            raise RecipeError("prompts.names: " + unknown("class", name, class_names))
    return {name: names.get(name, name) for name in class_names}


def read_phrases(path: Path) -> dict[str, list[str]]:
    """`{class: texts}` of a YAML file, classes without any text left out. Raises RecipeError for a file that holds no such mapping."""
    return check_phrases(read_yaml(path, LISTS, lambda keys: True, what="prompts: "), path)


def check_phrases(listed: Any, path: Path) -> dict[str, list[str]]:
    """What `read_phrases` makes of the plain value of a file."""
    listed = {} if listed is None else listed
    if not isinstance(listed, dict) or not all(
        texts is None or (isinstance(texts, list) and all(isinstance(text, str) for text in texts))
        for texts in listed.values()
    ):
        raise RecipeError(f"prompts: {path} holds no mapping from class names to lists of texts.")
    return {name: texts for name, texts in listed.items() if texts}


def draw_prompt(texts: Sequence[str], source_id: str, seed: int, attempt: int) -> str:
    """One text, a pure function of (source, seed, try), so that all levels of a spectrum share it."""
    return texts[derive_seed("prompt", source_id, seed, attempt) % len(texts)]
