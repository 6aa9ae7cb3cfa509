"""Parts of `gpu.py` about training: images per second from memory and from files."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from discl.models.classifier import ClassifierConfig, build_classifier
from discl.training import image_cache
from discl.training.image_cache import ImageCache
from discl.training.objectives import make_objective
from discl.training.optim import make_optimizer
from discl.training.step import EpochPart, StepConfig, TrainState
from figures import Figure
from gpu_bench import Bench

CLASSES = 100
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENT = ("random-resized-crop", "flip")
ROUNDS = 2
"""Timed epochs of each kind."""


class Files:
    """A folder of JPEG files, read when they are drawn."""

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.paths = [folder / f"{row}.jpg" for row in range(count)]
        rng = np.random.default_rng(0)
        for path in self.paths:
            coarse = Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8))
            file = io.BytesIO()
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            path.write_bytes(file.getvalue())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": {"bytes": self.paths[row].read_bytes(), "path": None}}


class FixedBatch:
    """The same batch on the device again and again: training that waits for nothing."""

    def __init__(self, pixels: ImageCache, batch: int, device: str) -> None:
        self.rows = np.arange(batch)
        self.pixels = pixels.__getitems__(self.rows.tolist()).to(device)

    def of(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for _ in range(len(rows) // len(self.rows)):
            yield self.rows, self.pixels

    def aspects_of(self, rows: np.ndarray) -> None:
        return None


def resnet10(bench: Bench) -> Iterator[Figure]:
    """ResNet-10 at 224 pixels, cross-entropy, SGD."""
    config = describe(bench, "resnet10", width=8 if bench.smoke else 64)
    state = make_state(bench, config, "cross-entropy", name="sgd", momentum=0.9)
    yield from feed(bench, state, "ResNet-10", batch=4 if bench.smoke else 256, steps=60)


def clip_b16(bench: Bench) -> Iterator[Figure]:
    """CLIP ViT-B/16 with FLYP's loss and AdamW."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2} if bench.smoke else {}
    sizes = small if bench.smoke else {}
    backbone = {
        "text_config": {"vocab_size": 64 if bench.smoke else 49408, **sizes},
        "vision_config": {"patch_size": 16, "image_size": 32 if bench.smoke else 224, **sizes},
        "projection_dim": 16 if bench.smoke else 512,
        "prompts": 4,
        "prompt_length": 16,
        "rebuild": True,
    }
    config = describe(bench, "clip", backbone=backbone)
    state = make_state(bench, config, "flyp", name="adamw", momentum=0.0)
    prompts: Any = state.model.prompts
    prompts.copy_(torch.randint(1, 60, prompts.shape))
    yield from feed(bench, state, "CLIP ViT-B/16, FLYP", batch=4 if bench.smoke else 256, steps=12)


def describe(bench: Bench, architecture: str, **settings: Any) -> ClassifierConfig:
    names = tuple(f"class {label}" for label in range(4 if bench.smoke else CLASSES))
    size, resize = (32, 40) if bench.smoke else (224, 256)
    given = {"stem": "7x7", "width": 0, "mean": MEAN, "std": STD} | settings
    return ClassifierConfig(
        architecture, class_names=names, image_size=size, resize=resize, **given
    )


def make_state(
    bench: Bench, config: ClassifierConfig, objective: str, *, name: str, momentum: float
) -> TrainState:
    torch.manual_seed(0)
    model: Any = build_classifier(config).to(bench.device)
    return TrainState(
        model.to(memory_format=torch.channels_last),
        partial(
            make_optimizer, name=name, lr=1e-4, weight_decay=1e-4, momentum=momentum, nesterov=False
        ),
        objective=make_objective(objective),
        class_counts=np.ones(len(config.class_names)),
        config=config,
        steps=StepConfig(),
        augment=AUGMENT,
        precision=bench.dtype,
        device=bench.device,
    )


def feed(
    bench: Bench, state: TrainState, title: str, *, batch: int, steps: int
) -> Iterator[Figure]:
    """Images per second of `TrainState.train_epoch` on a fixed batch, from memory, from files."""
    count = 8 if bench.smoke else 1024
    workers = 0 if bench.smoke else min(os.cpu_count() or 1, 16)
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), count, state.config.resize)
        memory = ImageCache([files], state.config.resize)
        limit, image_cache.MEMORY_LIMIT = image_cache.MEMORY_LIMIT, 0
        on_disk = ImageCache([files], state.config.resize)
        image_cache.MEMORY_LIMIT = limit
        loaders = {
            "the same batch on the device": FixedBatch(memory, batch, bench.device),
            "from memory": state.loader(memory, batch, 0),
            "from files": state.loader(on_disk, batch, workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(ROUNDS):  # in turns, because a device is slower at first
            for name, loader in loaders.items():
                rates[name].append(
                    time_epoch(bench, state, loader, batch=batch, count=count, steps=steps)
                )
        best = max(rates["the same batch on the device"])
        told = f"{batch} a step; best of {ROUNDS} rounds, files with {workers} workers, JPEG"
        for name, found in rates.items():
            yield Figure(f"{title}: images/s, {name}", max(found), detail=told)
        for name, goal in (("from memory", (">=", 0.95)), ("from files", ("", None))):
            yield Figure(f"{title}: {name} ÷ the same batch", max(rates[name]) / best, *goal)


def time_epoch(
    bench: Bench, state: TrainState, loader: Any, *, batch: int, count: int, steps: int
) -> float:
    """Images per second of an epoch, after a short one."""
    labels = np.arange(count) % len(state.config.class_names)
    for number in (2, 2) if bench.smoke else (steps // 3, steps):
        rows = np.random.default_rng(0).permutation(np.resize(np.arange(count), number * batch))
        part = EpochPart(rows, 0, epochs=1, batch_size=batch, seed=0)
        started = time.perf_counter()
        state.train_epoch(loader, part, labels, lambda progress: 1e-4, Path("none"))
        seconds = time.perf_counter() - started  # the mean loss has waited for the device
    return len(rows) / seconds
