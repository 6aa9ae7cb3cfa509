"""Probabilities by which other loops measure progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..training.objectives import widest

Probability = Callable[[nn.Module, Any], Tensor]
"""True-class probabilities `[batch]` of a batch as the loader gives it, by a model in evaluation
mode."""


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Computation in float32, for a model of float32 weights: under autocast, or prepared for mixed
    precision by accelerate.

    The change of a probability over a few steps is smaller than what bfloat16 can tell apart. A
    model of other weights stays as it is.
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
    """Softmax of the model's logits at the true class, `[batch]`.

    A batch is `(images, labels, …)`, or a mapping with `labels` of which the rest goes to the model
    by name.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        inputs = {
            name: value.to(device)
            for name, value in batch.items()
            if name != "labels" and isinstance(value, Tensor)
        }
        labels, answered = batch["labels"].to(device), model(**inputs)
    else:
        labels, answered = batch[1].to(device), model(batch[0].to(device))
    logits = getattr(answered, "logits", answered)
    return torch.softmax(logits.to(widest(logits.device)), 1).gather(1, labels[:, None])[:, 0]
