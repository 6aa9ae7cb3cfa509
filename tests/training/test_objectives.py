"""Losses and logit adjustment against numpy, by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from discl.errors import RecipeError
from discl.training.objectives import (
    CORRECTED,
    OBJECTIVES,
    adjust_logits,
    balanced_softmax,
    class_weights,
    contrastive,
    cross_entropy,
    focal,
    ldam,
    logit_adjusted,
    make_objective,
    normalise_head,
    weighted_loss,
    widest,
)

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [-3.0, 1.0, 4.0], [1.0, 1.5, -0.5]])
LABELS = np.array([0, 2, 1, 2])
COUNTS = np.array([500.0, 20.0, 1.0])


def test_cross_entropy_by_hand() -> None:
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    expected = -np.log(shares[np.arange(4), LABELS]).mean()
    got = cross_entropy(
        torch.from_numpy(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(COUNTS)
    )
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_balanced_softmax_by_hand() -> None:
    """−log n_y exp(z_y) / Σ n_c exp(z_c), which is eq. 4 of arXiv 2007.10740."""
    weighted = COUNTS * np.exp(LOGITS)
    expected = -np.log(weighted[np.arange(4), LABELS] / weighted.sum(1)).mean()
    got = balanced_softmax(
        torch.from_numpy(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(COUNTS)
    )
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
    logits, labels, counts = (
        torch.from_numpy(LOGITS),
        torch.from_numpy(LABELS),
        torch.from_numpy(COUNTS),
    )
    torch.testing.assert_close(
        balanced_softmax(logits, labels, counts),
        F.cross_entropy(adjust_logits(logits, counts, -1.0), labels),
    )


def test_every_corrected_objective_is_known() -> None:
    assert set(OBJECTIVES) >= CORRECTED


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_logit_adjusted_by_hand(tau: float) -> None:
    """log(1 + Σ_{c≠y} (π_c / π_y)^τ exp(z_c − z_y)), which is eq. 10 of arXiv 2007.07314."""
    prior = COUNTS / COUNTS.sum()
    expected = np.mean(
        [
            np.log1p(
                sum((prior[c] / prior[y]) ** tau * np.exp(z[c] - z[y]) for c in range(3) if c != y)
            )
            for z, y in zip(LOGITS, LABELS, strict=True)
        ]
    )
    got = logit_adjusted(
        torch.from_numpy(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(COUNTS), tau=tau
    )
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_by_hand(gamma: float) -> None:
    shares = (np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True))[np.arange(4), LABELS]
    expected = (-((1 - shares) ** gamma) * np.log(shares)).mean()
    got = focal(
        torch.from_numpy(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(COUNTS), gamma=gamma
    )
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_focal_of_a_certain_image_has_a_finite_gradient() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    focal(logits, torch.tensor([0]), torch.ones(2), gamma=0.5).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_ldam_by_hand_before_and_after_the_reweighting() -> None:
    """Margins .5 · (1/n_c)^¼, scale 30; weights (1 − β)/(1 − β^n) from 80 % of the epochs on."""
    cosines = np.tanh(LOGITS)
    moved = cosines.copy()
    moved[np.arange(4), LABELS] -= 0.5 * COUNTS[LABELS] ** -0.25
    shares = np.exp(30 * moved) / np.exp(30 * moved).sum(1, keepdims=True)
    losses = -np.log(shares[np.arange(4), LABELS])
    weights = (1 - 0.9999) / (1 - 0.9999**COUNTS)
    weights = weights * COUNTS.sum() / (weights * COUNTS).sum()
    arguments = torch.from_numpy(cosines), torch.from_numpy(LABELS), torch.from_numpy(COUNTS)
    assert ldam(*arguments, progress=0.79).item() == pytest.approx(losses.mean(), rel=1e-9)
    assert ldam(*arguments, progress=0.8).item() == pytest.approx(
        (weights[LABELS] * losses).mean(), rel=1e-9
    )
    assert make_objective("ldam").loss(*arguments, 0.9).item() == pytest.approx(
        (weights[LABELS] * losses).mean(), rel=1e-9
    )
    np.testing.assert_allclose(
        class_weights(torch.from_numpy(COUNTS), 0.9999).numpy(), weights, rtol=1e-9
    )
    assert class_weights(torch.from_numpy(COUNTS), 0.0).tolist() == [1.0, 1.0, 1.0]


def test_contrastive_by_hand() -> None:
    """Two pairs: cosines 1, .6 / 0, .8 times 2; both directions, by numpy."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    z = 2 * np.array([[1.0, 0.6], [0.0, 0.8]])
    rows, columns = np.log(np.exp(z).sum(1)), np.log(np.exp(z).sum(0))
    pairs = ((rows - z.diagonal()) + (columns - z.diagonal())) / 2
    scale = torch.tensor(2.0)
    assert contrastive(images, texts, scale).item() == pytest.approx(pairs.mean(), rel=1e-6)
    weighted = contrastive(images, texts, scale, torch.tensor([1.0, 0.25]))
    assert weighted.item() == pytest.approx((pairs[0] + pairs[1] / 4) / 2, rel=1e-6)


@pytest.mark.parametrize("name", ["cross-entropy", "ldam"])
def test_weighted_losses_add_up(name: str) -> None:
    """Against the losses of single images."""
    logits, labels, counts = map(torch.from_numpy, (LOGITS, LABELS, COUNTS))
    weights = np.array([1.0, 0.3, 1.0, 0.0])
    loss = partial(make_objective(name).loss, class_counts=counts, progress=0.9)
    singles = [loss(logits[[row]], labels[[row]]).item() for row in range(4)]
    expected = sum(weight * single for weight, single in zip(weights, singles, strict=True)) / 4
    got = weighted_loss(loss, logits, labels, weights)
    assert got.item() == pytest.approx(expected, rel=1e-9)


def test_a_normalised_head_by_hand() -> None:
    """Class vectors of lengths 5 and 2: τ = .5 divides their logits without bias by √5 and √2."""
    weight, bias = torch.tensor([[3.0, 4.0], [0.0, -2.0]]), torch.tensor([1.0, -1.0])
    features = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    logits = features @ weight.T + bias
    plain = np.array([[11.0, -4.0], [-1.0, -1.0]])
    for tau in (0.0, 0.5, 1.0):
        got = normalise_head(logits, weight, bias, tau).numpy()
        np.testing.assert_allclose(got, plain / np.array([5.0, 2.0]) ** tau, rtol=1e-6)
    np.testing.assert_allclose(normalise_head(features @ weight.T, weight, None, 0.0), plain)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("focul", "unknown objective 'focul'.*Did you mean 'focal'"),
        ({"gamma": 2}, "an objective is a name, or a mapping"),
        (3, "an objective is a name, or a mapping"),
        ({"name": "flyp", "gamma": 2}, "objective flyp has no parameter"),
        ({"name": "focal", "tau": 2}, "unknown parameter of objective focal 'tau'; known: gamma"),
    ],
)
def test_what_is_no_objective(asked: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_objective(asked)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no loss over logits"):
        make_objective("flyp").loss(torch.zeros(1, 2), torch.tensor([0]), torch.ones(2))


def test_numbers_are_as_wide_as_the_device_has_them() -> None:
    assert widest(torch.device("cpu")) == widest(torch.device("cuda")) == torch.float64
    assert widest(torch.device("mps")) == torch.float32
