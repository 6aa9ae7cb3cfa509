"""Losses and logit adjustment against numpy, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from discl.curriculum.objectives import CORRECTED, OBJECTIVES, adjust_logits, balanced_softmax, cross_entropy

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [-3.0, 1.0, 4.0], [1.0, 1.5, -0.5]])
LABELS = np.array([0, 2, 1, 2])
COUNTS = np.array([500.0, 20.0, 1.0])


def test_cross_entropy_by_hand() -> None:
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    expected = -np.log(shares[np.arange(4), LABELS]).mean()
    got = cross_entropy(torch.from_numpy(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(COUNTS))
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_balanced_softmax_by_hand() -> None:
    """−log n_y exp(z_y) / Σ n_c exp(z_c), which is eq. 4 of arXiv 2007.10740."""
    weighted = COUNTS * np.exp(LOGITS)
    expected = -np.log(weighted[np.arange(4), LABELS] / weighted.sum(1)).mean()
    got = balanced_softmax(torch.from_numpy(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(COUNTS))
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_balanced_softmax_of_one_image() -> None:
    """Counts 3 : 1 and equal logits: the rare class has probability 1/4, so its loss is log 4."""
    got = balanced_softmax(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([3.0, 1.0]))
    assert got.item() == pytest.approx(np.log(4), rel=1e-6)


def test_balanced_softmax_takes_counts_of_another_type_than_the_logits() -> None:
    logits, labels = torch.from_numpy(LOGITS).float(), torch.from_numpy(LABELS)
    doubles = balanced_softmax(logits, labels, torch.from_numpy(COUNTS))
    assert doubles.dtype == torch.float32
    assert torch.equal(doubles, balanced_softmax(logits, labels, torch.from_numpy(COUNTS).float()))


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_adjusted_logits_by_hand(tau: float) -> None:
    """z_c − τ log(n_c / N), eq. 9 of arXiv 2007.07314."""
    got = adjust_logits(torch.from_numpy(LOGITS), torch.from_numpy(COUNTS), tau).numpy()
    np.testing.assert_allclose(got, LOGITS - tau * np.log(COUNTS / 521), rtol=1e-12)


def test_no_strength_changes_nothing() -> None:
    logits = torch.from_numpy(LOGITS)
    assert torch.equal(adjust_logits(logits, torch.from_numpy(COUNTS), 0.0), logits)


def test_adjustment_lifts_rare_classes_and_takes_whole_counts() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0]])
    assert adjust_logits(logits, torch.tensor([500, 20, 1])).argmax(1).item() == 2
    assert adjust_logits(logits, torch.tensor([7, 7, 7])).argmax(1).item() == 0
    assert adjust_logits(logits, torch.tensor([500, 20, 1])).dtype == torch.float32


def test_balanced_softmax_is_cross_entropy_of_logits_adjusted_the_other_way() -> None:
    logits, labels, counts = torch.from_numpy(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(COUNTS)
    torch.testing.assert_close(balanced_softmax(logits, labels, counts), F.cross_entropy(adjust_logits(logits, counts, -1.0), labels))


def test_every_corrected_objective_is_known() -> None:
    assert set(OBJECTIVES) >= CORRECTED
