"""TensorBoard and Weights & Biases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..errors import RunError
from ..utils.atomic import make_folder
from ..utils.stored import read_text, write_text

Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def open_loggers(names: Sequence[str], folder: Path, title: str, mark: Path) -> Iterator[Log]:
    """Yields a function that sends the numbers of an epoch's record to every logger.

    - `names`: `tensorboard`, `wandb`, or both.
    - `folder`: where their files go.
    - `title`: name of the training in the loggers.
    - `mark`: file with the id of the training in Weights & Biases, for resuming. It is deleted
      together with the training's checkpoint.

    A resumed training sends its past epochs again, under the same numbers. Raises RunError for a
    logger that is not installed.
    """
    with ExitStack() as stack:
        logs = [_OPENERS[name](folder, title, mark, stack) for name in names]

        def log(record: Mapping[str, Any]) -> None:
            for each in logs:
                each(record)

        yield log


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The scalar numbers of a record, without the epoch."""
    return {
        key: float(value)
        for key, value in record.items()
        if isinstance(value, (int, float)) and key != "epoch"
    }


def _open_tensorboard(folder: Path, title: str, mark: Path, stack: ExitStack) -> Log:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError(
            "runtime.loggers: tensorboard is not installed: pip install 'discl[tensorboard]'."
        ) from error
    writer: Any = SummaryWriter(str(folder / "tensorboard" / title))
    stack.callback(writer.close)

    def log(record: Mapping[str, Any]) -> None:
        for key, value in numbers(record).items():
            writer.add_scalar(key, value, record["epoch"])

    return log


def _open_wandb(folder: Path, title: str, mark: Path, stack: ExitStack) -> Log:
    try:
        import wandb
    except ImportError as error:
        raise RunError(
            "runtime.loggers: wandb is not installed: pip install 'discl[wandb]'."
        ) from error
    make_folder(folder)
    if not mark.exists() or not re.fullmatch(r"\w{1,64}", read_text(mark)):
        write_text(mark, uuid4().hex)
    session: Any = wandb.init(
        project="discl", name=title, dir=str(folder), id=read_text(mark), resume="allow"
    )
    stack.callback(session.finish)
    first = session.step  # earlier epochs are logged already and would be refused

    def log(record: Mapping[str, Any]) -> None:
        if record["epoch"] >= first:
            session.log(numbers(record), step=record["epoch"])

    return log


_OPENERS = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
