"""Optimizers, learning rates, moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def make_learning_rate(
    peak: float,
    schedule: str,
    epochs: float,
    warm_up_epochs: float = 0,
    *,
    milestones: Sequence[float] = (),
    warm_up_steps: float = 0,
    factor: float = 0.01,
) -> Callable[[float], float]:
    """Returns the learning rate as a function of progress in [0, 1].

    - `schedule`: after a linear warm-up, `cosine` to 0, `constant`, or `steps`.
    - `warm_up_epochs`: the warm-up starts at peak / (epochs + 1).
    - `warm_up_steps`: the warm-up in steps; step i has (i + 1) / steps of the peak. An epoch has
      `warm_up_steps / warm_up_epochs` of them.
    - `milestones`: progress at which `steps` multiplies the rate by `factor`.
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
    first: Callable[[float], float], second: Callable[[float], float], fraction: float
) -> Callable[[float], float]:
    """Returns one rate for the first `fraction` of progress, and another for the rest.

    Each is stretched over its own part.
    """
    return lambda progress: (
        first(progress / fraction)
        if progress < fraction
        else second((progress - fraction) / (1 - fraction) if fraction < 1 else 1.0)
    )


def make_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    decay_vectors: bool = True,
) -> torch.optim.Optimizer:
    """Returns torch's optimizer of that name (`sgd`, `adam`, `adamw`) over all parameters.

    - `decay_vectors`: whether parameters of fewer than two dimensions (norms, biases, CLIP's scale)
      get weight decay; in open_clip they get none.
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
    """Returns the decay after t steps, min(decay, (1 + t)/(10 + t)), so that the initial weights
    fade quickly."""
    return min(decay, (1 + taken) / (10 + taken))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves an average of weights, in place, to decay · average + (1 − decay) · model.

    Counters are copied.
    """
    means, weights = average.state_dict(), model.state_dict()
    for mean, now in zip(means.values(), weights.values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)
