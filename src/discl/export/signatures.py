"""The format of an encoded image, by its first bytes."""

from __future__ import annotations

from ..errors import StoreError

SIGNATURES = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpg"), (b"RIFF", "webp"))
MIME_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


def suffix_of(data: bytes) -> str:
    """webp, png or jpg, by the first bytes of the file. Raises StoreError for other formats."""
    for start, suffix in SIGNATURES:
        if data.startswith(start):
            return suffix
    known = ", ".join(suffix for _, suffix in SIGNATURES)
    raise StoreError(
        f"the store holds an image that begins with {bytes(data[:8])!r}; {known} can be exported. "
        "This package did not write it: delete its shard, and run `discl generate` again."
    )
