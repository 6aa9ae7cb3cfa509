"""The gradient step: parts of a batch, the moving average, mixed images, frozen parameters."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from discl.baselines.docl import Docl, Dynamics
from discl.curriculum.sampling import Pool, SamplingConfig, balance_classes, draw_epoch
from discl.curriculum.schedule import Finish
from discl.errors import TrainingError
from discl.models.classifier import ClassifierConfig
from discl.training.augmentation import mix_images
from discl.training.hooks import TrainingHook
from discl.training.objectives import make_objective
from discl.training.optim import ema_decay, make_learning_rate, make_optimizer, two_phases
from discl.training.step import EpochPart, StepConfig, TrainState

CONFIG = ClassifierConfig("none", "", 0, ("a", "b", "c"), 8, 8, (0.5,) * 3, (0.25,) * 3)
LABELS = np.arange(12) % 3


class Flat(nn.Module):
    """A linear classifier of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


class Noise:
    memory = torch.randint(
        0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    def __len__(self) -> int:
        return 12

    def __getitems__(self, rows: list[int]) -> torch.Tensor:
        return self.memory[torch.as_tensor(rows)]


def trained(
    steps: StepConfig,
    rows: list[int],
    batch_size: int,
    objective: Any = "cross-entropy",
    hook: TrainingHook | None = None,
    synthetic: np.ndarray | None = None,
    rate: float = 0.1,
    finish: Finish | None = None,
    counts: tuple[int, ...] = (4, 4, 4),
) -> TrainState:
    torch.manual_seed(0)
    sgd = partial(
        make_optimizer, name="sgd", lr=0.1, weight_decay=0.0, momentum=0.0, nesterov=False
    )
    state = TrainState(
        Flat(),
        sgd,
        objective=make_objective(objective),
        class_counts=np.array(counts),
        config=CONFIG,
        steps=steps,
        augment=(),
        precision=torch.float32,
        device="cpu",
        hook=hook,
        finish=finish,
    )
    loader = state.loader(Noise(), batch_size, 0)  # type: ignore[arg-type]
    part = EpochPart(
        np.array(rows), 0, epochs=1, batch_size=batch_size, seed=0, synthetic=synthetic
    )
    state.train_epoch(loader, part, LABELS, lambda progress: rate, Path("nowhere"))
    return state


@pytest.mark.parametrize("objective", ["cross-entropy", "focal", "logit-adjusted"])
def test_parts_of_a_batch_add_up_to_it(objective: str) -> None:
    rows = list(range(12))
    whole = trained(StepConfig(), rows, 6, objective).model.state_dict()
    parts = trained(StepConfig(accumulate=3), rows, 6, objective).model.state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor)
    torch.manual_seed(0)
    assert not torch.equal(whole["head.weight"], Flat().state_dict()["head.weight"]), (
        "training that moves nothing would compare nothing"
    )
    with pytest.raises(TrainingError, match="batch_size: 6 cannot be divided evenly into 4 parts"):
        trained(StepConfig(accumulate=4), rows, 6)


@pytest.mark.parametrize("weight", [(1.0, 1.0), (0.25, 0.25), (1.0, 0.0)])
def test_weights_of_synthetic_images_in_one_batch_and_in_parts(weight: tuple[float, float]) -> None:
    """Two steps of 6: a weight that falls from 1 to 0 is .5 in the second."""
    rows, synthetic = list(range(12)), np.arange(len(LABELS)) % 3 == 1
    plain = trained(StepConfig(), rows, 6).model.state_dict()
    steps = StepConfig(synthetic_weight=weight)
    whole = trained(steps, rows, 6, synthetic=synthetic).model.state_dict()
    parts = trained(replace(steps, accumulate=3), rows, 6, synthetic=synthetic).model.state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor)
        assert torch.allclose(tensor, plain[name]) == (weight == (1.0, 1.0))


def test_mixed_images_have_the_weights_of_both() -> None:
    rows, steps = list(range(12)), StepConfig(mixup=0.4)
    plain = trained(steps, rows, 6).model.state_dict()
    even = trained(
        replace(steps, synthetic_weight=0.5), rows, 6, synthetic=np.ones(len(LABELS), bool)
    )
    half = trained(steps, rows, 6, rate=0.05).model.state_dict()
    for name, tensor in even.model.state_dict().items():
        torch.testing.assert_close(tensor, half[name])
        assert not torch.allclose(tensor, plain[name])


