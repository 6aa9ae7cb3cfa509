"""`LatentModel`: what the engine needs of a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .class_tokens import ClassTokens
from .schedules import Schedule

Conditioning = dict[str, Tensor]
"""Tensors by name, with one row per text or per row of a call."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LatentModel(Protocol):
    """What the engine needs of a generator.

    - `distilled`: guidance is built into the network. A step takes one row, and `guidance_scale` is
      part of its conditioning.
    - `class_tokens`: how prompts are written with the generator's class tokens; None without any.
    - `scheduler`, `autoencoder`: of the checkpoint, for the training of low-rank weights.
    """

    device: torch.device
    dtype: torch.dtype
    distilled: bool
    class_tokens: ClassTokens | None
    scheduler: Any
    autoencoder: Any

    @property
    def network(self) -> torch.nn.Module:
        """What `predict` calls, for torch.compile."""
        ...

    def schedule(
        self,
        num_inference_steps: int,
        height: int,
        width: int,
        fixed: bool = False,
        *,
        sampler: str = "ddim",
        timestep_spacing: str | None = None,
    ) -> Schedule:
        """The T steps for images of that many pixels; with `fixed`, T steps for every level.

        - `sampler`: one of `SAMPLERS`; a flow has only its own, which is the default.
        - `timestep_spacing`: as in `make_sampler`.

        Raises CheckpointError for a sampler that the family does not have.
        """
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """`[c, h, w]` of an image's latents.

        Raises CheckpointError for sides in pixels that the generator cannot make.
        """
        ...

    def encode_texts(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        """Tensors with one row per text; `negative` for negative prompts."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Scaled latents, float32, of pixels `[batch, 3, height, width]` in [−1, 1].

        The posterior's mode, so nothing is drawn.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 pixels `[batch, height, width, 3]`, on the CPU."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output, float32, for latents `[rows, c, h, w]` at `timesteps` `[rows]`."""
        ...
