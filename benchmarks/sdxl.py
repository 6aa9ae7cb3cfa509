"""SDXL with random weights, and diffusers' pipelines over the same parts, for `gpu.py`.

Also what `engine.py` shares with it: the rate of matrix products, and the work of a plan.

Speed does not depend on the values of the weights, so no checkpoint is needed. Texts are random
embeddings on both sides. Nothing here needs a data library.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from discl.spectrum.engine import Engine
from discl.spectrum.models.interface import Conditioning
from discl.spectrum.models.stable_diffusion import StableDiffusionXL
from discl.spectrum.plan import Request, Sampling, plan_requests, unet_rows
from discl.spectrum.slots import draw_noise
from discl.utils.hashing import derive_seed

LEVELS = (0, 10, 30, 50, 70, 90)
GUIDANCE_SCALE = 7.5
EQUAL = 1e-3
"""Rounding of a few steps in float32, as a share of the largest latent."""
TRUE = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
}
"""SDXL base 1.0, as its published configuration has it."""
TINY = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4, 4),
        "norm_num_groups": 16,
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "vae": {
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 1,
        "sample_size": 64,
        "norm_num_groups": 8,
    },
}


class RandomXL(StableDiffusionXL):
    """SDXL without text encoders: every text is a random embedding, a function of its words."""

    def _set_text_encoders(self, pipeline: Any) -> None:
        config = self.unet.config
        self.widths = (
            config.cross_attention_dim,
            config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,
        )
        self._aesthetic, self._sizes = False, {}

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        states, pooled = [], []
        for text in texts:
            generator = torch.Generator().manual_seed(sum(text.encode()))
            states.append(torch.randn(77, self.widths[0], generator=generator))
            pooled.append(torch.randn(self.widths[1], generator=generator))
        return {
            name: torch.stack(each).to(self.device, self.dtype)
            for name, each in (("encoder_hidden_states", states), ("text_embeds", pooled))
        }


def build(
    shape: dict[str, Any], device: str, dtype: torch.dtype, drawn_on: str | None = None
) -> RandomXL:
    """The network of that shape on the device.

    - `drawn_on`: where the weights are drawn, by default on `device`, which is faster. Each kind of
      device draws others.
    """
    torch.manual_seed(0)
    with torch.device(drawn_on or device):
        unet = UNet2DConditionModel(
            **shape["unet"], use_linear_projection=True, addition_embed_type="text_time"
        )
        vae = AutoencoderKL(
            **shape["vae"],
            latent_channels=4,
            scaling_factor=0.13025,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    return RandomXL(
        SimpleNamespace(unet=unet.to(dtype), vae=vae.to(dtype), scheduler=scheduler), device
    )


class Pipelines:
    """diffusers' two SDXL pipelines over the same parts."""

    def __init__(self, model: RandomXL, steps: int, size: int) -> None:
        self.model, self.steps, self.size = model, steps, size
        self.text, self.image = (
            self._pipeline(kind)
            for kind in (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline)
        )

    def _pipeline(self, kind: type) -> Any:
        model = self.model
        parts = {
            "text_encoder": None,
            "text_encoder_2": None,
            "tokenizer": None,
            "tokenizer_2": None,
        }
        pipeline: Any = kind(
            vae=model.vae,
            unet=model.unet,
            scheduler=DDIMScheduler.from_config(model.scheduler.config),
            **parts,
        )  # type: ignore[call-arg]
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def __call__(self, requests: Sequence[Request], batch: int) -> None:
        for level in LEVELS:
            same = [request for request in requests if request.level == level]
            for first in range(0, len(same), batch):
                self._call(same[first : first + batch])

    def _settings(self, requests: Sequence[Request]) -> dict[str, Any]:
        prompt = self.model.encode_texts([request.prompt for request in requests])
        negative = self.model.encode_texts(
            [request.negative_prompt for request in requests], negative=True
        )
        return {
            "prompt_embeds": prompt["encoder_hidden_states"],
            "pooled_prompt_embeds": prompt["text_embeds"],
            "negative_prompt_embeds": negative["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": negative["text_embeds"],
            "num_inference_steps": self.steps,
            "guidance_scale": GUIDANCE_SCALE,
            "output_type": "np",
        }

    @torch.inference_mode()
    def latents(self, request: Request) -> torch.Tensor:
        """What one request's image is decoded from, begun with the same noise as the engine's."""
        model, steps = self.model, request.steps(self.steps)
        settings = self._settings([request]) | {"output_type": "latent"}
        shape = model.latent_shape(self.size, self.size)
        noise = draw_noise(request.source_id, request.seed, request.attempt, shape)[None].to(
            model.device, model.dtype
        )
        if request.level == 0:
            return self.text(latents=noise, height=self.size, width=self.size, **settings).images
        channels_first = pixels_of(request.source_id, self.size).transpose(2, 0, 1)
        pixels = torch.from_numpy(channels_first.copy())[None].float() / 127.5 - 1
        clean = model.encode_images(pixels.to(model.device)).to(model.dtype)
        self.image.scheduler.set_timesteps(self.steps)
        begun = self.image.scheduler.add_noise(
            clean, noise, self.image.scheduler.timesteps[self.steps - steps][None]
        )
        return self.image(
            image=clean, latents=begun, strength=(steps + 0.5) / self.steps, **settings
        ).images

    @torch.inference_mode()
    def _call(self, requests: Sequence[Request]) -> None:
        common = self._settings(requests)
        if requests[0].level == 0:
            shape = self.model.latent_shape(self.size, self.size)
            noise = torch.stack(
                [draw_noise(each.source_id, each.seed, each.attempt, shape) for each in requests]
            )
            self.text(
                latents=noise.to(self.model.device, self.model.dtype),
                height=self.size,
                width=self.size,
                **common,
            )
            return
        pictures = [Image.fromarray(pixels_of(each.source_id, self.size)) for each in requests]
        self.image(
            image=pictures, strength=(requests[0].steps(self.steps) + 0.5) / self.steps, **common
        )


def make_requests(sources: int, steps: int, size: int) -> list[Request]:
    """The plan of `sources` images, all levels, one seed."""
    rows = [{"id": f"image-{row}", "digest": f"digest-{row}", "label": 0} for row in range(sources)]
    sampling = Sampling("model", "scheduler", steps, GUIDANCE_SCALE, size, "float32", "webp")
    prompts = {0: ["a photo of a bag", "a photo of one bag"]}
    return plan_requests(rows, LEVELS, 1, prompts, negative_prompt="", sampling=sampling)


def pixels_of(source: str, size: int) -> np.ndarray:
    """A picture uint8 `[size, size, 3]` of random patches, a pure function of the source's name."""
    rng = np.random.default_rng(derive_seed(source))
    coarse = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
    return np.array(coarse.resize((size, size), Image.Resampling.NEAREST))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: torch.dtype, side: int) -> float:
    """TFLOP/s of square matrix products, the best of five rounds of ten."""
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    rates = []
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        for _ in range(10):
            left @ right
        wait(device)
        rates.append(10 * 2 * side**3 / (time.perf_counter() - started) / 1e12)
    return max(rates)


