"""Locks of a folder that several processes or machines share.

On filelock's lease, with two additions. Stages exclude each other while shards of one plan are
generated at once, so one lease for the folder is not enough. And filelock 4.2 takes over the lease
of a killed process only if the file system can exchange two names in one step; NFS and SMB cannot,
so others would wait forever.

Therefore each owner holds a lease on a file that only it writes; the name says what it is for. It
then looks for the files of others, and withdraws if one of them is alive: of two that start at the
same time at least one sees the other. The file of a dead owner is deleted, which cannot hit a
living one. filelock writes, refreshes and removes the file, names its owner and notices its loss.
"""

from __future__ import annotations

import errno
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from filelock import SoftFileLease

from ..errors import RunError
from ..utils.atomic import why
from ..utils.hashing import digest
from ..utils.logging import get_logger
from . import paths

logger = get_logger(__name__)

BEAT = 5.0
"""Seconds between two refreshes of a lock."""
PATIENCE = 60.0
"""Seconds without a refresh after which an owner counts as dead."""
PAUSE = 0.5
"""Seconds between two looks at a lock that is held."""
SUFFIX = ".lock"

_own = threading.local()


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, and for what."""

    what: str
    process: int
    host: str
    since: int
    machine: str

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.process} on {self.host} ('{self.what}', since {since})"


@contextmanager
def lock(
    folder: Path, what: str, clashes: Callable[[str], bool] = lambda other: True
) -> Iterator[None]:
    """Waits until no other process holds a lock on `folder` that clashes, then holds one.

    Locks that this thread holds already do not count. Messages say whom it waits for, and whose
    lock it took over.

    - `what`: what the lock is for.
    - `clashes`: called with what another lock is for.

    Raises RunError if the folder cannot be written to, and, at the end, if another process took
    this one for dead.
    """
    path, lease = _take(folder / paths.LOCKS, what, clashes)
    _held().add(path.name)
    try:
        yield
        if lease.compromise is not None or not path.exists():
            raise RunError(
                f"another process has taken '{what}' over in {folder}, because this one gave no "
                f"sign of life for {PATIENCE:.0f} s (was it suspended?); run the command again "
                "once the other has ended."
            )
    finally:
        _held().discard(path.name)
        _release(lease, path)
        with suppress(OSError):
            path.parent.rmdir()  # the last one; refused while others wait


def owners_of(folder: Path) -> list[Owner]:
    """Who holds locks on a folder now; the locks of this process too."""
    return list(_find_others(folder / paths.LOCKS, Path(), lambda other: True, {}).values())


def _take(folder: Path, what: str, clashes: Callable[[str], bool]) -> tuple[Path, SoftFileLease]:
    """Acquires a lease on a file of its own, once nobody holds a lock that clashes."""
    parts = (quote(what, safe="").replace(".", "%2E"), f"{time.time():.0f}", _machine())
    path = folder / ".".join([*parts, uuid.uuid4().hex + SUFFIX])
    seen: dict[str, tuple[int, float]] = {}
    reported: set[str] = set()
    started = time.monotonic()
    while True:
        others = _find_others(folder, path, clashes, seen)
        if not others:
            try:
                lease = _acquire(path)
            except OSError as error:
                raise RunError(f"cannot write to {folder.parent}: {why(error)}.") from error
            others = _find_others(folder, path, clashes, seen)
            if not others:
                return path, lease
            _release(lease, path)
        for name, owner in others.items():
            if name not in reported and time.monotonic() - started > 2 * PAUSE:
                logger.info(f"waiting for {owner} in {folder.parent}")
                reported.add(name)
        time.sleep(PAUSE * random.uniform(0.5, 1.0))


def _acquire(path: Path) -> SoftFileLease:
    lease = SoftFileLease(path, lease_duration=PATIENCE, heartbeat_interval=BEAT)
    for attempt in range(10):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lease.acquire(blocking=False)
            break
        except OSError as error:
            if error.errno != errno.ENOENT or attempt == 9:
                raise  # else the last owner that left has removed the folder
    return lease


def _release(lease: SoftFileLease, path: Path) -> None:
    with suppress(OSError):
        lease.release()
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _find_others(
    folder: Path,
    own: Path,
    clashes: Callable[[str], bool],
    seen: dict[str, tuple[int, float]],
) -> dict[str, Owner]:
    """Living owners of locks that clash, by file; the files of dead ones are deleted.

    `seen` keeps when each file was last refreshed, and when that was noticed.
    """
    result: dict[str, Owner] = {}
    try:
        files = [file for file in folder.iterdir() if file.suffix == SUFFIX]
    except OSError:  # nobody holds a lock
        return result
    for file in files:
        owner = _read_owner(file)
        if file == own or file.name in _held() or owner is None or not clashes(owner.what):
            continue
        try:
            refreshed = file.stat().st_mtime_ns
        except OSError:
            continue  # released in the meantime
        if file.name not in seen or seen[file.name][0] != refreshed:
            seen[file.name] = refreshed, time.monotonic()
        if _has_exited(owner) or time.monotonic() - seen[file.name][1] > PATIENCE:
            with suppress(OSError):
                file.unlink()
                logger.warning(
                    f"{owner} has ended without releasing its lock on {folder.parent}; taken over"
                )
        else:
            result[file.name] = owner
    return result


def _read_owner(file: Path) -> Owner | None:
    """Whose lock a file is; None if it is nobody's."""
    what, since, machine, *_ = [*file.name.split("."), "", "", ""]
    if not since.isdecimal() or not since.isascii() or len(since) > 10:
        return None
    record = SoftFileLease(file, lease_duration=PATIENCE).owner  # None while it is being written
    host = "another host" if record is None else record.hostname.split("?")[0]
    process = 0 if record is None else record.pid
    return Owner(unquote(what), process, host, int(since), machine)


def _has_exited(owner: Owner) -> bool:
    """Whether the owner ran on this machine and runs no more."""
    if owner.machine != _machine() or owner.process == 0 or os.name != "posix":
        return False
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """Identifies the host and, if there is one, the namespace of its process numbers."""
    namespace = ""
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return digest(platform.node(), namespace)[:12]


def _held() -> set[str]:
    if not hasattr(_own, "files"):
        _own.files = set()
    held: set[str] = _own.files
    return held
