"""Copies as people make them: cropped, mirrored, compressed, noisy."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from discl import read_tables


def crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A crop of 80 to 100 % of each side, anywhere, at the size of the image."""
    part = random.uniform(0.8, 1)
    width, height = image.size
    left, top = random.uniform(0, 1 - part, 2) * (width, height)
    box = (left, top, left + part * width, top + part * height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box)


def mirror(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image)


def compress(image: Image.Image, random: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(random.integers(50, 90)))
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def add_noise(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Gaussian noise with a standard deviation of 6 grey levels."""
    pixels = np.asarray(image) + random.normal(0, 6, (image.height, image.width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def all_together(image: Image.Image, random: np.random.Generator) -> Image.Image:
    for change in (crop, mirror, add_noise, compress):
        image = change(image, random)
    return image


PLANTED: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "crop": crop,
    "flip": mirror,
    "jpeg": compress,
    "noise": add_noise,
}


def fashion(split: str, count: int, seed: int = 0) -> tuple[list[Image.Image], np.ndarray]:
    """Some images of the embedded Fashion-MNIST, and their labels."""
    table = read_tables("embedded:fashion-mnist/data", "auto")[split]
    rows = np.random.default_rng(seed).choice(len(table), count, replace=False)
    return [table.image(row) for row in rows], table.labels[rows]
