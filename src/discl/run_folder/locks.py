"""Locks of a folder that several processes or machines share.

Whoever wants the folder puts a file of its own into `locks/`, looks for the files of others, and takes its own back where one of
them is alive: of two that come at once at least one sees the other. That needs no server and nothing of the file system but that
a file which was written is listed. The owner of a lock touches its file every few seconds; one whose process is gone, or that was
not touched for a minute, is dead, and its lock is taken over.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..utils.atomic import whole, why
from ..utils.logging import get_logger
from . import paths

logger = get_logger(__name__)

BEAT, PATIENCE, PAUSE = 5.0, 60.0, 0.5
"""Seconds between two signs of life; without one until an owner counts as dead; between two looks at a lock that is taken."""

_own = threading.local()


@dataclass(frozen=True)
class Owner:
    """Who has a lock, and for what."""

    what: str
    process: int
    machine: str
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.machine.split('/')[0]} ('{self.what}', since {self.since})"


@contextmanager
def lock(
    folder: Path, what: str, clashes: Callable[[str], bool] = lambda other: True
) -> Iterator[None]:
    """Waits until no other process has a lock on `folder` for something that `clashes` with this, and keeps them out meanwhile.

    It says for whom it waits, and whose lock it took over. What this thread holds already does not stand in its way. Raises
    RunError where the folder cannot be written to, and at the end where another process has taken this one for dead.
    """
    path = _take(folder / paths.LOCKS, what, clashes)
    _held().add(path.name)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended), name="lock", daemon=True)
    beat.start()
    try:
        yield
        if not path.exists():
            raise RunError(
                f"another process has taken '{what}' over in {folder}, for this one gave no sign of life for {PATIENCE:.0f} s "
                "(was it suspended?); run the command again once the other has ended."
            )
    finally:
        ended.set()
        beat.join()
        _held().discard(path.name)
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()  # the last one; refused where others wait


def _take(folder: Path, what: str, clashes: Callable[[str], bool]) -> Path:
    owner = Owner(what, os.getpid(), _machine(), time.strftime("%Y-%m-%d %H:%M:%S"))
    path = folder / f"{uuid.uuid4().hex}.json"
    signs: dict[str, tuple[int, float]] = {}
    told: set[str] = set()
    started = time.monotonic()
    while True:
        others = _alive(folder, path.name, clashes, signs)
        if not others:
            try:
                _write(path, owner)
            except OSError as error:
                raise RunError(f"cannot write to {folder.parent}: {why(error)}.") from error
            others = _alive(folder, path.name, clashes, signs)
            if not others:
                return path
            path.unlink(missing_ok=True)
        for name, other in others.items():
            if name not in told and time.monotonic() - started > 2 * PAUSE:
                logger.info(f"waiting for {other} in {folder.parent}")
                told.add(name)
        time.sleep(PAUSE * random.uniform(0.5, 1.0))


def _alive(
    folder: Path, mine: str, clashes: Callable[[str], bool], signs: dict[str, tuple[int, float]]
) -> dict[str, Owner]:
    """Others that stand in the way, by file; those that are dead are removed. `signs` remembers when each showed that it lives."""
    found: dict[str, Owner] = {}
    try:
        files = [
            file
            for file in folder.iterdir()
            if file.suffix == ".json" and file.name != mine and file.name not in _held()
        ]
    except OSError:  # nobody has a lock
        return found
    for file in files:
        try:
            with (
                file.open() as stream
            ):  # opening asks the server anew, where a file system keeps attributes for a while
                other, touched = _owner(json.load(stream)), os.fstat(stream.fileno()).st_mtime_ns
        except (OSError, ValueError, TypeError, RecursionError):
            continue  # taken back meanwhile, or nobody's
        if not clashes(other.what):
            continue
        if file.name not in signs or signs[file.name][0] != touched:
            signs[file.name] = touched, time.monotonic()
        if _is_gone(other) or time.monotonic() - signs[file.name][1] > PATIENCE:
            with suppress(OSError):
                file.unlink()
                logger.warning(
                    f"{other} has ended without giving up its lock on {folder.parent}; taken over"
                )
        else:
            found[file.name] = other
    return found


def _owner(found: Any) -> Owner:
    """The owner that a lock's file names. Raises ValueError or TypeError for a file that is no lock."""
    owner = Owner(**found)
    texts = (owner.what, owner.machine, owner.since)
    if not all(isinstance(each, str) and each.strip() for each in texts):
        raise ValueError("a lock names what it is for, a machine and a time")
    if type(owner.process) is not int or not 0 < owner.process < 2**31:
        raise ValueError("a lock names a process by its number")
    return owner


def _is_gone(owner: Owner) -> bool:
    if owner.machine != _machine() or os.name != "posix":
        return False
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _write(path: Path, owner: Owner) -> None:
    for attempt in range(10):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path, sync=False) as unfinished:
                unfinished.write_text(json.dumps(asdict(owner)))
            return
        except OSError as error:
            if error.errno != errno.ENOENT or attempt == 9:
                raise  # else the last one that left has removed the folder


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _machine() -> str:
    """Host name and, where there is one, the namespace in which its process numbers count."""
    with suppress(OSError):
        return f"{platform.node()}/{Path('/proc/self/ns/pid').readlink()}"
    return platform.node()


def _held() -> set[str]:
    if not hasattr(_own, "files"):
        _own.files = set()
    held: set[str] = _own.files
    return held
