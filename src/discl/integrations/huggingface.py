"""The curriculum in Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from .sampler import Curriculum

NAME = "discl_curriculum"


class CurriculumCallback(TrainerCallback):
    """Turns a curriculum to each epoch of a Trainer and stores its state in the checkpoints.

    The Trainer divides the batches of any sampler among its processes, so the curriculum gives each
    of them all rows.

    - `curriculum`: the sampler of the Trainer's training rows.
    """

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum
        curriculum.share(0, 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        stored = state.stateful_callbacks.get(NAME)
        if state.global_step and stored is not None:
            self.curriculum.load_state_dict(stored["attributes"])

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        self.curriculum.begin(int((state.epoch or 0) + 1e-6), model)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        self.curriculum.end(model)
        self._store(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if control.should_save:
            self._store(state)

    def _store(self, state: Any) -> None:
        state.stateful_callbacks[NAME] = {"args": {}, "attributes": self.curriculum.state_dict()}


class CurriculumTrainer(Trainer):
    """A Trainer whose training rows a curriculum draws.

    - `curriculum`: a `Curriculum` over `train_dataset`.
    - All other arguments are those of `transformers.Trainer`.
    """

    def __init__(self, *arguments: Any, curriculum: Curriculum, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.curriculum = curriculum
        self.add_callback(CurriculumCallback(curriculum))

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return self.curriculum
