"""The guidance validation set and what is measured on it, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from discl.curriculum.mixture import Pool
from discl.curriculum.progress import (
    GuidanceSet,
    allot,
    best_level,
    check_disjoint,
    draw_guidance_set,
    measure_progress,
    true_class_probability,
    without_outliers,
)
from discl.errors import TrainingError
from discl.levels import GuidanceLevel

LEVELS = (GuidanceLevel(0), GuidanceLevel(50))


def make_pool(kept: dict[tuple[int, int], int], real: int = 10) -> Pool:
    """Real images of class 0, then the kept synthetic ones of each (label, level)."""
    rows = [(0, 100)] * real + [each for each, count in kept.items() for _ in range(count)]
    synthetic = np.repeat([False, True], [real, len(rows) - real])
    return Pool(
        np.array([label for label, _ in rows]),
        np.array([level for _, level in rows]),
        synthetic,
        ~synthetic,
        ("a", "b", "c"),
    )


POOL = make_pool({(1, 0): 40, (2, 0): 20, (1, 50): 30, (2, 50): 1})


def test_parts_of_levels_and_classes() -> None:
    drawn = draw_guidance_set(POOL, LEVELS, 24, seed=0)
    counts = {
        (label, level): int(((drawn.labels == label) & (drawn.levels == level)).sum())
        for label in (1, 2)
        for level in (0, 50)
    }
    assert counts == {
        (1, 0): 8,
        (2, 0): 4,
        (1, 50): 12,
        (2, 50): 0,
    }  # the only picture of a class stays with training
    assert POOL.synthetic[drawn.rows].all()
    assert len(set(drawn.rows)) == len(drawn) == 24


def test_training_keeps_half() -> None:
    drawn = draw_guidance_set(POOL, LEVELS, 10_000, seed=0)
    assert len(drawn) == 20 + 10 + 15


def test_same_seed_same_images() -> None:
    first, again, other = (
        draw_guidance_set(POOL, LEVELS, 24, seed).rows.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_level_without_enough_images_is_named() -> None:
    with pytest.raises(TrainingError, match=r"level 50 % has 1 kept synthetic images, too few"):
        draw_guidance_set(make_pool({(1, 0): 40, (2, 50): 1}), LEVELS, 10, seed=0)


def test_overlap_with_training_is_refused() -> None:
    drawn = draw_guidance_set(POOL, LEVELS, 24, seed=0)
    held_out = np.zeros(len(POOL.labels), bool)
    held_out[drawn.rows] = True
    check_disjoint(replace(POOL, held_out=held_out), drawn)
    held_out[drawn.rows[3]] = False
    with pytest.raises(TrainingError, match=rf"1 of 24 images .* .row {drawn.rows[3]}."):
        check_disjoint(replace(POOL, held_out=held_out), drawn)


def test_true_class_probability() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.8], [0.5, 0.5]]))
    assert true_class_probability(logits, np.array([1, 0])) == pytest.approx([0.8, 0.5])


def test_outliers_by_hand() -> None:
    """Quartiles 2 and 4, so what lies beyond −1 and 7 is dropped; the ends stay."""
    assert without_outliers(np.array([1.0, 2.0, 3.0, 4.0, 100.0])).tolist() == [1, 2, 3, 4]
    assert without_outliers(np.array([-1.0, 2.0, 3.0, 4.0, 7.0])).tolist() == [-1, 2, 3, 4, 7]
    assert without_outliers(np.array([5.0])).tolist() == [5]


def test_gain_by_level_and_class() -> None:
    guidance = GuidanceSet(
        np.arange(8), np.array([1, 1, 1, 1, 1, 2, 2, 1]), np.array([0, 0, 0, 0, 0, 0, 0, 50])
    )
    before = np.zeros(8)
    after = np.array([0.1, 0.2, 0.3, 0.4, 9.0, 0.1, 0.3, -0.5])
    measured = measure_progress(guidance, before, after)
    assert measured["gain"] == pytest.approx(
        {"0": (0.1 + 0.2 + 0.3 + 0.4 + 0.1 + 0.3) / 6, "50": -0.5}
    )
    common = (0.1 + 0.2 + 0.3 + 0.4 + 0.1 + 0.3) / 6
    assert measured["class_gain"]["1"] == pytest.approx(
        {"0": (5 * 0.25 + 10 * common) / 15, "50": -0.5}
    )  # its outlier is left out
    assert measured["class_gain"]["2"] == pytest.approx(
        {"0": (2 * 0.2 + 10 * common) / 12, "50": -0.5}
    )  # at 50 % it has no image


def test_a_class_of_few_images_keeps_the_common_level() -> None:
    """One lucky image of class 2 is no reason to leave the level that all others gain from; ten are."""

    def best_of_class_2(images: int) -> GuidanceLevel:
        labels, levels = (
            np.repeat([1, 1, 2, 2], [40, 40, images, images]),
            np.repeat([0, 50, 0, 50], [40, 40, images, images]),
        )
        after = np.repeat([0.1, 0.2, 0.25, 0.15], [40, 40, images, images])
        return best_level(
            measure_progress(GuidanceSet(np.arange(len(labels)), labels, levels), after * 0, after)[
                "class_gain"
            ]["2"]
        )

    assert [best_of_class_2(images).percent for images in (1, 30)] == [50, 0]


def test_shares_are_whole_and_add_up() -> None:
    rng = np.random.default_rng(0)
    assert allot(7, np.array([40, 20, 10, 2]), rng).tolist() == [4, 2, 1, 0]
    assert allot(30, np.array([20, 20, 9, 1]), rng).tolist() == [
        10,
        10,
        4,
        0,
    ]  # half of each at most
    assert allot(25, np.array([2, 2, 60]), rng).tolist() == [1, 1, 23]
    assert allot(5, np.array([1, 0]), rng).tolist() == [0, 0] and allot(
        99, np.array([3, 5]), rng
    ).tolist() == [1, 2]
    many = [allot(50, np.full(100, 4), np.random.default_rng(seed)) for seed in range(20)]
    assert {int(each.sum()) for each in many} == {50} and np.mean(
        many, 0
    ).min() > 0.1  # which classes give is left to chance


def test_many_classes_of_few_images_still_give_their_share() -> None:
    """300 classes of 3 images and 60 wanted: a fifth of an image each."""
    pool = make_pool({(label, 0): 3 for label in range(300)})
    pool = replace(pool, class_names=tuple(map(str, range(300))))
    drawn = draw_guidance_set(pool, LEVELS[:1], 60, seed=0)
    assert len(drawn) == len(set(drawn.labels.tolist())) == 60


def test_best_level_prefers_the_more_diverse() -> None:
    assert best_level({"50": 0.2, "10": 0.2, "0": 0.1}) == GuidanceLevel(10)
    assert best_level({"50": -0.1, "0": -0.2}) == GuidanceLevel(50)
