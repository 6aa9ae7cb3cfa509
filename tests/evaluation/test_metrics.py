"""Metrics against scikit-learn, and what is absent rather than 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import Tensor

from discl.evaluation.metrics import (
    calibration_error,
    class_accuracies,
    confusion_matrix,
    macro_f1,
    measure,
    softmax_rows,
    true_class_probability,
)

NAMES = ("boot", "shirt", "coat", "bag", "hat")


def answers(
    seed: int, present: tuple[int, ...] = (0, 1, 2, 3, 4), rows: int = 200
) -> tuple[Tensor, Tensor]:
    """Logits `[rows, 5]` and labels `[rows]`, right somewhat more often than chance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(present)[torch.randint(len(present), (rows,), generator=generator)]
    logits = torch.randn(rows, 5, generator=generator)
    logits[torch.arange(rows), labels] += 1
    return logits, labels


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("present", [(0, 1, 2, 3, 4), (0, 2, 4), (3,)])
def test_against_scikit_learn(seed: int, present: tuple[int, ...]) -> None:
    logits, labels = answers(seed, present)
    predicted = logits.argmax(1)
    confusion = confusion_matrix(predicted, labels, 5)
    assert np.array_equal(
        confusion.numpy(), reference.confusion_matrix(labels, predicted, labels=range(5))
    )
    f1 = reference.f1_score(
        labels, predicted, labels=np.unique(labels), average="macro", zero_division=0
    )
    assert macro_f1(confusion) == pytest.approx(f1, rel=1e-12)
    recalls = reference.recall_score(labels, predicted, labels=present, average=None)
    assert class_accuracies(confusion) == pytest.approx(
        dict(zip(present, recalls, strict=True)), rel=1e-12
    )
    result = measure(logits, labels, NAMES, {})
    assert result["images"] == 200
    assert result["accuracy"] == pytest.approx(
        reference.accuracy_score(labels, predicted), rel=1e-12
    )
    assert result["macro_f1"] == pytest.approx(f1, rel=1e-12)
    assert result["per_class"] == pytest.approx(
        {NAMES[label]: recall for label, recall in zip(present, recalls, strict=True)}, rel=1e-12
    )


def one_hot(predicted: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), 5).float()


def test_written_out() -> None:
    """boot 2 of 4, shirt 2 of 2, coat 0 of 1, bag 3 of 4; no hat, although one is predicted."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    logits = one_hot([0, 0, 1, 4, 1, 1, 3, 3, 3, 3, 0])
    groups = {"many": [0, 3], "medium": [1, 4], "few": [2]}
    result = measure(logits, labels, NAMES, groups, worst_k=(1, 2, 4))
    assert result.pop("calibration_error") == pytest.approx(
        abs(7 / 11 - np.e / (np.e + 4))
    )  # all in one bin
    assert result.pop("per_class") == {"boot": 0.5, "shirt": 1.0, "coat": 0.0, "bag": 0.75}
    assert result == pytest.approx(
        {
            "images": 11,
            "accuracy": 7 / 11,
            "macro_f1": (4 / 7 + 4 / 5 + 0 + 6 / 8) / 4,
            "many": (2 / 4 + 3 / 4) / 2,
            "medium": 1.0,
            "few": 0.0,
            "worst_1": 0.0,
            "worst_2": (0 + 1 / 2) / 2,
            "worst_4": (0 + 1 / 2 + 3 / 4 + 1) / 4,
        }
    )


def test_what_has_no_image_is_absent() -> None:
    labels = torch.tensor([0, 0, 1])
    result = measure(
        one_hot([0, 1, 1]),
        labels,
        NAMES,
        {"many": [0, 1], "medium": [2, 3], "few": []},
        worst_k=(1, 3),
    )
    assert set(result) == {
        "images",
        "accuracy",
        "macro_f1",
        "calibration_error",
        "many",
        "worst_1",
        "per_class",
    }
    assert set(result["per_class"]) == {"boot", "shirt"}


def test_probabilities_are_those_of_numpy_in_double() -> None:
    logits, _ = answers(0)
    exact = np.exp(logits.double().numpy())
    probabilities = softmax_rows(logits)
    assert probabilities.dtype == torch.float64
    np.testing.assert_allclose(
        probabilities.numpy(), exact / exact.sum(1, keepdims=True), rtol=1e-12
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
def test_calibration_error_bin_by_bin(seed: int, scale: float) -> None:
    logits, labels = answers(seed, rows=500)
    confidence, predicted = (each.numpy() for each in softmax_rows(scale * logits).max(1))
    right, place = predicted == labels.numpy(), np.minimum((15 * confidence).astype(int), 14)
    gaps = [
        abs(right[place == each].mean() - confidence[place == each].mean()) * (place == each).sum()
        for each in set(place.tolist())
    ]
    assert calibration_error(scale * logits, labels) == pytest.approx(sum(gaps) / 500, abs=1e-6)


def test_calibration_error_written_out() -> None:
    """Confidence .9 in 4 images, 3 correct, and .6 in 2, both correct: (4 · .15 + 2 · .4) / 6."""
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.6, 0.6], dtype=torch.float64)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    assert calibration_error(logits, torch.tensor([0, 0, 0, 1, 0, 0])) == pytest.approx(
        (4 * 0.15 + 2 * 0.4) / 6
    )


def test_a_certain_classifier_lies_in_the_last_bin() -> None:
    assert calibration_error(torch.tensor([[1000.0, 0.0]]), torch.tensor([0])) == 0
    assert calibration_error(torch.tensor([[1000.0, 0.0]]), torch.tensor([1])) == 1


def test_domains_against_scikit_learn() -> None:
    logits, labels = answers(1)
    domains = [f"camera {row % 3}" for row in range(150)] + ["night"] * 50
    result = measure(logits, labels, NAMES, {}, domains=domains)
    assert set(result["per_domain"]) == {"camera 0", "camera 1", "camera 2", "night"}
    for domain, found in result["per_domain"].items():
        here = [row for row, name in enumerate(domains) if name == domain]
        true, predicted = labels[here], logits[here].argmax(1)
        f1 = reference.f1_score(
            true, predicted, labels=np.unique(true), average="macro", zero_division=0
        )
        assert found == {
            "images": len(here),
            "accuracy": pytest.approx(reference.accuracy_score(true, predicted)),
            "macro_f1": pytest.approx(f1),
        }
    assert result["worst_domain_accuracy"] == min(
        each["accuracy"] for each in result["per_domain"].values()
    )
    assert result["worst_domain_macro_f1"] == min(
        each["macro_f1"] for each in result["per_domain"].values()
    )
    assert "per_domain" not in measure(logits, labels, NAMES, {})


def test_against_wilds() -> None:
    wilds = pytest.importorskip("wilds.common.metrics.all_metrics")
    logits, labels = answers(2, (0, 2, 4))
    predicted = logits.argmax(1)
    expected = wilds.F1(average="macro").compute(predicted, labels)["F1-macro_all"]
    assert macro_f1(confusion_matrix(predicted, labels, 5)) == pytest.approx(expected)


def test_true_class_probability() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.8], [0.5, 0.5]]))
    assert true_class_probability(logits, np.array([1, 0])) == pytest.approx([0.8, 0.5])
