"""Twelve images of three classes, and trainings of a few steps on them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from discl.curriculum.sampling import Pool, SamplingConfig
from discl.curriculum.strategies import RealOnly
from discl.models.classifier import ClassifierConfig
from discl.recipe import Train
from discl.training.image_cache import ImageCache
from discl.training.loop import TrainingJob, TrainSettings, train_classifier

NAMES = ("boot", "shirt", "coat")


def make_train(clip: Path | str, **changed: Any) -> Train:
    return Train.model_validate(
        {
            "epochs": 3,
            "curriculum_epochs": 0,
            "batch_size": 6,
            "image_size": 32,
            "augment": [],
            "precision": "float32",
            "model": {
                "architecture": "clip",
                "checkpoint": str(clip),
                "templates": ["a photo of {class}.", "{class} in the wild."],
            },
            "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.2, "warm_up_steps": 2},
            **changed,
        }
    )


def make_samples() -> tuple[Pool, ImageCache]:
    pictures = []
    labels = np.arange(12) % 3
    for label in labels:
        shade = np.random.default_rng(len(pictures)).integers(0, 90, (32, 32, 3)) + 80 * int(label)
        buffer = io.BytesIO()
        Image.fromarray(shade.astype(np.uint8)).save(buffer, "PNG")
        pictures.append({"image": {"bytes": buffer.getvalue(), "path": None}})
    no = np.zeros(12, bool)
    return Pool(labels, np.full(12, 100), no, no, NAMES), ImageCache([pictures], 32)


def train_real(
    folder: Path,
    objective: str,
    config: ClassifierConfig,
    settings: TrainSettings,
    *,
    on_epoch: Any = lambda record: None,
    **more: Any,
) -> None:
    """Trains on the real samples alone; `more` are fields of the job."""
    pool, pixels = make_samples()
    job = TrainingJob(
        pool,
        pixels,
        RealOnly(),
        SamplingConfig(None, 0.0),
        objective=objective,
        class_counts=pool.real_counts,
        classifier=config,
        settings=settings,
        **more,
    )
    train_classifier(job, folder, on_epoch=on_epoch)