def test_the_prior_of_classes_drawn_evenly_is_even() -> None:
    """Balanced softmax is then cross-entropy."""
    rows, finish = list(range(12)), Finish(0, head_only=True)
    weights = [
        trained(StepConfig(), rows, 6, name, finish=each, counts=(9, 1, 1)).model.state_dict()
        for name, each in (
            ("cross-entropy", finish),
            ("balanced-softmax", finish),
            ("balanced-softmax", None),
        )
    ]
    torch.testing.assert_close(weights[0]["head.weight"], weights[1]["head.weight"])
    assert not torch.allclose(weights[2]["head.weight"], weights[1]["head.weight"])


@pytest.mark.parametrize("parts", [1, 3])
def test_dynamics_count_a_step_once_however_many_parts_it_has(parts: int) -> None:
    docl = Docl()
    docl.dynamics = Dynamics.start(12, 3)
    trained(StepConfig(accumulate=parts), [*range(12), *range(12)], 6, hook=docl)
    assert docl.dynamics.rate_sum == pytest.approx(4 * 0.1)
    np.testing.assert_allclose(
        docl.dynamics.rate, [0.2] * 6 + [0.3] * 6
    )  # summed before each row's last visit


def test_moving_average_by_hand_and_evaluated() -> None:
    """Decays of the first steps are (1 + t)/(10 + t): .1 and 2/11, both below .9."""
    torch.manual_seed(0)
    start = Flat().state_dict()["head.weight"]
    first = trained(StepConfig(), list(range(6)), 6).model.state_dict()["head.weight"]
    state = trained(StepConfig(ema=0.9), list(range(12)), 6)
    last = state.model.state_dict()["head.weight"]
    expected = 0.1 * start + 0.9 * first
    expected = 2 / 11 * expected + 9 / 11 * last
    torch.testing.assert_close(state.evaluated.state_dict()["head.weight"], expected)
    assert ema_decay(0.9, 10**6) == 0.9
    assert ema_decay(0.05, 0) == 0.05


def test_state_goes_to_another_state_and_to_no_other_kind() -> None:
    state, other = (
        trained(StepConfig(ema=0.9), list(range(12)), 6),
        trained(StepConfig(ema=0.9), [0] * 6, 6),
    )
    other.load_state_dict(state.state_dict())
    assert all(
        torch.equal(tensor, state.state_dict()[name]) for name, tensor in other.state_dict().items()
    )
    with pytest.raises((KeyError, RuntimeError)):
        other.load_state_dict(trained(StepConfig(), list(range(6)), 6).state_dict())


def test_mixup_blends_and_cutmix_pastes() -> None:
    torch.manual_seed(3)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    for _ in range(20):
        mixed, order, share = mix_images(images, 0.4, 0.0)
        torch.testing.assert_close(mixed, share * images + (1 - share) * images[order])
        pasted, order, share = mix_images(images, 0.0, 1.0)
        own = pasted == images
        assert (own | (pasted == images[order])).all()
        moved = order != torch.arange(4)
        torch.testing.assert_close(
            own[moved].float().mean((1, 2, 3)), torch.full((int(moved.sum()),), share)
        )


def test_a_mixed_loss_is_that_of_two_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    from discl.training import step as module

    order = torch.tensor([1, 2, 3, 4, 5, 0])
    monkeypatch.setattr(module, "mix_images", lambda images, mixup, cutmix: (images, order, 0.75))
    steps = StepConfig(mixup=0.2)
    state = trained(steps, [0] * 6, 6)
    labels = torch.arange(6) % 3
    loss = state._loss(Noise.memory[:6], np.arange(6), labels, 0.0, 0.1)
    logits = state.model(((Noise.memory[:6].float() / 255) - 0.5) / 0.25)
    expected = 0.75 * F.cross_entropy(logits, labels) + 0.25 * F.cross_entropy(
        logits, labels[order]
    )
    torch.testing.assert_close(loss, expected)


