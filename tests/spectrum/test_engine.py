"""The engine against diffusers' pipelines, against itself in another order, and its counters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from discl.errors import DataError, RecipeError
from discl.spectrum import engine as engine_module
from discl.spectrum.engine import Engine
from discl.spectrum.models import Conditioning
from discl.spectrum.models.schedules import DDIM, make_ddim
from discl.spectrum.models.stable_diffusion import StableDiffusion
from discl.spectrum.plan import Request, Sampling, plan_requests, unet_rows
from discl.spectrum.slots import draw_noise
from discl.utils.hashing import derive_seed

LEVELS = (0, 10, 30, 50, 70, 90)
PROMPTS = {0: ["a photo of a shirt", "a grey shirt"], 1: ["a photo of a boot"]}
NEGATIVE = "blurry"


def make_requests(sources: int, levels: Sequence[int] = LEVELS, seeds: int = 1) -> list[Request]:
    """The plan of `sources` images of two classes, as `discl plan` writes it."""
    rows = [
        {"id": f"image-{index}", "digest": f"digest-{index}", "label": index % 2}
        for index in range(sources)
    ]
    sampling = Sampling("model", "scheduler", 20, 7.5, 32, "float32", "webp")
    return plan_requests(
        rows, list(levels), seeds, PROMPTS, negative_prompt=NEGATIVE, sampling=sampling
    )


def load_pixels(source: str) -> np.ndarray:
    """A picture uint8 `[32, 32, 3]`, a pure function of the source's name."""
    coarse = np.random.default_rng(derive_seed(source)).integers(
        256, size=(3, 4, 4), dtype=np.uint8
    )
    return np.ascontiguousarray(coarse.repeat(8, axis=1).repeat(8, axis=2).transpose(1, 2, 0))


# ---------------------------------------------------------------- equal to diffusers


@pytest.fixture(scope="module")
def model(loaded_model: Any) -> StableDiffusion:
    return loaded_model


def with_scheduler(model: StableDiffusion, **settings: object) -> StableDiffusion:
    """The same weights under another schedule."""
    other = copy.copy(model)
    other.scheduler = DDIMScheduler.from_config(model.scheduler.config, **settings)
    return other


