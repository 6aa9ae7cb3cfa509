"""Texts to generate from: class names, templates, phrase lists, descriptions by a language model, captions of the images."""

from .texts import CAPTION, class_prompts, draw_prompt, fill, read_phrases

__all__ = ["CAPTION", "class_prompts", "draw_prompt", "fill", "read_phrases"]
