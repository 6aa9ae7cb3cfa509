"""Samplers of diffusers as tables of coefficients, read from diffusers' own steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...levels import start_step
from .schedules import DDIM, Tables, check_grid_divides, fine_timesteps, make_ddim

DIFFUSERS = {
    "ddim": "DDIMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
"""Name in a recipe: class in diffusers."""
SAMPLERS = tuple(DIFFUSERS)
SETTINGS: dict[str, dict[str, Any]] = {
    "dpm-solver++": {"algorithm_type": "dpmsolver++", "solver_order": 2}
}
"""Settings that a checkpoint's file does not change, because they are what the name says."""
CONSISTENCY = ("lcm", "tcd")
"""Samplers of consistency models, whose grid is a part of the one that they were distilled on."""


@dataclass(frozen=True)
class LinearSteps(Tables):
    """Steps of a sampler that are linear: x_next = a·x + b·o + c·x̂0_previous + d·z.

    o is the network's output and z fresh noise. Latents are scaled as in DDIM: √ᾱ x0 + √(1 − ᾱ) ε.
    So those of diffusers' Euler sampler are divided by √(σ² + 1), as the network sees them.

    - `timesteps`: `[steps]`.
    - `next`: a, b, c and d, float32 `[4, steps]`.
    - `clean`: x̂0 = p·x + q·o, float32 `[2, steps]`.
    - `begin`: factors of z_real and ε before a step, float32 `[2, steps]`.
    - `text`: factor of ε before a step where there is no z_real, float32 `[steps]`.
    - `spans`: `{λ in per cent: its steps}`.
    - `multistep`: whether any c is not 0.
    """

    timesteps: Tensor
    next: Tensor
    clean: Tensor
    begin: Tensor
    text: Tensor
    spans: Mapping[int, range]
    multistep: bool

    def start(self, clean: Tensor | None, noise: Tensor, index: int) -> Tensor:
        """The latents before step `index`; pure noise where `clean` is None (λ = 0)."""
        if clean is None:
            return self.text[index] * noise
        return self.begin[0, index] * clean + self.begin[1, index] * noise

    def adds_noise(self, index: int) -> bool:
        """Whether step `index` takes fresh noise."""
        return bool(self.next[3, index] != 0)

    def predict_clean(self, latents: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """x̂0, which the next step of a multistep sampler takes."""
        ours, theirs = self.clean[:, index].view(2, -1, 1, 1, 1)
        return ours * latents + theirs * output

    def step(
        self,
        latents: Tensor,
        output: Tensor,
        index: Tensor,
        previous: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The latents after step `index` `[rows]`, all others `[rows, c, h, w]`.

        - `previous`: x̂0 of the step before; a first step ignores it.
        - `noise`: z.
        """
        ours, theirs, before, fresh = self.next[:, index].view(4, -1, 1, 1, 1)
        moved = ours * latents + theirs * output
        if previous is not None:
            moved = moved + before * previous
        return moved if noise is None else moved + fresh * noise


def make_sampler(
    scheduler: Any,
    num_inference_steps: int,
    *,
    sampler: str = "ddim",
    timestep_spacing: str | None = None,
    fixed: bool = False,
    levels: Iterable[int] = range(100),
) -> DDIM | LinearSteps:
    """The steps of one of `SAMPLERS`.

    - `scheduler`: a diffusers `DDIMScheduler`, whose configuration the sampler takes over.
    - `num_inference_steps`: T.
    - `timestep_spacing`: `leading`, `trailing` or `linspace`, which LCM and TCD do not use; None:
      that of the configuration.
    - `fixed`: T steps for every level. LCM and TCD take them from the last (1 − λ) of their grid,
      as `strength` of their `set_timesteps` does. Others take the times of DDIM.
    - `levels`: λ in whole per cents.

    Raises CheckpointError for settings that the sampler does not support.
    """
    changed = {} if timestep_spacing is None else {"timestep_spacing": timestep_spacing}
    if sampler == "ddim":
        if changed:
            scheduler = type(scheduler).from_config(scheduler.config, **changed)
        return make_ddim(scheduler, num_inference_steps, fixed)
    make_ddim(scheduler, 1)  # raises for a configuration that no sampler supports
    made = _from_config(scheduler, sampler, {**SETTINGS.get(sampler, {}), **changed})
    _check_settings(made, sampler, num_inference_steps, fixed)
    if fixed:
        chains = _fixed_chains(made, sampler, num_inference_steps, levels)
    else:
        chains = _chains_of_levels(made, num_inference_steps, levels)
    rows: list[Tensor] = []
    spans, known = {}, {}
    for level, chain in chains.items():
        if id(chain) not in known:
            known[id(chain)] = range(len(rows), len(rows) + len(chain))
            rows += chain
        spans[level] = known[id(chain)]
    return _as_tables(rows, made, spans)


def _chains_of_levels(
    scheduler: Any, num_inference_steps: int, levels: Iterable[int]
) -> dict[int, list[Tensor]]:
    """Rows of the last t(λ) of T steps of each level. Levels with as many steps share a chain.

    Only the first step of a chain differs from that of a longer one, because it has no predecessor.
    """
    grid = {"num_inference_steps": num_inference_steps}
    steps = {level: start_step(level, num_inference_steps) for level in levels}
    whole = _read_chain(scheduler, grid, num_inference_steps)
    chains = {
        count: [*_read_chain(scheduler, grid, count, read=2)[:1], *whole[1:][-count + 1 :]]
        for count in sorted(set(steps.values()) - {0, 1})
    }
    chains[1] = whole[-1:] if num_inference_steps == 1 else _read_chain(scheduler, grid, 1)
    return {level: chains[count] for level, count in steps.items() if count}


def _fixed_chains(
    scheduler: Any, sampler: str, num_inference_steps: int, levels: Iterable[int]
) -> dict[int, list[Tensor]]:
    """Rows of T steps over the noise of each level that has enough of it."""
    grids = {level: _fixed_grid(scheduler, sampler, num_inference_steps, level) for level in levels}
    return {
        level: _read_chain(scheduler, grid, num_inference_steps)
        for level, grid in grids.items()
        if grid is not None
    }


def check_own_sampler(family: str, sampler: str, timestep_spacing: str | None) -> None:
    """Raises CheckpointError for options of a sampler, where a family has only its own."""
    options = {"sampler": sampler != "ddim", "timestep_spacing": timestep_spacing is not None}
    for argument, used in options.items():
        if used:
            raise CheckpointError(
                f"{family} has only its own sampler; Stable Diffusion 1.x, 2.x and SDXL have a "
                "choice. Leave the option out.",
                argument=argument,
            )


def _from_config(scheduler: Any, sampler: str, settings: Mapping[str, Any]) -> Any:
    """diffusers' sampler of that name with the configuration of `scheduler`."""
    import diffusers

    kind = getattr(diffusers, DIFFUSERS[sampler])
    try:
        return kind.from_config(scheduler.config, **settings)
    except Exception as error:
        raise CheckpointError(
            f"diffusers' {kind.__name__} does not take the settings of this checkpoint's "
            f"scheduler: {error}. Use another sampler.",
            argument="sampler",
        ) from error


def _check_settings(scheduler: Any, sampler: str, num_inference_steps: int, fixed: bool) -> None:
    config = scheduler.config
    most = config.num_train_timesteps
    if sampler in CONSISTENCY:
        most = min(most, config.original_inference_steps)
    if num_inference_steps > most:
        raise CheckpointError(
            f"{num_inference_steps} inference steps exceed the {most} of the grid of {sampler}; "
            "use fewer.",
            argument="num_inference_steps",
        )
    if fixed and sampler not in CONSISTENCY:
        check_grid_divides(config)


def _fixed_grid(
    scheduler: Any, sampler: str, num_inference_steps: int, level: int
) -> dict[str, Any] | None:
    """Arguments of `set_timesteps` for a level; None where its noise has fewer than T steps."""
    if sampler in CONSISTENCY:
        strength = (100 - level) / 100
        enough = int(scheduler.config.original_inference_steps * strength) >= num_inference_steps
        if not enough:
            return None
        return {"num_inference_steps": num_inference_steps, "strength": strength}
    if (100 - level) * scheduler.config.num_train_timesteps < 100 * num_inference_steps:
        return None
    return {"timesteps": fine_timesteps(scheduler.config, num_inference_steps, level).tolist()}


def _read_chain(
    scheduler: Any, grid: Mapping[str, Any], steps: int, read: int | None = None
) -> list[Tensor]:
    """(a, b, c, d, p, q, factors of z_real and ε, of ε alone, time) of the last steps of a grid.

    - `read`: how many of these steps to read, by default all.

    The steps are linear, so their coefficients show in what diffusers makes of unit vectors.
    Latents and output of even steps are the dimensions 0 and 1, of odd steps 2 and 3. So what a
    step takes from the one before shows in the other two. Only noise gets into dimension 4.
    """
    scheduler.set_timesteps(**grid)
    total = len(grid["timesteps"]) if "timesteps" in grid else grid["num_inference_steps"]
    if len(scheduler.timesteps) != total:
        raise CheckpointError(
            f"diffusers' {type(scheduler).__name__} has no grid of {total} steps with this "
            "spacing; use another number of inference steps.",
            argument="num_inference_steps",
        )
    scheduler.set_begin_index(len(scheduler.timesteps) - steps)
    generator, before = torch.Generator(), 0.0
    rows: list[Tensor] = []
    fresh = torch.randn(5, generator=generator.manual_seed(0), dtype=torch.float64)
    units = torch.eye(2, dtype=torch.float64)[..., None]
    for index, time in enumerate(scheduler.timesteps[-steps:][:read]):
        x, o = 2 * (index % 2), 2 * (index % 2) + 1
        latents, output = torch.eye(5, dtype=torch.float64)[[x, o]]
        scale = float(scheduler.scale_model_input(latents, time)[x])
        clean, noise = scheduler.add_noise(units[0], units[1], time[None]).flatten() * scale
        prediction = _clean_factors(scheduler.config.prediction_type, clean, noise)
        moved = scheduler.step(
            output, time, latents, generator=generator.manual_seed(0), return_dict=False
        )[0]
        fraction = float(moved[4] / fresh[4])
        moved = moved - fraction * fresh
        if rows:
            rows[-1][:4] *= scale
        following = [
            float(moved[x]) / scale,
            float(moved[o]),
            float(moved[(o + 2) % 4]) / before if index else 0.0,
            fraction,
        ]
        text = float(scheduler.init_noise_sigma) * scale
        rows.append(
            torch.tensor(
                [*following, *prediction, clean, noise, text, float(time)], dtype=torch.float64
            )
        )
        before = float(prediction[1])
    return rows


def _clean_factors(
    prediction_type: str, alpha: Tensor, sigma: Tensor
) -> tuple[float | Tensor, float | Tensor]:
    """p and q of x̂0 = p·x + q·o for x = alpha · x0 + sigma · ε."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return 0.0, 1.0


def _as_tables(rows: list[Tensor], scheduler: Any, spans: Mapping[int, range]) -> LinearSteps:
    """The tables of all chains. Raises CheckpointError where a coefficient is not finite."""
    table = torch.stack(rows, 1) if rows else torch.zeros(10, 0, dtype=torch.float64)
    if not table.isfinite().all():
        raise CheckpointError(
            f"the noise schedule of this checkpoint has steps at which {type(scheduler).__name__} "
            "divides by zero; use another sampler.",
            argument="sampler",
        )
    times = table[9].to(scheduler.timesteps.dtype)
    table = table.float()
    # rounding leaves a trace of c in samplers that look back at nothing
    table[2] = torch.where(table[2].abs() < 1e-9, 0.0, table[2])
    multistep = bool((table[2] != 0).any())
    return LinearSteps(times, table[:4], table[4:6], table[6:8], table[8], spans, multistep)
