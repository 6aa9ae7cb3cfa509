"""`GuidanceLevel` and t(λ)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import RecipeError, shorten


@dataclass(frozen=True, order=True)
class GuidanceLevel:
    """Image guidance λ as a whole per cent, so that it is exact, hashable and printable.

    0 is text only, 100 is the real image itself. Raises RecipeError outside 0–100 or for a fraction.
    """

    percent: int

    def __post_init__(self) -> None:
        if (
            isinstance(self.percent, bool)
            or not isinstance(self.percent, int)
            or not 0 <= self.percent <= 100
        ):
            hint = ""
            if isinstance(self.percent, float) and 0 < self.percent < 1:
                hint = f" Write λ = {self.percent:g} as {round(self.percent * 100)}."
            raise RecipeError(
                f"level {shorten(self.percent)} is not a whole per cent from 0 (text only) to 100 "
                f"(the real image).{hint}"
            )

    def start_step(self, num_inference_steps: int) -> int:
        """t(λ) = ⌊(1 − λ)T⌋, the number of denoising steps (eq. 3), in integers: in floats ⌊(1 − 0.9)·50⌋ is 4."""
        return (100 - self.percent) * num_inference_steps // 100

    def __str__(self) -> str:
        return f"{self.percent} %"


REAL = GuidanceLevel(100)
TEXT_ONLY = GuidanceLevel(0)


def noise_shares(
    level: GuidanceLevel, num_inference_steps: int, fixed: bool = False
) -> tuple[float, ...]:
    """Shares of the noise schedule at which the steps of a level begin, falling: 1 is pure noise.

    As the paper has it, level λ takes the last t(λ) of T steps, so k steps before the end the share is k / T. With `fixed`
    it takes T finer steps over the same range: (1 − λ) k / T.
    """
    left = num_inference_steps if fixed else level.start_step(num_inference_steps)
    per_cent = 100 - level.percent if fixed else 100
    return tuple(per_cent * step / (100 * num_inference_steps) for step in range(left, 0, -1))


def check_levels(levels: Iterable[GuidanceLevel], num_inference_steps: int) -> None:
    """Raises RecipeError for a level that would be generated without a single denoising step."""
    for level in levels:
        if level == REAL:
            raise RecipeError(
                "level 100 is the real image and is never generated; take it out of spectrum.levels."
            )
        if level.start_step(num_inference_steps) == 0:
            needed = -(-100 // (100 - level.percent))
            raise RecipeError(
                f"level {level} leaves t(λ) = 0 denoising steps at {num_inference_steps} inference steps; "
                f"use at least {needed} steps or a level of at most {100 - -(-100 // num_inference_steps)} %."
            )
