"""Optimizers, learning rates, moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def make_learning_rate(
    peak: float, schedule: str, epochs: float, warm_up_epochs: float = 0, milestones: Sequence[float] = (), warm_up_steps: float = 0,
    factor: float = 0.01,
) -> Callable[[float], float]:  # fmt: skip
    """Learning rate over progress in [0, 1]: linear warm-up, then `cosine` to 0, `constant`, or `steps` (× `factor` after each milestone).

    Warm-up in epochs starts at peak / (epochs + 1); with `warm_up_steps` steps, of which an epoch has `warm_up_steps / warm_up_epochs`,
    step i has (i + 1) / steps of the peak.
    """
    warm_up = warm_up_epochs / epochs

    def rate(progress: float) -> float:
        if progress < warm_up:
            if warm_up_steps:
                return peak * min(1.0, progress / warm_up + 1 / warm_up_steps)
            return peak * (progress * epochs + 1) / (warm_up_epochs + 1)
        if schedule == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
        if schedule == "steps":
            return peak * factor ** sum(progress >= milestone for milestone in milestones)
        return peak

    return rate


def two_phases(
    first: Callable[[float], float], second: Callable[[float], float], share: float
) -> Callable[[float], float]:
    """The rate `first` over the first `share` of progress, then `second` over the rest, each stretched over its own part."""
    return lambda progress: (
        first(progress / share)
        if progress < share
        else second((progress - share) / (1 - share) if share < 1 else 1.0)
    )


def make_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    decay_vectors: bool = True,
) -> torch.optim.Optimizer:
    """The torch optimizer of that name over all parameters.

    Without `decay_vectors`, parameters of fewer than two dimensions (norms, biases, CLIP's scale) get no weight decay, as in open_clip.
    """
    parameters: Any = list(model.parameters())
    if not decay_vectors and weight_decay:
        parameters = [
            {"params": [each for each in model.parameters() if each.ndim >= 2]},
            {"params": [each for each in model.parameters() if each.ndim < 2], "weight_decay": 0.0},
        ]
        parameters = [group for group in parameters if group["params"]]
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov
        )
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=lr, weight_decay=weight_decay)


def ema_decay(decay: float, taken: int) -> float:
    """Decay after `taken` steps, min(decay, (1 + t)/(10 + t)): the first weights, which say little, are soon forgotten."""
    return min(decay, (1 + taken) / (10 + taken))
