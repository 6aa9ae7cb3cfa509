"""The gradient step: parts of a batch, the moving average, mixed images, frozen parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from discl.baselines.docl import Docl, Dynamics
from discl.curriculum.schedule import Finish
from discl.errors import TrainingError
from discl.models.classifier import ClassifierConfig
from discl.training.hooks import TrainingHook
from discl.training.objectives import make_objective
from discl.training.optim import ema_decay, make_optimizer
from discl.training.step import EpochPart, StepConfig, TrainState

CONFIG = ClassifierConfig("none", "", 0, ("a", "b", "c"), 8, 8, (0.5,) * 3, (0.25,) * 3)
LABELS = np.arange(12) % 3


class Flat(nn.Module):
    """A linear classifier of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


class Noise:
    memory = torch.randint(
        0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    def __len__(self) -> int:
        return 12

    def __getitems__(self, rows: list[int]) -> torch.Tensor:
        return self.memory[torch.as_tensor(rows)]


def trained(
    steps: StepConfig,
    rows: list[int],
    batch_size: int,
    objective: Any = "cross-entropy",
    hook: TrainingHook | None = None,
    synthetic: np.ndarray | None = None,
    rate: float = 0.1,
    finish: Finish | None = None,
    counts: tuple[int, ...] = (4, 4, 4),
) -> TrainState:
    torch.manual_seed(0)
    sgd = partial(
        make_optimizer, name="sgd", lr=0.1, weight_decay=0.0, momentum=0.0, nesterov=False
    )
    state = TrainState(
        Flat(),
        sgd,
        objective=make_objective(objective),
        class_counts=np.array(counts),
        config=CONFIG,
        steps=steps,
        augment=(),
        precision=torch.float32,
        device="cpu",
        hook=hook,
        finish=finish,
    )
    loader = state.loader(Noise(), batch_size, 0)  # type: ignore[arg-type]
    part = EpochPart(
        np.array(rows), 0, epochs=1, batch_size=batch_size, seed=0, synthetic=synthetic
    )
    state.train_epoch(loader, part, LABELS, lambda progress: rate, Path("nowhere"))
    return state


@pytest.mark.parametrize("objective", ["cross-entropy", "focal", "logit-adjusted"])
def test_parts_of_a_batch_add_up_to_it(objective: str) -> None:
    rows = list(range(12))
    whole = trained(StepConfig(), rows, 6, objective).model.state_dict()
    parts = trained(StepConfig(accumulate=3), rows, 6, objective).model.state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor)
    torch.manual_seed(0)
    assert not torch.equal(whole["head.weight"], Flat().state_dict()["head.weight"]), (
        "training that moves nothing would compare nothing"
    )
    with pytest.raises(TrainingError, match="batch_size: 6 cannot be divided evenly into 4 parts"):
        trained(StepConfig(accumulate=4), rows, 6)


@pytest.mark.parametrize("weight", [(1.0, 1.0), (0.25, 0.25), (1.0, 0.0)])
def test_weights_of_synthetic_images_in_one_batch_and_in_parts(weight: tuple[float, float]) -> None:
    """Two steps of 6: a weight that falls from 1 to 0 is .5 in the second."""
    rows, synthetic = list(range(12)), np.arange(len(LABELS)) % 3 == 1
    plain = trained(StepConfig(), rows, 6).model.state_dict()
    steps = StepConfig(synthetic_weight=weight)
    whole = trained(steps, rows, 6, synthetic=synthetic).model.state_dict()
    parts = trained(replace(steps, accumulate=3), rows, 6, synthetic=synthetic).model.state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor)
        assert torch.allclose(tensor, plain[name]) == (weight == (1.0, 1.0))


def test_mixed_images_have_the_weights_of_both() -> None:
    rows, steps = list(range(12)), StepConfig(mixup=0.4)
    plain = trained(steps, rows, 6).model.state_dict()
    even = trained(
        replace(steps, synthetic_weight=0.5), rows, 6, synthetic=np.ones(len(LABELS), bool)
    )
    half = trained(steps, rows, 6, rate=0.05).model.state_dict()
    for name, tensor in even.model.state_dict().items():
        torch.testing.assert_close(tensor, half[name])
        assert not torch.allclose(tensor, plain[name])


def test_the_prior_of_classes_drawn_evenly_is_even() -> None:
    """Balanced softmax is then cross-entropy."""
    rows, finish = list(range(12)), Finish(0, head_only=True)
    weights = [
        trained(StepConfig(), rows, 6, name, finish=each, counts=(9, 1, 1)).model.state_dict()
        for name, each in (
            ("cross-entropy", finish),
            ("balanced-softmax", finish),
            ("balanced-softmax", None),
        )
    ]
    torch.testing.assert_close(weights[0]["head.weight"], weights[1]["head.weight"])
    assert not torch.allclose(weights[2]["head.weight"], weights[1]["head.weight"])


@pytest.mark.parametrize("parts", [1, 3])
def test_dynamics_count_a_step_once_however_many_parts_it_has(parts: int) -> None:
    docl = Docl()
    docl.dynamics = Dynamics.start(12, 3)
    trained(StepConfig(accumulate=parts), [*range(12), *range(12)], 6, hook=docl)
    assert docl.dynamics.rate_sum == pytest.approx(4 * 0.1)
    np.testing.assert_allclose(
        docl.dynamics.rate, [0.2] * 6 + [0.3] * 6
    )  # summed before each row's last visit


def test_moving_average_by_hand_and_evaluated() -> None:
    """Decays of the first steps are (1 + t)/(10 + t): .1 and 2/11, both below .9."""
    torch.manual_seed(0)
    start = Flat().state_dict()["head.weight"]
    first = trained(StepConfig(), list(range(6)), 6).model.state_dict()["head.weight"]
    state = trained(StepConfig(ema=0.9), list(range(12)), 6)
    last = state.model.state_dict()["head.weight"]
    expected = 0.1 * start + 0.9 * first
    expected = 2 / 11 * expected + 9 / 11 * last
    torch.testing.assert_close(state.evaluated.state_dict()["head.weight"], expected)
    assert ema_decay(0.9, 10**6) == 0.9
    assert ema_decay(0.05, 0) == 0.05


def test_state_goes_to_another_state_and_to_no_other_kind() -> None:
    state, other = (
        trained(StepConfig(ema=0.9), list(range(12)), 6),
        trained(StepConfig(ema=0.9), [0] * 6, 6),
    )
    other.load_state_dict(state.state_dict())
    assert all(
        torch.equal(tensor, state.state_dict()[name]) for name, tensor in other.state_dict().items()
    )
    with pytest.raises((KeyError, RuntimeError)):
        other.load_state_dict(trained(StepConfig(), list(range(6)), 6).state_dict())


def test_a_mixed_loss_is_that_of_two_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    from discl.training import step as module

    order = torch.tensor([1, 2, 3, 4, 5, 0])
    monkeypatch.setattr(module, "mix_images", lambda images, mixup, cutmix: (images, order, 0.75))
    steps = StepConfig(mixup=0.2)
    state = trained(steps, [0] * 6, 6)
    labels = torch.arange(6) % 3
    loss = state._loss(Noise.memory[:6], np.arange(6), labels, 0.0, 0.1)
    logits = state.model(((Noise.memory[:6].float() / 255) - 0.5) / 0.25)
    expected = 0.75 * F.cross_entropy(logits, labels) + 0.25 * F.cross_entropy(
        logits, labels[order]
    )
    torch.testing.assert_close(loss, expected)
