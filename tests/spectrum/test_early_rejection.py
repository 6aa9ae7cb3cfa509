"""Early rejection: bound, looks, audit, and what a drop leaves untouched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discl.spectrum.early_rejection import (
    FEWEST_STEPS,
    Inspector,
    Learnt,
    conformal_bound,
    is_audited,
    look_steps,
)
from discl.spectrum.engine import Engine
from discl.spectrum.models import load_generator
from discl.spectrum.plan import Request, unet_rows

PLAIN = Request("id", "image", "digest", 0, 50, 0, 0, "a grey shirt", "", 32, 32)


def test_the_bound_is_the_rank_of_split_conformal_prediction() -> None:
    predictions = np.array([0.5, 0.1, 0.4, 0.2, 0.3, 0.9, 0.8, 0.7, 0.6])
    assert conformal_bound(predictions, 0.1) == 0.1  # floor(0.1 · 10) = 1
    assert conformal_bound(predictions, 0.29) == 0.2
    assert conformal_bound(predictions[:8], 0.1) == -math.inf  # too few for such a bound


def test_no_more_than_the_bound_is_lost_on_average() -> None:
    """Over many runs, new images that would be kept are dropped at no more than the bound."""
    lost, saved = [], []
    for seed in range(300):
        random = np.random.default_rng(seed)
        final = random.normal(size=260)
        look = final + 0.5 * random.normal(size=260)
        bound = conformal_bound(look[:200][final[:200] >= 0], 0.1)
        dropped, kept = look[200:] < bound, final[200:] >= 0
        lost.append(dropped[kept].mean())
        saved.append(dropped[~kept].mean())
    assert 0.08 < np.mean(lost) <= 0.101 and np.mean(saved) > 0.5


def test_short_chains_are_not_looked_at() -> None:
    assert look_steps([0.25, 0.5], 20) == (5, 10)
    assert look_steps([0.1, 0.15], 10) == (1, 2)
    assert look_steps([0.99], 10) == ()  # the end is no look
    assert look_steps([0.5], FEWEST_STEPS - 1) == () != look_steps([0.5], FEWEST_STEPS)


def test_the_audit_is_drawn_by_the_id() -> None:
    drawn = [is_audited(f"image-{index}", 0.2) for index in range(20_000)]
    assert 0.19 < np.mean(drawn) < 0.21
    assert drawn == [is_audited(f"image-{index}", 0.2) for index in range(20_000)]
    assert not is_audited("image", 0.0) and is_audited("image", 1.0)


# ---------------------------------------------------------------- in the engine


def load_pixels(source: str) -> np.ndarray:
    return np.full((32, 32, 3), 128, np.uint8)


def score(requests: Any, clean: Tensor) -> np.ndarray:
    return clean.mean((1, 2, 3)).numpy()


def denoise(model: Any, requests: list[Request], inspector: Inspector | None) -> tuple[Any, Engine]:
    engine = Engine(model, num_inference_steps=10, guidance_scale=7.5, slots=2)
    engine.inspector = inspector
    if inspector is not None:
        inspector.reload()
    return {r.id: x for r, x in engine.denoise(requests, load_pixels)}, engine


def test_kept_images_are_those_of_a_run_without_rejection(tiny_diffusion: Path) -> None:
    model = load_generator(str(tiny_diffusion))
    requests = [
        replace(PLAIN, id=f"{level}-{seed}", level=level, seed=seed)
        for level in (0, 50, 80)
        for seed in range(4)
    ]
    wanted, _ = denoise(model, requests, None)

    teaching = Inspector([0.4], 0.0, score, dict)
    made, engine = denoise(model, requests, teaching)
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert {(row["id"], row["look"]) for row in teaching.rows} == {
        *((f"0-{seed}", 4) for seed in range(4)),
        *((f"50-{seed}", 2) for seed in range(4)),
    }
    assert engine.work.looks == 8 and engine.work.dropped == 0

    # drop the images of level 0 that are below the median
    seen = {row["id"]: row["similarity"] for row in teaching.rows if row["level"] == 0}
    middle = float(np.median(list(seen.values())))
    learnt = {
        0: Learnt("zero", {4: middle}, frozenset()),
        50: Learnt("half", {2: -math.inf}, frozenset()),
    }
    rejecting = Inspector([0.4], 0.0, score, lambda: learnt)
    made, engine = denoise(model, requests, rejecting)
    dropped = {name for name, similarity in seen.items() if similarity < middle}
    assert len(dropped) == 2 and set(wanted) - set(made) == dropped
    assert all(torch.equal(made[name], wanted[name]) for name in made)
    assert {request.id for request in rejecting.dropped} == dropped
    assert {row["id"] for row in rejecting.rows} == dropped
    assert engine.work.looks == 4 and engine.work.dropped == 2
    assert engine.work.unet_rows == unet_rows(requests, 10, 7.5) - 2 * 2 * 6

    audited = Inspector([0.4], 1.0, score, lambda: learnt)
    made, _ = denoise(model, requests, audited)
    assert set(made) == set(wanted)
    assert {(row["id"], row["audited"]) for row in audited.rows} == {
        (name, True) for name in dropped
    }

    spared = {0: replace(learnt[0], teachers=frozenset(dropped))}
    made, _ = denoise(model, requests, Inspector([0.4], 0.0, score, lambda: spared))
    assert set(made) == set(wanted)
