"""What every objective promises, whatever it is: a new one is tested by being named in `OBJECTIVES`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from discl.curriculum.objectives import CORRECTED, OBJECTIVES

COUNTS = torch.tensor([500.0, 60.0, 7.0, 1.0], dtype=torch.float64)


@pytest.fixture(params=sorted(OBJECTIVES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def batch_of(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits `[12, 4]` and labels `[12]`, every class among them."""
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(12, 4, generator=generator), torch.arange(12) % 4


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_a_finite_scalar_of_the_type_of_the_logits(name: str, scale: float) -> None:
    logits, labels = batch_of(scale)
    loss = OBJECTIVES[name](logits, labels, COUNTS)
    assert loss.shape == ()
    assert loss.dtype == logits.dtype
    assert loss.isfinite()
    assert loss >= 0


def test_gradient_reaches_every_logit_and_sums_to_nothing(name: str) -> None:
    """Adding a constant to all logits of an image changes no probability, so each row of the gradient sums to 0."""
    logits, labels = batch_of()
    logits.requires_grad_()
    OBJECTIVES[name](logits, labels, COUNTS).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad != 0).all()
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(12), atol=1e-7, rtol=0)


def test_order_of_the_batch_does_not_matter(name: str) -> None:
    logits, labels = batch_of()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = logits[order].requires_grad_()
    logits.requires_grad_()
    loss, loss_shuffled = OBJECTIVES[name](logits, labels, COUNTS), OBJECTIVES[name](shuffled, labels[order], COUNTS)
    torch.testing.assert_close(loss, loss_shuffled)
    loss.backward()
    loss_shuffled.backward()
    assert logits.grad is not None and shuffled.grad is not None
    torch.testing.assert_close(logits.grad[order], shuffled.grad)


def test_names_of_the_classes_do_not_matter(name: str) -> None:
    logits, labels = batch_of()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        OBJECTIVES[name](logits, labels, COUNTS), OBJECTIVES[name](logits[:, order], order.argsort()[labels], COUNTS[order])
    )


def test_cross_entropy_where_all_classes_are_equally_large(name: str) -> None:
    logits, labels = batch_of()
    for count in (1.0, 500.0):
        torch.testing.assert_close(OBJECTIVES[name](logits, labels, torch.full((4,), count)), F.cross_entropy(logits, labels))


def test_corrected_ones_are_those_that_use_the_counts(name: str) -> None:
    logits, labels = batch_of()
    differs = not torch.equal(OBJECTIVES[name](logits, labels, COUNTS), F.cross_entropy(logits, labels))
    assert differs == (name in CORRECTED)
