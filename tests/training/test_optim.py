"""Optimizers and learning rates, beside torch's and written out."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from discl.training.optim import make_learning_rate, make_optimizer, two_phases


def rates(epochs: int, **arguments: Any) -> list[float]:
    rate = make_learning_rate(1.0, arguments.pop("schedule"), epochs, **arguments)
    return [rate(epoch / epochs) for epoch in range(epochs)]


def test_learning_rates_written_out() -> None:
    half = math.sqrt(0.5)
    assert rates(4, schedule="constant") == [1, 1, 1, 1]
    assert rates(4, schedule="cosine") == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert make_learning_rate(0.1, "cosine", 4)(1.0) == pytest.approx(0)
    assert rates(10, schedule="steps", milestones=(0.8, 0.9)) == pytest.approx(
        [1] * 8 + [0.01, 0.0001]
    )
    assert rates(10, schedule="steps", milestones=(0.8, 0.9), factor=0.1) == pytest.approx(
        [1] * 8 + [0.1, 0.01]
    )
    assert rates(5, schedule="constant", warm_up_epochs=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates(6, schedule="cosine", warm_up_epochs=2) == pytest.approx(
        [1 / 3, 2 / 3, 1, (1 + half) / 2, 0.5, (1 - half) / 2]
    )
    assert rates(10, schedule="steps", milestones=(0.8,), warm_up_epochs=1) == pytest.approx(
        [0.5] + [1] * 7 + [0.01] * 2
    )


def test_learning_rate_is_a_fraction_of_its_peak_and_smooth() -> None:
    rate = make_learning_rate(0.3, "cosine", 20, 4)
    values = [rate(step / 2000) for step in range(2001)]
    assert max(values) == pytest.approx(0.3)
    assert min(values) >= 0
    assert max(abs(after - before) for before, after in pairwise(values)) < 0.3 / 100


def test_cosine_agrees_with_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rate = make_learning_rate(0.1, "cosine", 30)
    assert [rate(epoch / 30) for epoch in range(30)] == pytest.approx(expected)


def test_warm_up_in_steps_is_that_of_open_clip() -> None:
    """5 steps of 4 an epoch: (i + 1)/5 of the peak, then a cosine from step 5 on."""
    rate = make_learning_rate(1.0, "cosine", 3, 5 / 4, warm_up_steps=5)
    assert [rate(step / 12) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate(5 / 12) == pytest.approx(1.0)
    assert rate(1.0) == pytest.approx(0.0)


def test_two_phases_each_over_its_own_part() -> None:
    rate = two_phases(lambda progress: progress, lambda progress: 10 + progress, 0.25)
    assert [rate(progress) for progress in (0.0, 0.125, 0.25, 0.625, 1.0)] == pytest.approx(
        [0.0, 0.5, 10.0, 10.5, 11.0]
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_optimizers_are_those_of_torch(name: str, kind: type[torch.optim.Optimizer]) -> None:
    settings: dict[str, Any] = {"lr": 0.05, "weight_decay": 5e-4}
    momentum = {"momentum": 0.9, "nesterov": True}
    made = make_optimizer(nn.Linear(2, 2), name=name, **settings, **momentum)
    (group,) = made.param_groups
    assert type(made) is kind and len(group["params"]) == 2
    for key, value in {**settings, **(momentum if name == "sgd" else {})}.items():
        assert group[key] == value
