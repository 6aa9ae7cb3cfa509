"""Stable Diffusion 1.x, 2.x, SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checkpoint_checks import check_tokens
from ...errors import CheckpointError
from .class_tokens import ClassTokens
from .interface import Conditioning
from .samplers import LinearSteps, make_sampler
from .schedules import DDIM

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""Scores that the SDXL refiner gets for the prompt and for the negative prompt, as in diffusers."""


class TextEncoder(NamedTuple):
    """A text encoder with its tokenizer; `part` is its folder in diffusers' layout."""

    tokenizer: Any
    network: Any
    part: str

    @property
    def length(self) -> int:
        """Tokens that it reads of a text."""
        return min(self.tokenizer.model_max_length, self.network.config.max_position_embeddings)


def tokenize(tokenizer: Any, encoder: Any, texts: Sequence[str], length: int) -> Any:
    """Tokens of texts, padded or truncated to `length`.

    Raises CheckpointError for a broken tokenizer, and for tokens that the encoder does not know.
    """
    try:
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint's tokenizer cannot split a text into {length} tokens: {error}. "
            "Download its files again."
        ) from error
    check_tokens(tokens.input_ids, encoder)
    return tokens


class Autoencoder:
    """The VAE of a pipeline: pixels to scaled latents and back (arXiv 2112.10752, section 3.1)."""

    def __init__(self, vae: Any) -> None:
        self.vae, config = vae.to(memory_format=torch.channels_last), vae.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = config.latent_channels

        def per_channel(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=vae.device).view(-1, 1, 1)

        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        own = mean is not None and std is not None
        self.shift = per_channel(mean if own else getattr(config, "shift_factor", None) or 0.0)
        self.scale = config.scaling_factor / per_channel(std if own else 1.0)
        if not (torch.isfinite(self.shift).all() and torch.isfinite(1 / self.scale).all()):
            raise CheckpointError(
                f"the VAE's scaling_factor is {config.scaling_factor!r:.80}, which makes its "
                "latents infinite; download it again."
            )

    def shape(self, height: int, width: int, multiple: int) -> tuple[int, int, int]:
        """`[c, h, w]` of the latents. Raises CheckpointError for a side that is no multiple."""
        for side in (height, width):
            check_side(side, multiple)
        return self.channels, height // self.factor, width // self.factor

    def encode(self, pixels: Tensor) -> Tensor:
        """float32 `[batch, c, h, w]`, the posterior's mode, of pixels in [−1, 1]."""
        mode = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self.shift) * self.scale

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents of pixels in [−1, 1], float32."""
        found = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return (found.mean.float() - self.shift) * self.scale, found.std.float() * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 `[batch, height, width, 3]`, on the CPU."""
        pixels = self.vae.decode(
            (latents / self.scale + self.shift).to(self.vae.dtype)
        ).sample.float()
        return (
            ((pixels / 2 + 0.5).clamp(0, 1) * 255)
            .round()
            .to(torch.uint8)
            .permute(0, 2, 3, 1)
            .contiguous()
            .cpu()
        )


def check_side(side: int, multiple: int, max_side: int | None = None) -> None:
    """Raises CheckpointError (`size`) for a side in pixels that the networks cannot make.

    - `multiple`: the factor of the VAE, times the side of a patch for a transformer.
    - `max_side`: None where nothing bounds the side.
    """
    if max_side is not None and side > max_side:
        raise CheckpointError(
            f"{side} is more than this checkpoint's network has position embeddings for; "
            f"allowed: at most {max_side} pixels a side.",
            argument="size",
        )
    if side % multiple:
        near = max(round(side / multiple), 1) * multiple
        raise CheckpointError(
            f"{side} is not a multiple of {multiple}, the factor of this checkpoint's VAE; "
            f"use {near}.",
            argument="size",
        )


