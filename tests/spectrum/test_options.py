"""Fixed steps, guidance intervals, several shapes: against diffusers and plain loops."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from discl.errors import CheckpointError
from discl.spectrum.engine import Engine
from discl.spectrum.models import check_generator, load_generator
from discl.spectrum.models.schedules import make_ddim, make_flow
from discl.spectrum.plan import Request, unet_rows
from discl.spectrum.slots import draw_noise
from discl.utils.hashing import derive_seed

REQUEST = Request("id", "image", "digest", 0, 50, 0, 0, "a grey shirt", "blurry", 32, 32)


def pixels_of(width: int, height: int) -> np.ndarray:
    coarse = np.random.default_rng(derive_seed(width, height)).integers(
        256, size=(3, height // 8, width // 8), dtype=np.uint8
    )
    return coarse.repeat(8, axis=1).repeat(8, axis=2).transpose(1, 2, 0)


def latents_of(model: Any, pixels: np.ndarray) -> Tensor:
    channels_first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return model.encode_images(channels_first[None].float() / 127.5 - 1)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@cache
def load_pipeline(folder: Path, kind: str) -> Any:
    """diffusers' pipeline of a folder, loaded once. Each test sets its own scheduler."""
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def image_to_image(
    folder: Path, model, request: Request, steps: int, strength: float, kind: str
) -> Tensor:
    """diffusers' pipeline with DDIM for one request, whatever its shape."""
    pipeline = load_pipeline(folder, kind)
    pipeline.scheduler = DDIMScheduler.from_pretrained(
        folder, subfolder="scheduler", clip_sample=False
    )
    clean = latents_of(model, pixels_of(request.width, request.height))
    generator = torch.Generator().manual_seed(
        derive_seed("noise", request.source_id, request.seed, request.attempt)
    )
    return pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        image=clean,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=generator,
        output_type="latent",
    ).images[0]


# ---------------------------------------------------------------- fixed steps


@pytest.mark.parametrize(("level", "whole"), [(50, 20), (80, 50), (90, 100)])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_fixed_steps_are_those_of_diffusers_with_more_inference_steps(
    tiny_diffusion: Path, tiny_model: Any, level: int, whole: int, spacing: str
) -> None:
    """Ten steps at level 90 % are the last ten of a hundred."""
    model = tiny_model
    model.scheduler = DDIMScheduler.from_config(model.scheduler.config, timestep_spacing=spacing)
    request = replace(REQUEST, level=level)
    engine = Engine(model, num_inference_steps=10, guidance_scale=7.5, slots=2, fixed=True)
    [(_, made)] = engine.denoise([request], lambda _: pixels_of(32, 32))
    assert engine.work.unet_rows == 20 == unet_rows([request], 10, 7.5, fixed=True)
    pipeline = load_pipeline(tiny_diffusion, "StableDiffusionImg2ImgPipeline")
    pipeline.scheduler = model.scheduler
    generator = torch.Generator().manual_seed(derive_seed("noise", "image", 0, 0))
    with torch.inference_mode():
        clean = latents_of(model, pixels_of(32, 32))
        wanted = pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            image=clean,
            num_inference_steps=whole,
            strength=10.5 / whole,
            guidance_scale=7.5,
            generator=generator,
            output_type="latent",
        ).images[0]
    assert relative_error(made, wanted) <= 1e-5


