"""ALIA's filters on numbers made by hand."""

from __future__ import annotations

import numpy as np

from discl.baselines.alia import (
    condense_request,
    confidence_drop,
    mean_self_confidence,
    pick_captions,
    semantic_drop,
)


def test_semantic_filter():
    assert semantic_drop(
        np.asarray([0.3, 0.3, 0.3]), np.asarray([[0.1, 0.2], [0.1, 0.4], [0.3, 0.1]])
    ).tolist() == [False, True, False]


def test_confidence_filter():
    own = mean_self_confidence(
        np.asarray([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6]]), np.asarray([0, 0, 1]), 3
    )
    assert own[:2].tolist() == [0.8, 0.6] and np.isnan(own[2])
    edits = np.asarray([[0.85, 0.15], [0.75, 0.25], [0.3, 0.7], [0.9, 0.1]])
    assert confidence_drop(edits, np.asarray([0, 0, 0, 1]), own).tolist() == [1, 0, 2, 2]


def test_captions_are_distinct_and_drawn_the_same_way():
    captions = [f"caption {row % 30}" for row in range(90)]
    picked = pick_captions(captions)
    assert len(picked) == len(set(picked)) == 20
    assert picked == pick_captions(reversed(captions)) != pick_captions(captions, seed=1)


def test_the_request_names_captions_and_limit():
    request = condense_request(["a bear by a river"], "animals", 7)
    assert "a bear by a river" in request and "at most 7" in request
