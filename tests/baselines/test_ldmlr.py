"""LDMLR: the schedule, the number of features, and that the diffusion learns where each class lies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from discl.baselines.ldmlr import cosine_alphas, features_to_make, sample_features, standardise, train_denoiser, train_last_layer


def test_cosine_schedule():
    alphas = cosine_alphas(1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500)]
    assert alphas[499].item() == pytest.approx(f[1] / f[0])
    assert (alphas.diff() < 0).all() and 0 < alphas[-1] < 1e-3


def test_features_to_make():
    assert features_to_make([500, 100, 24, 23, 5]).tolist() == [100, 20, 5, 5, 5]
    assert features_to_make([500, 53], only=[1]).tolist() == [0, 11]  # .2 · 53 = 10.6


def test_standardise_keeps_what_lies_beyond_one():
    features = torch.tensor([[0.0, 7.0], [10.0, 7.0], [2.0, 7.0]])
    scaled, mean, std = standardise(features)
    assert mean.tolist() == [4, 7] and std[1] == 1
    assert torch.allclose(scaled * std + mean, features)
    assert scaled.max() > 1


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
    assert np.array_equal(made, sample_features(model, torch.tensor([0] * 50 + [1] * 50), 3) * std + mean)


def test_training_does_not_touch_the_random_state_of_others():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_denoiser(torch.randn(8, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(8, dtype=torch.long), 1, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_last_layer_learns():
    features = torch.eye(3).repeat(20, 1)
    labels = torch.arange(3).repeat(20)
    layer = nn.Linear(3, 3)
    train_last_layer(layer, features, labels, epochs=200, lr=0.05)
    assert (layer(features).argmax(1) == labels).all()
