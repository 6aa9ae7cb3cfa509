"""SDXL, Stable Diffusion 3 and FLUX against diffusers' pipelines on tiny random checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from discl.errors import CheckpointError
from discl.spectrum.engine import Engine
from discl.spectrum.models import check_generator, describe_generator, load_generator
from discl.spectrum.models.flow import pack, unpack
from discl.spectrum.plan import Request, Sampling, plan_requests
from discl.spectrum.slots import draw_noise
from discl.utils.hashing import derive_seed

LEVELS = (0, 30, 50, 90)
PROMPTS = {0: ["a photo of a shirt", "a grey shirt"], 1: ["a photo of a boot"]}


def make_requests(
    sources: int,
    levels: Sequence[int] = LEVELS,
    negative: str = "blurry",
    size: tuple[int, int] = (32, 32),
) -> list[Request]:
    """`size` is (height, width)."""
    made = {"height": size[0], "width": size[1]}
    rows = [
        {"id": f"image-{index}", "digest": f"digest-{index}", "label": index % 2, **made}
        for index in range(sources)
    ]
    sampling = Sampling("model", "scheduler", 10, 7.5, 32, "float32", "webp")
    return plan_requests(
        rows, list(levels), 1, PROMPTS, negative_prompt=negative, sampling=sampling
    )


def load_pixels(source: str, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    coarse = np.random.default_rng(derive_seed(source)).integers(
        256, size=(3, size[0] // 8, size[1] // 8), dtype=np.uint8
    )
    return coarse.repeat(8, axis=1).repeat(8, axis=2).transpose(1, 2, 0)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def seed_of(request: Request) -> int:
    return derive_seed("noise", request.source_id, request.seed, request.attempt)


@cache
def load(folder: Path) -> Any:
    """The model of a folder that tests leave as it is."""
    return load_generator(str(folder))


@cache
def pipelines(folder: Path, text: str, image: str, absent: tuple[str, ...] = ()) -> list[Any]:
    """diffusers' pipelines of a folder, loaded once: for λ = 0, and for the other levels."""
    parts: Any = dict.fromkeys(absent)
    first = getattr(diffusers, text).from_pretrained(folder, **parts)
    second = first if text == image else getattr(diffusers, image).from_pipe(first)
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    return [first, second]


@torch.inference_mode()
def with_diffusers(
    folder: Path,
    model: Any,
    requests: list[Request],
    *,
    text: str,
    image: str,
    steps: int,
    guidance_scale: float,
    shape: tuple[int, ...],
    ddim: bool = False,
    aimed: float = 0.5,
    absent: tuple[str, ...] = (),
    **settings: Any,
) -> Tensor:
    """Latents of diffusers' pipelines `text` (λ = 0) and `image` for requests of one level."""
    level, (height, width) = requests[0].level, (requests[0].height, requests[0].width)
    pipeline = pipelines(folder, text, image, absent)[level > 0]
    if ddim:
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False
        )
    common = {
        "prompt": [request.prompt for request in requests],
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "output_type": "latent",
        **settings,
    }
    noise = torch.stack(
        [
            draw_noise(request.source_id, request.seed, request.attempt, shape)
            for request in requests
        ]
    )
    flux = text == "FluxPipeline"
    if level == 0 and text != image:
        made = pipeline(
            latents=pack(noise) if flux else noise, height=height, width=width, **common
        ).images
    else:
        images = np.stack([load_pixels(request.source_id, (height, width)) for request in requests])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        clean = model.encode_images(pixels.float() / 127.5 - 1)
        started = (
            {"latents": noise}
            if level == 0
            else {"generator": [torch.Generator().manual_seed(seed_of(each)) for each in requests]}
        )
        size = {"height": height, "width": width} if not ddim else {}
        strength = 1.0 if level == 0 else (requests[0].steps(steps) + aimed) / steps
        made = pipeline(image=clean, strength=strength, **started, **size, **common).images
    return unpack(made, *shape) if flux else made


def compare(
    folder: Path,
    steps: int = 10,
    guidance_scale: float = 7.5,
    negative: str = "blurry",
    size: tuple[int, int] = (32, 32),
    **how: Any,
) -> None:
    """Latents equal those of diffusers at every level, with all levels in shared calls."""
    model = load(folder)
    requests = make_requests(2, negative=negative, size=size)
    engine = Engine(model, num_inference_steps=steps, guidance_scale=guidance_scale, slots=3)
    made = {
        request.id: latents
        for request, latents in engine.denoise(requests, lambda source: load_pixels(source, size))
    }
    assert set(made) == {request.id for request in requests}
    for level in LEVELS:
        same = [request for request in requests if request.level == level]
        wanted = with_diffusers(
            folder,
            model,
            same,
            steps=steps,
            guidance_scale=guidance_scale,
            shape=model.latent_shape(*size),
            **how,
        )
        assert (
            relative_error(torch.stack([made[request.id] for request in same]), wanted) <= 1e-4
        ), level


