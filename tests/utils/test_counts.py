"""Counts with their nouns."""

from __future__ import annotations

from discl.utils.counts import count_be, count_have, count_of


def test_one_is_singular_and_all_else_plural() -> None:
    assert [count_of(number, "image") for number in (0, 1, 2, 1200)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,200 images",
    ]
    assert count_of(2, "class", "classes") == "2 classes"
    assert (count_be(1, "copy", "copies"), count_be(2, "copy", "copies")) == (
        "1 copy is",
        "2 copies are",
    )
    assert (count_have(1, "label"), count_have(3, "label")) == ("1 label has", "3 labels have")
