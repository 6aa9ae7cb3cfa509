"""Section `spectrum`: the synthetic images, and how the generator is adapted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from ..errors import RecipeError, arguments_named, shorten
from ..levels import check_levels
from .budget import Budget
from .paths import PathOrName
from .rejection import EarlyRejection
from .types import Level, Strict


class Lora(Strict):
    """Weights that are added to those of the generator."""

    path: PathOrName = Field(
        description="a *.safetensors file, or owner/name/FILE.safetensors on the hub"
    )
    scale: float = Field(1.0, ge=-100, le=100, description="factor of the weights")


TOKEN_RATE = 5e-4


class Adapt(Strict):
    """Low-rank weights and class tokens that teach the generator the domain of the real images.

    Low-rank weights need pip install 'discl[lora]'. Classes are drawn equally often.
    """

    LATER = ("class_tokens", "token_learning_rate")

    rank: int = Field(
        8, ge=0, le=1024, description="of the low-rank weights; 0: class tokens alone"
    )
    steps: int = Field(500, ge=1, le=1_000_000, description="gradient steps")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="of AdamW, for the low-rank weights")
    class_tokens: int = Field(
        0,
        ge=0,
        le=16,
        description="learned embeddings of each class, in the place of its name in prompts "
        "(textual inversion); for Stable Diffusion 1.x, 2.x and SDXL; 0: none",
    )
    token_learning_rate: float = Field(
        TOKEN_RATE, gt=0, le=1, description="of AdamW, for the class tokens"
    )
    batch_size: int = Field(4, ge=1, le=4096)
    layers: Literal["attention", "attention-and-convolutions"] = Field(
        "attention", description="layers with low-rank weights; convolutions: those of a UNet"
    )
    flip: bool = Field(False, description="mirror every second image")
    prior_weight: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="weight of the loss on images of the unadapted generator (DreamBooth)",
    )
    prior_images: int = Field(64, ge=2, le=100_000, description="how many of these")
    gradient_checkpointing: bool = Field(False, description="less memory, about a third slower")
    seed: int = Field(0, ge=0, le=2**32 - 1)

    @model_validator(mode="after")
    def _trains_something(self) -> Adapt:
        if not self.rank and not self.class_tokens:
            raise RecipeError(
                "spectrum.adapt.rank and class_tokens are both 0, so nothing would be trained; set "
                "one, or remove adapt."
            )
        return self


class Spectrum(Strict):
    """Phase 1: the synthetic images of each hard image."""

    LATER = ("wanted", "budget", "early_rejection", "sampler", "timestep_spacing")

    checkpoint: PathOrName = Field(
        description="folder in diffusers' format, hub name, single *.safetensors file, or "
        "embedded:fashion-mnist"
    )
    config: PathOrName | None = Field(
        None,
        description="single file: folder or hub name with the configurations of its family; null: "
        "a folder beside it",
    )
    loras: list[Lora] = Field(
        default_factory=list,
        max_length=100,
        description="LoRA weights and their scales; they need pip install 'discl[lora]'",
    )
    adapt: Adapt | None = Field(
        None,
        description="train low-rank weights or class tokens on the real images first; null: do not",
    )
    levels: list[Level] = Field(min_length=1, max_length=100)
    seeds: int = Field(8, ge=1, le=10_000, description="synthetic images per source and level")
    wanted: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="kept images per source and level; seeds are drawn until the filter has kept "
        "as many, at most wanted × tries; replaces seeds",
    )
    tries: int = Field(
        1,
        ge=1,
        le=1000,
        description="maximum number of tries per image until the filter keeps one, each with "
        "another prompt and noise",
    )
    budget: Budget | None = Field(
        None, description="the most that is generated; null: the whole plan and its tries"
    )
    early_rejection: EarlyRejection | None = Field(
        None,
        description="drop images on the way that the filter would drop, with a bound on what is "
        "lost; null: finish all",
    )
    num_inference_steps: int = Field(50, ge=1, le=10_000)
    guidance_scale: float = Field(
        10.0,
        ge=1,
        le=1000,
        description="classifier-free guidance, s = 1 + w of eq. 2, as diffusers counts it",
    )
    steps: Literal["per-level", "fixed"] = Field(
        "per-level",
        description="level λ takes the last t(λ) of T steps, as in the paper, or T finer steps "
        "over the same noise",
    )
    sampler: Literal["ddim", "dpm-solver++", "euler", "lcm", "tcd"] = Field(
        "ddim",
        description="for Stable Diffusion and SDXL; other families have their own; lcm and tcd "
        "are for weights distilled for them",
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        None,
        description="of the sampler's grid, as diffusers counts it; null: the checkpoint's own; "
        "few-step weights need trailing",
    )
    guidance_interval: tuple[
        Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]
    ] = Field(
        (0.0, 1.0),
        description="part of the noise schedule with guidance, 1 is pure noise; other steps cost "
        "half; lossy",
    )
    size: int | None = Field(
        None, ge=8, le=16_384, description="pixels per side; null: the size of the checkpoint"
    )
    resize: Literal["square", "keep-aspect"] = Field(
        "square",
        description="centre squares of size × size, or about as many pixels at the aspect of the "
        "image, up to 4 : 1",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    encoding: Literal["webp-lossless", "webp", "jpeg", "png"] = "webp-lossless"

    @property
    def makes_none(self) -> bool:
        """Whether the budget is no image at all."""
        return self.budget is not None and self.budget.images == 0

    @model_validator(mode="after")
    def _wanted_has_tries(self) -> Spectrum:
        if self.wanted is not None and self.tries == 1:
            raise RecipeError(
                f"spectrum.wanted = {self.wanted} draws further seeds only with spectrum.tries of "
                "2 or more, the most draws per wanted image; set it, or use "
                f"spectrum.seeds: {self.wanted}."
            )
        return self

    @model_validator(mode="after")
    def _levels_are_generated(self) -> Spectrum:
        if len(set(self.levels)) != len(self.levels):
            raise RecipeError(f"spectrum.levels names a level twice: {shorten(list(self.levels))}.")
        steps = self.num_inference_steps
        with arguments_named(levels="spectrum.levels"):
            check_levels(self.levels, 100 * steps if self.steps == "fixed" else steps)
        if self.guidance_interval[0] >= self.guidance_interval[1]:
            raise RecipeError(
                f"spectrum.guidance_interval = {list(self.guidance_interval)} is empty; write the "
                "smaller value first, for example [0.4, 1]."
            )
        return self
