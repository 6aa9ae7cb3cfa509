"""Processes together train what one does.

As a program, `python test_distributed.py PROGRAM CLIP FOLDER`, it is one of those processes.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from discl.baselines.cuda import Cuda
from discl.curriculum.sampling import Pool, SamplingConfig
from discl.curriculum.schedule import Finish, hold_out_guidance
from discl.curriculum.strategies import RealOnly, make_strategy
from discl.errors import TrainingError
from discl.models.classifier import build_classifier
from discl.recipe import Train
from discl.stages.classifiers import describe_classifier, describe_training, starter_of
from discl.training import loop
from discl.training.checkpoint import read_history
from discl.training.distributed import (
    CpuSyncBatchNorm,
    GradientAverage,
    Processes,
    current_processes,
    join_processes,
)
from discl.training.hooks import TrainingContext, TrainingHook
from discl.training.loop import TrainingJob, make_state, train_classifier
from discl.training.step import EpochPart

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
    """A network in double precision: in single precision a rounding can switch a ReLU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.double())


def make_pool() -> Pool:
    """16 real images in three classes; the third has 12 synthetic ones at each of two levels."""
    synthetic = np.repeat([False, True], [16, 24])
    labels, levels = (
        np.r_[np.arange(16) % 3, np.full(24, 2)],
        np.r_[np.full(16, 100), np.repeat([0, 50], 12)],
    )
    hard = np.flatnonzero(~synthetic & (labels == 2))
    sources = np.r_[np.arange(16), np.resize(hard, 24)]
    return Pool(labels, levels, synthetic, ~synthetic & (labels == 2), NAMES, sources=sources)


def clip_job(clip: str, objective: str, **changed: Any) -> TrainingJob:
    """Two epochs of a CLIP, which has no batch norm."""
    model = {
        "architecture": "clip",
        "checkpoint": clip,
        "templates": ["a {class}.", "one {class}.", "the {class}."],
    }
    common = {"epochs": 2, "curriculum_epochs": 0, "augment": [], "ema": 0.5, "image_size": 32}
    train = make_train(model=model, **common | changed)
    config = describe_classifier(train, NAMES, None, objective)
    pool = make_pool()
    return TrainingJob(
        pool,
        Noise(),  # type: ignore[arg-type]
        RealOnly(),
        SamplingConfig(None, 0.0),
        objective=objective,
        class_counts=pool.real_counts,
        classifier=config,
        settings=describe_training(train, "full", 16, torch.device("cpu"), epochs=2),
        make_model=starter_of(config, train),
    )


def network_job(
    folder: Path, epochs: int = 3, hook: TrainingHook | None = None, **changed: Any
) -> TrainingJob:
    """A residual network, with batch norm and augmentation, by a strategy that measures progress.

    Its figures on validation differ between the processes.
    """
    train = make_train(
        epochs=epochs,
        curriculum_epochs=epochs,
        image_size=28,
        resize=32,
        augment=["random-resized-crop", "flip", "color-jitter", "cutout"],
        steps_per_epoch=3,
        model={"architecture": "resnet10", "stem": "3x3", "width": 4},
        **changed,
    )
    config = describe_classifier(train, NAMES)
    pool, guidance = hold_out_guidance(make_pool(), LEVELS, 2, 0)
    settings = describe_training(train, "full", 16, torch.device("cpu"), epochs=epochs)
    return TrainingJob(
        pool,
        Noise(),  # type: ignore[arg-type]
        make_strategy("adaptive", levels=LEVELS, curriculum_epochs=epochs),
        SamplingConfig(None, 2.0, with_hard=False),
        objective="cross-entropy",
        class_counts=pool.real_counts,
        classifier=config,
        settings=replace(settings, probe_samples=8, save_seconds=1e6, validate_every=1),
        make_model=lambda: Double(build_classifier(config)),
        guidance=guidance,
        hook=hook,
        validate=lambda model: 1 / (2 + current_processes().rank + len(list(folder.glob("best")))),
    )


def light_job(clip: str) -> TrainingJob:
    """Bottlenecks in a frozen tower, and a head whose start rank 0 has measured."""
    light = {"head": "linear", "initial_head": "class-means"}
    train = make_train(
        model={"architecture": "clip", "checkpoint": clip, "light": light},
        **{"epochs": 2, "curriculum_epochs": 0, "augment": [], "ema": 0.5, "image_size": 32},
    )
    config = describe_classifier(train, NAMES, None, "cross-entropy", "light")
    job = clip_job(clip, "cross-entropy")

    def means(tower: nn.Module) -> torch.Tensor:
        processes, width = current_processes(), 32
        return processes.on_main(lambda: torch.eye(len(NAMES), width) + processes.rank)

    return replace(
        job,
        objective="logit-adjusted",
        classifier=config,
        settings=describe_training(train, "light", 16, torch.device("cpu"), epochs=2),
        make_model=starter_of(config, train, None, means),
    )


