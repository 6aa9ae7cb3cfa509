"""Counts with their nouns, and lists that are cut off."""

from __future__ import annotations

from collections.abc import Sequence


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """`1 image`, `2 images`, `1,200 classes`; `plural` is the noun with an s unless it is given."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def count_be(number: int, noun: str, plural: str | None = None) -> str:
    """As `count_of`, with its verb: `1 image is`, `2 images are`."""
    return f"{count_of(number, noun, plural)} {'is' if number == 1 else 'are'}"


def count_have(number: int, noun: str, plural: str | None = None) -> str:
    """As `count_of`, with its verb: `1 class has`, `2 classes have`."""
    return f"{count_of(number, noun, plural)} {'has' if number == 1 else 'have'}"


def list_some(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """`a, b and 3 more`: the first `most` texts, and how many others there are."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