def test_warm_up_in_steps_is_that_of_open_clip() -> None:
    """5 steps of 4 an epoch: (i + 1)/5 of the peak, then a cosine from step 5 on."""
    rate = make_learning_rate(1.0, "cosine", 3, 5 / 4, warm_up_steps=5)
    assert [rate(step / 12) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate(5 / 12) == pytest.approx(1.0)
    assert rate(1.0) == pytest.approx(0.0)


def test_two_phases_each_over_its_own_part() -> None:
    rate = two_phases(lambda progress: progress, lambda progress: 10 + progress, 0.25)
    assert [rate(progress) for progress in (0.0, 0.125, 0.25, 0.625, 1.0)] == pytest.approx(
        [0.0, 0.5, 10.0, 10.5, 11.0]
    )


def test_balanced_epochs() -> None:
    """90 : 9 : 1 images; balanced a third each, by the square root 9.49 : 3 : 1."""
    labels = np.repeat([0, 1, 2], [90, 9, 1])
    rng = np.random.default_rng(0)
    rows = balance_classes(np.arange(100), labels, 30_000, 0.0, rng=rng)
    np.testing.assert_allclose(np.bincount(labels[rows]) / 30_000, [1 / 3] * 3, atol=0.01)
    assert np.ptp(np.bincount(rows)[90:99]) <= 1
    rows = balance_classes(np.arange(100), labels, 30_000, 0.5, rng=rng)
    np.testing.assert_allclose(
        np.bincount(labels[rows]) / 30_000,
        np.sqrt([90, 9, 1]) / np.sqrt([90, 9, 1]).sum(),
        atol=0.01,
    )
    no = np.zeros(100, bool)
    pool = Pool(labels, np.full(100, 100), no, no, ("a", "b", "c"))
    plain, _ = draw_epoch(pool, (), SamplingConfig(None, 0.0), 100, seed=0)
    assert sorted(plain.tolist()) == list(range(100))
    even, _ = draw_epoch(pool, (), SamplingConfig(None, 0.0, class_power=0.0), 300, seed=0)
    assert np.bincount(labels[even]).min() > 60


def test_tensorboard_gets_the_numbers_of_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from discl.stages.loggers import open_loggers

    with open_loggers(["tensorboard"], tmp_path, "one", tmp_path / "mark") as log:
        for epoch in range(3):
            log({"epoch": epoch, "loss": 1.0 / (epoch + 1), "levels": [0], "samples": 7})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "one"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "samples"]
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [
        (0, 1.0),
        (1, 0.5),
        (2, pytest.approx(1 / 3)),
    ]


def test_wandb_goes_on_with_the_run_of_a_training_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run knows its next step, and refuses those before it."""
    from discl.stages.loggers import open_loggers

    runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
    finished: list[str] = []

    def init(*, project: str, name: str, dir: str, id: str, resume: str) -> SimpleNamespace:
        assert (project, name, dir, resume) == ("discl", "one", str(tmp_path / "logs"), "allow")
        logged = runs.setdefault(id, [])

        def log(values: dict[str, float], step: int) -> None:
            assert step >= len(logged), "wandb takes no step again"
            logged.append((step, values))

        return SimpleNamespace(step=len(logged), log=log, finish=lambda: finished.append(id))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    mark = tmp_path / "wandb.txt"
    for epochs in (
        2,
        4,
    ):  # killed after two epochs; the second time the first two are handed over again
        with open_loggers(["wandb"], tmp_path / "logs", "one", mark) as log:
            for epoch in range(epochs):
                log({"epoch": epoch, "loss": 1 / (epoch + 1), "levels": [0]})
    (only,) = runs
    assert runs[only] == [
        (epoch, {"loss": 1 / (epoch + 1)}) for epoch in range(4)
    ] and finished == [only, only]
    mark.unlink()  # a training anew
    with open_loggers(["wandb"], tmp_path / "logs", "one", mark) as log:
        log({"epoch": 0, "loss": 1.0})
    assert len(runs) == 2


def test_a_logger_that_is_not_installed(tmp_path: Path) -> None:
    from discl.errors import RunError
    from discl.stages.loggers import open_loggers

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "wandb", None)
        with (
            pytest.raises(RunError, match=r"pip install 'discl\[wandb\]'"),
            open_loggers(["wandb"], tmp_path, "one", tmp_path / "mark"),
        ):
            pass
