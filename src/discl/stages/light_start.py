"""How light tuning starts in a run, and what it trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ..curriculum.sampling import Pool
from ..curriculum.schedule import Record
from ..errors import BrokenFileError, TrainingError
from ..models.classifier import ClassifierConfig
from ..run_folder.run import Run
from ..training.distributed import Processes
from ..training.image_cache import ImageCache
from ..training.inference import class_means
from ..utils.stored import read_header, read_tensors, save_tensors
from .classifiers import check_texts


def check_start(initial_head: str, pool: Pool, names: Mapping[str, str]) -> None:
    """Checks that the head can start from every class.

    - `names`: class names to use in texts, by class name.

    Raises TrainingError for class-means and a class without a real image, and RecipeError for texts
    and a class without a name.
    """
    if initial_head == "texts":
        check_texts(pool.class_names, names)
    without = np.flatnonzero(pool.real_counts == 0)
    if initial_head == "class-means" and len(without):
        raise TrainingError(
            f"class-means needs a real training image of every class, and "
            f"'{pool.class_names[without[0]]}' has none ({len(without)} classes in all); use "
            "random, or texts with a CLIP.",
            argument="train.model.light.initial_head",
        )


@dataclass(frozen=True)
class LightStart:
    """How light tuning starts: class means of the real images, and the file that keeps the start.

    After a kill the class means are those in the file.

    - `file`: None keeps nothing.
    - `fingerprint`: of the training that the file belongs to.
    """

    run: Run
    pool: Pool
    pixels: ImageCache
    config: ClassifierConfig
    processes: Processes
    file: Path | None
    fingerprint: str

    def class_means(self, tower: nn.Module) -> Tensor:
        """Means of the real training images, measured on rank 0."""
        return self.processes.on_main(lambda: self._class_means(tower))

    def _class_means(self, tower: nn.Module) -> Tensor:
        if self._is_kept() and self.file is not None:
            return read_tensors(self.file)["head.weight"]
        pool, run = self.pool, self.run
        rows = np.flatnonzero(~pool.synthetic & ~pool.held_out)
        if not (np.bincount(pool.labels[rows], minlength=pool.num_classes) > 0).all():
            rows = np.flatnonzero(~pool.synthetic)  # V holds all images of a class
        return class_means(
            tower,
            self.pixels,
            rows,
            pool.labels[rows],
            self.config,
            device=run.device,
            workers=run.recipe.runtime.workers,
        )

    def kept(self, make_model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        """A function that also writes the initial light part, which weight ensembling needs."""

        def make() -> nn.Module:
            model = make_model()
            if self.processes.first and self.file is not None and not self._is_kept():
                metadata = {"fingerprint": self.fingerprint}
                save_tensors(model.state_dict(), self.file, metadata)
            return model

        return make

    def _is_kept(self) -> bool:
        if self.file is None or not self.file.exists():
            return False
        try:
            _, metadata = read_header(self.file)
        except BrokenFileError:
            return False
        return metadata.get("fingerprint") == self.fingerprint


def describe_footprint(history: list[Record]) -> str:
    """What a training trained, kept in memory and took, in words."""
    first, seconds = history[0], sum(record["seconds"] for record in history)
    trained, parameters = first["trained_parameters"], first["parameters"]
    return (
        f"{trained:,} of {parameters:,} parameters trained ({100 * trained / parameters:.2g} %), "
        f"{first['training_bytes'] / 1e6:.3g} MB of weights, gradients, optimizer and activations, "
        f"{seconds:.0f} s"
    )
