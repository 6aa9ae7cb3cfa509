"""Messages and progress bars on standard error."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..escaping import message, one_line
from .logging import ROOT, SILENT, get_logger

logger = get_logger(__name__)


class _StandardError:
    """The present `sys.stderr`. What it cannot take is dropped: closed, full, or none at all."""

    encoding = "utf-8"

    @staticmethod
    def _stream() -> TextIO | None:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def write(self, text: str) -> int:
        stream = self._stream()
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        stream = self._stream()
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()

    def isatty(self) -> bool:
        stream = self._stream()
        try:
            return stream is not None and stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        stream = self._stream()
        if stream is None:
            raise OSError("there is no standard error")
        return stream.fileno()


console = Console(file=_StandardError(), highlight=False, emoji=False)  # type: ignore[arg-type]


class ConsoleHandler(logging.Handler):
    """Writes messages to standard error, above progress bars; names in them cannot steer it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console.print(message(self.format(record)), markup=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


def show_messages(level: int = logging.INFO) -> None:
    """Shows messages from this level on; progress bars too where the level is INFO or lower.

    At DEBUG each message begins with time, level and logger. Another call changes the level.
    """
    root = logging.getLogger(ROOT)
    for old in [each for each in root.handlers if isinstance(each, ConsoleHandler)]:
        root.removeHandler(old)
    handler = ConsoleHandler()
    if level <= logging.DEBUG:
        pattern = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(pattern, datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(level)


def shown_level() -> int:
    """The level from which messages are shown; `SILENT` before `show_messages`."""
    root = logging.getLogger(ROOT)
    shown = any(isinstance(each, ConsoleHandler) for each in root.handlers)
    return root.getEffectiveLevel() if shown else SILENT


def shows_bars() -> bool:
    """Whether progress bars are drawn: on a terminal, where messages of level INFO are shown."""
    return console.is_terminal and shown_level() <= logging.INFO


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` units; yields a function that takes the number of finished ones.

    Where no bar is drawn, a message tells the end.
    """
    what = one_line(what)
    bars = shows_bars()
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not bars) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
    if not bars:
        logger.info(f"{what}: {total} done")


def open_standard_streams() -> None:
    """Opens closed standard streams on the null device.

    Otherwise a file that is opened later gets their number, and libraries write to it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)


def flush_standard_error() -> None:
    """Drops text that a full or closed standard error refuses; Python would exit with 120."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
