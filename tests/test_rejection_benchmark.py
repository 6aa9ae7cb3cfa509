"""The benchmark of early rejection: rows and losses of a rule, computed by hand."""

from __future__ import annotations

import numpy as np
from benchmarks import rejection

FINAL = [0.9, 0.8, 0.1, 0.2] * 3
IMAGES = rejection.Images(
    {"sources": [0, 1, 2, 3] * 3, "final": FINAL, "looks": {"4": FINAL, "6": FINAL}}, 0.5, 0
)
EVERY = np.arange(12)


def test_a_perfect_judge_pays_a_fifth_for_what_the_filter_drops() -> None:
    fell = rejection.perfect(IMAGES, EVERY[:0], EVERY)
    assert fell.tolist() == [0, 0, 4, 4] * 3
    assert rejection.rows_per_kept(IMAGES, EVERY, np.zeros(12, int), 0.0) == 80
    assert rejection.rows_per_kept(IMAGES, EVERY, fell, 0.0) == 40 + 8
    assert rejection.rows_per_kept(IMAGES, EVERY, fell, 0.5) == 40 + 8 + 0.5 * 32


def test_an_audit_keeps_its_part_of_the_good_images_that_fell() -> None:
    fell = np.where(EVERY == 0, 4, 0)
    rows = rejection.rows_per_kept(IMAGES, EVERY, fell, 0.25)
    assert rows == (11 * 40 + 8 + 0.25 * 32) / 5.25


def test_rules_drop_what_looks_bad_and_without_teachers_nothing() -> None:
    many = rejection.Images(
        {"sources": [0] * 80, "final": FINAL[:4] * 20, "looks": {"6": FINAL[:4] * 20}}, 0.5, 0
    )
    teachers, judged = np.arange(60), np.arange(60, 80)
    for rule in (rejection.separate_bounds((0.3,)), rejection.joint_bounds((0.3,))):
        assert rule(many, teachers, judged).tolist() == [0, 0, 6, 6] * 5
        assert not rule(many, teachers[:4], judged).any()
