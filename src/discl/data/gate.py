"""Which files a table may open: the only module that decides.

A stored image is `{bytes, path}`, and the path may come from untrusted data. So a path opens
nothing by itself. Only a `Gate` opens files: regular files below its folders, links followed. A
gate without folders, the default everywhere, opens none. Addresses (`slice://`, `parquet://`,
`camera://`) are valid only where a reader of this package wrote them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
"""Start of a URL, an address, or a Windows path with a drive."""
FOREIGN = r"^(/|\\|~|[A-Za-z][A-Za-z0-9+.-]*:)|\.\.|\x00"
"""What may lead elsewhere in a stored path; such paths are checked one by one."""


class Unreadable(DataError):
    """An image that cannot be decoded; the message says why."""


@dataclass(frozen=True)
class Gate:
    """What the stored images of a table may open.

    - `roots`: folders; a file is opened only where its path, links followed, lies below one of
      them. Relative paths are relative to the first.
    - `schemes`: schemes of addresses (such as `slice://`) that a reader wrote for this table.
    """

    roots: tuple[Path, ...] = ()
    schemes: frozenset[str] = frozenset()

    @cached_property
    def _real_roots(self) -> tuple[str, ...]:
        return tuple(os.path.realpath(root) for root in self.roots)

    def knows(self, path: str | None, scheme: str) -> bool:
        """Whether a path is an address of this scheme that a reader wrote."""
        return path is not None and scheme in self.schemes and path.startswith(scheme)

    def without(self, *schemes: str) -> Gate:
        """The same gate without these schemes."""
        return replace(self, schemes=self.schemes - set(schemes))

    def find(self, path: str) -> str:
        """The real path of a file below one of the roots, whether it exists or not.

        Raises Unreadable for a path that leads elsewhere, for URLs and for a `~`.
        """
        if not self.roots:
            raise Unreadable(
                f"it names {path!r} and holds no image; only images that are stored as bytes are "
                "read here"
            )
        if "\0" in path:
            raise Unreadable(f"the path {path!r} holds a zero byte")
        if URL.match(path) and not Path(path).is_absolute():
            raise Unreadable(
                f"it names {path!r}, an address that no reader wrote; only files below "
                f"{self.roots[0]} are read"
            )
        if path.startswith("~"):
            raise Unreadable(f"it names {path!r}; home folders are not looked up in data")
        try:
            real = os.path.realpath(os.path.join(self.roots[0], path))  # noqa: PTH118 (hot)
        except (OSError, ValueError) as error:
            raise Unreadable(f"{path!r} cannot be followed: {error}") from error
        if not any(_is_in(real, root) for root in self._real_roots):
            raise Unreadable(
                f"it leads to {real}, outside the root {self._real_roots[0]}; copy the images "
                "there or name their folder as the root"
            )
        return real

    def open(self, path: str) -> BinaryIO:
        """The regular file at a path. Raises Unreadable as `find`, and for pipes, devices, folders.

        Raises OSError where the system refuses.
        """
        real = self.find(path)
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
        flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            number = os.open(real, flags)
        except OSError as error:
            raise Unreadable(f"{error.strerror}: {real!r}") from error
        kind = os.fstat(number).st_mode
        if not stat.S_ISREG(kind):
            os.close(number)
            raise Unreadable(f"it is {_kind(kind)}, not a regular file")
        return os.fdopen(number, "rb")


CLOSED = Gate()
"""Opens nothing: only images that are stored as bytes are read."""


def roots_of(folder: Path) -> tuple[Path, ...]:
    """The folders that hold the files of a data set: its own, and `blobs` for a snapshot.

    In the cache of the hub a snapshot (`snapshots/REVISION`) is a folder of links into `blobs`.
    """
    parents = (folder, *folder.parents)
    snapshot = next((each for each in parents if each.parent.name == "snapshots"), None)
    blobs = snapshot.parent.parent / "blobs" if snapshot is not None else None
    return (folder,) if blobs is None or not blobs.is_dir() else (folder, blobs)


def first_foreign(stored: pa.ChunkedArray, gate: Gate) -> str | None:
    """Why the first stored image that only names a forbidden file may not be opened, or None.

    - `stored`: a column of {bytes, path}.

    Links and missing files are detected when images are read.
    """
    import pyarrow.compute as pc

    roots = tuple(f"{os.path.abspath(root)}{os.sep}" for root in gate.roots)  # noqa: PTH100
    for chunk in stored.chunks:
        named = pc.and_(pc.is_null(chunk.field("bytes")), pc.is_valid(chunk.field("path")))
        paths = chunk.field("path").filter(named)
        if gate.roots:
            paths = paths.filter(pc.match_substring_regex(paths, FOREIGN))
        for path in paths.to_pylist():
            written = path.startswith(tuple(gate.schemes)) if gate.schemes else False
            if written or (path.startswith(roots) and ".." not in path and "\0" not in path):
                continue
            try:
                gate.find(path)
            except Unreadable as error:
                return str(error)
    return None


def refuse_outside(files: Iterable[Path], root: Path) -> None:
    """Raises DataError for a file or a link of a data set that leads out of its root."""
    gate = Gate(roots_of(root))
    for file in files:
        try:
            gate.find(str(file.absolute()))
        except Unreadable as error:
            raise DataError(f"{file}: {error}.") from error


def _is_in(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
