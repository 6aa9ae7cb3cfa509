"""LDMLR: the schedule, the number of features, and features near the centres of classes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from discl.baselines import ldmlr
from discl.baselines.ldmlr import (
    DIFFUSION_RATES,
    Ldmlr,
    cosine_alphas,
    features_to_make,
    sample_features,
    standardise,
    train_denoiser,
    train_last_layer,
)
from discl.training.objectives import make_objective


def test_cosine_schedule():
    alphas = cosine_alphas(1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500)]
    assert alphas[499].item() == pytest.approx(f[1] / f[0])
    assert (alphas.diff() < 0).all() and 0 < alphas[-1] < 1e-3


def test_features_to_make():
    assert features_to_make([500, 100, 24, 23, 5]).tolist() == [100, 20, 5, 5, 5]
    assert features_to_make([500, 53], only=[1]).tolist() == [0, 11]  # .2 · 53 = 10.6
    assert features_to_make([500, 0]).tolist() == [100, 0]


def test_features_for_chosen_groups_only():
    counts = np.asarray([500, 100, 20, 19, 0])
    assert Ldmlr(only="few").features(counts).tolist() == [0, 0, 0, 5, 0]
    assert Ldmlr(only=["many", "medium"]).features(counts).tolist() == [100, 20, 5, 0, 0]
    assert Ldmlr(only=["few"], few=30).features(counts).tolist() == [0, 0, 5, 5, 0]
    assert Ldmlr().features(counts).tolist() == [100, 20, 5, 5, 0]
    with pytest.raises(
        ValueError,
        match=r"unknown group of classes 'fwe'; known: few, many, medium\. Did you mean 'few'\?",
    ):
        Ldmlr(only=["fwe"])


class Says(nn.Module):
    """A denoiser that predicts a constant x0 or a fraction of its input, and records its inputs."""

    def __init__(self, answer: torch.Tensor | float) -> None:
        super().__init__()
        self.answer = answer
        self.inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(
        self, noisy: torch.Tensor, times: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        self.inputs.append((noisy.clone(), times.clone()))
        return (
            self.answer * noisy if isinstance(self.answer, float) else self.answer.expand_as(noisy)
        )


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_a_denoiser_that_always_predicts_c_samples_exactly_c(steps):
    """The denoiser's output is x0 itself, neither noise nor velocity."""
    c = torch.tensor([0.3, -2.5, 7.0])
    model = Says(c)
    assert torch.equal(
        sample_features(model, torch.tensor([0, 1, 1]), 3, steps=steps), c.expand(3, 3)
    )
    assert len(model.inputs) == steps


def test_one_ddim_step_by_hand():
    """x0 = x / 2 at t = 999; ε = (x − √ā x0) / √(1 − ā); next √ā' x0 + √(1 − ā') ε at t = 0."""
    model = Says(0.5)
    made = sample_features(model, torch.tensor([0]), 2, steps=2, seed=3)
    (start, first), (following, second) = model.inputs
    assert (first.tolist(), second.tolist()) == ([999], [0])
    assert torch.equal(start, torch.randn(1, 2, generator=torch.Generator().manual_seed(3)))
    at, below = (float(cosine_alphas()[time]) for time in (999, 0))
    for component in range(2):
        x = start[0, component].item()
        noise = (x - math.sqrt(at) * 0.5 * x) / math.sqrt(1 - at)
        expected = math.sqrt(below) * 0.5 * x + math.sqrt(1 - below) * noise
        assert following[0, component].item() == pytest.approx(expected, rel=1e-5)
        assert made[0, component].item() == pytest.approx(0.5 * expected, rel=1e-5)


@pytest.mark.slow
def test_training_makes_it_predict_x0():
    """Of features that are all the same, x0 is known at every time, and noise at none."""
    features, labels = torch.tensor([[1.5, -2.0]]).repeat(64, 1), torch.zeros(64, dtype=torch.long)
    model = train_denoiser(features, labels, 1, epochs=60, batch_size=16)
    noise = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))
    for time in (0, 500, 999):
        alpha = cosine_alphas()[time].float()
        answer = model(
            alpha.sqrt() * features[:32] + (1 - alpha).sqrt() * noise,
            torch.full((32,), time),
            labels[:32],
        )
        assert (answer - features[:32]).abs().max() < 0.3


