"""Latent diffusion checkpoints behind one small interface.

The engine knows only `LatentModel`: texts and pictures in, noise predictions for rows that may each stand at a step of
their own, pictures out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoints import checkpoint_digest, find_checkpoint
from ..digests import digest
from ..errors import CheckpointError

Conditioning = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Schedule:
    """The DDIM grid of T steps (arXiv 2010.02502): step i goes from `timesteps[i]`, where ᾱ = `alphas[i]`, to `alphas_next[i]`.

    `clip` bounds the predicted clean latents where the checkpoint's scheduler asks for it.
    """

    timesteps: Tensor
    alphas: Tensor
    alphas_next: Tensor
    prediction_type: str
    clip: float | None

    def __len__(self) -> int:
        return len(self.timesteps)


class LatentModel(Protocol):
    """What the engine needs of a checkpoint."""

    device: torch.device
    dtype: torch.dtype

    def schedule(self, num_inference_steps: int) -> Schedule: ...

    def latent_shape(self, size: int) -> tuple[int, int, int]: ...

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        """Tensors with one row per text."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Scaled latents, float32, of pixels `[batch, 3, size, size]` in [−1, 1]; the posterior's mode, so nothing is drawn."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 pixels `[batch, size, size, 3]`, on the CPU."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output, float32, for latents `[rows, c, h, w]` at `timesteps` `[rows]`."""
        ...


def make_schedule(scheduler: Any, num_inference_steps: int) -> Schedule:
    """The grid of a diffusers `DDIMScheduler`. Raises CheckpointError for settings that DDIM on latents does not have."""
    config = scheduler.config
    if config.thresholding or config.prediction_type not in {"epsilon", "v_prediction", "sample"}:
        raise CheckpointError(
            f"the scheduler's prediction type '{config.prediction_type}' (thresholding {config.thresholding}) is not supported."
        )
    if num_inference_steps > config.num_train_timesteps:
        raise CheckpointError(
            f"{num_inference_steps} inference steps exceed the {config.num_train_timesteps} that the checkpoint was trained for; use fewer."
        )
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.cpu().long()
    following = timesteps - config.num_train_timesteps // num_inference_steps
    alphas = scheduler.alphas_cumprod.cpu().float()
    alphas_next = torch.where(following >= 0, alphas[following.clamp_min(0)], scheduler.final_alpha_cumprod.float())
    return Schedule(
        timesteps, alphas[timesteps], alphas_next, config.prediction_type, config.clip_sample_range if config.clip_sample else None
    )


class StableDiffusion:
    """A Stable Diffusion 1.x/2.x checkpoint: UNet2DConditionModel, AutoencoderKL, CLIP text encoder, DDIM."""

    def __init__(self, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Any, device: torch.device | str = "cpu") -> None:
        if unet.config.in_channels != vae.config.latent_channels:
            raise CheckpointError(
                f"the UNet takes {unet.config.in_channels} channels and the VAE makes {vae.config.latent_channels}: "
                "this is an inpainting or another special checkpoint; use the plain text-to-image one."
            )
        self.device, self.dtype = torch.device(device), unet.dtype
        self.unet = unet.to(self.device, memory_format=torch.channels_last).eval()
        self.vae = vae.to(self.device).eval()
        self.text_encoder = text_encoder.to(self.device).eval()
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self._scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self._length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)

    @property
    def size(self) -> int:
        """Native pixels a side."""
        return self.unet.config.sample_size * self._scale

    def schedule(self, num_inference_steps: int) -> Schedule:
        return make_schedule(self.scheduler, num_inference_steps)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Raises CheckpointError for a size that the VAE cannot halve evenly."""
        _check_size(size, self._scale)
        return self.unet.config.in_channels, size // self._scale, size // self._scale

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        tokens = self.tokenizer(list(texts), padding="max_length", max_length=self._length, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(self.device) if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        return {"encoder_hidden_states": self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]}

    def encode_images(self, pixels: Tensor) -> Tensor:
        mode = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode()
        return mode.float() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.unet(rows, timesteps, **conditioning, return_dict=False)[0].float()


def describe_generator(address: str) -> tuple[str, str, int]:
    """(digest of the checkpoint, digest of its DDIM settings, native pixels a side), read without loading any weight."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = find_checkpoint(address)
    _check_family(folder)
    scheduler = load_scheduler(folder)
    unet, vae = UNet2DConditionModel.load_config(folder / "unet"), AutoencoderKL.load_config(folder / "vae")
    settings = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return checkpoint_digest(folder), digest("DDIM", settings), unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def check_generator(address: str, num_inference_steps: int, size: int | None = None) -> None:
    """Raises CheckpointError for a checkpoint that is missing, of another family, or cannot do so many steps or this size.

    Reads configurations only, no weight.
    """
    from diffusers import AutoencoderKL

    folder = find_checkpoint(address)
    _check_family(folder)
    make_schedule(load_scheduler(folder), num_inference_steps)
    if size is not None:
        _check_size(size, 2 ** (len(AutoencoderKL.load_config(folder / "vae")["block_out_channels"]) - 1))


