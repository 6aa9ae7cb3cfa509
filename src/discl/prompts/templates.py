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
"""In a template: replaced by the caption of the source image."""
SETTING = "{setting}"
"""In a template: replaced by each place or condition in turn."""


def fill(template: str, name: str) -> str:
    """The template with `{class}` replaced by the name.

    Raises RecipeError where `{class}` is missing.
    """
    if "{class}" not in template:
        raise RecipeError(
            f"template '{shorten(template, quoted=False)}' lacks {{class}}, so every class would "
            "get the same text."
        )
    return template.replace("{class}", name)


def fill_caption(prompt: str, caption: str) -> str:
    """The prompt with `{caption}` replaced; a comma that an empty caption leaves goes too."""
    return prompt.replace(CAPTION, caption).strip(" ,")


def class_prompts(
    class_names: Sequence[str],
    templates: Sequence[str],
    phrases: str | None = None,
    *,
    names: Mapping[str, str] | None = None,
    needed: Collection[str] | None = None,
) -> dict[str, list[str]]:
    """`{class: texts}` of the classes that need texts.

    - `class_names`: all classes of the data set.
    - `templates`: texts that hold `{class}`.
    - `phrases`: a YAML file `{class: texts}` or `embedded:NAME`, used instead of the templates. A
      key may hold several names of one class, separated by commas.
    - `names`: `{class: name to use in templates}`, such as common names for scientific ones.
    - `needed`: the classes that need texts, such as those with hard images; None: all.

    Raises RecipeError for a needed class without phrases, and for a name of no class.
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
        raise RecipeError(f"there is no file {path}.", argument="phrases")
    texts = by_any_name(read_phrases(path))
    missing = [name for name in needed if name not in texts]
    if missing:
        raise RecipeError(
            f"{path} has no texts for {len(missing)} of the {len(needed)} classes that need them: "
            f"{', '.join(missing[:8])}. Add them, or remove phrases to use the templates.",
            argument="phrases",
        )
    return {name: texts[name] for name in needed}


def by_any_name(texts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """`{name: texts}` of the keys and of each name in a key such as "robin, American robin".

    A whole key has priority over a part of another. A name in several keys is omitted.
    """
    parts: dict[str, list[str]] = {}
    for key in texts:
        for part in {each.strip() for each in key.split(",")}:
            parts.setdefault(part, []).append(key)
    single = {part: texts[keys[0]] for part, keys in parts.items() if part and len(keys) == 1}
    return single | dict(texts)


def with_settings(templates: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Each template with `{setting}` once per setting; the other templates as they are."""
    return [
        template.replace(SETTING, each)
        for template in templates
        for each in (settings if SETTING in template else ("",))
    ]


def spoken_names(class_names: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """`{class: name to use in texts}`. Raises RecipeError where a key of `names` is no class."""
    for name in names:
        if name not in class_names:
            raise RecipeError(unknown("class", name, class_names), argument="names")
    return {name: names.get(name, name) for name in class_names}


def read_phrases(path: Path) -> dict[str, list[str]]:
    """`{class: texts}` of a YAML file, without classes that have no text.

    Raises RecipeError for a file that holds no such mapping.
    """
    return check_phrases(read_yaml(path, LISTS, lambda keys: True, what="phrases: "), path)


def check_phrases(listed: Any, path: Path) -> dict[str, list[str]]:
    """As `read_phrases`, of the plain value of a file."""
    listed = {} if listed is None else listed
    if not isinstance(listed, dict) or not all(
        texts is None or (isinstance(texts, list) and all(isinstance(text, str) for text in texts))
        for texts in listed.values()
    ):
        raise RecipeError(
            f"{path} holds no mapping from class names to lists of texts.", argument="phrases"
        )
    return {name: texts for name, texts in listed.items() if texts}


def draw_prompt(texts: Sequence[str], source_id: str, seed: int, attempt: int) -> str:
    """One of the texts, drawn by (source, seed, try), so that all levels of a spectrum share it."""
    return texts[derive_seed("prompt", source_id, seed, attempt) % len(texts)]
