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
    """What a hook sees of a training.

    - `pool`: the samples; `pixels`: their images.
    - `state`: the model, its optimizer and its loss.
    - `workers`: decode images that do not fit in memory, where they are read with `EpochLoader`.
    """

    pool: Pool
    pixels: ImageCache
    state: TrainState
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
    """Whether it works with batches in which mixup or CutMix has mixed images of two labels."""

    def objection(self, objective: str) -> str | None:
        """Returns why it has no effect with this objective, as a sentence, or None.

        A recipe with such a pair is refused.
        """
        if objective == FLYP and type(self).learn is not TrainingHook.learn:
            return f"it learns from logits, and objective {FLYP} has none"
        return None

    def begin(self, context: TrainingContext) -> None:
        """Called once, before the first epoch and before `load_state`."""

    def begin_epoch(self, context: TrainingContext, epoch: int) -> None:
        """Called before each epoch; may run the model in evaluation mode."""

    def draw(self, context: TrainingContext, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of a part of an epoch.

        - `rows`: what the strategy has drawn; as many have to be returned.
        """
        return rows

    def alter(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns images after crop and flip and before normalisation.

        - `images`: float `[batch, 3, size, size]` in [0, 1]; `labels`: `[batch]`.

        Random draws come from torch's random state.
        """
        return images

    def learn(self, rows: np.ndarray, labels: Tensor, logits: Tensor, learning_rate: float) -> None:
        """Called after every forward pass of training, with the rows of all processes.

        - `logits`: outputs of the model, `[batch, classes]`.
        - `learning_rate`: of the step that follows, 0 if none follows at once.
        """

    def finish(self, context: TrainingContext, model: nn.Module) -> np.ndarray | None:
        """Called once after the last epoch; may change the model that will be saved, in place.

        Where it trains the last layer on other samples than the epochs drew, it returns how often
        it showed each class, `[classes]`.
        """
        return None

    def state(self) -> dict[str, Tensor]:
        """Returns everything that has to survive a kill."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned."""


def number_within(name: str, value: Any, low: float, high: float) -> float:
    """Returns the parameter `name` of a system as a number from `low` to `high`.

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
    """Returns a whole number, as `number_within` does."""
    number = number_within(name, value, low, high)
    if number != int(number):
        raise ValueError(f"{name} is a whole number from {low} to {high}; got {shorten(value)}.")
    return int(number)