@torch.inference_mode()
def count_flops(model: Any, size: int) -> tuple[float, float, float]:
    """TFLOP of one row of the network, one encode and one decode, by torch's counter."""
    latents = torch.zeros(1, *model.latent_shape(size, size), device=model.device)
    pixels = torch.zeros(1, 3, size, size, device=model.device)
    texts, timestep = model.encode_texts([""]), torch.full((1,), 500, device=model.device)
    found = []
    for call in (
        lambda: model.predict(latents, timestep, texts),
        lambda: model.encode_images(pixels),
        lambda: model.decode(latents),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        found.append(counter.get_total_flops() / 1e12)
    return found[0], found[1], found[2]


def count_work(flops: Sequence[float], requests: Sequence[Request], steps: int) -> float:
    """TFLOP of the requests: UNet rows, an encode per source, a decode per image."""
    row, encode, decode = flops
    return (
        unet_rows(requests, steps, GUIDANCE_SCALE) * row
        + len({each.source_id for each in requests if each.level}) * encode
        + len(requests) * decode
    )


def compare(shape: dict[str, Any], device: str, steps: int, levels: Sequence[int]) -> float:
    """Largest difference of latents from diffusers', in float32, relative to the maximum.

    The levels share the engine's calls. TF32 is off meanwhile.
    """
    torch.backends.cudnn.allow_tf32 = False
    model = build(shape, device, torch.float32)
    pipelines, engine = (
        Pipelines(model, steps, model.size),
        Engine(model, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, slots=3),
    )
    requests = [
        request for request in make_requests(1, steps, model.size) if request.level in levels
    ]
    found = []
    for request, got in engine.denoise(requests, lambda source: pixels_of(source, model.size)):
        wanted = pipelines.latents(request)[0].float().cpu()
        found.append(((got - wanted).abs().max() / wanted.abs().max()).item())
    torch.backends.cudnn.allow_tf32 = True
    return float(np.max(found))  # NaN stays NaN
