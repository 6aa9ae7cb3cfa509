"""The training loop: resumed is the same as never stopped, bit for bit, and everything it refuses.

As a program, `python test_loop.py FOLDER`, it trains into FOLDER and prints each finished epoch.
"""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from discl.curriculum.progress import (
    GuidanceSet,
    best_level,
    draw_guidance_set,
    hold_out,
    measure_progress,
)
from discl.curriculum.sampling import Pool, SamplingConfig
from discl.curriculum.schedule import Finish
from discl.curriculum.strategies import MEASURING, RealOnly, Strategy, make_strategy
from discl.errors import TrainingError
from discl.evaluation.metrics import true_class_probability
from discl.models.classifier import (
    ClassifierConfig,
    build_classifier,
    load_classifier,
    save_classifier,
)
from discl.training import image_cache as pixels_module
from discl.training import loop
from discl.training.checkpoint import read_history
from discl.training.image_cache import ImageCache
from discl.training.inference import choose_precision, predict_logits
from discl.training.loop import (
    Record,
    TrainingJob,
    TrainSettings,
    check_batch_size,
    make_schedule,
    train_classifier,
)
from discl.training.optim import make_learning_rate, make_optimizer
from discl.training.step import StepConfig, TrainState

NAMES = ("boot", "shirt", "coat", "bag")
REAL = (12, 8, 4, 2)
SYNTHETIC_EACH = 5
CONFIG = ClassifierConfig("resnet10", "3x3", 4, NAMES, 12, 14, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
OPTIMIZERS = {
    "adam": {"name": "adam", "lr": 3e-3, "weight_decay": 0.0, "momentum": 0.9, "nesterov": False},
    "adamw": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "momentum": 0.9, "nesterov": False},
    "sgd": {"name": "sgd", "lr": 0.05, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": True},
    "plain sgd": {
        "name": "sgd",
        "lr": 0.05,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "nesterov": False,
    },
}


class Killed(Exception):
    """Stands for the end of a process."""


def draw_picture(label: int, index: int) -> dict[str, Any]:
    """A 14×14 drawing in the shade of its class, with noise of its own."""
    generator = np.random.default_rng([label, index])
    buffer = io.BytesIO()
    Image.fromarray((60 * label + generator.integers(0, 70, (14, 14, 3))).astype(np.uint8)).save(
        buffer, "PNG"
    )
    return {"image": {"bytes": buffer.getvalue(), "path": None}}


@cache
def make_samples() -> tuple[Pool, ImageCache]:
    """26 real images in four classes, and 5 synthetic ones at 0 % and at 50 % for each of the two
    rare classes.

    Hard images of a class take turns as their sources.
    """
    real = [(label, 100, index) for label, count in enumerate(REAL) for index in range(count)]
    synthetic = [
        (label, level, 100 + level + index)
        for label in (2, 3)
        for level in (0, 50)
        for index in range(SYNTHETIC_EACH)
    ]
    labels = np.array([label for label, _, _ in real + synthetic])
    is_synthetic = np.repeat([False, True], [len(real), len(synthetic)])
    pool = Pool(
        labels,
        np.array([level for _, level, _ in real + synthetic]),
        is_synthetic,
        ~is_synthetic & (labels >= 2),
        NAMES,
        sources=np.r_[
            np.arange(len(real)),
            [sum(REAL[:label]) + index % 10 % REAL[label] for label, _, index in synthetic],
        ],
    )
    return pool, ImageCache(
        [[draw_picture(label, index) for label, _, index in part] for part in (real, synthetic)],
        CONFIG.resize,
    )


def make_settings(optimizer: str = "adam", epochs: int = 8, **changed: Any) -> TrainSettings:
    arguments = OPTIMIZERS[optimizer]
    return replace(
        TrainSettings(
            epochs=epochs,
            steps_per_epoch=3,
            batch_size=8,
            augment=("random-crop", "flip", "color-jitter"),
            make_optimizer=partial(make_optimizer, **arguments),
            learning_rate=make_learning_rate(arguments["lr"], "cosine", epochs, 1),
            precision=torch.float32,
            seed=7,
            save_seconds=0.0,
        ),
        **changed,
    )


def curriculum(epochs: int) -> Strategy:
    return make_strategy(
        "diverse-to-specific",
        levels=(0, 50),
        curriculum_epochs=max(2, epochs - 2),
    )


def train_into(
    folder: Path,
    settings: TrainSettings | None = None,
    *,
    workers: int = 0,
    on_epoch: Callable[[Record], None] = lambda record: None,
    until: int | None = None,
    at_pause: Callable[[nn.Module], None] = lambda model: None,
    **changed: Any,
) -> list[Record]:
    """Trains on `make_samples`; `changed` are other fields of the job."""
    settings = settings or make_settings()
    pool, pixels = make_samples()
    job = TrainingJob(
        pool,
        pixels,
        curriculum(settings.epochs),
        SamplingConfig(pool.tail_share, 2.0),
        objective="balanced-softmax",
        class_counts=pool.real_counts,
        classifier=CONFIG,
        settings=settings,
    )
    return train_classifier(
        replace(job, **changed),
        folder,
        workers=workers,
        on_epoch=on_epoch,
        until=until,
        at_pause=at_pause,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of the files that training leaves; the seconds that an epoch took are taken out."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    files["history.jsonl"] = json.dumps(
        without_seconds(read_history(folder / "history.jsonl"))
    ).encode()
    return files


def without_seconds(history: list[Record]) -> list[Record]:
    return [
        {key: value for key, value in record.items() if not key.endswith("seconds")}
        for record in history
    ]


def stop_after(epoch: int) -> Callable[[Record], None]:
    def on_epoch(record: Record) -> None:
        if record["epoch"] == epoch:
            raise Killed

    return on_epoch


def states_to(kept: list[dict[str, torch.Tensor]]) -> Callable[[nn.Module], None]:
    """Keeps the state of a model at a pause."""
    return lambda model: kept.append(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}
    )


