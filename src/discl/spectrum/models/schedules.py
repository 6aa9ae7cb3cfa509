"""`Schedule`: DDIM and flow matching. Other samplers are in `samplers`."""

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
    """A table of denoising steps. Rows of one call of the network may be at different steps."""

    @property
    def timesteps(self) -> Tensor:
        """What the network is given as the time of each step, `[steps]`."""
        ...

    @property
    def spans(self) -> Mapping[int, range]:
        """`{λ in per cent: its steps, in order}`, for levels that take a step at all."""
        ...

    def start(self, clean: Tensor | None, noise: Tensor, index: int) -> Tensor:
        """The latents `[c, h, w]` before step `index`: z_real noised with ε (eq. 1, 3).

        Pure noise where `clean` is None (λ = 0).
        """
        ...

    @property
    def multistep(self) -> bool:
        """Whether a step takes x̂0 of the step before."""
        ...

    def adds_noise(self, index: int) -> bool:
        """Whether step `index` takes fresh noise."""
        ...

    def predict_clean(self, latents: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """x̂0 `[rows, c, h, w]` at step `index` `[rows]`, given the network's output."""
        ...

    def step(
        self,
        latents: Tensor,
        output: Tensor,
        index: Tensor,
        previous: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The latents `[rows, c, h, w]` after step `index` `[rows]`, given the network's output.

        - `previous`: x̂0 of the step before, where the schedule is multistep.
        - `noise`: fresh noise, where a step adds some.
        """
        ...

    def to(self, device: torch.device) -> Self:
        """The same tables on a device."""
        ...


class Tables:
    """A frozen dataclass of tensors that move together; the steps look back at nothing."""

    multistep = False

    def adds_noise(self, index: int) -> bool:
        return False

    def to(self, device: torch.device) -> Self:
        values = {
            each.name: getattr(self, each.name)
            for each in fields(self)  # type: ignore[arg-type]
        }
        moved = {
            name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)  # type: ignore[type-var]


def level_spans(num_inference_steps: int) -> dict[int, range]:
    """`{λ in per cent: the last t(λ) of T steps}` (eq. 3), for levels that take a step at all."""
    steps = {level: start_step(level, num_inference_steps) for level in range(100)}
    return {
        level: range(num_inference_steps - count, num_inference_steps)
        for level, count in steps.items()
        if count
    }


def stacked_spans(levels: Iterable[int], num_inference_steps: int) -> dict[int, range]:
    """`{λ in per cent: its own T steps}`, level after level."""
    return {
        level: range(index * num_inference_steps, (index + 1) * num_inference_steps)
        for index, level in enumerate(levels)
    }


# ---------------------------------------------------------------- diffusion


@dataclass(frozen=True)
class DDIM(Tables):
    """Steps of DDIM (arXiv 2010.02502): step i goes from ᾱ = `alphas[i]` to `alphas_next[i]`.

    - `timesteps`: int64 `[steps]`; `alphas`, `alphas_next`: float32 `[steps]`.
    - `spans`: `{λ in per cent: its steps}`.
    - `prediction_type`: `epsilon`, `v_prediction` or `sample`.
    - `clip`: bound of the predicted clean latents; None for no clipping.
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

    def predict_clean(self, latents: Tensor, output: Tensor, index: Tensor) -> Tensor:
        alpha = self.alphas[index].view(-1, 1, 1, 1)
        _, clean = split_output(latents, output, alpha, self.prediction_type)
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def step(
        self,
        latents: Tensor,
        output: Tensor,
        index: Tensor,
        previous: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        alpha, alpha_next = (
            table[index].view(-1, 1, 1, 1) for table in (self.alphas, self.alphas_next)
        )
        return ddim_step(
            latents,
            output,
            alpha,
            alpha_next,
            prediction_type=self.prediction_type,
            clip=self.clip,
        )


def ddim_step(
    latents: Tensor,
    output: Tensor,
    alpha: Tensor,
    alpha_next: Tensor,
    *,
    prediction_type: str,
    clip: float | None,
) -> Tensor:
    """x_next = √ᾱ_next · x̂0 + √(1 − ᾱ_next) · ε̂, η = 0 (arXiv 2010.02502, eq. 12).

    The velocity v = √ᾱ · ε − √(1 − ᾱ) · x0 is that of arXiv 2202.00512.

    - `latents`, `output`: x and the network's prediction, `[rows, c, h, w]`.
    - `alpha`, `alpha_next`: ᾱ now and after the step, broadcast over `latents`.
    - `prediction_type`: what the network predicts: `epsilon`, `v_prediction` or `sample`.
    - `clip`: bound of x̂0; ε̂ stays as predicted, as in diffusers. None for no clipping.
    """
    noise, clean = split_output(latents, output, alpha, prediction_type)
    if clip is not None:
        clean = clean.clamp(-clip, clip)
    return alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * noise


def split_output(
    latents: Tensor, output: Tensor, alpha: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(ε̂, x̂0) of latents and the network's prediction; arguments as in `ddim_step`."""
    if prediction_type == "epsilon":
        return output, (latents - (1 - alpha).sqrt() * output) / alpha.sqrt()
    if prediction_type == "v_prediction":
        return (
            alpha.sqrt() * output + (1 - alpha).sqrt() * latents,
            alpha.sqrt() * latents - (1 - alpha).sqrt() * output,
        )
    return (latents - alpha.sqrt() * output) / (1 - alpha).sqrt(), output


def make_ddim(scheduler: Any, num_inference_steps: int, fixed: bool = False) -> DDIM:
    """The steps of a diffusers `DDIMScheduler`.

    - `scheduler`: its configuration is used; its grid is set to T steps.
    - `num_inference_steps`: T.
    - `fixed`: T steps for every level with at least T training steps of noise.

    Raises CheckpointError for settings that DDIM on latents does not support.
    """
    config = scheduler.config
    if config.thresholding or config.prediction_type not in {"epsilon", "v_prediction", "sample"}:
        raise CheckpointError(
            f"the scheduler's prediction type '{config.prediction_type!s:.80}' (thresholding "
            f"{config.thresholding!s:.80}) is not supported."
        )
    if num_inference_steps > config.num_train_timesteps:
        raise CheckpointError(
            f"{num_inference_steps} inference steps exceed the {config.num_train_timesteps} that "
            "the checkpoint was trained for; use fewer.",
            argument="num_inference_steps",
        )
    if fixed:
        levels = [
            level
            for level in range(100)
            if (100 - level) * config.num_train_timesteps >= 100 * num_inference_steps
        ]
        grids = [fine_timesteps(config, num_inference_steps, level) for level in levels]
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


def fine_timesteps(config: Any, num_inference_steps: int, level: int) -> Tensor:
    """T training timesteps over the last (1 − λ) of the schedule, spaced like the checkpoint's own.

    They are the last T of a grid of T / (1 − λ) steps, a real number. Where that divides the
    training steps, they are those of diffusers with as many inference steps.
    """
    trained, total = config.num_train_timesteps, 100 * num_inference_steps / (100 - level)
    if config.timestep_spacing == "leading":
        steps = np.arange(num_inference_steps)[::-1] * (trained / total) + config.steps_offset
    elif config.timestep_spacing == "trailing":
        steps = np.arange(num_inference_steps, 0, -1) * (trained / total) - 1
    else:
        steps = np.arange(num_inference_steps)[::-1] * ((trained - 1) / max(total - 1, 1))
    return torch.from_numpy(steps.round().clip(0, trained - 1).astype(np.int64))


# ---------------------------------------------------------------- flow matching

WHOLE_GRID_SETTINGS = (
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)
"""Settings of a scheduler that change the grid as a whole."""


def check_grid_divides(config: Any) -> None:
    """Raises CheckpointError where levels cannot take a fixed number of steps."""
    whole = [name for name in WHOLE_GRID_SETTINGS if config.get(name)]
    if whole:
        raise CheckpointError(
            f"the scheduler's {whole[0]} is defined for the whole grid only, so levels cannot take "
            "a fixed number of steps; use steps per level.",
            argument="fixed",
        )


@dataclass(frozen=True)
class Flow(Tables):
    """Euler steps of a rectified flow (arXiv 2403.03206): step i goes from σ to `sigmas_next[i]`.

    - `timesteps`, `sigmas`, `sigmas_next`: float32 `[steps]`.
    - `spans`: `{λ in per cent: its steps}`.
    """

    timesteps: Tensor
    sigmas: Tensor
    sigmas_next: Tensor
    spans: Mapping[int, range]

    def start(self, clean: Tensor | None, noise: Tensor, index: int) -> Tensor:
        """z_t = (1 − σ) · z_real + σ · ε (arXiv 2403.03206, eq. 13)."""
        if clean is None:
            return noise
        return self.sigmas[index] * noise + (1 - self.sigmas[index]) * clean

    def predict_clean(self, latents: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """x − σ · v."""
        return latents - self.sigmas[index].view(-1, 1, 1, 1) * output

    def step(
        self,
        latents: Tensor,
        output: Tensor,
        index: Tensor,
        previous: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x + (σ_next − σ) · v for the predicted velocity v = ε − z_real."""
        return latents + (self.sigmas_next - self.sigmas)[index].view(-1, 1, 1, 1) * output


def make_flow(
    scheduler: Any,
    num_inference_steps: int,
    tokens: int = 256,
    *,
    from_one: bool = True,
    max_shift: float = 1.15,
    fixed: bool = False,
) -> Flow:
    """The steps of a diffusers `FlowMatchEulerDiscreteScheduler`.

    - `scheduler`: its configuration is used; the object stays as it is.
    - `num_inference_steps`: T.
    - `tokens`: of an image; their number shifts the grid where the checkpoint says so.
    - `from_one`: a grid over [1, 1/T], as in FLUX, instead of the scheduler's own range.
    - `max_shift`: the pipeline's default where the scheduler names none.
    - `fixed`: T steps for every level: the last T of a grid of T / (1 − λ) steps.

    Raises CheckpointError for a schedule that is random or inverted, and with `fixed` for a grid
    that is only defined as a whole.
    """
    config = scheduler.config
    if config.stochastic_sampling or config.invert_sigmas:
        raise CheckpointError(
            "the scheduler's stochastic_sampling or invert_sigmas is on, which is not supported; "
            "turn it off in its file."
        )
    if fixed:
        check_grid_divides(config)
    scheduler = copy.deepcopy(scheduler)
    settings: dict[str, Any] = {}
    if config.use_dynamic_shifting:
        settings["mu"] = _shift(config, tokens, max_shift)
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
    for level in range(100):
        fine = _fine_sigmas(num_inference_steps, level, scheduler.sigma_max, bottom)
        scheduler.set_timesteps(num_inference_steps, sigmas=fine, **settings)
        sigmas = scheduler.sigmas.float()
        tables.append((scheduler.timesteps.float(), sigmas[:-1], sigmas[1:]))
    timesteps, now, following = (torch.cat(each) for each in zip(*tables, strict=True))
    return Flow(timesteps, now, following, stacked_spans(range(100), num_inference_steps))


def _shift(config: Any, tokens: int, max_shift: float) -> float:
    """μ for that many tokens, linear between two sizes (diffusers' `calculate_shift`)."""
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    return low + (high - low) * (tokens - short) / (long - short)


def _fine_sigmas(
    num_inference_steps: int, level: int, top: float, bottom: float | None
) -> np.ndarray:
    """The last T sigmas, before shifting, of a grid of T / (1 − λ) steps from `top` to `bottom`.

    Without `bottom` the grid ends at the size of one step.
    """
    total = 100 * num_inference_steps / (100 - level)
    steps = np.arange(num_inference_steps, 0, -1)
    if bottom is None:
        return steps / total
    return bottom + (steps - 1) * (top - bottom) / (total - 1) if total > 1 else np.array([top])
