"""Training curves in TensorBoard or Weights & Biases, beside the history that is always written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import RunError

LOGGERS = ("tensorboard", "wandb")

Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def open_loggers(names: Sequence[str], folder: Path, title: str) -> Iterator[Log]:
    """A function that takes a record of an epoch and hands its numbers to every logger; files go to `folder`, closed at the end.

    A resumed run hands over its past epochs again, under the same epoch numbers. Raises RunError for a logger that is not installed.
    """
    with ExitStack() as stack:
        logs = [_OPENERS[name](folder, title, stack) for name in names]

        def log(record: Mapping[str, Any]) -> None:
            for each in logs:
                each(record)

        yield log


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of a record, without the epoch itself."""
    return {key: float(value) for key, value in record.items() if isinstance(value, (int, float)) and key != "epoch"}


def _open_tensorboard(folder: Path, title: str, stack: ExitStack) -> Log:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("runtime.loggers: tensorboard is not installed: pip install 'discl[tensorboard]'.") from error
    writer: Any = SummaryWriter(str(folder / "tensorboard" / title))
    stack.callback(writer.close)

    def log(record: Mapping[str, Any]) -> None:
        for key, value in numbers(record).items():
            writer.add_scalar(key, value, record["epoch"])

    return log


def _open_wandb(folder: Path, title: str, stack: ExitStack) -> Log:
    try:
        import wandb
    except ImportError as error:
        raise RunError("runtime.loggers: wandb is not installed: pip install 'discl[wandb]'.") from error
    folder.mkdir(parents=True, exist_ok=True)
    session: Any = wandb.init(project="discl", name=title, dir=str(folder))
    stack.callback(session.finish)
    return lambda record: session.log(numbers(record), step=record["epoch"])


_OPENERS = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
