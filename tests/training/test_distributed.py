"""Processes together train what one does. As a program, `python test_processes.py WHAT CLIP FOLDER`, it trains one share into FOLDER."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from discl.baselines.cuda import Cuda
from discl.curriculum.sampling import Pool, SamplingConfig
from discl.curriculum.schedule import hold_out_guidance
from discl.curriculum.strategies import RealOnly, make_strategy
from discl.errors import TrainingError
from discl.models.classifier import build_classifier
from discl.recipe import Train
from discl.stages.classifiers import describe_classifier, describe_training, starter_of
from discl.training import loop
from discl.training.distributed import (
    Processes,
    SharedBatchNorm,
    current_processes,
    join_processes,
)
from discl.training.hooks import TrainingHook
from discl.training.loop import read_history, train_classifier

NAMES = ("boot", "shirt", "coat")
LEVELS = (0, 50)


class Noise:
    """ImageCache that need no pictures: 16 real ones, then 24 synthetic ones."""

    def __init__(self, rows: Any = slice(None)) -> None:
        self.memory = torch.randint(
            0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )[rows]

    def __len__(self) -> int:
        return len(self.memory)

    def __getitems__(self, rows: list[int]) -> torch.Tensor:
        return self.memory[torch.as_tensor(rows)]

    def of_rows(self, rows: np.ndarray) -> Noise:
        return Noise(torch.as_tensor(rows))


class Double(nn.Module):
    """A network in double precision: in single precision a ReLU that a rounding turns on or off is seen in the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.double())


def make_pool() -> Pool:
    """16 real images in three classes, the third of which has 12 synthetic ones at each of two levels."""
    synthetic = np.repeat([False, True], [16, 24])
    labels, levels = (
        np.r_[np.arange(16) % 3, np.full(24, 2)],
        np.r_[np.full(16, 100), np.repeat([0, 50], 12)],
    )
    hard = np.flatnonzero(~synthetic & (labels == 2))
    sources = np.r_[np.arange(16), np.resize(hard, 24)]
    return Pool(labels, levels, synthetic, ~synthetic & (labels == 2), NAMES, sources=sources)


def train_clip(clip: str, folder: Path, objective: str, **changed: Any) -> None:
    """Two epochs of a CLIP, which has no batch norm."""
    train = Train.model_validate(
        {
            "epochs": 2, "curriculum_epochs": 0, "batch_size": 8, "image_size": 32, "augment": [], "precision": "float32",
            "model": {"architecture": "clip", "checkpoint": clip, "templates": ["a {class}.", "one {class}.", "the {class}."]},
            "optimizer": {"name": "sgd", "lr": 0.05}, "ema": 0.5, **changed,
        }
    )  # fmt: skip
    config = describe_classifier(train, NAMES, None, objective)
    settings = describe_training(train, "full", 16, torch.device("cpu"), 2)
    pool = make_pool()
    train_classifier(
        pool, Noise(), RealOnly(), SamplingConfig(None, 0.0), objective, pool.real_counts, config, settings, folder,  # type: ignore[arg-type]
        make_model=starter_of(config, train),
    )  # fmt: skip


def train_network(
    folder: Path,
    save_seconds: float = 1e6,
    epochs: int = 3,
    hook: TrainingHook | None = None,
    **changed: Any,
) -> None:
    """A residual network, with batch norm and augmentation, by a strategy that measures progress."""
    train = Train.model_validate(
        {
            "epochs": epochs, "curriculum_epochs": epochs, "batch_size": 8, "image_size": 28, "resize": 32, "precision": "float32",
            "augment": ["random-resized-crop", "flip", "color-jitter", "cutout"], "steps_per_epoch": 3,
            "model": {"architecture": "resnet10", "stem": "3x3", "width": 4}, "optimizer": {"name": "sgd", "lr": 0.05}, **changed,
        }
    )  # fmt: skip
    config = describe_classifier(train, NAMES)
    pool, guidance = hold_out_guidance(make_pool(), LEVELS, 2, 0)
    settings = describe_training(train, "full", 16, torch.device("cpu"), epochs)
    settings = replace(settings, probe_samples=8, save_seconds=save_seconds, validate_every=1)
    train_classifier(
        pool, Noise(), make_strategy("adaptive", levels=LEVELS, curriculum_epochs=epochs), SamplingConfig(None, 2.0, with_hard=False),  # type: ignore[arg-type]
        "cross-entropy", pool.real_counts, config, settings, folder, guidance=guidance, hook=hook,
        make_model=lambda: Double(build_classifier(config)),
        validate=lambda model: 1 / (2 + current_processes().rank + len(list(folder.glob("best")))),
    )  # fmt: skip


def train_out_of_step(folder: Path) -> None:
    """Two processes whose clocks and whose figures on validation differ."""
    rank = current_processes().rank
    clock = SimpleNamespace(calls=0)

    def monotonic() -> float:
        clock.calls += 1
        return time.monotonic() + (0.03 * (clock.calls % 3) if rank else 0.0)

    loop.time = SimpleNamespace(process_time=time.process_time, monotonic=monotonic)  # type: ignore[assignment]
    train_network(folder, save_seconds=0.05, epochs=20, select="validation")


