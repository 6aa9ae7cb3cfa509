"""Texts to generate from: class names, templates, phrase lists, descriptions and settings by a language model, captions of the images."""

from .texts import CAPTION, SETTING, class_prompts, draw_prompt, fill, read_phrases

__all__ = ["CAPTION", "SETTING", "class_prompts", "draw_prompt", "fill", "read_phrases"]
