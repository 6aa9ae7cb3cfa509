"""Probabilities by which other loops measure progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..training.objectives import widest

Probability = Callable[[nn.Module, Any], Tensor]
"""True-class probabilities `[batch]` of a loader's batch, by a model in evaluation mode."""


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Computes in float32 with a model of float32 weights, also under autocast or accelerate.

    A probability changes less over a few steps than bfloat16 can resolve. A model with other
    weights is unchanged.
    """
    weights = [each for each in model.parameters() if each.is_floating_point()]
    if not weights or any(each.dtype not in {torch.float32, torch.float64} for each in weights):
        yield
        return
    # accelerate replaces forward by one under autocast, which would switch autocast on again
    wrapped = [each for each in model.modules() if "_original_forward" in vars(each)]
    forwards = [vars(each)["forward"] for each in wrapped]
    for each in wrapped:
        each.forward = vars(each)["_original_forward"]
    try:
        with torch.autocast(weights[0].device.type, enabled=False):
            yield
    finally:
        for each, forward in zip(wrapped, forwards, strict=True):
            each.forward = forward


def true_class_probability(model: nn.Module, batch: Any) -> Tensor:
    """Softmax of the model's logits at the true class, `[batch]` in [0, 1].

    - `batch`: `(images, labels, …)`, or a mapping with `labels` and the model's named inputs.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        inputs = {
            name: value.to(device)
            for name, value in batch.items()
            if name != "labels" and isinstance(value, Tensor)
        }
        labels, output = batch["labels"].to(device), model(**inputs)
    else:
        labels, output = batch[1].to(device), model(batch[0].to(device))
    logits = getattr(output, "logits", output)
    return torch.softmax(logits.to(widest(logits.device)), 1).gather(1, labels[:, None])[:, 0]