class StableDiffusion:
    """A Stable Diffusion 1.x/2.x checkpoint as a `LatentModel`.

    - `pipeline`: diffusers' pipeline of its parts.
    """

    distilled = False
    class_tokens: ClassTokens | None = None

    def __init__(self, pipeline: Any, device: torch.device | str = "cpu") -> None:
        unet, vae = pipeline.unet, pipeline.vae
        if unet.config.in_channels != vae.config.latent_channels:
            raise CheckpointError(
                f"the UNet takes {unet.config.in_channels} channels and the VAE makes "
                f"{vae.config.latent_channels}: this is an inpainting or another special "
                "checkpoint; use the plain text-to-image one."
            )
        self.device, self.dtype = torch.device(device), unet.dtype
        self.unet = unet.to(self.device, memory_format=torch.channels_last).eval()
        self.vae = vae.to(self.device).eval()
        self.scheduler = pipeline.scheduler
        self._schedules: dict[tuple[Any, ...], DDIM | LinearSteps] = {}
        self.autoencoder = Autoencoder(self.vae)
        self._set_text_encoders(pipeline)

    def _set_text_encoders(self, pipeline: Any) -> None:
        self.tokenizer, self.text_encoder = (
            pipeline.tokenizer,
            pipeline.text_encoder.to(self.device).eval(),
        )
        self.text_encoders = [TextEncoder(self.tokenizer, self.text_encoder, "text_encoder")]

    @property
    def network(self) -> torch.nn.Module:
        return self.unet

    @property
    def size(self) -> int:
        """Native pixels a side."""
        return self.unet.config.sample_size * self.autoencoder.factor

    def schedule(
        self,
        num_inference_steps: int,
        height: int,
        width: int,
        fixed: bool = False,
        *,
        sampler: str = "ddim",
        timestep_spacing: str | None = None,
    ) -> DDIM | LinearSteps:
        """The sampler's grid, the same for all sizes."""
        key = self.scheduler, num_inference_steps, fixed, sampler, timestep_spacing
        if key not in self._schedules:
            self._schedules[key] = make_sampler(
                self.scheduler,
                num_inference_steps,
                sampler=sampler,
                timestep_spacing=timestep_spacing,
                fixed=fixed,
            )
        return self._schedules[key]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.autoencoder.shape(height, width, self.autoencoder.factor)

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        (encoder,) = self.text_encoders
        tokens = tokenize(encoder.tokenizer, encoder.network, texts, encoder.length)
        mask = (
            tokens.attention_mask.to(self.device)
            if getattr(encoder.network.config, "use_attention_mask", False)
            else None
        )
        return {
            "encoder_hidden_states": encoder.network(
                tokens.input_ids.to(self.device),
                attention_mask=mask,
            )[0]
        }

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.unet(rows, timesteps, **conditioning, return_dict=False)[0].float()


class StableDiffusionXL(StableDiffusion):
    """An SDXL checkpoint, base or refiner (arXiv 2307.01952), as a `LatentModel`.

    The UNet also takes a pooled text embedding, the image's size and, in the refiner, an aesthetic
    score. Where the checkpoint says so (`force_zeros_for_empty_prompt`), an empty negative prompt
    becomes zeros instead of an embedding, as in diffusers without a negative prompt.
    """

    def _set_text_encoders(self, pipeline: Any) -> None:
        self.text_encoders = [
            TextEncoder(tokenizer, encoder.to(self.device).eval(), part)
            for tokenizer, encoder, part in (
                (pipeline.tokenizer, pipeline.text_encoder, "text_encoder"),
                (pipeline.tokenizer_2, pipeline.text_encoder_2, "text_encoder_2"),
            )
            if encoder is not None
        ]
        self._zeros = bool(pipeline.config.force_zeros_for_empty_prompt)
        self._aesthetic = bool(pipeline.config.requires_aesthetics_score)
        numbers = 5 if self._aesthetic else 6
        takes = self.unet.add_embedding.linear_1.in_features
        gives = (
            numbers * self.unet.config.addition_time_embed_dim
            + pipeline.text_encoder_2.config.projection_dim
        )
        if takes != gives:
            raise CheckpointError(
                f"the UNet takes {takes} numbers beside the text and gets {gives}; check "
                f"requires_aesthetics_score (now {str(self._aesthetic).lower()}; true for the SDXL "
                "refiner) in model_index.json."
            )
        self._sizes: dict[tuple[int, int], Tensor] = {}

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        states = []
        for encoder in self.text_encoders:
            tokens = tokenize(encoder.tokenizer, encoder.network, texts, encoder.length)
            output = encoder.network(tokens.input_ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]  # of the last encoder
        hidden = torch.cat(states, dim=-1)
        if negative and self._zeros:
            kept = torch.tensor([text != "" for text in texts], device=self.device)
            hidden, pooled = hidden * kept[:, None, None], pooled * kept[:, None]
        score = NEGATIVE_AESTHETIC_SCORE if negative else AESTHETIC_SCORE
        scores = (
            {"aesthetic_score": torch.full((len(texts), 1), score, device=self.device)}
            if self._aesthetic
            else {}
        )
        return {"encoder_hidden_states": hidden, "text_embeds": pooled, **scores}

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = (
            latents.shape[-2] * self.autoencoder.factor,
            latents.shape[-1] * self.autoencoder.factor,
        )
        if (height, width) not in self._sizes:
            size = [height, width, 0, 0]  # original size and crop, as in diffusers
            if not self._aesthetic:
                size += [height, width]  # target size
            self._sizes[height, width] = torch.tensor(
                [size], dtype=torch.float32, device=self.device
            )
        numbers = [self._sizes[height, width].expand(len(latents), -1)]
        if self._aesthetic:
            numbers.append(conditioning["aesthetic_score"])
        added = {
            "text_embeds": conditioning["text_embeds"],
            "time_ids": torch.cat(numbers, dim=1).to(self.dtype),
        }
        rows = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        states = conditioning["encoder_hidden_states"]
        return self.unet(
            rows,
            timesteps,
            encoder_hidden_states=states,
            added_cond_kwargs=added,
            return_dict=False,
        )[0].float()
