"""Pixels to WebP, PNG or JPEG bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

ENCODINGS: dict[str, dict[str, Any]] = {
    "webp-lossless": {"format": "WEBP", "lossless": True, "quality": 50, "method": 4},
    "webp": {"format": "WEBP", "quality": 92, "method": 4},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "png": {"format": "PNG", "compress_level": 4},
}


def encode_image(pixels: np.ndarray, encoding: str) -> bytes:
    """The bytes of an image file.

    - `pixels`: uint8 `[height, width, 3]`.
    - `encoding`: `webp`, `webp-lossless`, `jpeg` or `png`.

    ```python
    import numpy as np

    import discl

    content = discl.encode_image(np.zeros((32, 32, 3), np.uint8), "png")
    ```
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, **ENCODINGS[encoding])
    return buffer.getvalue()
