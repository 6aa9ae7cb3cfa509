"""Too little memory: calls are made smaller, and what was done stays done."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from discl.errors import CheckpointError, RecipeError
from discl.recipe.recipe import Runtime
from discl.spectrum.clip_filter import ClipScorer
from discl.spectrum.engine import Engine
from discl.spectrum.models.stable_diffusion import StableDiffusion
from discl.spectrum.oom import is_out_of_memory, largest_that_fits, slots_on_cpu
from discl.spectrum.plan import unet_rows

from .test_engine import load_pixels, make_requests


class Cramped:
    """A model that runs out of memory above `rows` rows in a call, after `free` calls."""

    def __init__(
        self,
        model: StableDiffusion,
        rows: int = 10**6,
        pictures: int = 10**6,
        free: int = 0,
        texts: int = 10**6,
    ) -> None:
        self.model, self.rows, self.pictures, self.free, self.texts = (
            model,
            rows,
            pictures,
            free,
            texts,
        )
        self.calls: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def predict(
        self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        self.calls.append(len(latents))
        if len(latents) > self.rows and len(self.calls) > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.model.predict(latents, timesteps, conditioning)

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> dict[str, Tensor]:
        if len(texts) > self.texts:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.model.encode_texts(texts, negative)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_images(self._checked(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(self._checked(latents))

    def _checked(self, batch: Tensor) -> Tensor:
        if len(batch) > self.pictures:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 8 bytes"
            )
        return batch


@pytest.fixture(scope="module")
def model(loaded_model: Any) -> StableDiffusion:
    return loaded_model


@pytest.fixture(scope="module")
def wanted(model: StableDiffusion) -> dict[str, np.ndarray]:
    """Pictures of a model with enough memory."""
    return make(model)[1]


def make(model: Any, slots: int = 12, **settings: Any) -> tuple[Engine, dict[str, np.ndarray]]:
    engine = Engine(model, num_inference_steps=10, guidance_scale=7.5, slots=slots, **settings)
    return engine, {
        request.id: picture for request, picture in engine.generate(make_requests(4), load_pixels)
    }


@pytest.mark.parametrize(
    "free", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(9, marks=pytest.mark.slow)]
)
def test_slots_are_halved_and_no_step_is_done_twice(
    model: StableDiffusion, wanted: dict[str, np.ndarray], free: int
) -> None:
    cramped = Cramped(model, rows=7, free=free)
    engine, made = make(cramped)
    assert engine.slots == 3 and engine.work.out_of_memory == 2
    assert engine.work.unet_rows == unet_rows(make_requests(4), 10, 7.5)
    assert engine.work.unet_calls == len(cramped.calls) - 2 and set(cramped.calls) == {24, 12, 6}
    assert engine.work.vae_encodes == 4 and engine.work.vae_decodes == len(made)
    assert set(made) == set(wanted)
    assert (
        max(np.abs(made[name].astype(int) - wanted[name].astype(int)).max() for name in wanted) <= 1
    )


@pytest.mark.slow
def test_slots_are_halved_where_some_steps_are_not_guided(model: StableDiffusion) -> None:
    _, wanted = make(model, guidance_interval=(0.4, 1.0))
    engine, made = make(Cramped(model, rows=5, free=2), guidance_interval=(0.4, 1.0))
    assert engine.slots == 1 and set(made) == set(wanted)
    assert engine.work.unet_rows == unet_rows(
        make_requests(4), 10, 7.5, guidance_interval=(0.4, 1.0)
    )
    assert (
        max(np.abs(made[name].astype(int) - wanted[name].astype(int)).max() for name in wanted) <= 1
    )


@pytest.mark.slow
def test_the_vae_takes_smaller_batches(
    model: StableDiffusion, wanted: dict[str, np.ndarray]
) -> None:
    engine, made = make(Cramped(model, pictures=4))
    assert (
        engine.vae_batch_for(32, 32) == 3 and engine.slots == 12 and engine.work.out_of_memory == 2
    )
    assert engine.work.vae_encodes == 4 and engine.work.vae_decodes == len(made) == len(wanted)
    assert (
        max(np.abs(made[name].astype(int) - wanted[name].astype(int)).max() for name in wanted) <= 1
    )


@pytest.mark.slow
def test_text_encoders_take_smaller_batches(
    model: StableDiffusion, wanted: dict[str, np.ndarray]
) -> None:
    engine, made = make(Cramped(model, texts=5))
    assert engine.texts.batch == 4 and engine.work.out_of_memory == 2 and set(made) == set(wanted)
    assert (
        max(np.abs(made[name].astype(int) - wanted[name].astype(int)).max() for name in wanted) <= 1
    )


@pytest.mark.slow
def test_the_clip_takes_smaller_batches(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ClipScorer(str(tiny_clip), {0: "a photo of a hat"})
    pictures = [Image.fromarray(np.full((32, 32, 3), 5 * number, np.uint8)) for number in range(21)]
    wanted, whole, room = scorer(pictures, [0] * 21), scorer.model.get_image_features, 4

    def cramped(pixel_values: Tensor) -> Any:
        if len(pixel_values) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return whole(pixel_values=pixel_values)

    monkeypatch.setattr(scorer.model, "get_image_features", cramped)
    np.testing.assert_allclose(scorer(pictures, [0] * 21), wanted, atol=2e-6)
    assert scorer.batch == 4
    room = 0
    with pytest.raises(CheckpointError, match="single image in a call of the CLIP"):
        scorer(pictures, [0] * 21)


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        ({"rows": 1}, "image in a call of the network"),
        pytest.param({"pictures": 0}, "image in a call of the VAE", marks=pytest.mark.slow),
        pytest.param({"texts": 0}, "text in a call of the text encoders", marks=pytest.mark.slow),
    ],
)
def test_one_image_that_is_too_large_is_told(
    model: StableDiffusion, limits: dict[str, int], what: str
) -> None:
    with pytest.raises(CheckpointError, match=f"single {what}"):
        make(Cramped(model, **limits))


def test_another_failure_is_no_lack_of_memory(
    model: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("expected scalar type Float but found Half")

    broken = copy.copy(model)
    monkeypatch.setattr(broken, "predict", fail, raising=False)
    with pytest.raises(RuntimeError, match="scalar type"):
        make(broken)
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "found"), [(0, 1), (1, 1), (2, 2), (13, 8), (64, 64), (1000, 64)]
)
def test_the_largest_call_is_found_by_trying(limit: int, found: int) -> None:
    def call(size: int) -> None:
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_that_fits(call) == found


def test_slots_of_a_cpu_follow_from_the_shape(model: StableDiffusion) -> None:
    assert [slots_on_cpu(side, side) for side in (4, 8, 32, 64, 96, 128, 512)] == [
        64,
        64,
        64,
        16,
        7,
        4,
        1,
    ]
    engine = Engine(model, num_inference_steps=10, guidance_scale=7.5, slots=1)
    assert engine.fit_slots(32, 32) == engine.slots == 64 and engine.rows == 128
    assert Runtime().slots == "auto"
    for wrong in (0, "many", 1.5):
        with pytest.raises(ValueError, match="whole number from 1 to 65536, or auto"):
            Runtime(slots=wrong)  # type: ignore[arg-type]
    assert issubclass(RecipeError, ValueError)


def test_nan_is_told_after_what_was_finished(model: StableDiffusion) -> None:
    """As float16 does it: an overflow in one image's rows."""
    requests = make_requests(2)
    steps = 0

    class Overflowing(Cramped):
        def predict(
            self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
        ) -> Tensor:
            nonlocal steps
            steps += 1
            output = super().predict(latents, timesteps, conditioning)
            if steps > 5:
                output[-1] = float("nan")
            return output

    engine = Engine(Overflowing(model), num_inference_steps=10, guidance_scale=7.5, slots=3)  # type: ignore[arg-type]
    made = []
    with pytest.raises(
        CheckpointError,
        match=r"produced NaN for source 'image-.' at level .*; use dtype float32 or bfloat16",
    ):
        for request, _ in engine.generate(requests, load_pixels):
            made.append(request.id)
    assert 0 < len(made) < len(requests)
