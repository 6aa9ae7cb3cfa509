"""A curriculum in Lightning.

    python examples/lightning_trainer.py RUN_FOLDER [STRATEGY] [EPOCHS]

RUN_FOLDER is a run that has passed the filter:

    discl filter fashion-lt --out runs/fashion-lt
"""

import sys
import tempfile

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

import discl
from discl.integrations.lightning import CurriculumCallback


class Classifier(lightning.LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, 2, 1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(48, classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def training_step(self, batch: tuple, index: int) -> torch.Tensor:
        images, labels, _levels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple, index: int) -> None:
        images, labels, _levels = batch
        self.log("validation_accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def flip(pixels: torch.Tensor) -> torch.Tensor:
    """Mirrors half of the images. Progress is measured without this random part."""
    return pixels.flip(-1) if torch.rand(()) < 0.5 else pixels


def main(
    folder: str,
    strategy: str = "adaptive",
    epochs: int = 12,
    out: str | None = None,
    resume: str | None = None,
) -> tuple[discl.Curriculum, lightning.Trainer]:
    """Trains a small network and returns its curriculum and trainer."""
    lightning.seed_everything(0)
    dataset = discl.SpectrumDataset.of_run(
        folder, size=32, transform=flip, evaluation_transform=nn.Identity()
    )
    validation = discl.SpectrumDataset.of_run(folder, size=32, split="validation")
    curriculum = discl.Curriculum(dataset, strategy, curriculum_epochs=epochs * 2 // 3)
    # on several devices Lightning shards the rows; the callback sets the curriculum so
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[CurriculumCallback(curriculum)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=out or tempfile.mkdtemp(),
    )
    loader = DataLoader(
        dataset, batch_size=64, sampler=curriculum, num_workers=2, persistent_workers=True
    )
    trainer.fit(
        Classifier(len(dataset.class_names)), loader, DataLoader(validation, 64), ckpt_path=resume
    )
    print(trainer.callback_metrics)
    return curriculum, trainer


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*arguments[:2], *map(int, arguments[2:3]))
