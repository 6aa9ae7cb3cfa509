"""Samplers against diffusers' schedulers, alone and beside other images in one call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from discl.errors import CheckpointError
from discl.pipeline import run_until
from discl.recipe import validate
from discl.run_folder.open import open_run
from discl.spectrum.engine import Engine
from discl.spectrum.models import SAMPLERS, check_generator
from discl.spectrum.models.samplers import DIFFUSERS, make_sampler
from discl.spectrum.plan import Request, Sampling, unet_rows
from discl.spectrum.slots import draw_noise
from discl.utils.hashing import derive_seed

PLAIN = Request("id", "image", "digest", 0, 50, 0, 0, "a grey shirt", "blurry", 32, 32)
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
STEPS = 10


def load_pixels(source: str) -> np.ndarray:
    coarse = np.random.default_rng(derive_seed(source)).integers(
        256, size=(4, 4, 3), dtype=np.uint8
    )
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


def scheduler_of(model: Any, sampler: str, **settings: Any) -> Any:
    return getattr(diffusers, DIFFUSERS[sampler]).from_config(model.scheduler.config, **settings)


class Noises:
    """Stands in for `randn_tensor`: the engine's noise of each step of a request, in order."""

    def __init__(self, request: Request, left: int) -> None:
        self.request, self.left = request, left

    def __call__(self, shape: Any, **_: Any) -> Tensor:
        request = self.request
        key = request.source_id, request.seed, request.attempt
        noise = draw_noise(*key, tuple(shape[1:]), left=self.left)
        self.left -= 1
        return noise[None]


@torch.inference_mode()
def denoise_with_diffusers(
    model: Any, request: Request, scheduler: Any, monkeypatch: pytest.MonkeyPatch, scale: float
) -> Tensor:
    """One request in a plain loop over diffusers' scheduler, as its image-to-image pipelines do."""
    left = len(scheduler.timesteps) if request.level == 0 else request.steps(STEPS)
    noise = draw_noise(request.source_id, request.seed, request.attempt, (4, 8, 8))[None]
    times = scheduler.timesteps[-left:]
    if request.level == 0:
        latents = noise * scheduler.init_noise_sigma
    else:
        if not isinstance(scheduler, DDIMScheduler):
            scheduler.set_begin_index(len(scheduler.timesteps) - left)
        pixels = torch.from_numpy(load_pixels(request.source_id)).permute(2, 0, 1)
        clean = model.encode_images(pixels[None].float() / 127.5 - 1)
        latents = scheduler.add_noise(clean, noise, times[:1])
    monkeypatch.setattr(
        f"{type(scheduler).__module__}.randn_tensor", Noises(request, left), raising=False
    )
    texts = [
        model.encode_texts([text])["encoder_hidden_states"]
        for text in (request.prompt, request.negative_prompt)
    ]
    for time in times:
        scaled = scheduler.scale_model_input(latents, time)
        output = model.unet(scaled, time, texts[0]).sample
        if scale != 1:
            without = model.unet(scaled, time, texts[1]).sample
            output = without + scale * (output - without)
        latents = scheduler.step(output, time, latents, return_dict=False)[0]
    return latents[0]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def denoise(model: Any, requests: list[Request], slots: int, **options: Any) -> dict[str, Tensor]:
    scale = options.pop("guidance_scale", 7.5)
    engine = Engine(model, num_inference_steps=STEPS, guidance_scale=scale, slots=slots, **options)
    made = {request.id: latents for request, latents in engine.denoise(requests, load_pixels)}
    fixed = options.get("fixed", False)
    assert engine.work.unet_rows == unet_rows(requests, STEPS, scale, fixed=fixed)
    return made


