"""Loggers of the package: the standard library's, except that a failing handler stops no run.

The loggers are called `discl` and `discl.MODULE`; a NullHandler on `discl` is all that importing
the package sets up. Route, filter and silence messages as those of any library:

    logging.getLogger("discl").setLevel(logging.ERROR)

Modules use `get_logger` instead of `logging.getLogger` for one reason. The standard library lets an
exception of a handler reach the code that logs, but a run of days must survive a full log disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

ROOT = "discl"
SILENT = logging.CRITICAL + 1
"""A level above that of every message."""


class SafeLogger(logging.Logger):
    """A logger whose handlers may fail: the message is lost, the caller continues."""

    def callHandlers(self, record: logging.LogRecord) -> None:
        try:
            super().callHandlers(record)
        except Exception:
            with suppress(Exception):  # standard error may be closed or full as well
                logging.Handler().handleError(record)


def get_logger(name: str) -> logging.Logger:
    """`logging.getLogger(name)`, made safe against handlers that raise."""
    logger = logging.getLogger(name)
    logger.__class__ = SafeLogger
    return logger


class _Forwarder(logging.Handler):
    def __init__(self, send: Callable[[str, int, str], object]) -> None:
        super().__init__()
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        self.send(record.name, record.levelno, self.format(record))


def forward_messages(send: Callable[[str, int, str], object], level: int) -> None:
    """Hands messages from `level` on to `send`, as logger's name, level and text.

    A worker process hands them to the process that started it, which logs them as its own.
    """
    root = logging.getLogger(ROOT)
    root.addHandler(_Forwarder(send))
    root.setLevel(level)


def silence() -> None:
    """Drops every message and progress bar of this process, as ranks other than 0 do."""
    logging.getLogger(ROOT).setLevel(SILENT)