@pytest.mark.parametrize("from_one", [True, False])
@pytest.mark.parametrize(("level", "whole"), [(0, 10), (50, 20), (90, 100)])
def test_fixed_steps_of_a_flow_are_those_of_diffusers_with_more_inference_steps(
    from_one: bool, level: int, whole: int
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = make_flow(scheduler, 10, from_one=from_one, fixed=True)
    span = schedule.spans[level]
    scheduler.set_timesteps(whole, sigmas=np.linspace(1.0, 1 / whole, whole) if from_one else None)
    torch.testing.assert_close(
        schedule.sigmas[span.start : span.stop], scheduler.sigmas[-11:-1], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        schedule.sigmas_next[span.start : span.stop], scheduler.sigmas[-10:], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        schedule.timesteps[span.start : span.stop], scheduler.timesteps[-10:], rtol=1e-5, atol=1e-3
    )


def test_fixed_steps_fall_evenly_where_the_grid_does_not_divide() -> None:
    """λ = 70 % covers 300 of 1,000 steps; diffusers' integer grid of 167 would start at 246."""
    schedule = make_ddim(DDIMScheduler(steps_offset=1, clip_sample=False), 50, fixed=True)
    span = schedule.spans[70]
    times = schedule.timesteps[span.start : span.stop]
    assert times[0] == 295 and times[-1] == 1 and set((times[:-1] - times[1:]).tolist()) == {6}
    assert 95 in schedule.spans and 96 not in schedule.spans


def test_level_with_less_noise_than_steps_is_refused(tiny_diffusion: Path) -> None:
    check_generator(str(tiny_diffusion), 50, None, [95], fixed=True)
    with pytest.raises(CheckpointError, match=r"96 % has fewer than 50 training steps") as raised:
        check_generator(str(tiny_diffusion), 50, None, [96], fixed=True)
    assert raised.value.argument == "levels"


# ---------------------------------------------------------------- guidance interval


@torch.inference_mode()
def plain_loop(model, request: Request, steps: int, low: float, high: float) -> Tensor:
    """Image to image with diffusers' scheduler, guided while low < noise fraction <= high."""
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(steps)
    noise = draw_noise(request.source_id, request.seed, request.attempt, (4, 8, 8))[None]
    clean = latents_of(model, pixels_of(32, 32))
    left = request.steps(steps)
    latents = scheduler.add_noise(
        clean, noise, scheduler.timesteps[steps - left : steps - left + 1]
    )
    prompt, negative = (
        model.encode_texts([text])["encoder_hidden_states"]
        for text in (request.prompt, request.negative_prompt)
    )
    for index in range(steps - left, steps):
        time = scheduler.timesteps[index]
        output = model.unet(latents, time, prompt).sample
        if low < (steps - index) / steps <= high:
            without = model.unet(latents, time, negative).sample
            output = without + 7.5 * (output - without)
        latents = scheduler.step(output, time, latents).prev_sample
    return latents[0]


@pytest.mark.parametrize("interval", [(0.3, 1.0), (0.0, 0.4), (0.2, 0.6)])
@pytest.mark.parametrize(
    "slots", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_guidance_on_an_interval_equals_a_plain_loop(
    tiny_model: Any, interval: tuple[float, float], slots: int
) -> None:
    model = tiny_model
    requests = [
        replace(REQUEST, id=f"{level}-{seed}", level=level, seed=seed)
        for level, seed in ((10, 0), (10, 1), (50, 0), (50, 1), (80, 0))
    ]
    engine = Engine(
        model, num_inference_steps=10, guidance_scale=7.5, slots=slots, guidance_interval=interval
    )
    made = {
        request.id: latents
        for request, latents in engine.denoise(requests, lambda _: pixels_of(32, 32))
    }
    assert set(made) == {request.id for request in requests}
    for request in requests:
        assert relative_error(made[request.id], plain_loop(model, request, 10, *interval)) <= 1e-5
    assert (
        engine.work.unet_rows
        == unet_rows(requests, 10, 7.5, guidance_interval=interval)
        < unet_rows(requests, 10, 7.5)
    )
    assert engine.work.unet_rows_computed == 2 * slots * engine.work.unet_calls


@pytest.mark.slow
def test_unguided_rows_fill_the_calls(tiny_model: Any) -> None:
    """With half of the steps unguided a call holds more images, so there are fewer calls."""
    requests = [
        replace(REQUEST, id=f"{seed}", level=level, seed=seed)
        for seed in range(24)
        for level in (0, 50)
    ]
    calls = []
    for interval in ((0.0, 1.0), (0.4, 1.0)):
        engine = Engine(
            tiny_model,
            num_inference_steps=10,
            guidance_scale=7.5,
            slots=4,
            guidance_interval=interval,
        )
        assert sum(1 for _ in engine.denoise(requests, lambda _: pixels_of(32, 32))) == len(
            requests
        )
        assert engine.work.slot_fill >= 0.9
        calls.append(engine.work.unet_calls)
    assert calls[1] <= 0.8 * calls[0]  # 22 rows for two images instead of 30


def test_interval_is_refused_where_guidance_is_built_in(tiny_flux: Path) -> None:
    with pytest.raises(CheckpointError, match=r"FLUX\.1") as raised:
        check_generator(str(tiny_flux), 10, guidance_interval=(0.4, 1.0))
    assert raised.value.argument == "guidance_interval"


# ---------------------------------------------------------------- shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("tiny_diffusion", "StableDiffusionImg2ImgPipeline"),
        ("tiny_xl", "StableDiffusionXLImg2ImgPipeline"),
    ],
)
def test_shapes_share_an_engine_and_equal_diffusers(
    family: str, kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    model = load_generator(str(folder))
    shapes = {"wide": (48, 24), "tall": (24, 40), "square": (32, 32)}
    requests = [
        replace(REQUEST, id=f"{name}-{seed}", source_id=name, seed=seed, width=width, height=height)
        for name, (width, height) in shapes.items()
        for seed in range(2)
    ]
    engine = Engine(model, num_inference_steps=10, guidance_scale=7.5, slots=2)
    made = {
        each.id: latents
        for each, latents in engine.denoise(requests, lambda source: pixels_of(*shapes[source]))
    }
    for each in requests:
        assert (
            relative_error(made[each.id], image_to_image(folder, model, each, 10, 0.55, kind))
            <= 1e-4
        )
    assert engine.work.vae_encodes == 3
    pictures = {
        each.id: picture.shape
        for each, picture in engine.generate(requests, lambda source: pixels_of(*shapes[source]))
    }
    assert pictures == {each.id: (each.height, each.width, 3) for each in requests}