def accuracies(values: list[float]) -> Callable[[nn.Module], float]:
    """A figure for each call, whatever the model."""
    following = iter(values)
    return lambda model: next(following)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_into(folder)
    return contents(folder)


def test_what_training_leaves(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    history = train_into(tmp_path)
    assert sorted(uninterrupted) == ["config.json", "history.jsonl", "model.safetensors"]
    assert read_history(tmp_path / "history.jsonl") == history
    model, config = load_classifier(tmp_path)
    assert config == CONFIG
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_two_runs_are_equal(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    train_into(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_another_seed_gives_another_model(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    train_into(tmp_path, make_settings(seed=8))
    assert contents(tmp_path)["model.safetensors"] != uninterrupted["model.safetensors"]


def test_random_state_of_the_caller_does_not_matter(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    torch.manual_seed(12345)
    train_into(tmp_path, on_epoch=lambda record: torch.rand(record["epoch"] + 1).sum())
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("epoch", [0, 3, 7])
def test_resumed_is_uninterrupted(
    epoch: int, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    with pytest.raises(Killed):
        train_into(tmp_path, on_epoch=stop_after(epoch))
    assert len(read_history(tmp_path / "history.jsonl")) == epoch + 1
    seen: list[int] = []
    train_into(tmp_path, on_epoch=lambda record: seen.append(record["epoch"]))
    assert seen == list(range(8))
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_head_is_trained_anew_on_classes_drawn_evenly(
    ema: float | None, tmp_path: Path
) -> None:
    """cRT: the last three of six epochs, killed in them. The backbone stays as it was."""
    settings = make_settings(
        "sgd", epochs=6, finish=Finish(3, head_only=True, new_head=True), steps=StepConfig(ema=ema)
    )
    strategy = make_strategy("all-levels", levels=(0, 50), curriculum_epochs=3)
    before: list[dict[str, torch.Tensor]] = []
    train_into(
        tmp_path / "paused", settings, strategy=strategy, until=3, at_pause=states_to(before)
    )
    history = train_into(tmp_path / "whole", settings, strategy=strategy)
    with pytest.raises(Killed):
        train_into(tmp_path / "killed", settings, strategy=strategy, on_epoch=stop_after(4))
    train_into(tmp_path / "killed", settings, strategy=strategy)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    ended = load_classifier(tmp_path / "whole")[0].state_dict()
    for name, tensor in before[0].items():
        assert torch.equal(ended[name], tensor) != name.startswith("fc."), name
    drawn = np.array([record["class_samples"] for record in history])
    assert drawn[3:].sum(0).min() >= 12  # of 72; in proportion to the images it would be 6
    assert history[-1]["last_layer_samples"] == drawn[3:].sum(0).tolist()
    assert [record["synthetic_share"] > 0 for record in history] == [True] * 3 + [False] * 3


def test_a_new_head_is_the_one_of_the_start(tmp_path: Path) -> None:
    settings = make_settings(
        "plain sgd",
        epochs=2,
        learning_rate=lambda progress: 0.1 if progress < 0.5 else 0.0,
        finish=Finish(1, head_only=True, new_head=True),
    )
    train_into(tmp_path / "one", settings, strategy=RealOnly())
    still = replace(settings, learning_rate=lambda progress: 0.0, finish=None)
    train_into(tmp_path / "start", still, strategy=RealOnly())
    ended, first = (load_classifier(tmp_path / each)[0].state_dict() for each in ("one", "start"))
    assert torch.equal(ended["fc.weight"], first["fc.weight"])
    assert not torch.equal(ended["conv1.weight"], first["conv1.weight"])


def test_real_images_end_a_training_whatever_the_strategy_says(tmp_path: Path) -> None:
    strategy = make_strategy("fixed", level=50, levels=(0, 50), curriculum_epochs=4)
    settings = make_settings(epochs=4, finish=Finish(3))
    history = train_into(tmp_path, settings, strategy=strategy)
    assert [record["levels"] for record in history] == [[50]] * 3 + [[]]
    assert "last_layer_samples" not in history[-1]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "plain sgd"])
def test_resumed_is_uninterrupted_with_every_optimizer(optimizer: str, tmp_path: Path) -> None:
    settings = make_settings(optimizer, epochs=4)
    train_into(tmp_path / "whole", settings)
    with pytest.raises(Killed):
        train_into(tmp_path / "killed", settings, on_epoch=stop_after(1))
    train_into(tmp_path / "killed", settings)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_again_and_again(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    for epoch in range(8):
        with pytest.raises(Killed):
            train_into(tmp_path, on_epoch=stop_after(epoch))
    train_into(tmp_path)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("epoch", [1, 4, 5])
def test_last_save_some_epochs_before_the_end(
    epoch: int, tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second passes in an epoch, so the fourth and the seventh are saved."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        loop,
        "time",
        SimpleNamespace(process_time=time.process_time, monotonic=lambda: clock.now),
    )

    def on_epoch(record: Record) -> None:
        clock.now += 1
        if record["epoch"] == epoch:
            raise Killed

    with pytest.raises(Killed):
        train_into(tmp_path, make_settings(save_seconds=2.5), on_epoch=on_epoch)
    saved = 4 if epoch >= 3 else 0
    assert (tmp_path / "checkpoint.safetensors").exists() == bool(saved)
    assert not saved or len(read_history(tmp_path / "history.jsonl")) == saved
    train_into(tmp_path, make_settings(save_seconds=2.5))
    assert contents(tmp_path) == uninterrupted


@pytest.mark.slow
def test_killed_process_resumed(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(3)] == [
            "epoch 0\n",
            "epoch 1\n",
            "epoch 2\n",
        ]
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
    (tmp_path / f".checkpoint.safetensors.{'0' * 32}.new").write_bytes(
        b"half"
    )  # as where it is killed while it saves
    train_into(tmp_path)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_from_workers_give_the_same_model_resumed_too(
    workers: int, tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels_module, "MEMORY_LIMIT", 0)
    with pytest.raises(Killed):
        train_into(tmp_path, workers=workers, on_epoch=stop_after(3))
    train_into(tmp_path, workers=workers)
    assert contents(tmp_path) == uninterrupted


def test_history_is_complete(tmp_path: Path) -> None:
    """Two hard classes of four: half of 24 samples. A pass has 6 hard, 12 synthetic, 18 others."""
    history = train_into(tmp_path, validate=lambda model: 0.25)
    assert [record["epoch"] for record in history] == list(range(8))
    assert [record["levels"] for record in history] == [[0]] * 3 + [[50]] * 3 + [[]] * 2
    assert {record["samples"] for record in history} == {24}
    assert all(sum(record["class_samples"]) == 24 for record in history)
    assert all(
        math.isfinite(record["loss"])
        and record["seconds"] >= 0
        and record["processor_seconds"] >= 0
        for record in history
    )
    assert [record["synthetic_share"] > 0 for record in history] == [True] * 6 + [False] * 2
    assert [record["effective_scale"] for record in history] == pytest.approx(
        [9 / 6] * 6 + [0.0] * 2
    )
    assert [record["hard_share"] for record in history[-2:]] == pytest.approx([0.5] * 2, abs=0.01)
    assert [record.get("validation_accuracy") for record in history] == [None] * 4 + [0.25] + [
        None
    ] * 2 + [0.25]
    rate = make_settings().learning_rate
    assert [record["learning_rate"] for record in history] == [
        rate((epoch + 2 / 3) / 8) for epoch in range(8)
    ]


def test_an_epoch_draws_the_rows_that_the_history_counts(tmp_path: Path) -> None:
    history = train_into(tmp_path)
    pool, _ = make_samples()
    strategy, sampling, settings = (
        curriculum(8),
        SamplingConfig(pool.tail_share, 2.0),
        make_settings(),
    )
    for record in history:
        rows, _ = make_schedule(pool, strategy, sampling, settings).draw(record["epoch"], 0, [])
        assert np.bincount(pool.labels[rows], minlength=4).tolist() == record["class_samples"]


def test_it_learns(tmp_path: Path) -> None:
    """The classes differ in shade, so 12 epochs suffice to classify most training images."""
    history = train_into(tmp_path, make_settings(epochs=12, augment=("flip",)))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    pool, pixels = make_samples()
    logits = predict_logits(load_classifier(tmp_path)[0], pixels, np.arange(26), CONFIG)
    assert (logits.argmax(1).numpy() == pool.labels[:26]).mean() > 0.7


def test_validation_chooses_the_best_epoch_and_last_the_last(tmp_path: Path) -> None:
    """The fourth of six epochs is best, the sixth as good, and the first of equals is taken."""
    figures = [0.2, 0.5, 0.4, 0.7, 0.6, 0.7]
    every_epoch: list[dict[str, torch.Tensor]] = []

    def validate(model: nn.Module) -> float:
        every_epoch.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return figures[len(every_epoch) - 1]

    history = train_into(
        tmp_path / "validation", make_settings(epochs=6, select="validation"), validate=validate
    )
    assert [record["validation_accuracy"] for record in history] == figures
    chosen = load_classifier(tmp_path / "validation")[0].state_dict()
    assert all(torch.equal(tensor, every_epoch[3][name]) for name, tensor in chosen.items())
    assert sorted(contents(tmp_path / "validation")) == [
        "config.json",
        "history.jsonl",
        "model.safetensors",
    ]
    train_into(tmp_path / "last", make_settings(epochs=6), validate=accuracies(figures))
    last = load_classifier(tmp_path / "last")[0].state_dict()
    assert all(torch.equal(tensor, every_epoch[5][name]) for name, tensor in last.items())


@pytest.mark.parametrize(
    "epoch", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_validation_choice_survives_a_kill(
    epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after epoch 1 only: the best model on disk may be newer than the checkpoint."""
    figures = [0.2, 0.5, 0.4, 0.7, 0.6, 0.7]
    settings = make_settings(epochs=6, select="validation")
    train_into(tmp_path / "whole", settings, validate=accuracies(figures))
    save = loop.save_checkpoint

    def save_once(path: Path, state: TrainState, history: list[Record], *rest: str) -> None:
        if len(history) == 2:
            save(path, state, history, *rest)

    monkeypatch.setattr(loop, "save_checkpoint", save_once)
    with pytest.raises(Killed):
        train_into(
            tmp_path / "killed", settings, validate=accuracies(figures), on_epoch=stop_after(epoch)
        )
    train_into(
        tmp_path / "killed", settings, validate=accuracies(figures if epoch == 0 else figures[2:])
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("killed_in", ["replace", "unlink", "rmtree"])
def test_killed_while_the_chosen_model_is_put_in_place(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = [0.2, 0.7, 0.4]
    settings = make_settings(epochs=3, select="validation")
    train_into(tmp_path / "whole", settings, validate=accuracies(figures))

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        owner = loop.shutil if killed_in == "rmtree" else Path

        def on_epoch(record: Record) -> None:
            if record["epoch"] == 2:
                patched.setattr(owner, killed_in, kill)

        train_into(tmp_path / "killed", settings, validate=accuracies(figures), on_epoch=on_epoch)
    train_into(tmp_path / "killed", settings, validate=accuracies(figures))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# ---------------------------------------------------------------- whole pictures


def draw_wide(label: int, index: int) -> dict[str, Any]:
    """A drawing of 20×10 or 10×20 pixels."""
    generator = np.random.default_rng([label, index])
    buffer = io.BytesIO()
    shape = (10, 20, 3) if index % 2 else (20, 10, 3)
    Image.fromarray((60 * label + generator.integers(0, 70, shape)).astype(np.uint8)).save(
        buffer, "PNG"
    )
    return {"image": {"bytes": buffer.getvalue(), "path": None}}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_crops_of_whole_pictures_are_resumed_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    pool, _ = make_samples()
    count = len(pool.labels)
    aspects = np.where(np.arange(count) % 2, 2.0, 0.5)
    settings = make_settings(epochs=4, augment=("random-resized-crop", "flip"))

    def run(folder: Path, in_memory: bool, **changed: Any) -> None:
        monkeypatch.setattr(pixels_module, "MEMORY_LIMIT", 2**31 if in_memory else 0)
        pictures = [draw_wide(int(pool.labels[row]), row) for row in range(count)]
        pixels = ImageCache([pictures], CONFIG.resize, aspects=changed.pop("aspects", aspects))
        more = {"pixels": pixels, "objective": "cross-entropy", **changed}
        train_into(folder, settings, workers=workers, **more)

    run(tmp_path / "memory", True)
    run(tmp_path / "workers", False)
    with pytest.raises(Killed):
        run(tmp_path / "killed", False, on_epoch=stop_after(1))
    run(tmp_path / "killed", False)
    whole = contents(tmp_path / "memory")
    assert contents(tmp_path / "workers") == contents(tmp_path / "killed") == whole
    run(tmp_path / "centre", True, aspects=None)
    assert contents(tmp_path / "centre")["model.safetensors"] != whole["model.safetensors"]


# ---------------------------------------------------------------- strategies that follow progress


def follow_progress(
    name: str, folder: Path, settings: TrainSettings | None = None, **changed: Any
) -> list[Record]:
    """Training by a strategy that measures, on V of up to two hard images of each rare class."""
    pool, _ = make_samples()
    levels = (0, 50)
    guidance = draw_guidance_set(pool, levels, 3, seed=1)
    arguments: dict[str, Any] = {
        "pool": hold_out(pool, guidance),
        "strategy": make_strategy(name, levels=levels, curriculum_epochs=6),
        "sampling": SamplingConfig(None, 2.0, with_hard=name == "bandit"),
        "objective": "cross-entropy",
        "guidance": guidance,
        **changed,
    }
    return train_into(folder, settings or make_settings(probe_samples=8), **arguments)


@pytest.mark.parametrize("name", sorted(MEASURING))
def test_progress_is_measured_and_followed(name: str, tmp_path: Path) -> None:
    history = follow_progress(name, tmp_path)
    for record in history[:6]:
        assert set(record["progress"]["gain"]) == {"0", "50"}
        assert len(record["levels"]) == 1
        assert ("class_levels" in record) == (name == "adaptive-per-class")
        apart = [
            levels
            for levels in record.get("class_levels", {}).values()
            if levels != record["levels"]
        ]
        assert record.get("classes_apart", 0) == len(apart)
        if name != "bandit":
            assert record["levels"] == [best_level(record["progress"]["gain"])]
    assert all("progress" not in record and record["levels"] == [] for record in history[6:])
    assert {record["samples"] for record in history} == {
        24
    }  # a probe is part of the epoch's updates
    if name != "bandit":
        assert history[0]["progress"]["gain"]["0"] != history[0]["progress"]["gain"]["50"]


class Cosines(nn.Module):
    """Logits as a CLIP has them, 30 times a cosine; notes them in float64 and in bfloat16 wherever
    it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(3 * 12 * 12, 4, bias=False)
        self.exact: list[np.ndarray] = []
        self.coarse: list[np.ndarray] = []

    def answer(self, images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return 30 * F.linear(F.normalize(images.flatten(1)), F.normalize(weight))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.exact.append(self.answer(images.double(), self.head.weight.double()).numpy())
            with torch.autocast("cpu", torch.bfloat16):
                self.coarse.append(self.answer(images, self.head.weight).float().numpy())
        return self.answer(images, self.head.weight)


def gains_of(guidance: GuidanceSet, logits: list[np.ndarray]) -> list[dict[str, float]]:
    """The gain of each level around each probe, from the logits of V before and after it."""
    seen = [
        true_class_probability(torch.from_numpy(each), guidance.labels).astype(np.float64)
        for each in logits
    ]
    pairs = zip(seen[::2], seen[1::2], strict=True)
    return [measure_progress(guidance, before, after)["gain"] for before, after in pairs]


def test_progress_is_measured_in_float32_where_training_is_not(tmp_path: Path) -> None:
    """A choice between close levels, which bfloat16 makes otherwise."""
    model, pool = Cosines(), make_samples()[0]
    levels = (0, 50)
    settings = make_settings(
        epochs=24, probe_samples=8, precision=torch.bfloat16, learning_rate=lambda progress: 1e-5
    )
    history = follow_progress(
        "adaptive",
        tmp_path,
        settings,
        make_model=lambda: model,
        strategy=make_strategy("adaptive", levels=levels, curriculum_epochs=24),
    )
    guidance = draw_guidance_set(pool, levels, 3, seed=1)
    exact, coarse = gains_of(guidance, model.exact), gains_of(guidance, model.coarse)
    for record, gain in zip(history, exact, strict=True):
        assert record["progress"]["gain"] == pytest.approx(gain, abs=2e-6)
        assert record["levels"] == [best_level(gain)]
    flips = [
        best_level(gain) != best_level(rough) for gain, rough in zip(exact, coarse, strict=True)
    ]
    assert any(flips), "a case in which the precision decides nothing shows nothing"


@pytest.mark.parametrize("name", sorted(MEASURING))
@pytest.mark.parametrize(
    "epoch", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)]
)
def test_resumed_is_uninterrupted_with_progress_too(name: str, epoch: int, tmp_path: Path) -> None:
    follow_progress(name, tmp_path / "whole")
    with pytest.raises(Killed):
        follow_progress(name, tmp_path / "killed", on_epoch=stop_after(epoch))
    follow_progress(name, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_hard_images_are_in_the_probe_and_not_beside_the_synthetic_ones(tmp_path: Path) -> None:
    """Algorithm 2: D is drawn from all real images, the epoch from S_λ and D_nh."""
    pool, _ = make_samples()
    settings = make_settings(probe_samples=16)
    schedule = make_schedule(
        pool,
        make_strategy("adaptive", levels=(), curriculum_epochs=20),
        SamplingConfig(None, 2.0, with_hard=False),
        settings,
    )
    probes = np.concatenate([schedule.draw(epoch, 0, [])[0] for epoch in range(20)])
    assert not pool.synthetic[probes].any() and pool.hard[probes].any()
    assert len(schedule.draw_probe(0)) == 16 == len(set(schedule.draw_probe(0)))
    rows, _ = schedule.draw(0, 1, [{"progress": {"gain": {"0": 0.1, "50": 0.2}}}])
    assert set(pool.levels[rows[pool.synthetic[rows]]]) == {50}
    assert len(rows) == 8 and not pool.hard[rows].any()


def test_a_probe_as_long_as_the_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="probe_samples: a probe of 24 samples takes 3 of the"):
        follow_progress("adaptive", tmp_path, make_settings(probe_samples=24))


def test_a_batch_larger_than_all_images_is_refused() -> None:
    pool, _ = make_samples()
    check_batch_size(pool, 26)
    with pytest.raises(TrainingError, match="batch_size: 27 exceeds the 26 real images"):
        check_batch_size(pool, 27)


def test_progress_needs_a_guidance_set_that_training_leaves_alone(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no guidance validation set"):
        follow_progress("adaptive", tmp_path / "none", guidance=None)
    pool, _ = make_samples()
    with pytest.raises(TrainingError, match="can also be drawn for training"):
        follow_progress(
            "adaptive",
            tmp_path / "shared",
            guidance=GuidanceSet(np.array([0]), pool.labels[:1], pool.levels[:1]),
        )


def make_broken(model: nn.Module, bad_epoch: float) -> torch.optim.Optimizer:
    """SGD whose parameters turn to NaN once its learning rate has fallen to that of `bad_epoch`."""

    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            if self.param_groups[0]["lr"] <= 1 - bad_epoch / 4:
                with torch.no_grad():
                    next(iter(model.parameters())).fill_(math.nan)

    return Broken(model.parameters(), lr=1.0)


def test_the_step_that_was_not_finite_is_named_though_it_is_looked_at_late(tmp_path: Path) -> None:
    """The loss is checked every 50 of 60 steps; step 1 spoils the weights, and step 2 is named."""
    taken = [0]

    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            taken[0] += 1
            if taken[0] == 62:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].fill_(math.nan)

    settings = make_settings(
        epochs=2,
        steps_per_epoch=60,
        make_optimizer=lambda model: Broken(model.parameters(), lr=1e-3),
    )
    with pytest.raises(TrainingError, match=r"the loss is not finite in epoch 1, step 2;"):
        train_into(tmp_path, settings)


@pytest.mark.parametrize("bad_epoch", [0, 2])
def test_a_loss_that_is_not_finite(bad_epoch: int, tmp_path: Path) -> None:
    settings = make_settings(
        epochs=4,
        make_optimizer=partial(make_broken, bad_epoch=bad_epoch),
        learning_rate=lambda progress: 1 - progress,
    )
    with pytest.raises(TrainingError, match=f"not finite in epoch {bad_epoch}, step 1") as raised:
        train_into(tmp_path, settings)
    checkpoint = tmp_path / "checkpoint.safetensors"
    assert checkpoint.exists() == (bad_epoch > 0)
    assert (str(checkpoint) if bad_epoch else "no checkpoint had been saved yet") in str(
        raised.value
    )
    assert "learning rate" in str(raised.value)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_last_step_of_an_epoch_cannot_spoil_the_checkpoint(tmp_path: Path) -> None:
    """Its own loss is still finite, and so is that of every step before."""
    broken = partial(make_broken, bad_epoch=1 + 2 / 3)
    settings = make_settings(
        epochs=4, make_optimizer=broken, learning_rate=lambda progress: 1 - progress
    )
    with pytest.raises(
        TrainingError,
        match=r"the network is not finite in epoch 1, step 2; the last good .*checkpoint\.",
    ):
        train_into(tmp_path, settings)
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_into(tmp_path, on_epoch=stop_after(1))
    with pytest.raises(
        TrainingError,
        match=r"checkpoint\.safetensors does not belong to this model: .*size mismatch for conv1",
    ) as raised:
        train_into(tmp_path, classifier=replace(CONFIG, width=8))
    assert str(raised.value).endswith("Delete its folder to train again.")
    assert len(str(raised.value)) < 600  # the first of some fifty tensors that do not fit


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes | None, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    if content is None:
        save_classifier(build_classifier(CONFIG), CONFIG, tmp_path)
        (tmp_path / "model.safetensors").replace(checkpoint)
    else:
        checkpoint.write_bytes(content)
    with pytest.raises(TrainingError, match="does not belong to this model"):
        train_into(tmp_path)


def test_logits_do_not_depend_on_the_batch_and_leave_the_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_classifier(CONFIG).train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, pixels = make_samples()
    rows = np.array([25, 3, 0, 11, 40])
    counted: list[int] = []
    whole = predict_logits(model, pixels, rows, CONFIG, on_progress=counted.append)
    assert whole.shape == (5, 4)
    assert whole.dtype == torch.float32
    assert sum(counted) == 5
    torch.testing.assert_close(predict_logits(model, pixels, rows, CONFIG, batch_size=2), whole)
    torch.testing.assert_close(
        predict_logits(model, pixels, rows[::-1].copy(), CONFIG).flip(0), whole
    )
    assert model.training
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_logits_are_of_normalised_centres() -> None:
    torch.manual_seed(0)
    model = build_classifier(CONFIG).eval()
    _, pixels = make_samples()
    stored = pixels.__getitems__([4, 9])[..., 1:13, 1:13].double() / 255
    with torch.inference_mode():
        expected = model(((stored - 0.5) / 0.25).float())
    torch.testing.assert_close(predict_logits(model, pixels, np.array([4, 9]), CONFIG), expected)


def test_precision_by_name() -> None:
    assert choose_precision("float32", "cpu") == torch.float32
    assert choose_precision("bfloat16", "cpu") == torch.bfloat16
    assert choose_precision("auto", "cpu") in {torch.float32, torch.bfloat16}


def test_half_precision_trains_and_resumes_too(tmp_path: Path) -> None:
    settings = make_settings(epochs=3, precision=torch.bfloat16)
    train_into(tmp_path / "whole", settings)
    with pytest.raises(Killed):
        train_into(tmp_path / "killed", settings, on_epoch=stop_after(0))
    train_into(tmp_path / "killed", settings)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


if __name__ == "__main__":
    train_into(
        Path(sys.argv[1]), on_epoch=lambda record: print(f"epoch {record['epoch']}", flush=True)
    )
