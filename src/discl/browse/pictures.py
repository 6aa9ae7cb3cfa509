"""Pictures as a browser shows them: the stored bytes, or a thumbnail."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from ..data.images import decode_image
from ..export.signatures import MIME_TYPES, SIGNATURES

SIDE = 160
"""Pixels a side of a thumbnail, at most."""
LOSSLESS_SIDE = 64


class Encoded(NamedTuple):
    """An image file and its media type."""

    data: bytes
    kind: str


def encode_stored(stored: Mapping[str, Any] | None, thumb: bool) -> Encoded:
    """A stored picture: its bytes where a browser shows them, otherwise a WebP.

    - `thumb`: at most 160 pixels a side.

    Raises Unreadable for a picture that cannot be decoded. Paths are not opened.
    """
    image = decode_image(stored)
    data = (stored or {}).get("bytes") or b""
    kind = next(
        (MIME_TYPES[suffix] for start, suffix in SIGNATURES if data.startswith(start)), None
    )
    if kind is not None and (not thumb or max(image.size) <= SIDE):
        return Encoded(data, kind)
    return encode_picture(image, thumb)


def encode_picture(image: Image.Image, thumb: bool) -> Encoded:
    """A decoded picture as WebP; small ones lossless."""
    if thumb:
        image = image.copy()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=max(image.size) <= LOSSLESS_SIDE, quality=85, method=2)
    return Encoded(buffer.getvalue(), "image/webp")