def make_pipeline(kind: type, model: StableDiffusion):
    pipeline = kind(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(model.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def denoise_with_diffusers(
    model: StableDiffusion,
    requests: list[Request],
    steps: int,
    guidance_scale: float,
    output: str = "latent",
):
    """Results of diffusers' unaltered pipelines for requests of one level, with the engine's ε."""
    common = {
        "prompt": [request.prompt for request in requests],
        "negative_prompt": [request.negative_prompt for request in requests],
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "output_type": output,
    }
    if requests[0].level == 0:
        noise = torch.stack(
            [
                draw_noise(request.source_id, request.seed, request.attempt, (4, 8, 8))
                for request in requests
            ]
        )
        return make_pipeline(StableDiffusionPipeline, model)(
            latents=noise, height=32, width=32, **common
        ).images
    squares = np.stack([load_pixels(request.source_id) for request in requests])
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous()
    seeds = [
        derive_seed("noise", request.source_id, request.seed, request.attempt)
        for request in requests
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    strength = (requests[0].steps(steps) + 0.5) / steps
    return make_pipeline(StableDiffusionImg2ImgPipeline, model)(
        image=model.encode_images(pixels.float() / 127.5 - 1),
        strength=strength,
        generator=generators,
        **common,
    ).images


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


ALL_SETTINGS = list(
    itertools.product(["epsilon", "v_prediction"], ["leading", "trailing"], [False, True], [1, 7.5])
)
SOME_SETTINGS = [  # every pair of values occurs
    ("epsilon", "leading", False, 7.5),
    ("epsilon", "trailing", True, 1),
    ("v_prediction", "leading", True, 7.5),
    ("epsilon", "trailing", False, 7.5),
    ("v_prediction", "trailing", False, 1),
    ("epsilon", "leading", True, 1),
]


@pytest.mark.parametrize(
    ("steps", "prediction_type", "timestep_spacing", "set_alpha_to_one", "guidance_scale"),
    [
        *((10, *settings) for settings in SOME_SETTINGS),
        *(
            pytest.param(10, *settings, marks=pytest.mark.slow)
            for settings in ALL_SETTINGS
            if settings not in SOME_SETTINGS
        ),
        *(pytest.param(20, *each, marks=pytest.mark.slow) for each in SOME_SETTINGS),
        *(pytest.param(50, *each, marks=pytest.mark.slow) for each in SOME_SETTINGS[::2]),
    ],
)
def test_latents_equal_those_of_diffusers(
    model: StableDiffusion,
    steps: int,
    prediction_type: str,
    timestep_spacing: str,
    set_alpha_to_one: bool,
    guidance_scale: float,
) -> None:
    model = with_scheduler(
        model,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        set_alpha_to_one=set_alpha_to_one,
    )
    requests = make_requests(2)
    engine = Engine(model, num_inference_steps=steps, guidance_scale=guidance_scale, slots=5)
    made = {request.id: latents for request, latents in engine.denoise(requests, load_pixels)}
    assert len(made) == len(requests)
    for level in LEVELS:
        same = [request for request in requests if request.level == level]
        wanted = denoise_with_diffusers(model, same, steps, guidance_scale)
        assert relative_error(torch.stack([made[request.id] for request in same]), wanted) <= 1e-5


@pytest.mark.parametrize("level", [0, 50])
def test_pictures_equal_those_of_diffusers(model: StableDiffusion, level: int) -> None:
    requests = make_requests(2, [level])
    engine = Engine(model, num_inference_steps=10, guidance_scale=7.5, slots=3)
    made = {request.id: picture for request, picture in engine.generate(requests, load_pixels)}
    for request, wanted in zip(
        requests, denoise_with_diffusers(model, requests, 10, 7.5, "pil"), strict=True
    ):
        picture = made[request.id]
        assert picture.dtype == np.uint8 and picture.shape == (32, 32, 3)
        assert np.abs(picture.astype(int) - np.asarray(wanted).astype(int)).max() <= 1


@torch.inference_mode()
def test_encoded_image_is_the_mode_of_the_posterior(model: StableDiffusion) -> None:
    pixels = load_pixels("image-0")
    pipeline = make_pipeline(StableDiffusionImg2ImgPipeline, model)
    prepared = pipeline.image_processor.preprocess(Image.fromarray(pixels))
    wanted = model.vae.encode(prepared).latent_dist.mode() * model.vae.config.scaling_factor
    assert (
        relative_error(
            model.encode_images(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1), wanted
        )
        <= 1e-5
    )


def test_prompt_and_negative_prompt_reach_the_picture(model: StableDiffusion) -> None:
    first = make_requests(1, [0])[0]
    variants = [first, replace(first, prompt="a bag"), replace(first, negative_prompt="sharp")]
    engine = Engine(model, num_inference_steps=5, guidance_scale=7.5, slots=3)
    plain, other, negative = (latents for _, latents in engine.denoise(variants, load_pixels))
    assert relative_error(other, plain) > 1e-3 and relative_error(negative, plain) > 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "settings",
    [{"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 1.5}],
    ids=["free", "clipped"],
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_step_equals_diffusers(
    prediction_type: str, settings: dict[str, object], spacing: str, set_alpha_to_one: bool
) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1 if spacing == "leading" else 0,
        **settings,
    )
    schedule = make_ddim(scheduler, 20)
    generator = torch.Generator().manual_seed(0)
    latents, output = torch.randn(2, 20, 4, 8, 8, generator=generator)
    got = schedule.step(latents, output, torch.arange(20))
    for row, timestep in enumerate(schedule.timesteps):
        wanted = scheduler.step(output[row], int(timestep), latents[row]).prev_sample
        torch.testing.assert_close(got[row], wanted, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- equal to itself


def denoise(model: StableDiffusion, requests: list[Request], slots: int) -> dict[str, Tensor]:
    engine = Engine(model, num_inference_steps=10, guidance_scale=7.5, slots=slots)
    return {request.id: latents for request, latents in engine.denoise(requests, load_pixels)}


def test_order_and_company_do_not_change_a_bit(model: StableDiffusion) -> None:
    requests = make_requests(2, seeds=2)
    whole = denoise(model, requests, slots=6)
    shuffled = [requests[place] for place in np.random.default_rng(0).permutation(len(requests))]
    for others in (shuffled, requests[::-1], requests[len(requests) // 2 :], requests[:1]):
        made = denoise(model, others, slots=6)
        assert set(made) == {request.id for request in others}
        assert all(torch.equal(latents, whole[name]) for name, latents in made.items())


def test_pictures_of_a_resumed_run_are_the_same_bytes(model: StableDiffusion) -> None:
    requests = make_requests(3)

    def pictures(part: list[Request]) -> dict[str, bytes]:
        engine = Engine(model, num_inference_steps=10, guidance_scale=7.5, slots=4)
        return {
            request.id: picture.tobytes() for request, picture in engine.generate(part, load_pixels)
        }

    whole = pictures(requests)
    assert pictures(requests[7:]) == {request.id: whole[request.id] for request in requests[7:]}


@pytest.mark.slow
def test_slot_count_changes_pictures_by_at_most_one_grey_level(model: StableDiffusion) -> None:
    requests, made = make_requests(3), []
    for slots in (1, 4, 18, 32):
        engine = Engine(model, num_inference_steps=10, guidance_scale=7.5, slots=slots)
        made.append(
            {
                request.id: picture.astype(int)
                for request, picture in engine.generate(requests, load_pixels)
            }
        )
    for other in made[1:]:
        assert all(np.abs(other[name] - picture).max() <= 1 for name, picture in made[0].items())


# ---------------------------------------------------------------- counters


class Counting:
    """A LatentModel without weights: ε̂ = 0, one number per text and image. It records its calls."""

    device, dtype, distilled = torch.device("cpu"), torch.float32, False
    class_tokens = None

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.calls: list[int] = []

    def schedule(
        self, num_inference_steps: int, height: int, width: int, fixed: bool = False
    ) -> DDIM:
        return make_ddim(
            DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
            num_inference_steps,
            fixed,
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 1, 2, 2

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        self.texts += texts
        return {"states": torch.tensor([[float(len(text))] for text in texts])}

    def encode_images(self, pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(len(latents), 4, 4, 3, dtype=torch.uint8)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert all(len(tensor) == len(latents) for tensor in (timesteps, *conditioning.values()))
        self.calls.append(len(latents))
        return torch.zeros_like(latents)


def make_engine(
    slots: int, guidance_scale: float = 7.5, num_inference_steps: int = 20
) -> tuple[Engine, Counting]:
    model = Counting()
    return Engine(
        model, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, slots=slots
    ), model


def small_pixels(source: str) -> np.ndarray:
    return np.full((32, 32, 3), derive_seed(source) % 256, np.uint8)


@pytest.mark.parametrize(("guidance_scale", "per_step"), [(7.5, 2), (1, 1)])
def test_every_row_is_computed_once(guidance_scale: float, per_step: int) -> None:
    requests = make_requests(10, seeds=2)
    engine, model = make_engine(8, guidance_scale)
    made = [request for request, _ in engine.generate(requests, small_pixels)]
    assert sorted(request.id for request in made) == sorted(request.id for request in requests)
    work = engine.work
    assert (
        work.unet_rows
        == unet_rows(requests, 20, guidance_scale)
        == per_step * 10 * 2 * (20 + 18 + 14 + 10 + 6 + 2)
    )
    assert model.calls == [8 * per_step] * work.unet_calls
    assert work.unet_rows_computed == 8 * per_step * work.unet_calls
    assert work.slot_fill == work.unet_rows / work.unet_rows_computed
    assert work.vae_encodes == 10 and work.vae_decodes == len(requests)


def test_text_is_encoded_once_per_prompt() -> None:
    requests = make_requests(40)
    engine, model = make_engine(8)
    list(engine.denoise(requests, small_pixels))
    assert engine.work.text_encodes == 3 + 1 == len({text for text in model.texts if text})


def test_images_that_no_level_needs_are_not_encoded() -> None:
    engine, _ = make_engine(8)
    asked: list[str] = []
    list(
        engine.denoise(
            make_requests(5, [0]), lambda source: asked.append(source) or small_pixels(source)
        )
    )  # type: ignore[func-returns-value]
    assert engine.work.vae_encodes == 0 and asked == []


@pytest.mark.parametrize(
    ("num_inference_steps", "slots", "times", "goal"),
    [
        (20, 8, 10, 0.95),
        (20, 64, 10, 0.95),
        (50, 16, 10, 0.95),
        (20, 8, 100, 0.99),
        pytest.param(20, 64, 100, 0.99, marks=pytest.mark.slow),
        pytest.param(50, 16, 100, 0.99, marks=pytest.mark.slow),
    ],
)
def test_slots_stay_filled(num_inference_steps: int, slots: int, times: int, goal: float) -> None:
    requests = make_requests(-(-slots * times // len(LEVELS)))[: slots * times]
    engine, _ = make_engine(slots, num_inference_steps=num_inference_steps)
    assert sum(1 for _ in engine.denoise(requests, small_pixels)) == slots * times
    assert engine.work.slot_fill >= goal


@pytest.mark.slow
@pytest.mark.parametrize("levels", [LEVELS, (90,), (10, 30)], ids=str)
def test_long_plan_is_worked_on_in_bounded_memory(
    monkeypatch: pytest.MonkeyPatch, levels: tuple[int, ...]
) -> None:
    queues: list[engine_module.RequestQueue] = []

    class Watched(engine_module.RequestQueue):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            queues.append(self)

        def _encode(self, sources: list[str]) -> None:
            super()._encode(sources)
            assert len(self.latents) <= self.engine.lookahead

    monkeypatch.setattr(engine_module, "RequestQueue", Watched)
    engine, _ = make_engine(4)
    requests = make_requests(8 * engine.lookahead // len(levels), levels)
    taken = 0

    def stream() -> Iterator[Request]:
        nonlocal taken
        for request in requests:
            taken += 1
            yield request

    for done, _ in enumerate(engine.denoise(stream(), small_pixels)):
        queue = queues[0]
        assert (
            len(queue.heap) <= engine.lookahead
            and len(queue.latents) <= engine.lookahead
            and len(queue.users) <= engine.lookahead
        )
        assert taken - done <= engine.lookahead + engine.slots
    assert taken == len(requests)


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [7, 64, 256])
@pytest.mark.parametrize("seeds", [1, 3])
def test_source_is_encoded_once_across_windows(lookahead: int, seeds: int) -> None:
    engine, _ = make_engine(4)
    engine.lookahead = lookahead
    asked: list[str] = []

    def load(source: str) -> np.ndarray:
        asked.append(source)
        return small_pixels(source)

    requests = make_requests(200 // seeds, seeds=seeds)
    assert sum(1 for _ in engine.denoise(requests, load)) == len(requests)
    assert engine.work.vae_encodes == len(asked) == len(set(asked)) == 200 // seeds


def test_more_prompts_than_are_remembered_are_encoded_once() -> None:
    engine, _ = make_engine(4)
    size = sum(tensor[0].nbytes for tensor in engine.model.encode_texts([""]).values())
    engine.texts.limit = 32 * size  # bytes
    engine.lookahead = 16
    requests = [
        replace(request, prompt=f"caption of {request.source_id}") for request in make_requests(100)
    ]
    list(engine.denoise(requests, small_pixels))
    assert engine.work.text_encodes == 100 + 1
    assert len(engine.texts.known) <= 32 + engine.lookahead
    engine.texts.trim(set())
    assert len(engine.texts.known) == 32


def test_longest_requests_start_first() -> None:
    engine, _ = make_engine(2)
    made = [
        request.level for request, _ in engine.denoise(make_requests(1, [90, 0, 50]), small_pixels)
    ]
    assert made == [50, 90, 0]


# ---------------------------------------------------------------- noise


def test_noise_is_keyed_by_source_seed_and_try() -> None:
    first = draw_noise("image-0", 0, 0, (4, 8, 8))
    assert torch.equal(first, draw_noise("image-0", 0, 0, (4, 8, 8)))
    for other in (("image-1", 0, 0), ("image-0", 1, 0), ("image-0", 0, 1)):
        assert not torch.equal(first, draw_noise(*other, (4, 8, 8)))
    assert abs(first.mean().item()) < 0.3 and abs(first.std().item() - 1) < 0.2


def test_levels_of_a_spectrum_share_their_noise() -> None:
    """With ε̂ = 0 DDIM only rescales: x_end / √ᾱ_end = z + √((1 − ᾱ_t) / ᾱ_t) ε. So ε is known."""
    engine, model = make_engine(8)
    schedule = model.schedule(20, 4, 4)
    for request, latents in engine.denoise(make_requests(2), small_pixels):
        noise = draw_noise(request.source_id, request.seed, request.attempt, (1, 2, 2))
        alpha = schedule.alphas[20 - request.steps(20)]
        clean = model.encode_images(
            torch.from_numpy(small_pixels(request.source_id))[None].float() / 127.5 - 1
        )[0]
        start = noise if request.level == 0 else alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        torch.testing.assert_close(
            latents, start * (schedule.alphas_next[-1] / alpha).sqrt(), rtol=1e-4, atol=1e-5
        )


# ---------------------------------------------------------------- used by itself


def test_a_request_by_itself_needs_a_text_a_level_and_a_source(model: StableDiffusion) -> None:
    request = Request.of("a photo of a boot", 50, "image-0", width=32, negative_prompt=NEGATIVE)
    planned = make_requests(2, [50])[0]
    assert (request.width, request.height, request.seed, request.attempt, request.label) == (
        32,
        32,
        0,
        0,
        0,
    )
    assert (
        request.id
        == Request.of(
            "a photo of a boot", 50, "image-0", 32, height=32, negative_prompt=NEGATIVE
        ).id
    )
    others = [
        {"level": 0},
        {"source_id": "image-1"},
        {"prompt": "a boot"},
        {"width": 40},
        {"height": 40},
        {"seed": 1},
        {"attempt": 1},
    ]
    given = {
        "prompt": "a photo of a boot",
        "level": 50,
        "source_id": "image-0",
        "width": 32,
        "negative_prompt": NEGATIVE,
    }
    assert len({request.id, *(Request.of(**{**given, **other}).id for other in others)}) == 1 + len(
        others
    )  # type: ignore[arg-type]
    engine = Engine(model, num_inference_steps=4, guidance_scale=7.5, slots=2)
    alike = replace(planned, prompt=request.prompt)
    (_, first), (_, second) = engine.generate([request, alike], load_pixels)
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("level", "told"),
    [
        (
            95,
            "95 % .* at 4 inference steps; use at least 20 steps or a level of at most 75 %",
        ),
        (100, "level 100 is the real image and is never generated"),
        (0.5, "is not a whole per cent .* Write λ = 0.5 as 50"),
    ],
)
def test_a_level_without_a_step_is_refused(model: StableDiffusion, level: int, told: str) -> None:
    engine = Engine(model, num_inference_steps=4, guidance_scale=7.5, slots=2)
    with pytest.raises(RecipeError, match=told):
        list(engine.generate([Request.of("a boot", level, "image-0", 32)], load_pixels))


@pytest.mark.parametrize(
    ("give", "got"),
    [
        (lambda pixels: pixels.transpose(2, 0, 1), r"uint8 \[3, 32, 32\]"),
        (lambda pixels: pixels[:16], r"uint8 \[16, 32, 3\]"),
        (lambda pixels: pixels / np.float32(255), r"float32 \[32, 32, 3\]"),
        (lambda pixels: Image.fromarray(pixels), "of the type Image"),
    ],
    ids=["channels first", "another size", "fractions", "a picture"],
)
def test_pixels_of_another_shape_are_refused(
    model: StableDiffusion, give: Callable[[np.ndarray], Any], got: str
) -> None:
    engine = Engine(model, num_inference_steps=4, guidance_scale=7.5, slots=2)
    with pytest.raises(DataError, match=rf"'image-0' are {got}; .* uint8 \[32, 32, 3\]"):
        list(
            engine.generate(
                [Request.of("a boot", 50, "image-0", 32)], lambda source: give(load_pixels(source))
            )
        )