TRAININGS: dict[str, Callable[[str, Path], None]] = {
    "flyp": lambda clip, folder: train_clip(clip, folder, "flyp"),
    "cross-entropy": lambda clip, folder: train_clip(
        clip, folder, "cross-entropy", mixup=0.4, cutmix=1.0
    ),
    "network": lambda clip, folder: train_network(folder),
    "accumulated": lambda clip, folder: train_network(
        folder, hook=Cuda(threshold=0.0, probability=0.8), accumulate=2, mixup=0.4
    ),
    "out-of-step": lambda clip, folder: train_out_of_step(folder),
}


def start_together(what: str, clip: Path, folder: Path) -> subprocess.Popen[bytes]:
    """torchrun with two processes that train these, one after the other."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        what,
        str(clip),
        str(folder),
    ]
    return subprocess.Popen(command, env=os.environ)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tiny_clip: Path, tmp_path: Path) -> None:
    """Augmentation, mixed images, drawn prompts, batch norm, parts of a batch and the level of an epoch are those of one process."""
    compared = ["flyp", "cross-entropy", "network", "accumulated"]
    children = start_together(",".join(compared), tiny_clip, tmp_path / "two")
    for what in compared:
        TRAININGS[what](str(tiny_clip), tmp_path / "one" / what)
    try:
        assert children.wait(240) == 0
    finally:
        children.kill()
    for what in compared:
        one, two = (
            load_file(tmp_path / which / what / "model.safetensors") for which in ("one", "two")
        )
        first, second = (
            read_history(tmp_path / which / what / "history.jsonl") for which in ("one", "two")
        )
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(
                two[name],
                tensor,
                rtol=1e-3,
                atol=2e-5,
                msg=lambda told, at=f"{what}: {name}": f"{at}: {told}",
            )
        for alone, shared in zip(first, second, strict=True):
            assert (shared["levels"], shared["loss"]) == (
                alone["levels"],
                pytest.approx(alone["loss"], rel=1e-4),
            )
    start = load_file(tiny_clip / "model.safetensors")
    for what in ("flyp", "cross-entropy"):
        name = "vision_model.embeddings.patch_embedding.weight"
        tuned = load_file(tmp_path / "two" / what / "model.safetensors")[f"clip.{name}"]
        assert (tuned - start[name]).abs().max() > 1e-3, (
            "training that moves nothing would compare nothing"
        )


@pytest.mark.slow
def test_processes_decide_together_when_to_save_and_what_is_best(
    tiny_clip: Path, tmp_path: Path
) -> None:
    children = start_together("out-of-step", tiny_clip, tmp_path)
    try:
        assert children.wait(180) == 0, "the processes wait for one another for ever, or one failed"
    finally:
        children.kill()
    assert len(read_history(tmp_path / "out-of-step" / "history.jsonl")) == 20


def test_a_shared_batch_norm_is_that_of_torch() -> None:
    """Outputs, gradients and running statistics, alone; together it is compared above."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, 3, 2)
    results = []
    for kind in (nn.BatchNorm2d, SharedBatchNorm):
        layer = nn.BatchNorm2d(5)
        nn.init.uniform_(layer.weight)
        layer = layer if kind is nn.BatchNorm2d else SharedBatchNorm.of(layer)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(5.0))
        given = x.clone().requires_grad_()
        out = layer(layer(given))
        out.pow(3).sum().backward()
        results.append(
            [out, given.grad, layer.weight.grad, *layer.state_dict().values(), layer.eval()(x)]
        )
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_share_is_the_same_part_of_every_batch() -> None:
    rows = np.arange(12)
    assert Processes(0, 2).share(rows, 6).tolist() == [0, 1, 2, 6, 7, 8]
    assert Processes(1, 2).share(rows, 6).tolist() == [3, 4, 5, 9, 10, 11]
    assert Processes().share(rows, 5) is rows
    assert Processes(1, 2).local_shard(torch.arange(6)).tolist() == [3, 4, 5]
    with pytest.raises(TrainingError, match=r"2 processes cannot share batches of 3 evenly"):
        Processes(0, 2).share(rows, 3)


def test_alone_nothing_is_joined_or_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join_processes(cpu=True)
    assert alone == Processes(0, 1) and alone.first and alone.broadcast(3) == 3
    tensor = torch.ones(2)
    alone.average([tensor])
    assert (
        alone.gather(tensor) is tensor
        and alone.local_shard(tensor) is tensor
        and tensor.tolist() == [1, 1]
    )


if __name__ == "__main__":
    join_processes(cpu=True)
    for each in sys.argv[1].split(","):
        TRAININGS[each](sys.argv[2], Path(sys.argv[3]) / each)
