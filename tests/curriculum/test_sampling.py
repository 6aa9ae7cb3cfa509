"""What an epoch draws: counted row by row on pools small enough to count by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from discl.curriculum.sampling import (
    Pass,
    Pool,
    SamplingConfig,
    balance_classes,
    draw_epoch,
    draw_pass,
)
from discl.errors import TrainingError

TEXT_ONLY, HALF = 0, 50
REAL = {"boot": 60, "shirt": 50, "coat": 40, "bag": 6, "hat": 3}
KEPT = {("bag", 0): 30, ("bag", 50): 10, ("hat", 0): 4, ("hat", 50): 20}
SHARE = 2 / 5


def make_pool(
    real: dict[str, int], kept: dict[tuple[str, int], int], hard: tuple[str, ...] = ("bag", "hat")
) -> Pool:
    """Real images, then the kept synthetic ones of each (class, level)."""
    names = tuple(real)
    rows = [(name, 100, False) for name, count in real.items() for _ in range(count)]
    rows += [(name, level, True) for (name, level), count in kept.items() for _ in range(count)]
    return Pool(
        labels=np.array([names.index(name) for name, _, _ in rows]),
        levels=np.array([level for _, level, _ in rows]),
        synthetic=np.array([synthetic for _, _, synthetic in rows]),
        hard=np.array([name in hard and not synthetic for name, _, synthetic in rows]),
        class_names=names,
    )


POOL = make_pool(REAL, KEPT)


def draw(
    levels: tuple[int, ...], sampling: SamplingConfig, pool: Pool = POOL, seed: int = 0
) -> Pass:
    return draw_pass(pool, levels, sampling, np.random.default_rng(seed))


def count_rows(pool: Pool, rows: np.ndarray) -> Counter[tuple[str, int]]:
    """How often each (class, level) was drawn."""
    return Counter((pool.class_names[pool.labels[row]], int(pool.levels[row])) for row in rows)


def test_pool_counts_its_real_images_and_tail_classes() -> None:
    assert POOL.num_classes == 5
    assert POOL.real_counts.tolist() == [60, 50, 40, 6, 3]
    assert POOL.tail_share == SHARE


def test_a_round_written_out() -> None:
    """9 hard + 3 × 9 synthetic are 2/5 of the samples, so 54 others go with them."""
    drawn = draw((HALF,), SamplingConfig(SHARE, 3.0, shortage="cap"))
    counts = count_rows(POOL, drawn.rows)
    assert (counts["bag", 100], counts["hat", 100]) == (6, 3)
    assert (counts["bag", 50], counts["hat", 50]) == (10, 9)  # of 18 bags wanted, 10 were kept
    others = sum(counts[name, 100] for name in ("boot", "shirt", "coat"))
    assert others == round((9 + 19) * 3 / 2) == 42
    assert len(drawn.rows) == 9 + 19 + 42
    assert (drawn.hard, drawn.synthetic, drawn.distinct_synthetic) == (9, 19, 19)
    assert drawn.effective_scale == 19 / 9


def test_imagenet_lt_keeps_13_6_per_cent() -> None:
    """136 of 1,000 classes are rare: 136 hard images and 408 synthetic ones are 13.6 % of 4,000."""
    tail = tuple(f"rare {index}" for index in range(136))
    pool = make_pool(
        {f"class {index}": 5 for index in range(864)} | dict.fromkeys(tail, 1),
        {(name, 0): 3 for name in tail},
        tail,
    )
    drawn = draw((TEXT_ONLY,), SamplingConfig(pool.tail_share, 3.0), pool)
    assert len(drawn.rows) == 4_000
    assert (pool.synthetic | pool.hard)[drawn.rows].mean() == 0.136


@pytest.mark.parametrize("levels", [(), (TEXT_ONLY,), (HALF,), (TEXT_ONLY, HALF)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_tail_share_is_kept_at_every_level_and_without_any(
    levels: tuple[int, ...], scale: float
) -> None:
    drawn = draw(levels, SamplingConfig(SHARE, scale))
    tail = (POOL.synthetic | POOL.hard)[drawn.rows]
    assert abs(tail.sum() - SHARE * len(tail)) <= 0.5  # one image is the grain


@pytest.mark.parametrize("levels", [(), (TEXT_ONLY,), (HALF,), (TEXT_ONLY, HALF)])
def test_every_hard_image_is_in_every_round_once(levels: tuple[int, ...]) -> None:
    for seed in range(5):
        rows = draw(levels, SamplingConfig(SHARE, 3.0), seed=seed).rows
        assert sorted(rows[POOL.hard[rows]]) == np.flatnonzero(POOL.hard).tolist()


def test_the_others_come_once_at_most_and_all_of_them_without_a_share() -> None:
    others = ~POOL.hard & ~POOL.synthetic
    undersampled = draw((HALF,), SamplingConfig(SHARE, 3.0)).rows
    assert max(Counter(undersampled[others[undersampled]].tolist()).values()) == 1
    everything = draw((HALF,), SamplingConfig(None, 3.0)).rows
    assert sorted(everything[others[everything]]) == np.flatnonzero(others).tolist()


def test_undersampling_never_repeats_the_others() -> None:
    """5 others are too few for a fraction of 2/5 beside 9 hard images; all are drawn."""
    pool = make_pool({"boot": 5, "bag": 6, "hat": 3}, {})
    assert len(draw((), SamplingConfig(SHARE, 3.0), pool).rows) == 14


@pytest.mark.parametrize(
    ("scale", "bags", "hats"),
    [(0.0, 0, 0), (0.4, 2, 1), (1.0, 6, 3), (1.5, 9, 4), (2.0, 12, 6), (3.0, 18, 9), (5.0, 30, 15)],
)
def test_synthetic_images_are_the_scale_times_the_class_count_rounded(
    scale: float, bags: int, hats: int
) -> None:
    drawn = draw((TEXT_ONLY, HALF), SamplingConfig(SHARE, scale))
    counts = count_rows(POOL, drawn.rows)
    assert counts["bag", 0] + counts["bag", 50] == bags
    assert counts["hat", 0] + counts["hat", 50] == hats
    assert drawn.synthetic == bags + hats


@pytest.mark.parametrize("levels", [(TEXT_ONLY,), (HALF,), (TEXT_ONLY, HALF)])
def test_only_the_levels_asked_for(levels: tuple[int, ...]) -> None:
    drawn = draw(levels, SamplingConfig(SHARE, 3.0)).rows
    assert set(POOL.levels[drawn][POOL.synthetic[drawn]].tolist()) == set(levels)
    assert set(POOL.levels[drawn][~POOL.synthetic[drawn]].tolist()) == {100}


def test_shortage_repeats_each_image_as_often_as_the_others_or_once_more() -> None:
    """9 hats are wanted and 4 were kept: three come twice and one three times."""
    drawn = draw((TEXT_ONLY,), SamplingConfig(SHARE, 3.0, shortage="repeat"))
    hats = drawn.rows[POOL.synthetic[drawn.rows] & (POOL.labels[drawn.rows] == 4)]
    assert sorted(Counter(hats.tolist()).values()) == [2, 2, 2, 3]
    assert (drawn.synthetic, drawn.distinct_synthetic) == (27, 18 + 4)
    assert drawn.effective_scale == 22 / 9


def test_shortage_caps_a_class_at_what_was_kept() -> None:
    drawn = draw((TEXT_ONLY,), SamplingConfig(SHARE, 3.0, shortage="cap"))
    hats = drawn.rows[POOL.synthetic[drawn.rows] & (POOL.labels[drawn.rows] == 4)]
    assert (
        sorted(hats.tolist())
        == np.flatnonzero(POOL.synthetic & (POOL.labels == 4) & (POOL.levels == 0)).tolist()
    )
    assert drawn.effective_scale == 22 / 9


def test_no_effective_scale_without_hard_images() -> None:
    assert (
        draw(
            (), SamplingConfig(None, 3.0), make_pool({"boot": 5, "bag": 6}, {}, ())
        ).effective_scale
        == 0.0
    )


@pytest.mark.parametrize("samples", [1, 90, 1_000])
def test_an_epoch_has_a_fixed_length(samples: int) -> None:
    for levels in ((), (TEXT_ONLY,), (TEXT_ONLY, HALF)):
        rows, _ = draw_epoch(POOL, levels, SamplingConfig(SHARE, 3.0), samples, seed=0)
        assert len(rows) == samples
        assert rows.dtype == np.int64


def test_an_epoch_is_rounds_one_after_another_each_drawn_anew() -> None:
    rows, first = draw_epoch(POOL, (HALF,), SamplingConfig(SHARE, 3.0), 200, seed=5)
    length = len(first.rows)
    assert length == 90
    assert np.array_equal(rows[:length], first.rows)
    assert sorted(rows[length : 2 * length]) != sorted(first.rows)
    assert set(np.flatnonzero(POOL.hard)) <= set(rows[length : 2 * length])


def test_same_seed_same_rows_another_seed_other_rows() -> None:
    drawn = [
        draw_epoch(POOL, (HALF,), SamplingConfig(SHARE, 3.0), 90, seed=seed)[0].tolist()
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_image_that_is_kept_at_another_level_changes_nothing() -> None:
    more = make_pool(REAL, KEPT | {("hat", 90): 12})
    assert np.array_equal(
        draw((HALF,), SamplingConfig(SHARE, 3.0), more).rows,
        draw((HALF,), SamplingConfig(SHARE, 3.0)).rows,
    )


def test_a_class_without_a_kept_image_is_named_with_its_level() -> None:
    pool = make_pool(REAL, {("bag", 0): 30, ("bag", 50): 10, ("hat", 50): 20})
    with pytest.raises(TrainingError, match=r"1 class .*: 'hat' at 0 %\.") as raised:
        draw((TEXT_ONLY,), SamplingConfig(SHARE, 3.0), pool)
    assert raised.value.argument == "missing"
    assert draw((TEXT_ONLY, HALF), SamplingConfig(SHARE, 3.0), pool).synthetic == 27
    assert draw((TEXT_ONLY,), SamplingConfig(SHARE, 0.0), pool).synthetic == 0


def test_an_empty_pool_is_refused() -> None:
    empty = replace(
        POOL,
        held_out=POOL.held_out[:0],
        labels=POOL.labels[:0],
        levels=POOL.levels[:0],
        synthetic=POOL.synthetic[:0],
        hard=POOL.hard[:0],
    )
    with pytest.raises(TrainingError, match="no sample to train on"):
        draw_epoch(empty, (), SamplingConfig(None, 3.0), 10, seed=0)


def test_every_class_that_lacks_images_is_named() -> None:
    with pytest.raises(TrainingError, match=r"2 classes .* 'bag' at 90 %; 'hat' at 90 %"):
        draw((90,), SamplingConfig(SHARE, 3.0))


def test_a_class_that_lacks_a_level_may_take_its_nearest() -> None:
    pool = make_pool(REAL, {("bag", 0): 30, ("bag", 90): 4, ("hat", 50): 20, ("hat", 70): 20})
    counts = count_rows(
        pool, draw((TEXT_ONLY,), SamplingConfig(SHARE, 3.0, missing="nearest"), pool).rows
    )
    assert (counts["bag", 0], counts["hat", 50], counts["hat", 70]) == (18, 9, 0)
    nothing = make_pool(REAL, {("bag", 0): 30})
    assert (
        count_rows(
            nothing, draw((TEXT_ONLY,), SamplingConfig(SHARE, 3.0, missing="nearest"), nothing).rows
        )["hat", 100]
        == 3
    )


def test_a_class_may_have_levels_of_its_own() -> None:
    drawn = draw_pass(
        POOL,
        (TEXT_ONLY,),
        SamplingConfig(SHARE, 3.0),
        np.random.default_rng(0),
        class_levels={4: (HALF,)},
    )
    counts = count_rows(POOL, drawn.rows)
    assert (counts["bag", 0], counts["bag", 50], counts["hat", 0], counts["hat", 50]) == (
        18,
        0,
        0,
        9,
    )


def test_held_out_rows_are_never_drawn() -> None:
    held_out = np.zeros(len(POOL.labels), bool)
    held_out[[0, 170, 171]] = True
    pool = replace(POOL, held_out=held_out)
    for seed in range(20):
        assert not held_out[
            draw((TEXT_ONLY, HALF), SamplingConfig(None, 3.0), pool, seed).rows
        ].any()


def test_hard_images_may_be_left_out_where_there_are_levels() -> None:
    sampling = SamplingConfig(None, 3.0, with_hard=False)
    drawn = draw((HALF,), sampling)
    assert not POOL.hard[drawn.rows].any()
    assert (drawn.synthetic, drawn.hard) == (27, 9)
    assert POOL.hard[draw((), sampling).rows].sum() == 9


def test_balanced_epochs() -> None:
    """90 : 9 : 1 images; balanced a third each, by the square root 9.49 : 3 : 1."""
    labels = np.repeat([0, 1, 2], [90, 9, 1])
    rng = np.random.default_rng(0)
    rows = balance_classes(np.arange(100), labels, 30_000, 0.0, rng=rng)
    np.testing.assert_allclose(np.bincount(labels[rows]) / 30_000, [1 / 3] * 3, atol=0.01)
    assert np.ptp(np.bincount(rows)[90:99]) <= 1
    rows = balance_classes(np.arange(100), labels, 30_000, 0.5, rng=rng)
    np.testing.assert_allclose(
        np.bincount(labels[rows]) / 30_000,
        np.sqrt([90, 9, 1]) / np.sqrt([90, 9, 1]).sum(),
        atol=0.01,
    )
    no = np.zeros(100, bool)
    pool = Pool(labels, np.full(100, 100), no, no, ("a", "b", "c"))
    plain, _ = draw_epoch(pool, (), SamplingConfig(None, 0.0), 100, seed=0)
    assert sorted(plain.tolist()) == list(range(100))
    even, _ = draw_epoch(pool, (), SamplingConfig(None, 0.0, class_power=0.0), 300, seed=0)
    assert np.bincount(labels[even]).min() > 60
