"""The small network of a pilot learns, draws by weight, and does not touch what is random."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from discl.evaluation import proxy


def images(counts: list[int], seed: int, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with a bright bar that lies (0), stands (1), or is a square in the middle (2)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = rng.integers(0, 60, (len(labels), 3, side, side))
    for row, label in enumerate(labels.tolist()):
        rows, columns = [(slice(6, 10), slice(0, 16)), (slice(0, 16), slice(6, 10)),
                         (slice(4, 12), slice(4, 12))][label]  # fmt: skip
        pixels[row, :, rows, columns] += 120
    return pixels.astype(np.uint8), labels


def test_it_learns_and_is_a_function_of_its_seed(monkeypatch):
    monkeypatch.setattr(proxy, "STEPS", 60)
    pixels, labels = images([40, 40, 40], 0)
    others, truth = images([20, 20, 20], 1)
    before = torch.random.get_rng_state()
    found = [
        proxy.fit_proxy(pixels, labels, np.ones(len(labels)), 3, seed=seed)(others)
        for seed in (0, 0)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(*found) and (found[0] == truth).mean() > 0.9
    assert proxy.fit_proxy(pixels, labels, np.ones(len(labels)), 3)(others[:0]).shape == (0,)


def test_a_class_without_weight_is_never_named(monkeypatch):
    monkeypatch.setattr(proxy, "STEPS", 40)
    pixels, labels = images([40, 40, 40], 0)
    others, _ = images([20, 20, 20], 1)
    found = proxy.fit_proxy(pixels, labels, (labels != 2).astype(float), 3)(others)
    assert set(found.tolist()) == {0, 1}


@pytest.mark.parametrize("side", [16, 64])
def test_augmentation_moves_and_mirrors_whole_images(side):
    rng = np.random.default_rng(0)
    batch = torch.from_numpy(rng.random((64, 3, side, side))).float()
    moved = proxy.augment(batch, torch.Generator().manual_seed(0))
    most = max(1, round(proxy.SHIFT * side))
    padded = torch.nn.functional.pad(batch, (most,) * 4, value=-0.5)
    kinds = set()
    for image, wide in zip(moved, padded, strict=True):
        places = [
            (down, right, mirrored)
            for down in range(2 * most + 1)
            for right in range(2 * most + 1)
            for mirrored in (False, True)
            if torch.equal(
                image,
                wide[:, down : down + side, right : right + side].flip(2)
                if mirrored
                else wide[:, down : down + side, right : right + side],
            )
        ]
        assert len(places) == 1
        kinds.add(places[0])
    assert len({mirrored for _, _, mirrored in kinds}) == 2 and len(kinds) > 2
