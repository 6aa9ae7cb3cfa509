"""`Schedule`: DDIM and flow matching."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from ...levels import start_step


class Schedule(Protocol):
    """A table of steps. Level λ takes those of `spans[λ]`, in that order; rows of one call may stand at any of them."""

    @property
    def timesteps(self) -> Tensor: ...

    @property
    def spans(self) -> Mapping[int, range]: ...

    def start(self, clean: Tensor | None, noise: Tensor, index: int) -> Tensor:
        """The latents with which step `index` begins: z_real with its share of ε; pure noise where `clean` is None (λ = 0)."""
        ...

    def step(self, latents: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """The latents `[rows, c, h, w]` after step `index` `[rows]`, given the network's output."""
        ...

    def to(self, device: torch.device) -> Self: ...


class _Tables:
    """Tables of a frozen dataclass, moved together."""

    def to(self, device: torch.device) -> Self:
        tensors = {
            each.name: getattr(self, each.name)
            for each in fields(self)  # type: ignore[arg-type]
            if isinstance(getattr(self, each.name), Tensor)
        }
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})  # type: ignore[type-var]


def level_spans(num_inference_steps: int) -> dict[int, range]:
    """{λ in per cent: the last t(λ) of T steps}, for all levels that take a step at all."""
    steps = {percent: start_step(percent, num_inference_steps) for percent in range(100)}
    return {
        percent: range(num_inference_steps - left, num_inference_steps)
        for percent, left in steps.items()
        if left
    }


def stacked_spans(levels: Iterable[int], num_inference_steps: int) -> dict[int, range]:
    """{λ in per cent: T steps of its own}, one level's after the other's."""
    return {
        percent: range(place * num_inference_steps, (place + 1) * num_inference_steps)
        for place, percent in enumerate(levels)
    }


# ---------------------------------------------------------------- diffusion


@dataclass(frozen=True)
class DDIM(_Tables):
    """Steps of DDIM (arXiv 2010.02502): step i goes from `timesteps[i]`, where ᾱ = `alphas[i]`, to `alphas_next[i]`.

    `clip` bounds the predicted clean latents where the checkpoint's scheduler asks for it.
    """

    timesteps: Tensor
    alphas: Tensor
    alphas_next: Tensor
    spans: Mapping[int, range]
    prediction_type: str
    clip: float | None

    def start(self, clean: Tensor | None, noise: Tensor, index: int) -> Tensor:
        """z_t = √ᾱ_t · z_real + √(1 − ᾱ_t) · ε (eq. 1, 3)."""
        if clean is None:
            return noise
        alpha = self.alphas[index]
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def step(self, latents: Tensor, output: Tensor, index: Tensor) -> Tensor:
        alpha, alpha_next = (
            table[index].view(-1, 1, 1, 1) for table in (self.alphas, self.alphas_next)
        )
        return ddim_step(latents, output, alpha, alpha_next, self.prediction_type, self.clip)


def ddim_step(
    latents: Tensor,
    output: Tensor,
    alpha: Tensor,
    alpha_next: Tensor,
    prediction_type: str,
    clip: float | None,
) -> Tensor:
    """x_next = √ᾱ_next · x̂0 + √(1 − ᾱ_next) · ε̂ with η = 0 (arXiv 2010.02502, eq. 12).

    `alpha` and `alpha_next` are ᾱ now and after the step, broadcast over `latents` `[rows, c, h, w]`. Clipping bounds x̂0
    and leaves ε̂ as predicted, as diffusers does.
    """
    if prediction_type == "epsilon":
        noise, clean = output, (latents - (1 - alpha).sqrt() * output) / alpha.sqrt()
    elif prediction_type == "v_prediction":
        noise, clean = (
            alpha.sqrt() * output + (1 - alpha).sqrt() * latents,
            alpha.sqrt() * latents - (1 - alpha).sqrt() * output,
        )
    else:
        noise, clean = (latents - alpha.sqrt() * output) / (1 - alpha).sqrt(), output
    if clip is not None:
        clean = clean.clamp(-clip, clip)
    return alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * noise


def make_ddim(scheduler: Any, num_inference_steps: int, fixed: bool = False) -> DDIM:
    """The grid of a diffusers `DDIMScheduler`; with `fixed` one of T steps for every level whose noise range has as many.

    Raises CheckpointError for settings that DDIM on latents does not have.
    """
    config = scheduler.config
    if config.thresholding or config.prediction_type not in {"epsilon", "v_prediction", "sample"}:
        raise CheckpointError(
            f"the scheduler's prediction type '{config.prediction_type!s:.80}' (thresholding {config.thresholding!s:.80}) is not supported."
        )
    if num_inference_steps > config.num_train_timesteps:
        raise CheckpointError(
            f"{num_inference_steps} inference steps exceed the {config.num_train_timesteps} that the checkpoint was trained for; use fewer."
        )
    if fixed:
        levels = [
            percent
            for percent in range(100)
            if (100 - percent) * config.num_train_timesteps >= 100 * num_inference_steps
        ]
        grids = [_fine_timesteps(config, num_inference_steps, percent) for percent in levels]
        timesteps = torch.cat(grids)
        following = torch.cat([torch.cat([grid[1:], torch.tensor([-1])]) for grid in grids])
        spans = stacked_spans(levels, num_inference_steps)
    else:
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps.cpu().long()
        following = timesteps - config.num_train_timesteps // num_inference_steps
        spans = level_spans(num_inference_steps)
    alphas = scheduler.alphas_cumprod.cpu().float()
    alphas_next = torch.where(
        following >= 0, alphas[following.clamp_min(0)], scheduler.final_alpha_cumprod.float()
    )
    clip = config.clip_sample_range if config.clip_sample else None
    return DDIM(timesteps, alphas[timesteps], alphas_next, spans, config.prediction_type, clip)


