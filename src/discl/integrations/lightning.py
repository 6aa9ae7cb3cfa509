"""The curriculum in Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from .sampler import Curriculum


class CurriculumCallback(Callback):
    """Turns a curriculum, the sampler of the training loader, to each epoch, and keeps its state in Lightning's checkpoints.

    Where progress is measured, `probability(model, batch)` of the curriculum gets the LightningModule. Of several processes Lightning
    divides the rows of any sampler itself, unless its Trainer has `use_distributed_sampler=False`; then the curriculum does.
    """

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        divided = getattr(
            getattr(trainer, "_accelerator_connector", None), "use_distributed_sampler", True
        )
        self.curriculum.share(*(0, 1) if divided else (trainer.global_rank, trainer.world_size))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.curriculum.begin(trainer.current_epoch, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.curriculum.end(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self.curriculum.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state_dict)
