"""Texts to generate from."""

from .templates import (
    CAPTION,
    SETTING,
    class_prompts,
    draw_prompt,
    fill,
    fill_caption,
    read_phrases,
)

__all__ = [
    "CAPTION",
    "SETTING",
    "class_prompts",
    "draw_prompt",
    "fill",
    "fill_caption",
    "read_phrases",
]