def weighted_job(clip: str) -> TrainingJob:
    """Weighted synthetic images in mixed batches, then a new head on classes drawn evenly."""
    job = clip_job(clip, "cross-entropy", mixup=0.4)
    settings = job.settings
    return replace(
        job,
        strategy=make_strategy("fixed", level=50, levels=LEVELS, curriculum_epochs=2),
        sampling=SamplingConfig(None, 2.0),
        settings=replace(
            settings,
            finish=Finish(1, head_only=True, new_head=True),
            steps=replace(settings.steps, synthetic_weight=(1.0, 0.25)),
        ),
    )


def make_train(**values: Any) -> Train:
    common = {"batch_size": 8, "precision": "float32", "optimizer": {"name": "sgd", "lr": 0.05}}
    return Train.model_validate(common | values)


def accumulated_job(folder: Path) -> TrainingJob:
    hook = Cuda(threshold=0.0, probability=0.8)
    return network_job(folder, hook=hook, accumulate=2, mixup=0.4)


def train_out_of_step(folder: Path) -> None:
    """Two processes whose clocks and whose figures on validation differ."""
    rank = current_processes().rank
    clock = SimpleNamespace(calls=0)

    def monotonic() -> float:
        clock.calls += 1
        return time.monotonic() + (0.03 * (clock.calls % 3) if rank else 0.0)

    clocks = SimpleNamespace(process_time=time.process_time, monotonic=monotonic)
    loop.time = clocks  # type: ignore[assignment]
    job = network_job(folder, epochs=20, select="validation")
    train_classifier(replace(job, settings=replace(job.settings, save_seconds=0.05)), folder)


def record_gradients(job: TrainingJob, overlap: bool) -> dict[str, torch.Tensor]:
    """Gradients of three steps, by step and name, with or without DistributedDataParallel."""
    state, seen = make_state(job, "cpu", current_processes()), dict[str, torch.Tensor]()
    state.gradients.overlap, step = overlap, state.optimizer.step

    def recorded() -> None:
        number = sum(name.endswith("head.bias") or name.endswith("fc.bias") for name in seen)
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None:
                seen[f"{number}.{name}"] = parameter.grad.clone()
        step()

    state.optimizer.step = recorded  # type: ignore[method-assign, assignment]
    state.hook.begin(TrainingContext(job.pool, job.pixels, state, 0, 8, 3))
    loader, part = state.loader(job.pixels, 8, 0), EpochPart(np.arange(24) % 16, 0, 3, 8, 0)
    state.train_epoch(loader, part, job.pool.labels, job.settings.learning_rate, Path("none"))
    assert (state.gradients.parallel is not None) == overlap
    return seen


def compare_gradients(clip: str, folder: Path) -> None:
    """Fails where the gradients differ, in either process."""
    jobs = {
        "flyp": lambda: clip_job(clip, "flyp"),
        "a tower without a gradient": lambda: clip_job(clip, "cross-entropy", mixup=0.4),
        "a frozen tower with adapters": lambda: light_job(clip),
        "batch norm": lambda: network_job(folder),
        "parts of a batch": lambda: accumulated_job(folder),
    }
    for what, make_job in jobs.items():
        plain, overlapped = (record_gradients(make_job(), overlap) for overlap in (False, True))
        assert plain.keys() == overlapped.keys() and len(plain) > 10, what
        for name, gradient in plain.items():
            torch.testing.assert_close(overlapped[name], gradient, msg=f"{what}: {name}")
        assert max(float(gradient.abs().max()) for gradient in plain.values()) > 1e-3


JOBS: dict[str, Callable[[str, Path], TrainingJob]] = {
    "flyp": lambda clip, folder: clip_job(clip, "flyp"),
    "cross-entropy": lambda clip, folder: clip_job(clip, "cross-entropy", mixup=0.4, cutmix=1.0),
    "weighted": lambda clip, folder: weighted_job(clip),
    "light": lambda clip, folder: light_job(clip),
    "network": lambda clip, folder: network_job(folder),
    "accumulated": lambda clip, folder: accumulated_job(folder),
}
PROGRAMS: dict[str, Callable[[str, Path], Any]] = {
    **{
        name: lambda clip, folder, make_job=make_job: train_classifier(
            make_job(clip, folder), folder
        )
        for name, make_job in JOBS.items()
    },
    "gradients": compare_gradients,
    "out-of-step": lambda clip, folder: train_out_of_step(folder),
}
"""The last one changes the clock of its process."""