BASE = {
    "text": "StableDiffusionXLPipeline",
    "image": "StableDiffusionXLImg2ImgPipeline",
    "ddim": True,
}
REFINER = {
    "text": "StableDiffusionXLImg2ImgPipeline",
    "image": "StableDiffusionXLImg2ImgPipeline",
    "ddim": True,
}
SD3 = {
    "text": "StableDiffusion3Pipeline",
    "image": "StableDiffusion3Img2ImgPipeline",
    "aimed": -0.5,
}
FLUX = {"text": "FluxPipeline", "image": "FluxImg2ImgPipeline", "aimed": -0.5}


@pytest.mark.parametrize("guidance_scale", [1, 7.5])
@pytest.mark.parametrize("negative", [pytest.param("", marks=pytest.mark.slow), "blurry"])
def test_sdxl_base_equals_diffusers(tiny_xl: Path, guidance_scale: float, negative: str) -> None:
    """Without a negative prompt diffusers uses zeros, where the checkpoint says so."""
    compare(
        tiny_xl,
        guidance_scale=guidance_scale,
        negative=negative,
        **BASE,
        negative_prompt=[negative] * 2 if negative else None,
    )


def test_sdxl_with_another_offset_equals_diffusers(tiny_xl: Path, tmp_path: Path) -> None:
    """Its pipelines take the offset of the file, where those of Stable Diffusion force 1."""
    folder = Path(shutil.copytree(tiny_xl, tmp_path / "offset"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps_offset": 0}))
    compare(folder, **BASE, negative_prompt=["blurry"] * 2)
    assert load(folder).schedule(10, 32, 32).timesteps[-1] == 0


@pytest.mark.parametrize("negative", [pytest.param("", marks=pytest.mark.slow), "blurry"])
def test_sdxl_refiner_equals_diffusers(tiny_refiner: Path, negative: str) -> None:
    compare(
        tiny_refiner,
        negative=negative,
        **REFINER,
        negative_prompt=[negative] * 2 if negative else None,
    )


NO_T5 = ("text_encoder_3", "tokenizer_3")


@pytest.mark.parametrize("guidance_scale", [1, 5.0])
def test_stable_diffusion_3_equals_diffusers(tiny_sd3: Path, guidance_scale: float) -> None:
    compare(tiny_sd3, guidance_scale=guidance_scale, **SD3, negative_prompt=["blurry"] * 2)


def test_stable_diffusion_3_without_its_t5_equals_diffusers(tiny_sd3: Path, tmp_path: Path) -> None:
    """The T5 is often left out because of its size; model_index.json then says null."""
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "no-t5"))
    file = folder / "model_index.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {name: [None, None] for name in NO_T5})
    )
    shutil.rmtree(folder / "text_encoder_3")
    compare(folder, guidance_scale=5.0, **SD3, negative_prompt=["blurry"] * 2, absent=NO_T5)


def test_stable_diffusion_3_shifted_by_the_size_equals_diffusers(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "shifted"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))
    compare(folder, steps=13, guidance_scale=5.0, **SD3, negative_prompt=["blurry"] * 2)


