"""Levels λ as whole per cents, and t(λ)."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

from .errors import RecipeError, shorten

REAL = 100
"""The level of a real image."""
TEXT_ONLY = 0
"""The level of an image that is made from text alone."""


def check_level(value: object) -> int:
    """The level λ as an int: a whole per cent, exact, from 0 (text only) to 100 (the real image).

    - `value`: anything that a user wrote.

    Raises RecipeError for a fraction, a truth value, text, or a number outside 0–100.

    ```python
    import discl

    discl.check_level(30)  # 30
    ```
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) <= REAL:
        return int(value)
    hint = ""
    if isinstance(value, float) and 0 < value < 1:
        hint = f" Write λ = {value:g} as {round(value * 100)}."
    raise RecipeError(
        f"level {shorten(value)} is not a whole per cent from 0 (text only) to 100 "
        f"(the real image).{hint}"
    )


def format_level(level: int) -> str:
    """The level in words, for example `30 %`."""
    return f"{level} %"


def start_step(level: int, num_inference_steps: int) -> int:
    """t(λ) = ⌊(1 − λ)T⌋, the number of denoising steps of a level (arXiv 2410.13674, eq. 3).

    Computed in integers: in floats ⌊(1 − 0.9)·50⌋ is 4.

    - `level`: λ, a whole per cent from 0 to 100.
    - `num_inference_steps`: T, at least 1.

    ```python
    import discl

    discl.start_step(90, 50)  # 5
    ```
    """
    return (100 - level) * num_inference_steps // 100


def noise_fractions(level: int, num_inference_steps: int, fixed: bool = False) -> tuple[float, ...]:
    """Positions in the noise schedule, falling from 1 (pure noise), at which a level's steps begin.

    Level λ takes the last t(λ) of T steps, so k steps before the end the position is k / T (arXiv
    2410.13674, eq. 3).

    - `level`: λ, a whole per cent from 0 to 100.
    - `num_inference_steps`: T, at least 1.
    - `fixed`: take T finer steps over the same range instead: (1 − λ) k / T.
    """
    steps = num_inference_steps if fixed else start_step(level, num_inference_steps)
    per_cent = 100 - level if fixed else 100
    return tuple(per_cent * step / (100 * num_inference_steps) for step in range(steps, 0, -1))


def check_levels(levels: Iterable[int], num_inference_steps: int) -> None:
    """Raises RecipeError (`levels`) for a level that takes no denoising step at T steps."""
    for level in levels:
        if level == REAL:
            raise RecipeError(
                "level 100 is the real image and is never generated; take it out.",
                argument="levels",
            )
        if start_step(level, num_inference_steps) == 0:
            steps = -(-100 // (100 - level))
            highest = 100 - -(-100 // num_inference_steps)
            raise RecipeError(
                f"level {format_level(level)} leaves t(λ) = 0 denoising steps at "
                f"{num_inference_steps} inference steps; use at least {steps} steps or a level of "
                f"at most {format_level(highest)}.",
                argument="levels",
            )
