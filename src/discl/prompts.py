"""Texts: class names, templates and phrase lists to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from .assets import embedded_phrases
from .digests import derive_seed
from .errors import RecipeError, unknown


def fill(template: str, name: str) -> str:
    """The template with `{class}` replaced by the name. Raises RecipeError where `{class}` is missing."""
    if "{class}" not in template:
        raise RecipeError(f"template '{template}' lacks {{class}}, so every class would get the same text.")
    return template.replace("{class}", name)


def class_prompts(
    class_names: Sequence[str], templates: Sequence[str], phrases: str | None = None, names: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """`{class: texts}` from templates, or from the phrase list `phrases` (a YAML file or `embedded:NAME`) where it is given.

    `names` replaces class names in templates (scientific → common). Raises RecipeError for a class without phrases, and for
    a name that is no class.
    """
    for name in names or {}:
        if name not in class_names:
            raise RecipeError("prompts.names: " + unknown("class", name, class_names))
    if phrases is None:
        return {name: [fill(template, (names or {}).get(name, name)) for template in templates] for name in class_names}
    path = embedded_phrases(phrases.removeprefix("embedded:")) if phrases.startswith("embedded:") else Path(phrases)
    if not path.is_file():
        raise RecipeError(f"prompts.phrases: there is no file {path}.")
    try:
        listed = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"prompts.phrases: {path} is not valid YAML: {error}") from error
    if not isinstance(listed, dict) or not all(texts is None or isinstance(texts, list) for texts in listed.values()):
        raise RecipeError(f"prompts.phrases: {path} holds no mapping from class names to lists of texts.")
    texts = {str(name): each for name, each in listed.items()}
    lacking = [name for name in class_names if not texts.get(name)]
    if lacking:
        raise RecipeError(f"prompts.phrases: {path} has no texts for {len(lacking)} classes: {', '.join(lacking[:8])}.")
    return {name: [str(text) for text in texts[name]] for name in class_names}


def draw_prompt(texts: Sequence[str], source_id: str, seed: int, attempt: int) -> str:
    """One text, a pure function of (source, seed, try), so that all levels of a spectrum share it."""
    return texts[derive_seed("prompt", source_id, seed, attempt) % len(texts)]