@pytest.mark.parametrize(
    ("family", "how"),
    [("tiny_sd3", SD3 | {"negative_prompt": ["blurry"] * 2}), ("tiny_flux", FLUX)],
)
def test_flows_of_oblong_pictures_equal_diffusers(
    family: str, how: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """FLUX shifts its grid by the number of tokens, and encodes each one's row and column."""
    compare(request.getfixturevalue(family), guidance_scale=3.5, size=(32, 48), **how)


@pytest.mark.parametrize("steps", [10, pytest.param(13, marks=pytest.mark.slow)])
def test_flux_equals_diffusers(tiny_flux: Path, steps: int) -> None:
    compare(tiny_flux, steps=steps, guidance_scale=3.5, **FLUX)


def test_flux_without_guidance_equals_diffusers(tiny_schnell: Path) -> None:
    compare(tiny_schnell, guidance_scale=3.5, **FLUX)


def test_distilled_guidance_takes_one_row_a_step(tiny_flux: Path) -> None:
    engine = Engine(load(tiny_flux), num_inference_steps=10, guidance_scale=3.5, slots=2)
    list(engine.denoise(make_requests(1, [50]), load_pixels))
    assert engine.work.unet_rows == 5


def test_sides_beyond_the_places_of_the_network_are_refused(tiny_sd3: Path) -> None:
    most = describe_generator(str(tiny_sd3)).max_side
    assert most is not None
    check_generator(str(tiny_sd3), 4, most)
    with pytest.raises(CheckpointError, match=rf"{most + 16} .* at most {most} ") as raised:
        check_generator(str(tiny_sd3), 4, most + 16)
    assert raised.value.argument == "size"


def test_packing_and_back() -> None:
    latents = torch.randn(2, 4, 6, 8)
    packed = pack(latents)
    assert torch.equal(packed, diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(packed, 4, 6, 8), latents)


@pytest.mark.parametrize("family", ["tiny_xl", "tiny_refiner", "tiny_sd3", "tiny_flux"])
def test_pictures_come_from_every_family(family: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(family))
    engine = Engine(
        load_generator(folder, "bfloat16"), num_inference_steps=4, guidance_scale=4.0, slots=3
    )
    pictures = [picture for _, picture in engine.generate(make_requests(2, [0, 50]), load_pixels)]
    assert len(pictures) == 4 and all(
        picture.shape == (32, 32, 3) and picture.dtype == np.uint8 for picture in pictures
    )


@pytest.mark.parametrize(
    ("family", "name", "multiple", "distilled"),
    [
        ("tiny_xl", "SDXL", 4, False),
        ("tiny_refiner", "SDXL", 4, False),
        ("tiny_sd3", "Stable Diffusion 3.x", 8, False),
    ],
)
def test_description_of_every_family(
    family: str, name: str, multiple: int, distilled: bool, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(family))
    found, model = describe_generator(folder), load(Path(folder))
    assert (found.family, found.multiple, found.distilled, found.size) == (
        name,
        multiple,
        distilled,
        32,
    )
    assert (model.distilled, model.size) == (distilled, 32)  # type: ignore[attr-defined]
    check_generator(folder, 10, 32)
    with pytest.raises(CheckpointError, match=f"not a multiple of {multiple}"):
        check_generator(folder, 10, 33)


def test_description_says_who_denoises(tiny_xl: Path, tiny_refiner: Path, tiny_flux: Path) -> None:
    found = [describe_generator(str(folder)) for folder in (tiny_xl, tiny_refiner, tiny_flux)]
    assert [each.sampler for each in found] == ["DDIM", "DDIM", "Euler steps of the flow"]
    assert [each.aesthetic for each in found] == [False, True, False]


def test_description_of_flux(tiny_flux: Path) -> None:
    """Its files name no size: diffusers takes 128 latents a side."""
    found = describe_generator(str(tiny_flux))
    assert (found.family, found.multiple, found.distilled, found.size) == ("FLUX.1", 8, True, 512)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vae_is_never_in_half_precision(tiny_xl: Path, dtype: str) -> None:
    model = load_generator(str(tiny_xl), dtype)
    assert model.vae.dtype == {"float16": torch.float32, "bfloat16": torch.bfloat16}[dtype]  # type: ignore[attr-defined]
    assert model.dtype == {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]


def test_half_precision_files_alone_are_enough(tiny_xl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_xl, tmp_path / "half"))
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert load_generator(str(folder)).size == 32  # type: ignore[attr-defined]


def test_one_part_in_half_precision_is_enough(tiny_xl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_xl, tmp_path / "mixed"))
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert load_generator(str(folder)).size == 32  # type: ignore[attr-defined]


def test_refiner_without_its_flag_is_told(tiny_refiner: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_refiner, tmp_path / "refiner"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"requires_aesthetics_score": False})
    )
    with pytest.raises(
        CheckpointError, match=r"takes 72 numbers .* gets 80; check requires_aesthetics_score"
    ):
        load_generator(str(folder))


@pytest.mark.parametrize(
    ("family", "part"),
    [("tiny_xl", "tokenizer_2"), ("tiny_sd3", "transformer"), ("tiny_flux", "text_encoder_2")],
)
def test_missing_part_is_named(
    family: str, part: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "spoilt"))
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"no complete .* folder: {part} missing"):
        check_generator(str(folder), 10)
