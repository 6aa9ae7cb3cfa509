"""The curriculum in Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from .sampler import Curriculum


class CurriculumCallback(Callback):
    """Turns a curriculum to each epoch and stores its state in Lightning's checkpoints.

    Progress is measured by the curriculum's `probability(model, batch)` with the LightningModule.
    With several processes Lightning divides the rows of any sampler. With
    `use_distributed_sampler=False` the curriculum divides them.

    - `curriculum`: the sampler of the training loader.
    """

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        connector = getattr(trainer, "_accelerator_connector", None)
        divided = getattr(connector, "use_distributed_sampler", True)
        self.curriculum.share(*(0, 1) if divided else (trainer.global_rank, trainer.world_size))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.curriculum.begin(trainer.current_epoch, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.curriculum.end(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self.curriculum.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state_dict)
