"""A plain second implementation of arXiv 2410.13674, algorithm 2, against the training loop."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from discl.curriculum.progress import GuidanceSet, draw_guidance_set, hold_out
from discl.curriculum.sampling import Pool, SamplingConfig, draw_epoch
from discl.curriculum.schedule import EpochSchedule
from discl.curriculum.strategies import make_strategy
from discl.models.classifier import ClassifierConfig
from discl.training.loop import TrainingJob, TrainSettings, make_schedule, train_classifier
from discl.utils.hashing import derive_seed

LEVELS = (0, 30, 50)
CONFIG = ClassifierConfig("none", "", 0, ("a", "b", "c"), 6, 6, (0.5,) * 3, (0.25,) * 3)
EPOCHS, GUIDED, BATCH, RATE = 8, 6, 8, 0.05


class Net(nn.Module):
    """A layer whose answers differ between training and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3 * 6 * 6), nn.Linear(3 * 6 * 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x.flatten(1)))


class Squares:
    """ImageCache of rows in the shade of their class, and with more noise the lower their level."""

    def __init__(self, squares: torch.Tensor) -> None:
        self.memory = squares

    def __len__(self) -> int:
        return len(self.memory)

    def __getitems__(self, rows: list[int]) -> torch.Tensor:
        return self.memory[torch.as_tensor(rows)]

    def of_rows(self, rows: np.ndarray) -> Squares:
        return Squares(self.memory[torch.as_tensor(rows)])


def make_samples() -> tuple[Pool, Squares, GuidanceSet]:
    """30 real images, those of class 2 hard, and two synthetic ones of each at each level; V takes
    five hard images."""
    labels, levels = (
        np.r_[np.arange(30) % 3, np.full(60, 2)],
        np.r_[np.full(30, 100), np.repeat(LEVELS, 20)],
    )
    synthetic = np.repeat([False, True], [30, 60])
    rng = np.random.default_rng(0)
    squares = (
        70 * labels[:, None, None, None]
        + rng.integers(-60, 60, (90, 3, 6, 6)) * (1.3 - levels / 100)[:, None, None, None]
    )
    hard = ~synthetic & (labels == 2)
    sources = np.r_[np.arange(30), np.resize(np.flatnonzero(hard), 60)]
    pool = Pool(labels, levels, synthetic, hard, CONFIG.class_names, sources=sources)
    guidance = draw_guidance_set(pool, tuple(LEVELS), 5, seed=1)
    return (
        hold_out(pool, guidance),
        Squares(torch.from_numpy(squares.clip(0, 255).astype(np.uint8))),
        guidance,
    )


def replay(
    model: nn.Module, pool: Pool, pixels: Squares, guidance: GuidanceSet, schedule: EpochSchedule
) -> list[int | None]:
    """The level of each epoch by algorithm 2, None for real only; trains `model` in place."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def images(rows: np.ndarray) -> torch.Tensor:
        return (pixels.memory[torch.from_numpy(rows)].float() / 255 - 0.5) / 0.25

    def train(rows: np.ndarray) -> None:
        model.train()
        for batch in np.split(rows, len(rows) // BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images(batch)), torch.from_numpy(pool.labels[batch])).backward()
            optimizer.step()

    @torch.no_grad()
    def probability() -> np.ndarray:
        model.eval()
        return (
            model(images(guidance.rows)).double().softmax(1)[:, 2].numpy()
        )  # V holds class 2 alone

    chosen: list[int | None] = []
    for epoch in range(EPOCHS):
        left, levels, level = 4 * BATCH, (), None
        if epoch < GUIDED:
            before = probability()
            drawn = schedule.draw_probe(epoch)
            assert not pool.synthetic[drawn].any()
            train(drawn)
            change = probability() - before
            gain = {}
            for each in LEVELS:
                own = sorted(change[guidance.levels == each])
                low, high = np.percentile(own, 25), np.percentile(own, 75)
                kept = [
                    value
                    for value in own
                    if low - 1.5 * (high - low) <= value <= high + 1.5 * (high - low)
                ]
                gain[each] = sum(kept) / len(kept)
            level = max(gain, key=lambda each: gain[each])
            left, levels = left - len(drawn), (level,)
        rows, _ = draw_epoch(
            pool, levels, schedule.sampling, left, seed=derive_seed("mix", schedule.seed, epoch)
        )
        assert set(pool.levels[rows]) <= {level, 100} and not (levels and pool.hard[rows].any())
        train(rows)
        chosen.append(level)
    return chosen


def test_training_is_algorithm_2(tmp_path: Path) -> None:
    pool, pixels, guidance = make_samples()
    settings = TrainSettings(
        epochs=EPOCHS,
        steps_per_epoch=4,
        batch_size=BATCH,
        augment=(),
        learning_rate=lambda progress: RATE,
        precision=torch.float32,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), RATE),
        seed=3,
        probe_samples=BATCH,
    )
    strategy, sampling = (
        make_strategy("adaptive", levels=(), curriculum_epochs=GUIDED),
        SamplingConfig(None, 1.0, with_hard=False),
    )
    torch.manual_seed(0)
    start = Net()
    job = TrainingJob(
        pool,
        pixels,  # type: ignore[arg-type]
        strategy,
        sampling,
        objective="cross-entropy",
        class_counts=pool.real_counts,
        classifier=CONFIG,
        settings=settings,
        guidance=guidance,
        make_model=lambda: copy.deepcopy(start),
    )
    history = train_classifier(job, tmp_path)
    schedule = make_schedule(pool, strategy, sampling, settings, guidance=guidance)
    chosen = replay(start, pool, pixels, guidance, schedule)
    assert [record["levels"] for record in history] == [
        [] if level is None else [level] for level in chosen
    ]
    assert len(set(chosen[:GUIDED])) > 1, "a choice that never changes would compare little"
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(tensor, start.state_dict()[name])
