"""File systems of a store: this machine's own, or what fsspec opens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from ..errors import StoreError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ATOMIC = {"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "hf"}
"""fsspec protocols that put an object whole or not at all. Others: put, then renamed."""
INDIRECT = {
    "reference",
    "simplecache",
    "filecache",
    "blockcache",
    "cached",
    "zip",
    "tar",
    "libarchive",
}
"""fsspec protocols that read through another file or a cache."""


def open_filesystem(folder: Path | str) -> tuple[AbstractFileSystem | None, str]:
    """(file system, path in it) of a folder; None for a local one.

    Raises StoreError for a URL that fsspec cannot open, and for one that reads through another
    file.
    """
    if isinstance(folder, Path) or "://" not in folder:
        return None, str(folder)
    protocol = folder.partition("://")[0]
    if "::" in folder or protocol in INDIRECT:
        raise StoreError(
            f"store '{folder}' cannot be opened: it is read through another file, which may lead "
            "anywhere; name one folder without '::', such as s3://bucket/birds."
        )
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(folder)
    except Exception as error:  # each package has its own errors
        raise StoreError(
            f"store '{folder}' cannot be opened: {error}; write a folder, or a URL for which "
            "fsspec's package is installed."
        ) from error
    if not path.strip("/"):
        raise StoreError(
            f"store '{folder}' cannot be opened: it names no folder; write one, such as "
            f"{folder.rstrip('/')}//birds."
        )
    return (None if "file" in _protocols(filesystem) else filesystem), path


def puts_atomically(filesystem: AbstractFileSystem) -> bool:
    """Whether an object that is put there is whole or does not exist."""
    return bool(ATOMIC.intersection(_protocols(filesystem)))


def _protocols(filesystem: AbstractFileSystem) -> tuple[str, ...]:
    names = filesystem.protocol
    return (names,) if isinstance(names, str) else tuple(names)


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Turns errors of a remote store into an OSError; each package has its own errors."""
    try:
        yield
    except (OSError, pa.ArrowInvalid):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
