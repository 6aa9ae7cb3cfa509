"""The contract of every objective in `OBJECTIVES`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from discl.errors import RecipeError
from discl.training.objectives import (
    BOUNDS,
    CORRECTED,
    OBJECTIVES,
    make_objective,
    parameters_of,
)

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
    """A constant added to an image's logits changes nothing, so gradients of a row sum to 0."""
    logits, labels = batch_of(0.1)  # as cosines are, which some losses enlarge
    logits.requires_grad_()
    OBJECTIVES[name](logits, labels, COUNTS).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad != 0).all()
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(12), atol=1e-6, rtol=0)


def test_order_of_the_batch_does_not_matter(name: str) -> None:
    logits, labels = batch_of()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = logits[order].requires_grad_()
    logits.requires_grad_()
    loss, loss_shuffled = (
        OBJECTIVES[name](logits, labels, COUNTS),
        OBJECTIVES[name](shuffled, labels[order], COUNTS),
    )
    torch.testing.assert_close(loss, loss_shuffled)
    loss.backward()
    loss_shuffled.backward()
    assert logits.grad is not None and shuffled.grad is not None
    torch.testing.assert_close(logits.grad[order], shuffled.grad)


def test_names_of_the_classes_do_not_matter(name: str) -> None:
    logits, labels = batch_of()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        OBJECTIVES[name](logits, labels, COUNTS),
        OBJECTIVES[name](logits[:, order], order.argsort()[labels], COUNTS[order]),
    )


def test_cross_entropy_where_all_classes_are_equally_large(name: str) -> None:
    """But for the two that change cross-entropy itself, whose parameters can turn that off."""
    parameters = {"focal": {"gamma": 0.0}, "ldam": {"max_margin": 0.0, "scale": 1.0}}.get(name, {})
    logits, labels = batch_of()
    for count in (1.0, 500.0):
        loss = OBJECTIVES[name](logits, labels, torch.full((4,), count), **parameters)
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


def test_corrected_ones_are_those_that_use_the_counts(name: str) -> None:
    logits, labels = batch_of()
    differs = not torch.equal(
        OBJECTIVES[name](logits, labels, COUNTS), OBJECTIVES[name](logits, labels, torch.ones(4))
    )
    assert differs == (name in CORRECTED)


def test_recipes_can_name_it_and_each_of_its_parameters(name: str) -> None:
    logits, labels = batch_of()
    assert torch.equal(
        make_objective(name).loss(logits, labels, COUNTS), OBJECTIVES[name](logits, labels, COUNTS)
    )
    for parameter in parameters_of(name):
        low, high = BOUNDS[parameter]
        for value in (low, high):
            assert (
                make_objective({"name": name, parameter: value})
                .loss(logits, labels, COUNTS, 1.0)
                .isfinite()
            )
        for value in (low - 1, high + 1, True, "1"):
            with pytest.raises(RecipeError, match=f"{name}: {parameter} is a number from"):
                make_objective({"name": name, parameter: value})
    with pytest.raises(RecipeError, match="gamme"):
        make_objective({"name": name, "gamme": 1})
