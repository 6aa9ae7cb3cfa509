"""`TrainingHook`: where another system takes part in training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ..errors import shorten
from .objectives import FLYP

if TYPE_CHECKING:
    from ..curriculum.sampling import Pool
    from .image_cache import ImageCache
    from .step import TrainState


@dataclass(frozen=True)
class TrainingContext:
    """What a hook sees of a training: samples, their pixels, the learner with its model, the seed and how long it goes on.

    `workers` decode pixels that do not fit in memory, where they are read through `EpochLoader`.
    """

    pool: Pool
    pixels: ImageCache
    learner: TrainState
    seed: int
    batch_size: int
    epochs: int
    workers: int = 0


class TrainingHook:
    """Base of other systems that take part in training; its methods change nothing.

    One object serves one training. Its memory belongs in `state`, so that a killed training
    resumes. Random draws are functions of (seed, epoch).

    ```python
    import discl


    class Brighter(discl.TrainingHook):  # a recipe names it as system: my_module:Brighter
        def alter(self, images, labels):
            return (1.1 * images).clamp(0, 1)
    ```
    """

    takes_mixed = True
    """Whether it can do with batches in which mixup or CutMix has mixed images of two labels."""

    def objection(self, objective: str) -> str | None:
        """Why it has no effect beside this objective, as a sentence about it; None where it has one. A recipe refuses the former."""
        if objective == FLYP and type(self).learn is not TrainingHook.learn:
            return f"it learns from logits, and objective {FLYP} has none"
        return None

    def begin(self, context: TrainingContext) -> None:
        """Called once, before the first epoch and before `load_state`."""

    def begin_epoch(self, context: TrainingContext, epoch: int) -> None:
        """Called before each epoch; the model may be looked at, in evaluation mode."""

    def draw(self, context: TrainingContext, epoch: int, rows: np.ndarray) -> np.ndarray:
        """The rows of the epoch's part, as many as `rows`, which is what the strategy has drawn."""
        return rows

    def alter(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images `[batch, 3, size, size]` in [0, 1], after crop and flip and before normalisation; random draws from torch's state."""
        return images

    def learn(self, rows: np.ndarray, labels: Tensor, logits: Tensor, learning_rate: float) -> None:
        """Told of every forward pass in training, with the model's outputs `[batch, classes]`: of all processes, in each of them."""

    def finish(self, context: TrainingContext, model: nn.Module) -> np.ndarray | None:
        """Called once after the last epoch with the model that will be saved; may change it in place.

        Where it trains the last layer on something else than the epochs drew, it returns how often it showed each class, `[classes]`.
        """
        return None

    def state(self) -> dict[str, Tensor]:
        """Everything that has to survive a kill."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""


def number_within(name: str, value: Any, low: float, high: float) -> float:
    """The parameter `name` of a system as a number from `low` to `high`.

    A text such as 1e-3, as YAML reads it, is a number too. Raises ValueError for anything else.
    """
    number = value
    if isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
    if (
        isinstance(number, bool)
        or not isinstance(number, (int, float))
        or not low <= number <= high
    ):
        raise ValueError(f"{name} is a number from {low:g} to {high:g}; got {shorten(value)}.")
    return float(number)


def whole_within(name: str, value: Any, low: int, high: int) -> int:
    """As `number_within`, for whole numbers."""
    number = number_within(name, value, low, high)
    if number != int(number):
        raise ValueError(f"{name} is a whole number from {low} to {high}; got {shorten(value)}.")
    return int(number)
