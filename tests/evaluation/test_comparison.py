"""Tables over seeds, and paired bootstrap intervals against known answers."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from scipy.stats import t
from sklearn.metrics import f1_score

from discl.evaluation.comparison import (
    Entry,
    Interval,
    as_csv,
    as_latex,
    as_markdown,
    mean_std,
    paired_f1_interval,
    paired_interval,
    stretch,
)


def test_mean_and_sample_deviation():
    assert mean_std([0.5, 0.7]) == pytest.approx((60, 100 * 0.1 * 2**0.5))
    assert mean_std([0.5]) == (50.0, None)


def test_difference_over_all_images_and_over_classes():
    labels = np.asarray([0, 0, 0, 1])
    first = np.asarray([[True, True, True, False]])
    second = np.asarray([[False, True, True, True]])
    assert paired_interval(first, second, labels).difference == pytest.approx(0)
    assert paired_interval(first, second, labels, [0, 1]).difference == pytest.approx(
        100 * (1 / 3 - 1) / 2
    )
    assert paired_interval(first, second, labels, [1]) == Interval(-100, -100, -100)
    assert paired_interval(first, second, labels, [2]) is None


def test_interval_is_that_of_a_binomial():
    """One class, one seed, second always wrong: the interval of a mean of n binary images."""
    rng = np.random.default_rng(0)
    first = rng.random((1, 400)) < 0.3
    found = paired_interval(first, np.zeros((1, 400), bool), np.zeros(400, int), replicates=4000)
    share = first.mean()
    half = 100 * 1.96 * (share * (1 - share) / 400) ** 0.5
    assert found.difference == pytest.approx(100 * share)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)


def test_pairs_are_drawn_together():
    """Two equal methods differ by nothing in every replicate, however much both vary."""
    first = np.random.default_rng(1).random((3, 50)) < 0.5
    assert paired_interval(first, first, np.repeat([0, 1], 25)) == Interval(0, 0, 0)


@pytest.mark.parametrize("seeds", [2, 3, 5, 9, 10, 30])
def test_few_seeds_are_stretched_as_student_says(seeds):
    assert stretch(seeds) == pytest.approx(
        t.ppf(0.975, seeds - 1) / t.ppf(0.975, 1e9) * (seeds / (seeds - 1)) ** 0.5, rel=2e-3
    )
    assert stretch(1) == 1


def test_seeds_are_drawn_too():
    """All images of a seed are correct together: an interval of three draws, 2.69 times wider."""
    first = np.arange(100) < np.asarray([[40], [50], [60]])
    found = paired_interval(
        first, np.zeros((3, 100), bool), np.arange(100)
    )  # one image a class, which is always drawn
    assert (found.low, found.difference, found.high) == pytest.approx(
        (50 - 10 * stretch(3), 50, 50 + 10 * stretch(3))
    )


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_a_difference_of_nothing(seeds):
    """About 95 of 100 times if seeds alone differ; without the stretch three seeds cover 75."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        rights = rng.normal(200, 20, (2, seeds)).round()
        first, second = (np.arange(400) < each[:, None] for each in rights)
        found = paired_interval(first, second, np.arange(400) % 2, replicates=500)
        covered += found.low <= 0 <= found.high
    assert 0.9 <= covered / 300 <= 0.985


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        paired_interval(np.zeros((1, 3), bool), np.zeros((2, 3), bool), np.zeros(3, int))


ENTRIES = [
    Entry(
        "ce",
        {"all": [0.5, 0.52], "few": [0.1, 0.1]},
        costs={"UNet rows": 0},
        published={"few": 5.49},
    ),
    Entry("discl_a", {"all": [0.6, 0.6]}, {"all": Interval(9, 7.96, 10.04)}, {"UNet rows": 25792}),
]


def test_markdown():
    assert as_markdown(ENTRIES, ["all", "many", "few"]).splitlines() == [
        "| method | all | few | all, difference [95 %] | UNet rows | few, published |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| ce | 51.0 ± 1.4 | 10.0 ± 0.0 | – | 0 | 5.5 |",
        "| discl_a | 60.0 ± 0.0 | – | +9.0 [+8.0, +10.0] | 25,792 | – |",
    ]


def test_latex_escapes():
    lines = as_latex(ENTRIES, ["all"]).splitlines()
    assert lines[0] == r"\begin{tabular}{lrrr}"
    assert lines[2] == r"method & all & all, difference [95 \%] & UNet rows \\"
    assert lines[5] == r"discl\_a & 60.0 $\pm$ 0.0 & +9.0 [+8.0, +10.0] & 25,792 \\"


@pytest.mark.slow
def test_difference_of_macro_f1():
    """Against scikit-learn, and against a bootstrap image by image."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], [60, 30, 12])  # no image of class 2, although it is predicted
    first, second = (
        np.where(rng.random((3, 102)) < right, labels, rng.integers(4, size=(3, 102)))
        for right in (0.7, 0.5)
    )

    def macro(predicted, labels):
        present = np.unique(labels)
        return f1_score(labels, predicted, labels=present, average="macro", zero_division=0)

    found = paired_f1_interval(first, second, labels)
    exact = np.asarray(
        [macro(first[seed], labels) - macro(second[seed], labels) for seed in range(3)]
    )
    assert found.difference == pytest.approx(100 * exact.mean())
    drawn = []
    for _ in range(400):
        rows = np.concatenate(
            [
                rng.choice(np.flatnonzero(labels == each), (labels == each).sum())
                for each in (0, 1, 3)
            ]
        )
        seeds = rng.integers(3, size=3)
        gains = [
            macro(first[seed][rows], labels[rows]) - macro(second[seed][rows], labels[rows])
            for seed in range(3)
        ]
        drawn.append(100 * (np.mean(gains) + stretch(3) * (exact[seeds].mean() - exact.mean())))
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=2.5)
    same = paired_f1_interval(first, first, labels)
    assert (same.low, same.difference, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="do not match"):
        paired_f1_interval(first, second[:2], labels)


def test_csv_holds_raw_figures():
    rows = list(csv.DictReader(io.StringIO(as_csv(ENTRIES, ["all", "few"], seeds=[4, 7]))))
    assert [row["all"] for row in rows] == ["0.500000", "0.520000", "0.600000", "0.600000"]
    assert rows[3] == {"method": "discl_a", "seed": "7", "all": "0.600000", "few": ""}
