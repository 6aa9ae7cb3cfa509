"""Files written whole or not at all."""

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
"""What a file is called while it is written: hidden, and with another ending, so that nobody takes it for a finished one."""
REMEDIES = {
    errno.EISDIR: "Move the folder of that name away",
    errno.ENOTEMPTY: "Move the folder of that name away",
    errno.ENAMETOOLONG: "Choose a shorter name",
}
"""What to do where it is not the disk that refuses."""
MANY = 200
"""Files from which on it is quicker to write out everything once."""
REMEDY = "Free space, make the place writable or name another one,"
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
"""How a file system says that it has no way to write out a file at once."""


@contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to: at the end it takes the place of `path`, and where anything fails nothing is left of it.

    Each has a name of its own, so several may write the same file at once; the last one's stays.
    What a killed process leaves, called `.NAME.….new`, is for `clear_unfinished`. The file is
    written out to the disk before it takes its place, so a power cut leaves the old one or the new
    one; `sync` false leaves that out, for files that are worth nothing after a power cut.
    Raises WriteError, which is an OSError too and names `path`, where the disk refuses.
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
    """Makes a WriteError that names `path` of whatever the system refuses in the block."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
        remedy = REMEDIES.get(error.errno or 0, REMEDY) + " and run the same command again."
        raise WriteError(path, said, remedy, error.errno) from error


def make_folder(folder: Path) -> Path:
    """The folder, made with those above it where it does not exist. Raises WriteError where that cannot be."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def why(error: OSError) -> str:
    """What the system said, without the advice of a WriteError."""
    return f"{error.path}: {error.said}" if isinstance(error, WriteError) else str(error)


def write_out(file: Path) -> None:
    """Has the system write a file out to the disk. Raises OSError where the disk is full or broken."""
    with file.open("rb") as stream:
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            if error.errno not in CANNOT_SYNC:
                raise


def write_out_all(folder: Path) -> None:
    """Has the system write out a folder's files: one by one, or, where they are many, all that it holds back."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    if len(files) > MANY and hasattr(os, "sync"):
        os.sync()
        return
    for file in files:
        write_out(file)


def write_out_names(folder: Path) -> None:
    """Has the system write out which files a folder holds, where it can."""
    with suppress(OSError):  # Windows opens no folder
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


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