# ---------------------------------------------------------------- equal to diffusers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "prediction_type", "spacing", "scale"),
    [
        ("ddim", "epsilon", "trailing", 7.5),
        ("dpm-solver++", "epsilon", None, 7.5),
        ("dpm-solver++", "v_prediction", "linspace", 1.0),
        ("dpm-solver++", "sample", "trailing", 1.0),
        ("euler", "epsilon", None, 7.5),
        ("euler", "v_prediction", "trailing", 1.0),
        ("euler", "epsilon", "linspace", 1.0),
        ("lcm", "epsilon", None, 1.0),
        ("lcm", "v_prediction", None, 7.5),
        ("tcd", "epsilon", None, 1.0),
        ("tcd", "v_prediction", None, 7.5),
    ],
)
def test_equals_diffusers_in_calls_of_mixed_levels(
    tiny_model: Any,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    prediction_type: str,
    spacing: str | None,
    scale: float,
) -> None:
    """Three slots hold five images at different steps; each equals a loop of its own."""
    model = tiny_model
    model.scheduler = DDIMScheduler.from_config(
        model.scheduler.config, prediction_type=prediction_type
    )
    requests = [
        replace(PLAIN, id=f"{level}-{seed}", level=level, seed=seed)
        for level, seed in ((0, 0), (10, 0), (50, 0), (50, 1), (90, 0))
    ]
    made = denoise(
        model, requests, 3, sampler=sampler, timestep_spacing=spacing, guidance_scale=scale
    )
    settings = {} if spacing is None else {"timestep_spacing": spacing}
    for request in requests:
        scheduler = scheduler_of(model, sampler, **settings)
        scheduler.set_timesteps(STEPS)
        wanted = denoise_with_diffusers(model, request, scheduler, monkeypatch, scale)
        assert relative_error(made[request.id], wanted) <= 1e-5, request.id


