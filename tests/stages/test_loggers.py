"""TensorBoard and Weights & Biases get the numbers of every epoch once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from discl.errors import RunError
from discl.stages.loggers import open_loggers


def test_tensorboard_gets_the_numbers_of_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    for epochs in (2, 4):  # killed after two epochs, which are handed over again
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
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "wandb", None)
        with (
            pytest.raises(RunError, match=r"pip install 'discl\[wandb\]'"),
            open_loggers(["wandb"], tmp_path, "one", tmp_path / "mark"),
        ):
            pass
