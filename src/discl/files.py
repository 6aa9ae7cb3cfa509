"""Files that are there whole or not at all, whoever reads them, writes them too, or is killed meanwhile."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".*.new"
"""What a file is called while it is written: hidden, and with another ending, so that nobody takes it for a finished one."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: at the end it takes the place of `path`, and where anything fails nothing is left of it.

    Each has a name of its own, so several may write the same file at once; the last one's stays. What a killed process leaves, called
    `.NAME.….new`, is for `clear_unfinished`.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def clear_unfinished(folder: Path, older_than: float = 3600.0, pattern: str = UNFINISHED) -> None:
    """Deletes what killed writers left in a folder, never a finished file nor, within `older_than` seconds, one that is being written."""
    for file in folder.glob(pattern):
        with suppress(
            OSError
        ):  # another process clears too, or has finished it, or it is another user's
            if time.time() - file.stat().st_mtime > older_than:
                file.unlink()


def path_exists(path: Path) -> bool:
    """Whether something is there; not where the name is longer than the file system takes."""
    try:
        return path.exists()
    except OSError:
        return False


def is_regular(path: Path) -> bool:
    """Whether a regular file is there; a pipe and a device are none, and as `path_exists`."""
    try:
        return path.is_file()
    except OSError:
        return False
