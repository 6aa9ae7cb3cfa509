"""Stable Diffusion 1.x, 2.x, SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...checkpoint_checks import check_tokens
from ...errors import CheckpointError
from .interface import Conditioning
from .schedules import DDIM, make_ddim

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What the SDXL refiner is told of the wished-for picture, and of the one that guidance leads away from; diffusers' defaults."""


def cut(tokenizer: Any, encoder: Any, texts: Sequence[str], length: int) -> Any:
    """Texts as tokens that the encoder knows, filled up to `length`. Raises CheckpointError where the tokenizer's files are spoilt."""
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
            f"the checkpoint's tokenizer cannot cut a text into {length} tokens: {error}. Fetch its files anew."
        ) from error
    check_tokens(tokens.input_ids, encoder)
    return tokens


class Autoencoder:
    """The VAE of a pipeline: pixels to scaled latents and back."""

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
                f"the VAE's scaling_factor is {config.scaling_factor!r:.80}, with which its latents are no finite numbers; fetch it anew."
            )

    def shape(self, height: int, width: int, multiple: int) -> tuple[int, int, int]:
        """`[c, h, w]` of the latents. Raises CheckpointError for a side that is no multiple of `multiple` pixels."""
        for side in (height, width):
            check_side(side, multiple)
        return self.channels, height // self.factor, width // self.factor

    def encode(self, pixels: Tensor) -> Tensor:
        mode = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self.shift) * self.scale

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents of pixels in [−1, 1], float32."""
        found = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return (found.mean.float() - self.shift) * self.scale, found.std.float() * self.scale

    def decode(self, latents: Tensor) -> Tensor:
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


def check_side(side: int, multiple: int, most: int | None = None) -> None:
    """Raises CheckpointError for pixels that the VAE (and the patches of a transformer) cannot divide evenly, or more than `most`."""
    if most is not None and side > most:
        raise CheckpointError(
            f"size {side} is more than this checkpoint's network has places for; {most} pixels a side are the most."
        )
    if side % multiple:
        near = max(round(side / multiple), 1) * multiple
        raise CheckpointError(
            f"size {side} is not a multiple of {multiple}, the factor of this checkpoint's VAE; {near} would be."
        )


class StableDiffusion:
    """A Stable Diffusion 1.x/2.x checkpoint, from diffusers' pipeline of its parts."""

    distilled = False

    def __init__(self, pipeline: Any, device: torch.device | str = "cpu") -> None:
        unet, vae = pipeline.unet, pipeline.vae
        if unet.config.in_channels != vae.config.latent_channels:
            raise CheckpointError(
                f"the UNet takes {unet.config.in_channels} channels and the VAE makes {vae.config.latent_channels}: "
                "this is an inpainting or another special checkpoint; use the plain text-to-image one."
            )
        self.device, self.dtype = torch.device(device), unet.dtype
        self.unet = unet.to(self.device, memory_format=torch.channels_last).eval()
        self.vae = vae.to(self.device).eval()
        self.scheduler = pipeline.scheduler
        self.autoencoder = Autoencoder(self.vae)
        self._take_texts(pipeline)

    def _take_texts(self, pipeline: Any) -> None:
        self.tokenizer, self.text_encoder = (
            pipeline.tokenizer,
            pipeline.text_encoder.to(self.device).eval(),
        )
        self._length = min(
            self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings
        )

    @property
    def network(self) -> torch.nn.Module:
        return self.unet

    @property
    def size(self) -> int:
        """Native pixels a side."""
        return self.unet.config.sample_size * self.autoencoder.factor

    def schedule(
        self, num_inference_steps: int, height: int, width: int, fixed: bool = False
    ) -> DDIM:
        """DDIM's grid, the same for all sizes."""
        return make_ddim(self.scheduler, num_inference_steps, fixed)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.autoencoder.shape(height, width, self.autoencoder.factor)

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        tokens = cut(self.tokenizer, self.text_encoder, texts, self._length)
        mask = (
            tokens.attention_mask.to(self.device)
            if getattr(self.text_encoder.config, "use_attention_mask", False)
            else None
        )
        return {
            "encoder_hidden_states": self.text_encoder(
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
    """An SDXL checkpoint, base or refiner: the UNet is also told a pooled text, the picture's size and, the refiner, its beauty.

    An empty negative prompt is no text at all but zeros where the checkpoint was trained so (`force_zeros_for_empty_prompt`),
    which is what diffusers does for a caller who names none.
    """

    def _take_texts(self, pipeline: Any) -> None:
        pairs = (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        )
        self.text_encoders = [
            (tokenizer, encoder.to(self.device).eval())
            for tokenizer, encoder in pairs
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
                f"the UNet takes {takes} numbers beside the text and gets {gives}; check requires_aesthetics_score "
                f"(now {str(self._aesthetic).lower()}; true for the SDXL refiner) in model_index.json."
            )
        self._sizes: dict[tuple[int, int], Tensor] = {}

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        states = []
        for tokenizer, encoder in self.text_encoders:
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            tokens = cut(tokenizer, encoder, texts, length)
            output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
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
            told = (
                [height, width, 0, 0] if self._aesthetic else [height, width, 0, 0, height, width]
            )  # original size, crop, target size
            self._sizes[height, width] = torch.tensor(
                [told], dtype=torch.float32, device=self.device
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
