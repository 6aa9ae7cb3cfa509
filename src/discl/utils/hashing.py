"""Ids and seeds that are the same everywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of the canonical JSON of `parts`.

    - `parts`: plain values only (str, int, float, bool, None, list, dict).
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def derive_seed(*parts: Any) -> int:
    """A seed in [0, 2^63) that depends on `parts` alone.

    The built-in `hash` would differ between processes.
    """
    return int(digest(*parts)[:16], 16) >> 1


def digest_bytes(*chunks: bytes) -> str:
    """32 hexadecimal digits of the concatenated bytes."""
    state = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def digest_file(path: Path) -> str:
    """32 hexadecimal digits of a file's contents, whatever its name."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_files(files: Iterable[Path], root: Path) -> str:
    """Digest of the names (relative to `root`) and contents of `files`, sorted by name."""
    entries = [[path.relative_to(root).as_posix(), digest_file(path)] for path in sorted(files)]
    return digest(entries)