def _check_size(size: int, factor: int) -> None:
    if size % factor:
        near = max(round(size / factor), 1) * factor
        raise CheckpointError(f"size {size} is not a multiple of {factor}, the factor of this checkpoint's VAE; {near} would be.")


def load_scheduler(folder: Path) -> Any:
    """The checkpoint's schedule as DDIM, whatever sampler it was published with.

    Clipping is off and the offset 1, as diffusers' Stable Diffusion pipelines force them: many samplers' files name neither,
    and DDIM's own defaults would then bound the latents by ±1.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(DDIMScheduler.load_config(folder / "scheduler"), clip_sample=False, steps_offset=1)


def load_generator(address: str, dtype: str = "float32", device: torch.device | str = "cpu") -> StableDiffusion:
    """The checkpoint of a folder in diffusers' format, a hub name or `embedded:...`.

    The VAE runs in float32 where float16 is asked for (it overflows there). Raises CheckpointError for a folder that
    lacks a component or weights, holds pickled weights, or is of a family that is not supported.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors import SafetensorError
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = find_checkpoint(address)
    _check_family(folder)
    wanted = DTYPES[dtype]
    try:
        return StableDiffusion(
            unet=UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=wanted, use_safetensors=True),
            vae=AutoencoderKL.from_pretrained(
                folder / "vae", torch_dtype=torch.float32 if dtype == "float16" else wanted, use_safetensors=True
            ),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=wanted, use_safetensors=True),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            scheduler=load_scheduler(folder),
            device=device,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint '{folder}' cannot be loaded: {error}") from error


def _check_family(folder: Path) -> None:
    lacking = [name for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if not (folder / name).is_dir()]
    if lacking:
        found = ", ".join(sorted(item.name for item in folder.iterdir()))
        raise CheckpointError(
            f"checkpoint '{folder}' is no Stable Diffusion folder: it lacks {', '.join(lacking)} (it holds {found}). "
            "Expected diffusers' layout with unet/, vae/, text_encoder/, tokenizer/ and scheduler/."
        )
    if (folder / "text_encoder_2").is_dir():
        raise CheckpointError(
            f"checkpoint '{folder}' is an SDXL folder (it has text_encoder_2); only Stable Diffusion 1.x and 2.x are supported so far."
        )
    for name in ("unet", "vae", "text_encoder"):
        if not any((folder / name).glob("*.safetensors")):
            raise CheckpointError(
                f"checkpoint '{folder}': {name}/ holds no *.safetensors file. Fetch it, or convert pickled weights, which are refused "
                "because unpickling runs code, with save_pretrained(..., safe_serialization=True)."
            )
    if not any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(
            f"checkpoint '{folder}': tokenizer/ holds no vocabulary (tokenizer.json, or vocab.json with merges.txt); fetch it."
        )
