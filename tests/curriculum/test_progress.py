"""The guidance validation set and what is measured on it, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from discl.curriculum.progress import (
    GuidanceSet,
    allocate,
    best_level,
    check_disjoint,
    draw_guidance_set,
    drop_outliers,
    hold_out,
    measure_progress,
)
from discl.curriculum.sampling import Pool
from discl.errors import TrainingError

LEVELS = (0, 50)


def make_pool(
    hard: dict[int, int], kept: dict[tuple[int, int], int], real: int = 10, seeds: int = 2
) -> Pool:
    """`real` images of class 0, `hard[label]` hard ones of the others, and `seeds` synthetic images
    of the first `kept[label, level]`."""
    rows: list[tuple[int, int, int]] = [(0, 100, row) for row in range(real)]
    first = {}
    for label, count in hard.items():
        first[label] = len(rows)
        rows += [(label, 100, len(rows) + row) for row in range(count)]
    count = len(rows)
    for (label, level), sources in kept.items():
        rows += [(label, level, first[label] + row) for row in range(sources) for _ in range(seeds)]
    labels, levels, sources = np.array(rows).T
    synthetic = np.arange(len(rows)) >= count
    names = tuple(map(str, range(max(hard) + 1)))
    return Pool(labels, levels, synthetic, ~synthetic & (labels > 0), names, sources=sources)


POOL = make_pool(
    {1: 40, 2: 20, 3: 6, 4: 1},
    {
        (1, 0): 40,
        (2, 0): 20,
        (3, 0): 6,
        (4, 0): 1,
        (1, 50): 30,
        (2, 50): 20,
        (3, 50): 1,
        (4, 50): 1,
    },
)
"""Class 3 has one hard image with an image at 50 %, class 4 one hard image."""


def sources_of(pool: Pool, drawn: GuidanceSet, level: int | None = None) -> list[int]:
    rows = drawn.rows if level is None else drawn.rows[drawn.levels == level]
    return sorted(pool.sources[rows].tolist())


def test_every_source_has_one_image_at_every_level() -> None:
    drawn = draw_guidance_set(POOL, LEVELS, 12, seed=0)
    assert sources_of(POOL, drawn, 0) == sources_of(POOL, drawn, 50)
    assert len(set(sources_of(POOL, drawn))) == 12 and len(drawn) == 24
    assert POOL.synthetic[drawn.rows].all()
    assert np.array_equal(drawn.labels, POOL.labels[drawn.rows])
    counts = {label: int((drawn.labels == label).sum()) // 2 for label in (1, 2, 3, 4)}
    # 40 : 20 : 6 : 1 of 12, but without their sources class 3 would have no image at 50 %, and
    # class 4 none at all
    assert counts == {1: 8, 2: 4, 3: 0, 4: 0}


def test_training_keeps_half_of_each_class() -> None:
    drawn = draw_guidance_set(POOL, LEVELS, 10_000, seed=0)
    assert {
        label: len(set(sources_of(POOL, drawn, 0)) & set(np.flatnonzero(POOL.labels == label)))
        for label in (1, 2, 3, 4)
    } == {1: 20, 2: 10, 3: 0, 4: 0}


def test_nothing_of_a_source_is_left_to_training() -> None:
    """Neither the real image nor its siblings at other seeds and levels; the classes keep images of
    every level."""
    for seed in range(5):
        drawn = draw_guidance_set(POOL, LEVELS[1:], 20, seed)  # V measures one level of the two
        left = hold_out(POOL, drawn)
        trained = np.flatnonzero(~left.held_out)
        assert not set(sources_of(POOL, drawn)) & set(POOL.sources[trained].tolist())
        assert left.held_out.sum() == 20 * (1 + 2 + 2)
        for label in (1, 2, 3, 4):
            mine = trained[POOL.labels[trained] == label]
            assert set(POOL.levels[mine].tolist()) == {0, 50, 100}
        assert left.real_counts.tolist() == [
            10,
            *(POOL.real_counts[1:] - np.bincount(drawn.labels, minlength=5)[1:]),
        ]


def test_whatever_was_kept_v_and_training_are_apart() -> None:
    """120 pools of random classes, hard images, seeds, levels and filters, some of which have
    nothing to spare."""
    refused = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        levels = sorted(rng.choice(100, rng.integers(1, 4), replace=False).tolist())
        hard = {label: int(rng.integers(1, 9)) for label in range(1, rng.integers(3, 7))}
        full = make_pool(
            hard,
            {(label, level): count for label, count in hard.items() for level in levels},
            real=int(rng.integers(0, 5)),
            seeds=int(rng.integers(1, 4)),
        )
        kept = np.flatnonzero(
            ~full.synthetic | (rng.random(len(full.labels)) < rng.uniform(0.3, 1))
        )
        pool = Pool(
            full.labels[kept],
            full.levels[kept],
            full.synthetic[kept],
            full.hard[kept],
            full.class_names,
            sources=full.sources[kept],
        )
        chosen, size = list(levels), int(rng.integers(1, 30))
        try:
            drawn = draw_guidance_set(pool, chosen, size, seed)
        except TrainingError:
            refused += 1
            continue
        left = hold_out(pool, drawn)
        check_disjoint(left, drawn)
        sources = sources_of(pool, drawn, levels[0])
        assert 1 <= len(set(sources)) == len(sources) <= size
        assert all(sources_of(pool, drawn, level) == sources for level in levels)
        trained = ~left.held_out
        assert not set(sources) & set(pool.sources[trained].tolist())
        for label, count in hard.items():
            mine = pool.labels == label
            assert 2 * (pool.hard & trained & mine).sum() >= count
            if (drawn.labels == label).any():
                assert set(levels) <= set(pool.levels[trained & mine & pool.synthetic].tolist())
    assert 5 < refused < 60


def test_same_seed_same_images() -> None:
    first, again, other = (
        draw_guidance_set(POOL, LEVELS, 12, seed).rows.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_seeds_of_a_source_are_drawn_alike() -> None:
    drawn = [draw_guidance_set(POOL, LEVELS, 12, seed).rows % 2 for seed in range(20)]
    assert 0.4 < np.concatenate(drawn).mean() < 0.6


@pytest.mark.parametrize("kept", [{(1, 0): 40, (2, 50): 20}, {(1, 0): 40, (1, 50): 1}])
def test_where_nothing_can_be_held_out_it_is_said(kept: dict[tuple[int, int], int]) -> None:
    pool = make_pool({1: 40, 2: 20}, kept)
    there = kept.get((1, 50), 0) + kept.get((2, 50), 0)
    with pytest.raises(TrainingError, match=rf"40 at 0 %, {there} at 50 %"):
        draw_guidance_set(pool, LEVELS, 10, seed=0)


def test_synthetic_images_of_unknown_sources_are_refused() -> None:
    pool = replace(POOL, sources=np.zeros(0, np.int64))
    with pytest.raises(TrainingError, match=r"238 synthetic images"):
        draw_guidance_set(pool, LEVELS, 10, seed=0)


def test_a_source_that_is_not_trained_on_may_serve() -> None:
    """Its real image is not among the training images, but its other synthetic images are held out
    too."""
    away = np.where(POOL.synthetic, POOL.sources + 10_000, POOL.sources)
    pool = replace(POOL, sources=away)
    drawn = draw_guidance_set(pool, LEVELS, 12, seed=0)
    left = hold_out(pool, drawn)
    assert left.held_out.sum() == 12 * 4 and not left.held_out[~pool.synthetic].any()
    check_disjoint(left, drawn)


def test_overlap_with_training_is_refused() -> None:
    drawn = draw_guidance_set(POOL, LEVELS, 12, seed=0)
    left = hold_out(POOL, drawn)
    check_disjoint(left, drawn)
    source = POOL.sources[drawn.rows[3]]
    for row in np.flatnonzero(POOL.sources == source):  # its real image, and each of its siblings
        held_out = left.held_out.copy()
        held_out[row] = False
        with pytest.raises(TrainingError, match=rf"^1 images .* row {row}\."):
            check_disjoint(replace(POOL, held_out=held_out), drawn)


def test_outliers_by_hand() -> None:
    """Quartiles 2 and 4, so values beyond −1 and 7 are dropped; the ends are kept."""
    assert drop_outliers(np.array([1.0, 2.0, 3.0, 4.0, 100.0])).tolist() == [1, 2, 3, 4]
    assert drop_outliers(np.array([-1.0, 2.0, 3.0, 4.0, 7.0])).tolist() == [-1, 2, 3, 4, 7]
    assert drop_outliers(np.array([5.0])).tolist() == [5]


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
    """One lucky image of class 2 does not change its level; thirty do."""

    def best_of_class_2(images: int) -> int:
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

    assert [best_of_class_2(images) for images in (1, 30)] == [50, 0]


def test_shares_are_whole_and_add_up() -> None:
    rng = np.random.default_rng(0)
    assert allocate(7, np.array([40, 20, 10, 2]), rng).tolist() == [4, 2, 1, 0]
    assert allocate(30, np.array([20, 20, 9, 1]), rng).tolist() == [
        10,
        10,
        4,
        0,
    ]  # half of each at most
    assert allocate(25, np.array([2, 2, 60]), rng).tolist() == [1, 1, 23]
    assert allocate(5, np.array([1, 0]), rng).tolist() == [0, 0] and allocate(
        99, np.array([3, 5]), rng
    ).tolist() == [1, 2]
    many = [allocate(50, np.full(100, 4), np.random.default_rng(seed)) for seed in range(20)]
    assert {int(each.sum()) for each in many} == {50} and np.mean(
        many, 0
    ).min() > 0.1  # which classes give is left to chance


def test_many_classes_of_few_images_still_give_their_share() -> None:
    """300 classes of 3 hard images and 60 wanted: a fifth of an image each."""
    labels = range(1, 301)
    pool = make_pool(dict.fromkeys(labels, 3), {(label, 0): 3 for label in labels})
    drawn = draw_guidance_set(pool, LEVELS[:1], 60, seed=0)
    assert len(drawn) == len(set(drawn.labels.tolist())) == 60


def test_best_level_prefers_the_more_diverse() -> None:
    assert best_level({"50": 0.2, "10": 0.2, "0": 0.1}) == 10
    assert best_level({"50": -0.1, "0": -0.2}) == 50
