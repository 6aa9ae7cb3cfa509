"""Writes files atomically: temporary file, flush to disk, rename.

Written by hand because small libraries for it neither flush the folder entry nor name the file and
the fix in their errors. A run must survive kills, power cuts and full disks.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import WriteError

UNFINISHED = ".*.new"
"""Pattern of temporary files: hidden, with another suffix than finished ones."""
REMEDIES = {
    errno.EISDIR: "Move the folder of that name away",
    errno.ENOTEMPTY: "Move the folder of that name away",
    errno.ENAMETOOLONG: "Choose a shorter name",
}
"""Advice for errors that have other causes than the disk."""
MANY = 200
"""From this number of files on, one flush of everything is faster."""
REMEDY = "Free space, make the folder writable or choose another one,"
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
"""Error numbers of file systems that cannot flush a file."""


@contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces `path` at the end.

    - `path`: the file to write. If anything fails, it stays as it was.
    - `sync`: whether to flush to disk before the rename, so that a power cut leaves the old or the
      new file. False is for files that are useless after a power cut.

    Several processes may write the same file at once; the last one wins. `clear_unfinished` removes
    temporary files of killed processes, called `.NAME.….new`. Raises WriteError, which is also an
    OSError and names `path`.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        with writing(path):
            yield unfinished
            if sync:
                write_out(unfinished)
            unfinished.replace(path)
        if sync:
            write_out_names(path.parent)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns OSErrors in the block into WriteErrors that name `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
        remedy = REMEDIES.get(error.errno or 0, REMEDY) + " and run the same command again."
        raise WriteError(path, said, remedy, error.errno) from error


def make_folder(folder: Path) -> Path:
    """Creates a folder and its parents where missing; returns it. Raises WriteError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def why(error: OSError) -> str:
    """The system's reason for an error, without the advice of a WriteError."""
    return f"{error.path}: {error.said}" if isinstance(error, WriteError) else str(error)


def write_out(file: Path) -> None:
    """Flushes a file to disk. Raises OSError where the disk is full or broken."""
    with file.open("rb") as stream:
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            if error.errno not in CANNOT_SYNC:
                raise


def write_out_all(folder: Path) -> None:
    """Flushes the files of a folder to disk: one by one, or all at once if there are many."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    if len(files) > MANY and hasattr(os, "sync"):
        os.sync()
        return
    for file in files:
        write_out(file)


def write_out_names(folder: Path) -> None:
    """Flushes the entries of a folder to disk, if the system can."""
    with suppress(OSError):  # Windows opens no folder
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def clear_unfinished(folder: Path, older_than: float = 3600.0, pattern: str = UNFINISHED) -> None:
    """Deletes temporary files that killed processes left in a folder.

    - `older_than`: minimum age in seconds, so that files of running processes stay.
    """
    for file in folder.glob(pattern):
        with suppress(OSError):  # renamed or deleted meanwhile, or owned by another user
            if time.time() - file.stat().st_mtime > older_than:
                file.unlink()


def path_exists(path: Path) -> bool:
    """Whether the path exists; false for names that are too long for the file system."""
    try:
        return path.exists()
    except OSError:
        return False


def is_regular(path: Path) -> bool:
    """Whether the path is a regular file: no pipe, no device, no too long name."""
    try:
        return path.is_file()
    except OSError:
        return False
