"""The contract of every system: it changes training, and resumes to the same weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from discl.baselines import SYSTEMS, find_system, make_system
from discl.curriculum.sampling import Pool, SamplingConfig
from discl.curriculum.strategies import RealOnly
from discl.errors import RecipeError
from discl.models.classifier import ClassifierConfig
from discl.training.checkpoint import read_history
from discl.training.hooks import TrainingHook
from discl.training.image_cache import ImageCache
from discl.training.loop import TrainingJob, TrainSettings, train_classifier
from discl.training.optim import make_learning_rate, make_optimizer

NAMES = ("boot", "shirt", "coat")
COUNTS = (9, 6, 3)
CONFIG = ClassifierConfig("resnet10", "3x3", 4, NAMES, 12, 14, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
QUICK: dict[str, dict[str, Any]] = {
    "cuda": {"threshold": 0.05},
    "docl": {"warm_up": 1},
    "ldmlr": {"diffusion_epochs": 3, "epochs": 3},
}


class Killed(Exception):
    """Stands for the end of a process."""


def samples() -> tuple[Pool, ImageCache]:
    labels = np.repeat(np.arange(3), COUNTS)
    rng = np.random.default_rng(0)
    pixels = ImageCache([[]], CONFIG.resize)
    noise = rng.integers(0, 60, (len(labels), 3, 14, 14))
    pixels.memory = torch.from_numpy((70 * labels[:, None, None, None] + noise).astype(np.uint8))
    real = np.zeros(len(labels), bool)
    return Pool(labels, np.full(len(labels), 100), real, labels == 2, NAMES), pixels


def job_of(
    pool: Pool,
    pixels: ImageCache,
    settings: TrainSettings,
    hook: TrainingHook | None,
    make_model: Any = None,
) -> TrainingJob:
    return TrainingJob(
        pool,
        pixels,
        RealOnly(),
        SamplingConfig(None, 0.0),
        objective="cross-entropy",
        class_counts=pool.real_counts,
        classifier=CONFIG,
        settings=settings,
        hook=hook,
        make_model=make_model,
    )


def train(
    folder: Path, hook: TrainingHook | None, on_epoch: Any = lambda record: None
) -> dict[str, torch.Tensor]:
    pool, pixels = samples()
    settings = TrainSettings(
        epochs=4,
        steps_per_epoch=3,
        batch_size=6,
        augment=("flip",),
        precision=torch.float32,
        seed=3,
        save_seconds=0.0,
        make_optimizer=partial(
            make_optimizer, name="sgd", lr=0.05, weight_decay=0.0, momentum=0.9, nesterov=False
        ),
        learning_rate=make_learning_rate(0.05, "constant", 4, 0),
    )
    train_classifier(job_of(pool, pixels, settings, hook), folder, on_epoch=on_epoch)
    return load_file(folder / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(tmp_path_factory.mktemp("plain"), None)


class Close(nn.Module):
    """Right about every shade by a margin that bfloat16 cannot tell from nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3) * 1e-3)
            self.head.bias.fill_(10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shade = images.mean((1, 2, 3))[:, None]
        near = -(shade - torch.tensor([-1.55, -0.45, 0.65])).abs()
        return self.head(near.float())


def test_cuda_recognises_in_float32_where_training_is_in_bfloat16(tmp_path: Path) -> None:
    pool, pixels = samples()
    settings = TrainSettings(
        epochs=1,
        steps_per_epoch=1,
        batch_size=6,
        augment=(),
        precision=torch.bfloat16,
        seed=3,
        make_optimizer=partial(
            make_optimizer, name="sgd", lr=0.0, weight_decay=0.0, momentum=0.0, nesterov=False
        ),
        learning_rate=lambda progress: 0.0,
    )
    hook = make_system("cuda")
    train_classifier(job_of(pool, pixels, settings, hook, Close), tmp_path)
    assert hook.state()["levels"].tolist() == [1, 1, 1]


class Seen(nn.Module):
    """Keeps the images that it is evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.images: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.images.append(images.clone())
        return self.head(images.mean((2, 3)))


@pytest.mark.parametrize("name", ["cuda", "ldmlr"])
def test_the_middle_of_whole_pictures_is_looked_at(name: str, tmp_path: Path) -> None:
    """Pictures twice as wide as high, white beside the middle, squeezed into squares of 14."""
    pool, pixels = samples()
    pixels.memory = torch.full_like(pixels.memory, 255)
    pixels.memory[..., 3:11] = 90
    pixels.aspects = np.full(len(pool.labels), 2.0)
    settings = TrainSettings(
        epochs=1,
        steps_per_epoch=1,
        batch_size=6,
        augment=("random-resized-crop",),
        precision=torch.float32,
        seed=3,
        make_optimizer=partial(
            make_optimizer, name="sgd", lr=0.01, weight_decay=0.0, momentum=0.0, nesterov=False
        ),
        learning_rate=lambda progress: 0.01,
    )
    model = Seen()
    hook = make_system({"name": name, **QUICK[name]})
    train_classifier(job_of(pool, pixels, settings, hook, lambda: model), tmp_path)
    seen = torch.cat(model.images)
    assert len(seen) >= len(pool.labels)
    assert torch.allclose(seen, torch.full_like(seen, (90 / 255 - 0.5) / 0.25), atol=0.01)


@pytest.mark.parametrize("name", SYSTEMS)
def test_it_takes_part_and_survives_a_kill(
    name: str, tmp_path: Path, plain: dict[str, torch.Tensor]
) -> None:
    config = {"name": name, **QUICK[name]}
    whole = train(tmp_path / "whole", make_system(config))
    assert not same(whole, plain)
    if name == "ldmlr":  # only the last layer is another
        assert {key for key in whole if not torch.equal(whole[key], plain[key])} == {
            "fc.weight",
            "fc.bias",
        }
        shown = [
            each.get("last_layer_samples")
            for each in read_history(tmp_path / "whole" / "history.jsonl")
        ]
        assert shown == [
            None,
            None,
            None,
            [9 + 5, 6 + 5, 3 + 5],
        ]  # real features, and five made ones of each class

    def kill(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "killed", make_system(config), kill)
    assert same(train(tmp_path / "killed", make_system(config)), whole)


def test_a_companion_that_adds_nothing_changes_nothing(
    tmp_path: Path, plain: dict[str, torch.Tensor]
) -> None:
    system = make_system("discl.training.hooks:TrainingHook", allow_plugins=True)
    assert same(train(tmp_path, system), plain)


def test_cuda_raises_levels_of_what_is_recognised(tmp_path: Path) -> None:
    system: Any = make_system("cuda")
    system.threshold = -1.0  # every accuracy exceeds it
    train(tmp_path, system)
    assert system.state()["levels"].tolist() == [4, 4, 4]


def test_docl_remembers_every_sample_that_was_drawn(tmp_path: Path) -> None:
    system = make_system({"name": "docl", "warm_up": 4})
    train(tmp_path, system)
    assert system.state()["visited"].all() and (system.state()["score"] != 0).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "cudda",
            r"unknown system 'cudda'; known: cuda, docl, ldmlr\. Did you mean 'cuda'",
        ),
        (
            {"name": "cuda", "treshold": 1},
            r"unknown parameter of system cuda 'treshold'; known: operations, probability, "
            r"threshold\. Did you mean",
        ),
        ("nowhere:Thing", r"system 'nowhere:Thing' cannot be found"),
        (["cuda"], r"a system is a name, or a mapping"),
    ],
)
def test_what_is_no_system_is_refused(config: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_system(config, allow_plugins=True)
