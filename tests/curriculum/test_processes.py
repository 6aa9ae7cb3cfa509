"""Two processes train what one does. Run as a program, `python test_processes.py CLIP FOLDER`, it trains one share into FOLDER."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from discl.curriculum.mixture import Mixing, Pool
from discl.curriculum.processes import Processes, join_processes
from discl.curriculum.strategies import RealOnly
from discl.curriculum.training import train_classifier
from discl.errors import TrainingError
from discl.recipe import Train
from discl.stages.classifiers import describe_classifier, describe_training, starter_of

NAMES = ("boot", "shirt", "coat")


class Noise:
    """Pixels that need no pictures."""

    memory = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 16

    def __getitems__(self, rows: list[int]) -> torch.Tensor:
        return self.memory[torch.as_tensor(rows)]


def train_into(clip: str, folder: Path, objective: str) -> None:
    """Two epochs of a CLIP, which has no batch norm, without augmentation and with one prompt: nothing is random but the order."""
    train = Train.model_validate(
        {
            "epochs": 2, "curriculum_epochs": 0, "batch_size": 8, "image_size": 32, "augment": [], "precision": "float32",
            "model": {"architecture": "clip", "checkpoint": clip}, "optimizer": {"name": "sgd", "lr": 0.05}, "ema": 0.5,
        }
    )  # fmt: skip
    config = describe_classifier(train, NAMES, None, objective)
    settings = describe_training(train, "full", 16, torch.device("cpu"), 2)
    no = np.zeros(16, bool)
    pool = Pool(np.arange(16) % 3, np.full(16, 100), no, no, NAMES)
    train_classifier(
        pool, Noise(), RealOnly(), Mixing(None, 0.0), objective, pool.real_counts, config, settings, folder,  # type: ignore[arg-type]
        make_model=starter_of(config, train),
    )  # fmt: skip


def starter_learned(clip: str, tuned: dict[str, torch.Tensor]) -> float:
    """How far the image tower has moved from the checkpoint."""
    name = "vision_model.embeddings.patch_embedding.weight"
    start = load_file(Path(clip) / "model.safetensors")[name]
    return float((tuned[f"clip.{name}"] - start).abs().max())


def test_two_processes_train_what_one_does(tiny_clip: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(tiny_clip), str(tmp_path / "two")],
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for objective in ("flyp", "cross-entropy"):
        train_into(str(tiny_clip), tmp_path / "one" / objective, objective)
    assert [child.wait(240) for child in children] == [0, 0]
    for objective in ("flyp", "cross-entropy"):
        one, two = (load_file(tmp_path / which / objective / "model.safetensors") for which in ("one", "two"))
        assert one.keys() == two.keys()
        learned = starter_learned(str(tiny_clip), one)
        assert learned > 1e-3, "training that moves nothing would compare nothing"
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-5, msg=f"{objective}: {name}")


def test_a_share_is_the_same_part_of_every_batch() -> None:
    rows = np.arange(12)
    assert Processes(0, 2).share(rows, 6).tolist() == [0, 1, 2, 6, 7, 8]
    assert Processes(1, 2).share(rows, 6).tolist() == [3, 4, 5, 9, 10, 11]
    assert Processes().share(rows, 5) is rows
    with pytest.raises(TrainingError, match=r"2 processes cannot share batches of 3 evenly"):
        Processes(0, 2).share(rows, 3)


def test_alone_nothing_is_joined_or_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join_processes(cpu=True)
    assert alone == Processes(0, 1) and alone.first
    tensor = torch.ones(2)
    alone.average([tensor])
    assert alone.gather(tensor) is tensor and tensor.tolist() == [1, 1]


if __name__ == "__main__":
    join_processes(cpu=True)
    for each in ("flyp", "cross-entropy"):
        train_into(sys.argv[1], Path(sys.argv[2]) / each, each)
