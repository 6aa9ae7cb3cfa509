"""Expected gains: planted gains are found, planted harm is found, and nothing is seen twice."""

from __future__ import annotations

import numpy as np
import pytest

from discl.errors import DataError
from discl.evaluation import worth as module
from discl.evaluation.worth import (
    Features,
    Worth,
    class_totals,
    deal_folds,
    estimate_worth,
    fit_head,
    precision_and_coverage,
    score_mixtures,
)

CENTRES = np.eye(4) * 3


def blobs(counts: list[int], seed: int, shift: float = 0.0, spread: float = 1.6) -> Features:
    """Gaussian classes around their centres; `shift` moves class 3 towards class 0."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), counts)
    centres = CENTRES.copy()
    centres[3] = (1 - shift) * CENTRES[3] + shift * CENTRES[0]
    return Features(
        (centres[labels] + spread * rng.standard_normal((len(labels), 4))).astype(np.float32),
        labels,
    )


def setting(shift: float):
    real = blobs([80, 80, 80, 4], 0)
    hard = real.labels == 3
    made = blobs([0, 0, 0, 60], 1, shift)
    sources = np.flatnonzero(hard)[np.arange(60) % 4]
    return real, hard, made, sources


def estimate(real, hard, made, sources, *, folds: int = 3, **options) -> Worth:
    fold_of = deal_folds(real.labels, hard, folds)
    return estimate_worth(real, hard, made, sources, fold_of=fold_of, **options)


def test_images_of_the_class_bring_more_than_those_of_another():
    held_out = blobs([200] * 4, 2)
    right = estimate(*setting(0.0), held_out=held_out)
    wrong = estimate(*setting(1.0), held_out=held_out)
    assert right.few.low > 0
    assert right.few.mean > wrong.few.mean + 3
    assert right.recognised > 0.5 > 0.3 > wrong.recognised
    assert right.overall is not None
    assert right.overall.mean > wrong.overall.mean


def test_without_validation_images_the_hard_ones_are_held_out_in_turn():
    worth = estimate(*setting(0.0))
    assert worth.overall is None
    assert worth.few.low <= worth.few.mean <= worth.few.high


def test_the_images_of_a_held_out_source_are_not_trained_on():
    """Synthetic images that copy their source would otherwise be recognised every time."""
    rng = np.random.default_rng(0)
    real = Features(
        rng.standard_normal((60, 40)).astype(np.float32), np.repeat([0, 1, 2], [40, 10, 10])
    )
    hard = real.labels == 2
    rows = np.flatnonzero(hard)
    copies = real.take(np.repeat(rows, 5))
    worth = estimate(real, hard, copies, np.repeat(rows, 5), folds=5)
    assert worth.few.mean < 40, "features are noise, so copies of others cannot help"
    assert worth.recognised < 0.7


def test_a_class_of_one_image_needs_a_validation_split():
    real = blobs([20, 20, 20, 1], 0)
    hard = real.labels == 3
    made = blobs([0, 0, 0, 10], 1)
    sources = np.full(10, 60)
    with pytest.raises(DataError) as caught:
        estimate(real, hard, made, sources)
    assert caught.value.argument == "held_out"
    assert estimate(real, hard, made, sources, held_out=blobs([9] * 4, 3)).overall is not None


def test_no_synthetic_image_weighs_more_than_a_real_one_of_its_class(monkeypatch):
    """A pilot has few images; a whole spectrum has `scale` times the weight of the real ones."""
    fitted = []
    known = module.fit_head

    def spy(features, weights, classes):
        fitted.append((features.labels, weights))
        return known(features, weights, classes)

    monkeypatch.setattr(module, "fit_head", spy)
    real, hard, made, sources = setting(0.0)
    held_out = blobs([20] * 4, 2)
    for count, part in ((2, 2 / 6), (60, 3 / 4)):  # beside four real images
        fitted.clear()
        few = np.arange(count)
        fold_of = np.full(len(hard), -1)
        estimate_worth(
            real, hard, made.take(few), sources[few], fold_of=fold_of, held_out=held_out, scale=3.0
        )
        labels, weights = fitted[-1]
        own = weights[labels == 3]
        assert own.sum() == pytest.approx(1) and own[4:].sum() == pytest.approx(part)


def test_any_classifier_may_be_the_judge():
    """One that names the class of every image gains nothing from more of them."""
    real, hard, made, sources = setting(0.0)
    truth = {row.tobytes(): label for each in (real, made) for row, label in zip(
        each.values, each.labels.tolist(), strict=True
    )}  # fmt: skip
    seen = []

    def fit(features, weights, num_classes):
        seen.append((len(features.labels), len(weights), num_classes))
        return lambda values: np.array([truth[row.tobytes()] for row in values], np.int64)

    worth = estimate(real, hard, made, sources, folds=2, fit=fit)
    assert (worth.few.mean, worth.recognised) == (0, 1)
    assert seen == [(242, 242, 4), (272, 272, 4)] * 2  # two of four hard images, half of the made


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ("all", [100, 40, 20, 20]),
        ("class-balanced", [1, 1, 1, 1]),
        ("square-root", [10, 40**0.5, 20**0.5, 20**0.5]),
        # tail 40 for two classes; the other two together as much: 40 of 140, by their images
        ("undersampled", [100 * 40 / 140, 40 * 40 / 140, 20, 20]),
    ],
)
def test_the_totals_of_classes_by_hand(mixture, expected):
    counts, tail = np.array([100, 40, 5, 5]), np.array([False, False, True, True])
    assert class_totals(counts, tail, mixture, 3.0) == pytest.approx(expected)


def test_the_head_is_that_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    features = blobs([30, 30, 30, 30], 4)
    values = (features.values - features.values.mean(0)) / features.values.std(0)
    reference = linear.LogisticRegression(C=1 / (0.05 * len(values)), tol=1e-8, max_iter=500)
    reference.fit(values, features.labels)
    matrix, bias = fit_head(features, np.ones(len(values)), 4, penalty=0.05)
    scores = features.values @ matrix + bias
    expected = values @ reference.coef_.T + reference.intercept_
    centred = [each - each.mean(1, keepdims=True) for each in (scores, expected)]
    assert centred[0] == pytest.approx(centred[1], abs=5e-3)


def test_precision_and_coverage_by_hand():
    """Real points 0, 1, 2, 10 on a line; k = 1 gives radii 1, 1, 1, 8."""
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    made = np.array([[0.5], [3.5], [30.0]])
    precision, coverage = precision_and_coverage(real, made, neighbours=1)
    assert precision == pytest.approx(2 / 3)  # 30 is in no ball; 3.5 is in that around 10
    assert coverage == pytest.approx(3 / 4)  # the ball around 2 holds none
    with pytest.raises(DataError):
        precision_and_coverage(real[:1], made)


def test_mixtures_are_scored_on_held_out_images_with_synthetic_images_and_without():
    """A balanced head names the rare class more often than one on the real frequencies."""
    real, hard, made, _ = setting(0.0)
    counts = np.asarray([800, 800, 800, 4])
    names = ["all", "class-balanced", "undersampled"]
    options = {"mixtures": names, "class_counts": counts}
    scores = score_mixtures(real, hard, made, blobs([200] * 4, 2), **options)
    assert [each.mixture for each in scores] == names
    plain, balanced, _ = scores
    assert balanced.real > plain.real + 3
    assert all(each.mixed is not None for each in scores) and balanced.mixed > balanced.real + 1
    alone = score_mixtures(real, hard, None, blobs([200] * 4, 2), **options)
    assert [each.real for each in alone] == [each.real for each in scores]
    assert {each.mixed for each in alone} == {None}