@pytest.mark.parametrize(
    ("optimizer", "lr", "rate"), [("adam", None, 1e-3), ("sgd", None, 1e-4), ("sgd", 0.2, 0.2)]
)
def test_the_denoisers_optimizer_is_chosen(optimizer, lr, rate, monkeypatch):
    used: list[tuple[str, float]] = []
    for name in ("Adam", "SGD"):
        whole = getattr(torch.optim, name)

        def make(parameters, lr, name=name, whole=whole):
            used.append((name.lower(), lr))
            return whole(parameters, lr=lr)

        monkeypatch.setattr(torch.optim, name, make)
    train_denoiser(torch.eye(2), torch.arange(2), 2, epochs=1, optimizer=optimizer, lr=lr)
    assert used == [(optimizer, rate)]
    assert DIFFUSION_RATES == {"adam": 1e-3, "sgd": 1e-4}
    with pytest.raises(
        ValueError,
        match=r"unknown diffusion_optimizer 'sdg'; known: adam, sgd\. Did you mean 'sgd'\?",
    ):
        Ldmlr(diffusion_optimizer="sdg")


def test_standardise_keeps_what_lies_beyond_one():
    features = torch.tensor([[0.0, 7.0], [10.0, 7.0], [2.0, 7.0]])
    scaled, mean, std = standardise(features)
    assert mean.tolist() == [4, 7] and std[1] == 1
    assert torch.allclose(scaled * std + mean, features)
    assert scaled.max() > 1


@pytest.mark.slow
def test_diffusion_learns_where_each_class_lies():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat(200)
    centres = torch.tensor([[1.5, -1.0, 0.0], [-1.5, 1.0, 0.0]])
    features = centres[labels] + 0.1 * torch.randn(400, 3, generator=generator)
    scaled, mean, std = standardise(features)
    losses: list[float] = []
    model = train_denoiser(scaled, labels, 2, epochs=40, batch_size=64, on_epoch=losses.append)
    made = sample_features(model, torch.tensor([0] * 50 + [1] * 50), 3) * std + mean
    assert losses[-1] < losses[0] / 2
    for label in range(2):
        part = made[label * 50 : label * 50 + 50]
        assert (part.mean(0) - centres[label]).abs().max() < 0.25
    assert np.array_equal(
        made, sample_features(model, torch.tensor([0] * 50 + [1] * 50), 3) * std + mean
    )


def test_training_does_not_touch_the_random_state_of_others():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_denoiser(
        torch.randn(8, 2, generator=torch.Generator().manual_seed(1)),
        torch.zeros(8, dtype=torch.long),
        1,
        epochs=1,
    )
    assert torch.equal(torch.rand(3), expected)


def test_last_layer_learns():
    features = torch.eye(3).repeat(20, 1)
    labels = torch.arange(3).repeat(20)
    layer = nn.Linear(3, 3)
    train_last_layer(layer, features, labels, epochs=200, lr=0.05)
    assert (layer(features).argmax(1) == labels).all()


def test_the_last_layer_is_trained_with_the_methods_loss(monkeypatch):
    """Balanced Softmax takes the counts of real and generated features together."""
    labels = np.repeat([0, 1], [30, 3])
    pool = SimpleNamespace(
        labels=labels, synthetic=np.zeros(33, bool), held_out=np.zeros(33, bool), num_classes=2
    )
    model = torch.nn.Module()
    model.head = torch.nn.Linear(4, 2)
    state = SimpleNamespace(
        objective=make_objective("balanced-softmax"),
        counts=torch.tensor([30.0, 3.0], dtype=torch.float64),
    )
    caught = []
    monkeypatch.setattr(
        ldmlr, "read_features", lambda context, model, layer, rows: torch.randn(len(rows), 4)
    )
    monkeypatch.setattr(
        ldmlr, "train_last_layer", lambda *args, **kwargs: caught.append(kwargs["loss"])
    )
    shown = Ldmlr(diffusion_epochs=1).finish(SimpleNamespace(pool=pool, state=state, seed=0), model)
    assert shown.tolist() == [36, 8]
    logits, seen = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(
        caught[0](logits, seen), F.cross_entropy(logits + torch.tensor([36.0, 8.0]).log(), seen)
    )