def _fine_timesteps(config: Any, num_inference_steps: int, percent: int) -> Tensor:
    """T training timesteps over the last (1 − λ) of the schedule, spaced as the checkpoint's own are.

    They are the last T of the grid of T / (1 − λ) steps, taken as a real number: where that divides the training
    steps, they are those of diffusers with as many inference steps.
    """
    trained, total = config.num_train_timesteps, 100 * num_inference_steps / (100 - percent)
    if config.timestep_spacing == "leading":
        steps = np.arange(num_inference_steps)[::-1] * (trained / total) + config.steps_offset
    elif config.timestep_spacing == "trailing":
        steps = np.arange(num_inference_steps, 0, -1) * (trained / total) - 1
    else:
        steps = np.arange(num_inference_steps)[::-1] * ((trained - 1) / max(total - 1, 1))
    return torch.from_numpy(steps.round().clip(0, trained - 1).astype(np.int64))


# ---------------------------------------------------------------- flow matching


@dataclass(frozen=True)
class Flow(_Tables):
    """Euler steps of a flow (arXiv 2403.03206): at `sigmas[i]` the latents are σ · ε + (1 − σ) · z; step i goes to `sigmas_next[i]`."""

    timesteps: Tensor
    sigmas: Tensor
    sigmas_next: Tensor
    spans: Mapping[int, range]

    def start(self, clean: Tensor | None, noise: Tensor, index: int) -> Tensor:
        if clean is None:
            return noise
        return self.sigmas[index] * noise + (1 - self.sigmas[index]) * clean

    def step(self, latents: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """x + (σ_next − σ) · v for the predicted velocity v = ε − z."""
        return latents + (self.sigmas_next - self.sigmas)[index].view(-1, 1, 1, 1) * output


def make_flow(
    scheduler: Any,
    num_inference_steps: int,
    tokens: int = 256,
    from_one: bool = True,
    max_shift: float = 1.15,
    fixed: bool = False,
) -> Flow:
    """The grid of a diffusers `FlowMatchEulerDiscreteScheduler` for a picture of so many tokens, whose number shifts the grid
    where the checkpoint asks for it.

    With `fixed` every level has T steps of its own: the last T of the grid of T / (1 − λ) steps. `from_one` lays the grid over
    [1, 1/T], as FLUX does, instead of the scheduler's own range; `max_shift` is what the pipeline takes where the scheduler
    names none. Raises CheckpointError for a schedule that is random or inverted.
    """
    config = scheduler.config
    if config.stochastic_sampling or config.invert_sigmas:
        raise CheckpointError(
            "the scheduler's stochastic_sampling or invert_sigmas is on, which is not supported; turn it off in its file."
        )
    scheduler = copy.deepcopy(scheduler)
    settings: dict[str, Any] = {}
    if config.use_dynamic_shifting:
        short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
        settings["mu"] = low + (high - low) * (tokens - short) / (long - short)
    whole = [
        name
        for name in (
            "shift_terminal",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
        )
        if config.get(name)
    ]
    if fixed and whole:
        raise CheckpointError(
            f"the scheduler's {whole[0]} bends the grid as a whole, so steps: fixed has no part of it; use per-level."
        )
    bottom = None if from_one else scheduler.sigma_min
    if not fixed:
        if from_one:
            settings["sigmas"] = _fine_sigmas(num_inference_steps, 0, 1.0, bottom)
        scheduler.set_timesteps(num_inference_steps, **settings)
        sigmas = scheduler.sigmas.float()
        return Flow(
            scheduler.timesteps.float(), sigmas[:-1], sigmas[1:], level_spans(num_inference_steps)
        )
    tables = []
    for percent in range(100):
        fine = _fine_sigmas(num_inference_steps, percent, scheduler.sigma_max, bottom)
        scheduler.set_timesteps(num_inference_steps, sigmas=fine, **settings)
        tables.append(
            (
                scheduler.timesteps.float(),
                scheduler.sigmas[:-1].float(),
                scheduler.sigmas[1:].float(),
            )
        )
    timesteps, now, following = (torch.cat(each) for each in zip(*tables, strict=True))
    return Flow(timesteps, now, following, stacked_spans(range(100), num_inference_steps))


def _fine_sigmas(
    num_inference_steps: int, percent: int, top: float, bottom: float | None
) -> np.ndarray:
    """The last T sigmas, before shifting, of a grid of T / (1 − λ) steps from `top` to `bottom`, or to its last step's share."""
    total = 100 * num_inference_steps / (100 - percent)
    steps = np.arange(num_inference_steps, 0, -1)
    if bottom is None:
        return steps / total
    return bottom + (steps - 1) * (top - bottom) / (total - 1) if total > 1 else np.array([top])
