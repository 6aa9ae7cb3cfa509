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
    """A function that takes a record of an epoch and hands its numbers to every logger; files go to `folder`, closed at the end.

    A resumed training hands over its past epochs again, under the same epoch numbers. The file `mark` keeps what it is called in
    Weights & Biases, so that it goes on there; it has to go with the training's checkpoint. Raises RunError for a logger that is not
    installed.
    """
    with ExitStack() as stack:
        logs = [_OPENERS[name](folder, title, mark, stack) for name in names]

        def log(record: Mapping[str, Any]) -> None:
            for each in logs:
                each(record)

        yield log


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of a record, without the epoch itself."""
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
    first = session.step  # epochs before it are there already, and would be refused

    def log(record: Mapping[str, Any]) -> None:
        if record["epoch"] >= first:
            session.log(numbers(record), step=record["epoch"])

    return log


_OPENERS = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
