"""Planted copies are found, and different images are not taken for copies."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from discl.audit import copies, proposals
from discl.audit.coefficients import SIDE
from discl.audit.copies import compare, find_copies, make_thumbnail
from discl.audit.stack import Stack
from helpers.planted import PLANTED, fashion


def planted(images: list[Image.Image], rows: np.ndarray, kind: str) -> np.ndarray:
    random = np.random.default_rng(1)
    return np.stack([make_thumbnail(PLANTED[kind](images[row], random)) for row in rows])


def measure(count: int, queries: int) -> tuple[dict[str, float], float]:
    """(recall of each kind, fraction of images that copy one of another class)."""
    images, labels = fashion("validation", count)
    known = np.stack([make_thumbnail(image) for image in images])
    rows = np.random.default_rng(2).choice(count, queries, replace=False)
    found = find_copies(np.concatenate([planted(images, rows, kind) for kind in PLANTED]), known)
    pairs = set(zip(found.queries.tolist(), found.references.tolist(), strict=True))
    hits = [(place, rows[place % queries]) in pairs for place in range(queries * len(PLANTED))]
    means = np.reshape(hits, (len(PLANTED), queries)).mean(1).tolist()
    recall = dict(zip(PLANTED, means, strict=True))
    others = find_copies(known[rows], known, same_query=labels[rows], same_reference=labels)
    return recall, len(set(others.queries.tolist())) / queries


def test_planted_copies_are_found_and_other_classes_are_none() -> None:
    recall, false_alarms = measure(200, 10)
    assert recall == dict.fromkeys(PLANTED, 1.0) and false_alarms == 0


@pytest.mark.slow
def test_recall_and_false_alarms_among_a_thousand_images() -> None:
    recall, false_alarms = measure(1000, 150)
    assert np.mean(list(recall.values())) >= 0.99 and min(recall.values()) >= 0.97
    assert false_alarms <= 0.01


def noise(count: int) -> np.ndarray:
    shape = (count, SIDE, SIDE)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_the_search_is_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(12)
    images[7], images[9] = images[2], images[3][:, ::-1]
    numbers = np.arange(12)
    whole = find_copies(images, images, same_query=numbers, same_reference=numbers)
    pairs = sorted(zip(whole.queries.tolist(), whole.references.tolist(), strict=True))
    assert pairs == [(2, 7), (3, 9), (7, 2), (9, 3)]
    assert whole.similarity == pytest.approx([1.0] * 4, abs=1e-4)
    monkeypatch.setattr(copies, "QUERIES_HELD", 5)
    for name, size in (("QUERIES", 3), ("REFERENCES", 2), ("PAIRS", 1)):
        monkeypatch.setattr(proposals, f"{name}_AT_ONCE", size)
    done = []
    again = find_copies(
        images,
        images,
        same_query=numbers,
        same_reference=numbers,
        candidates=1,
        on_progress=done.append,
    )
    assert sorted(zip(again.queries.tolist(), again.references.tolist(), strict=True)) == pairs
    assert sum(done) == 144


def test_a_stack_is_what_concatenation_makes() -> None:
    parts = [noise(3), noise(1)[:0], noise(5)[3:]]
    whole, chosen = np.concatenate(parts), np.array([4, 0, 4, 3])
    for stack, same in ((Stack(parts), whole), (Stack(parts, chosen), whole[chosen])):
        assert len(stack) == len(same)
        for which in (slice(None), slice(1, 3), slice(9, 12), slice(2, 0, -1)):
            assert np.array_equal(stack[which], same[which])
        assert all(np.array_equal(stack[row], same[row]) for row in range(-1, len(same)))
    with pytest.raises(IndexError):
        Stack(parts)[5]


def test_equal_numbers_are_left_out() -> None:
    images = noise(3)
    found = find_copies(
        images[:1], images, same_query=np.array([8]), same_reference=np.array([8, 8, 9])
    )
    assert not len(found)


def test_images_without_content_copy_nothing() -> None:
    flat = np.full((2, SIDE, SIDE), 90, np.uint8)
    assert compare(flat[:1], flat[1:]).tolist() == [-1]
    assert not len(find_copies(flat, noise(3))) and not len(find_copies(noise(2), flat))
    none = np.zeros((0, SIDE, SIDE), np.uint8)
    assert not len(find_copies(none, flat)) and not len(find_copies(flat, none))


def test_a_crop_is_found_but_not_what_it_was_taken_from() -> None:
    images, _ = fashion("validation", 1)
    smaller = images[0].resize((32, 32), Image.Resampling.BICUBIC, (1, 5, 27, 31))
    whole, part = make_thumbnail(images[0])[None], make_thumbnail(smaller)[None]
    assert compare(part, whole) > 0.9 > compare(whole, part)
