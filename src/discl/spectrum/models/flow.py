"""Stable Diffusion 3.x, FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .class_tokens import ClassTokens
from .interface import Conditioning
from .samplers import check_own_sampler
from .schedules import Flow, make_flow
from .stable_diffusion import Autoencoder


class FlowModel:
    """Base of the flow-matching families: a transformer over patches of 2 × 2 latents.

    - `pipeline`: diffusers' pipeline of the checkpoint's parts.

    `from_one` and `max_shift` are those of `make_flow`.
    """

    from_one = False
    max_shift = 1.16
    class_tokens: ClassTokens | None = None

    def __init__(self, pipeline: Any, device: torch.device | str = "cpu") -> None:
        self.device, self.dtype = torch.device(device), pipeline.transformer.dtype
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.to(self.device).eval()
        self.pipeline, self.transformer, self.scheduler = (
            pipeline,
            pipeline.transformer,
            pipeline.scheduler,
        )
        self.autoencoder = Autoencoder(pipeline.vae)
        self.patch = self._check_channels()

    def _check_channels(self) -> int:
        """Latents a side of a patch. Raises CheckpointError for channels that the VAE lacks."""
        patch = self.transformer.config.patch_size
        _check_channels(self.transformer.config.in_channels, self.autoencoder.channels)
        return patch

    @property
    def network(self) -> torch.nn.Module:
        return self.transformer

    @property
    def size(self) -> int:
        """Native pixels a side."""
        return self.pipeline.default_sample_size * self.autoencoder.factor

    def schedule(
        self,
        num_inference_steps: int,
        height: int,
        width: int,
        fixed: bool = False,
        *,
        sampler: str = "ddim",
        timestep_spacing: str | None = None,
    ) -> Flow:
        check_own_sampler("a flow", sampler, timestep_spacing)
        side = self.autoencoder.factor * self.patch
        tokens = (height // side) * (width // side)
        return make_flow(
            self.scheduler,
            num_inference_steps,
            tokens,
            from_one=self.from_one,
            max_shift=self.max_shift,
            fixed=fixed,
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.autoencoder.shape(height, width, self.autoencoder.factor * self.patch)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)


def _check_channels(takes: int, makes: int) -> None:
    if takes != makes:
        raise CheckpointError(
            f"the transformer takes {takes} channels and the VAE makes {makes}: this is an "
            "inpainting or another special checkpoint; use the plain text-to-image one."
        )


class StableDiffusion3(FlowModel):
    """A Stable Diffusion 3.x checkpoint (arXiv 2403.03206): two CLIPs, and a T5 if there is one."""

    distilled = False

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        prompts = list(texts)
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, prompts, prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.transformer(
            latents.to(self.dtype), timestep=timesteps, **conditioning, return_dict=False
        )[0].float()


class Flux(FlowModel):
    """A FLUX.1 checkpoint. Its guidance is distilled into the network.

    The scale is an input of [dev]; [schnell] has none.
    """

    distilled = True
    from_one = True
    max_shift = 1.15

    def _check_channels(self) -> int:
        _check_channels(self.transformer.config.in_channels, 4 * self.autoencoder.channels)
        return 2

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        states, pooled, _ = self.pipeline.encode_prompt(list(texts), None, device=self.device)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        channels, height, width = latents.shape[1:]
        states = conditioning["encoder_hidden_states"]
        positions = torch.zeros(height // 2, width // 2, 3, device=self.device, dtype=self.dtype)
        positions[..., 1] += torch.arange(height // 2, device=self.device)[:, None]
        positions[..., 2] += torch.arange(width // 2, device=self.device)[None, :]
        output = self.transformer(
            pack(latents).to(self.dtype),
            timestep=timesteps.to(self.dtype) / 1000,
            guidance=conditioning["guidance_scale"].float()
            if self.transformer.config.guidance_embeds
            else None,
            pooled_projections=conditioning["pooled_projections"],
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=self.device, dtype=states.dtype),
            img_ids=positions.view(-1, 3),
            return_dict=False,
        )[0]
        return unpack(output, channels, height, width).float()


def pack(latents: Tensor) -> Tensor:
    """`[rows, c, h, w]` -> one token per 2 × 2 latents, `[rows, h/2 · w/2, 4c]`."""
    rows, channels, height, width = latents.shape
    patches = latents.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    patches = tokens.view(-1, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, channels, height, width)