@pytest.fixture(scope="module")
def together(
    tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """torchrun with two processes that run every program, and the folder that they write to.

    One launch for all tests: a process takes seconds to load torch.
    """
    folder = tmp_path_factory.mktemp("two")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    programs = [__file__, ",".join(PROGRAMS), str(tiny_clip), str(folder)]
    children = subprocess.Popen([sys.executable, *launch, *programs], env=os.environ)
    yield children, folder
    children.kill()


def wait_for(children: subprocess.Popen[bytes], folder: Path) -> set[str]:
    """Waits for torchrun to end; returns the programs that both processes have finished."""
    try:
        children.wait(500)
    finally:
        children.kill()  # processes that wait for one another for ever
    done = [{path.stem for path in folder.glob(f"*.{rank}")} for rank in range(2)]
    return done[0] & done[1]


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    tiny_clip: Path, tmp_path: Path, together: tuple[subprocess.Popen[bytes], Path]
) -> None:
    """Augmentation, mixed images, prompts, batch norm, parts of a batch, levels of epochs."""
    compared = list(JOBS)
    for what in compared:
        PROGRAMS[what](str(tiny_clip), tmp_path / what)
    children, folder = together
    assert {*compared} <= wait_for(children, folder)
    for what in compared:
        one, two = (load_file(place / what / "model.safetensors") for place in (tmp_path, folder))
        first, second = (
            read_history(place / what / "history.jsonl") for place in (tmp_path, folder)
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
        tuned = load_file(folder / what / "model.safetensors")[f"clip.{name}"]
        assert (tuned - start[name]).abs().max() > 1e-3, (
            "training that moves nothing would compare nothing"
        )


@pytest.mark.slow
def test_processes_decide_together_when_to_save_and_what_is_best(
    together: tuple[subprocess.Popen[bytes], Path],
) -> None:
    """Otherwise they wait for one another for ever."""
    children, folder = together
    assert "out-of-step" in wait_for(children, folder)
    assert len(read_history(folder / "out-of-step" / "history.jsonl")) == 20


@pytest.mark.slow
def test_distributed_data_parallel_gives_the_same_gradients(
    together: tuple[subprocess.Popen[bytes], Path],
) -> None:
    """On CPUs, by gloo; on GPUs it is the only way. Two processes compare every gradient."""
    assert "gradients" in wait_for(*together)


@pytest.mark.slow
def test_processes_that_have_trained_together_end_well(
    together: tuple[subprocess.Popen[bytes], Path],
) -> None:
    wait_for(*together)
    assert together[0].returncode == 0


def test_one_process_and_cpus_do_without_distributed_data_parallel() -> None:
    model, gpu, cpu = nn.Linear(2, 2), torch.device("cuda"), torch.device("cpu")
    assert not GradientAverage(model, Processes(0, 1), gpu).overlap
    assert GradientAverage(model, Processes(0, 2), gpu).overlap
    assert not GradientAverage(model, Processes(0, 2), cpu).overlap


def test_a_shared_batch_norm_is_that_of_torch() -> None:
    """Outputs, gradients and running statistics, alone; together it is compared above."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, 3, 2)
    results = []
    for kind in (nn.BatchNorm2d, CpuSyncBatchNorm):
        layer = nn.BatchNorm2d(5)
        nn.init.uniform_(layer.weight)
        layer = layer if kind is nn.BatchNorm2d else CpuSyncBatchNorm.of(layer)
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
    assert Processes(0, 2).shard_rows(rows, 6).tolist() == [0, 1, 2, 6, 7, 8]
    assert Processes(1, 2).shard_rows(rows, 6).tolist() == [3, 4, 5, 9, 10, 11]
    assert Processes().shard_rows(rows, 5) is rows
    assert Processes(1, 2).local_shard(torch.arange(6)).tolist() == [3, 4, 5]
    with pytest.raises(
        TrainingError, match="batch_size: 2 processes cannot divide batches of 3 evenly"
    ):
        Processes(0, 2).shard_rows(rows, 3)


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


def fail_unless_parted() -> None:
    """torch aborts one in four processes that end with the threads of their group alive."""
    if dist.is_initialized():
        os._exit(3)


if __name__ == "__main__":
    atexit.register(fail_unless_parted)  # runs after what is registered later
    join_processes(cpu=True)
    for each in sys.argv[1].split(","):
        PROGRAMS[each](sys.argv[2], Path(sys.argv[3]) / each)
        Path(sys.argv[3], f"{each}.{current_processes().rank}").touch()
