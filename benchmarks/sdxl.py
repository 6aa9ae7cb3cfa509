"""The engine against diffusers' pipelines on a GPU, with the shape of SDXL and random weights.

    python benchmarks/sdxl.py --json benchmarks/results/sdxl.json   # one GPU
    python benchmarks/sdxl.py --sources 8 --repetitions 1           # a short run
    python benchmarks/sdxl.py --smoke       # a tiny network on a CPU; its times mean nothing

Both run plain and compiled, and are compared with the matmul ceiling. First the latents of both
sides are compared in float32. If they differ, no speed is measured. Speed does not depend on the
values of the weights, so no checkpoint is needed. Texts are random embeddings on both sides.
Fractions are of the bf16 matmul rate measured in the same process. Work is counted by torch's FLOP
counter on one call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from discl.spectrum.engine import Engine
from discl.spectrum.models.interface import Conditioning
from discl.spectrum.models.stable_diffusion import StableDiffusionXL
from discl.spectrum.plan import Request, unet_rows
from discl.spectrum.slots import draw_noise
from engine import (
    LEVELS,
    Figure,
    count_flops,
    count_work,
    interleave,
    make_requests,
    matmul_ceiling,
    pixels_of,
    ratio,
    table,
    wait,
)

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


def build(shape: dict[str, Any], device: str, dtype: torch.dtype) -> RandomXL:
    """The network of that shape on the device."""
    torch.manual_seed(0)
    with torch.device(device):
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


def score_seconds(device: str, size: int, images: int) -> float:
    """Seconds that a CLIP ViT-B/32 with random weights takes for a number of images.

    Includes preprocessing, in batches of 32.
    """
    clip = CLIPModel(CLIPConfig()).to(device).eval()
    processor = CLIPImageProcessorPil()
    pictures = [Image.fromarray(pixels_of(f"{row}", size)) for row in range(32)]
    for _ in range(2):
        wait(device)
        started = time.perf_counter()
        with torch.inference_mode():
            clip.get_image_features(
                pixel_values=processor(images=pictures, return_tensors="pt")["pixel_values"].to(
                    device
                )
            )
        wait(device)
        seconds = time.perf_counter() - started
    return seconds * images / 32


def compare(shape: dict[str, Any], device: str, steps: int, levels: Sequence[int]) -> float:
    """Largest difference of latents from diffusers', in float32, relative to the maximum."""
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
    return max(found)


def measure(
    arguments: argparse.Namespace, device: str, dtype: torch.dtype
) -> tuple[list[Figure], dict[str, Any]]:
    shape = TINY if arguments.smoke else TRUE
    difference = compare(
        shape,
        device,
        min(arguments.steps, 10),
        LEVELS if arguments.smoke else (LEVELS[0], LEVELS[-2]),
    )
    if not difference <= EQUAL:
        raise SystemExit(
            f"the engine's latents differ from diffusers' by {difference:.2g} of the largest "
            "value; nothing was measured."
        )
    model = build(shape, device, dtype)
    steps, size = arguments.steps, model.size
    engine = Engine(
        model, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, slots=arguments.slots or 1
    )
    slots = arguments.slots or engine.fit_slots(size, size)
    requests = make_requests(arguments.sources, steps, size)
    rows = unet_rows(requests, steps, GUIDANCE_SCALE)
    flops, total = count_flops(model, size), count_work(model, requests, steps, size)
    ceiling = matmul_ceiling(device, dtype, 256 if arguments.smoke else 8192)
    single = requests[: len(LEVELS)]
    pipelines = Pipelines(model, steps, size)
    calls = 0

    def generate() -> None:
        nonlocal calls
        before = engine.work.unet_calls
        for _ in engine.generate(requests, lambda source: pixels_of(source, size)):
            pass
        calls = engine.work.unet_calls - before

    def bare() -> None:
        call = engine._make_call(size, size)
        for _ in range(calls):
            call()

    def arms() -> dict[str, Callable[[], object]]:
        return {
            "engine": generate,
            "bare": bare,
            "per level": lambda: pipelines(requests, slots),
            "per image": lambda: pipelines(single, 1),
        }

    figures = [
        Figure("difference from diffusers' latents, float32", difference, "<=", EQUAL),
        Figure("matmul ceiling, TFLOP/s", ceiling),
        Figure("slots", slots),
        Figure(
            "one row of the UNet, TFLOP",
            flops[0],
            detail=f"encode {flops[1]:.2f}, decode {flops[2]:.2f}",
        ),
    ]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        generate()
        figures.append(
            Figure("peak memory of the engine, GiB", torch.cuda.max_memory_allocated() / 2**30)
        )
    for name in ("plain", "compiled")[: 1 if arguments.smoke and not arguments.compile else 2]:
        if name == "compiled":
            engine.compile(size, size)
        seconds = interleave(arms(), arguments.repetitions)
        taken = statistics.median(seconds["engine"])
        one_by_one = [each * len(requests) / len(single) for each in seconds["per image"]]
        told = ", ".join(
            f"{arm} {statistics.median(values):.2f} s" for arm, values in seconds.items()
        )
        figures += [
            Figure(f"{name}: images/s", len(requests) / taken, detail=told),
            Figure(
                f"{name}: share of the matmul ceiling",
                total / taken / ceiling,
                ">=",
                0.45,
                "aim .6",
            ),
            Figure(
                f"{name}: engine ÷ bare UNet loop",
                ratio(seconds["bare"], seconds["engine"]),
                ">=",
                0.95,
                f"{calls} calls",
            ),
            Figure(
                f"{name}: idle share of the network",
                1 - statistics.median(seconds["bare"]) / taken,
                detail="VAE and texts included",
            ),
            Figure(
                f"{name}: engine ÷ diffusers per (image, level)",
                ratio(one_by_one, seconds["engine"]),
            ),
            Figure(
                f"{name}: engine ÷ diffusers per-level batches",
                ratio(seconds["per level"], seconds["engine"]),
                ">=",
                0.98,
            ),
        ]
        if name == "plain":
            share = score_seconds(device, size, len(requests)) / taken
            figures.append(Figure("CLIP ViT-B/32 scoring ÷ generation", share, "<=", 0.02))
    settings = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(dtype),
        "size": size,
        "slots": slots,
        "num_inference_steps": steps,
        "levels": list(LEVELS),
        "sources": arguments.sources,
        "repetitions": arguments.repetitions,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "unet_parameters": sum(each.numel() for each in model.unet.parameters()),
        "unet_rows": rows,
        "smoke": arguments.smoke,
    }
    return figures, settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=int, default=24, help="images; each gets six levels")
    parser.add_argument(
        "--slots", type=int, help="images that share a call (default: found by trying)"
    )
    parser.add_argument("--steps", type=int, default=20, help="inference steps T")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="with --smoke: compile too")
    parser.add_argument("--smoke", action="store_true", help="a tiny network on the CPU")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        raise SystemExit(
            "this machine has no NVIDIA GPU; --smoke runs the same code with a tiny network "
            "on the CPU."
        )
    if arguments.smoke:
        arguments.sources, arguments.slots, arguments.steps, arguments.repetitions = 2, 4, 10, 1
    figures, settings = measure(
        arguments,
        "cpu" if arguments.smoke else "cuda",
        torch.float32 if arguments.smoke else torch.bfloat16,
    )
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(table(figures))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(figure), "met": figure.met} for figure in figures]
        arguments.json.write_text(
            json.dumps({"settings": settings, "figures": rows}, indent=1, ensure_ascii=False)
        )


if __name__ == "__main__":
    main()