@pytest.mark.parametrize("sampler", ["dpm-solver++", "euler", "lcm", "tcd"])
def test_fixed_steps_equal_diffusers_on_the_same_times(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    model = tiny_model
    request = replace(PLAIN, level=50)
    made = denoise(model, [request], 1, sampler=sampler, fixed=True)
    scheduler = scheduler_of(model, sampler)
    if sampler in ("lcm", "tcd"):
        scheduler.set_timesteps(STEPS, strength=0.5)
    else:
        ddim = make_sampler(model.scheduler, STEPS, fixed=True)
        scheduler.set_timesteps(timesteps=[int(ddim.timesteps[row]) for row in ddim.spans[50]])
    monkeypatch.setattr(Request, "steps", lambda self, steps: steps)
    wanted = denoise_with_diffusers(model, request, scheduler, monkeypatch, 7.5)
    assert relative_error(made["id"], wanted) <= 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("fixed", [False, True])
def test_coefficients_leave_a_perfect_prediction_on_its_path(sampler: str, fixed: bool) -> None:
    """If the network names the true ε, the last step returns z_real, whatever the level."""
    schedule: Any = make_sampler(
        DDIMScheduler(**{**SCHEDULE, "set_alpha_to_one": True}),
        STEPS,
        sampler=sampler,
        fixed=fixed,
        levels=[0, 30, 80],
    )
    clean = torch.full((1, 1, 1, 1), 0.7)
    for level in (30, 80):
        span, noise = schedule.spans[level], torch.full((1, 1, 1, 1), -1.3)
        assert len(span) == (STEPS if fixed else STEPS * (100 - level) // 100)
        latents, previous = schedule.start(clean[0], noise[0], span.start)[None], clean
        for index in span:
            row = torch.tensor([index])
            one, sigma = schedule.start(clean[0] * 0 + 1, noise[0] * 0, index), None
            alpha = float(one)
            sigma = (1 - alpha**2) ** 0.5
            output = (latents - alpha * clean) / sigma
            found = schedule.predict_clean(latents, output, row)
            torch.testing.assert_close(found, clean, rtol=0, atol=1e-4)
            fresh = torch.full_like(latents, 0.4) if schedule.adds_noise(index) else None
            latents = schedule.step(latents, output, row, previous, fresh)
        if sampler in ("lcm", "tcd"):  # end at the first training step's noise, or a boundary's
            torch.testing.assert_close(latents, clean, rtol=0, atol=0.1)
        else:
            torch.testing.assert_close(latents, clean, rtol=0, atol=1e-3)


# ---------------------------------------------------------------- neighbours, noise, ids


@pytest.mark.parametrize("sampler", ["dpm-solver++", "tcd"])
def test_an_image_does_not_depend_on_its_neighbours_or_their_order(
    tiny_model: Any, sampler: str
) -> None:
    model = tiny_model
    requests = [
        replace(PLAIN, id=f"{level}-{seed}", level=level, seed=seed)
        for level in (0, 30, 80)
        for seed in range(2)
    ]
    made = denoise(model, requests, 2, sampler=sampler)
    backwards = denoise(model, requests[::-1], 2, sampler=sampler)
    assert all(torch.equal(made[each.id], backwards[each.id]) for each in requests)
    for request in requests[::2]:  # one of each level
        alone = denoise(model, [request], 2, sampler=sampler)[request.id]
        assert torch.equal(made[request.id], alone)


def test_an_image_after_a_broken_one_is_whole(tiny_model: Any) -> None:
    """A slot's previous x̂0 goes with its image: NaN in one does not get into the next."""
    model = tiny_model
    good = replace(PLAIN, id="good", level=50)
    [wanted] = denoise(model, [good], 1, sampler="dpm-solver++").values()
    whole, broken = model.predict, [True]

    def predict(latents: Tensor, *rest: Any) -> Tensor:
        return whole(latents, *rest) * (float("nan") if broken[0] else 1.0)

    model.predict = predict
    engine = Engine(
        model, num_inference_steps=STEPS, guidance_scale=7.5, slots=1, sampler="dpm-solver++"
    )
    made = {}
    for request, latents in engine.denoise([replace(good, id="bad", level=0), good], load_pixels):
        made[request.id], broken[0] = latents, False
    assert made["bad"].isnan().all() and torch.equal(made["good"], wanted)


def test_fresh_noise_is_keyed_by_source_seed_attempt_and_step() -> None:
    def draw(source: str, seed: int, attempt: int, left: int | None) -> Tensor:
        return draw_noise(source, seed, attempt, (4,), left=left)

    keys = [("a", 0, 0, None), ("a", 0, 0, 1), ("a", 0, 0, 2), ("a", 1, 0, 1), ("b", 0, 0, 1)]
    keys.append(("a", 0, 1, 1))
    drawn = {tuple(draw(*key).tolist()) for key in keys}
    assert len(drawn) == len(keys)
    assert torch.equal(draw(*keys[1]), draw(*keys[1]))


def test_the_sampler_is_in_the_id_only_where_it_is_not_the_default() -> None:
    plain = Sampling("model", "scheduler", 20, 7.5, 32, "float32", "webp")
    for field, value in (("sampler", "lcm"), ("timestep_spacing", "trailing")):
        assert field not in plain.identity()
        assert replace(plain, **{field: value}).identity()[field] == value  # type: ignore[arg-type]


# ---------------------------------------------------------------- what cannot be


def test_flow_models_have_no_choice(tiny_flux: Path) -> None:
    for argument, value in (("sampler", "euler"), ("timestep_spacing", "trailing")):
        with pytest.raises(CheckpointError, match=r"FLUX\.1") as raised:
            check_generator(str(tiny_flux), 10, **{argument: value})  # type: ignore[arg-type]
        assert raised.value.argument == argument


def test_a_run_with_a_sampler_that_the_family_lacks_makes_nothing(
    tiny_flux: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    for split in ("train", "validation", "test"):
        for name in ("boot", "hat"):
            path = tmp_path / "data" / split / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(load_pixels(f"{split}-{name}")).save(path)
    tree = {
        "name": "flow",
        "data": {"root": str(tmp_path / "data")},
        "spectrum": {"checkpoint": str(tiny_flux), "levels": [0], "sampler": "tcd"},
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "methods": {"ce": {}},
    }
    run = open_run(validate(tree), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"FLUX\.1") as raised:
        run_until(run, "generate")
    assert raised.value.argument == "spectrum.sampler"
    assert not list(run.folder.rglob("*.parquet"))


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_consistency_samplers_have_a_grid_of_fifty_steps(
    tiny_diffusion: Path, sampler: str
) -> None:
    check_generator(str(tiny_diffusion), 50, None, [0], sampler=sampler)
    with pytest.raises(CheckpointError, match="51 inference steps exceed the 50") as raised:
        check_generator(str(tiny_diffusion), 51, None, [0], sampler=sampler)
    assert raised.value.argument == "num_inference_steps"
    with pytest.raises(CheckpointError, match="level 90 %") as raised:
        check_generator(str(tiny_diffusion), 8, None, [90], sampler=sampler, fixed=True)
    assert raised.value.argument == "levels"


def test_settings_that_a_sampler_cannot_take_are_refused() -> None:
    karras = DDIMScheduler.from_config(
        {**DDIMScheduler(**SCHEDULE).config, "use_karras_sigmas": True}
    )
    assert make_sampler(karras, STEPS, sampler="euler").spans[50]
    with pytest.raises(CheckpointError, match="use_karras_sigmas") as raised:
        make_sampler(karras, STEPS, sampler="euler", fixed=True)
    assert raised.value.argument == "fixed"
    endless = DDIMScheduler(**SCHEDULE, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(CheckpointError, match="divides by zero") as raised:
        make_sampler(endless, STEPS, sampler="lcm")
    assert raised.value.argument == "sampler"
