"""Photos as camera traps take them: optics and addresses.

A camera is a site and its optics: darkness, infrared, grass before the lens, blur, noise and
compression. All of it is drawn from (seed, number). What differs between photos of one camera is
drawn from (camera, shot). A degraded image is therefore a pure function of the clean image and of
its address `camera://SEED:NUMBER:SHOT::PATH`. It is computed on decoding and never stored.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from ..utils.hashing import derive_seed

SCHEME = "camera://"


@dataclass(frozen=True)
class Camera:
    """What all photos of a camera have in common; lengths are fractions of the shorter side.

    - `exposure`: fraction of the light that is left.
    - `infrared`: whether photos are grey.
    - `tint`: colour of the light, (r, g, b); equal parts for infrared.
    - `blur`, `angle`: length and direction (radians) of the motion.
    - `stems`, `stem_width`: number and width of the blades of grass before the lens.
    - `noise`: standard deviation of the sensor's noise in linear light.
    - `quality`: of the JPEG.
    """

    exposure: float
    infrared: bool
    tint: tuple[float, float, float]
    blur: float
    angle: float
    stems: int
    stem_width: float
    noise: float
    quality: int


@lru_cache(maxsize=1024)
def draw_camera(seed: int, number: int) -> Camera:
    """The camera of that number, whatever split it belongs to."""
    rng = np.random.default_rng(derive_seed("camera", seed, number))
    infrared = bool(rng.random() < 0.35)
    tint = np.ones(3) if infrared else np.exp(rng.normal(0, 0.18, 3))
    return Camera(
        exposure=float(np.exp(rng.uniform(np.log(0.07), np.log(0.35)))),
        infrared=infrared,
        tint=(float(tint[0]), float(tint[1]), float(tint[2])),
        blur=float(rng.uniform(0.0, 0.11)),
        angle=float(rng.uniform(0, np.pi)),
        stems=int(rng.integers(0, 5)),
        stem_width=float(rng.uniform(0.03, 0.08)),
        noise=float(rng.uniform(0.002, 0.009)),
        quality=int(rng.integers(35, 80)),
    )


def degrade(image: Image.Image, camera: Camera, shot: int) -> Image.Image:
    """The RGB image as the camera takes it, of the same size.

    A pure function of its arguments. In linear light, in this order: grass, motion, exposure,
    noise (of photons and of the sensor). Then sRGB and JPEG.
    """
    rng = np.random.default_rng(derive_seed("shot", shot))
    light = _to_linear(np.asarray(image, np.float32) / 255)
    light = _add_grass(light, camera, rng)
    light = _add_motion(
        light, camera.blur * rng.uniform(0.5, 1.5), camera.angle + rng.normal(0, 0.3)
    )
    if camera.infrared:
        light = np.repeat(
            0.3 * light[..., :1] + 0.55 * light[..., 1:2] + 0.15 * light[..., 2:], 3, 2
        )
    light = (
        light * camera.exposure * np.exp(rng.normal(0, 0.25)) * np.asarray(camera.tint, np.float32)
    )
    scale = camera.noise * np.sqrt(1 + light / 0.05)
    grain = rng.standard_normal((*light.shape[:2], 1 if camera.infrared else 3))
    srgb = _to_srgb(np.clip(light + scale * grain, 0, 1))
    out = io.BytesIO()
    Image.fromarray(np.rint(255 * srgb).astype(np.uint8)).save(out, "JPEG", quality=camera.quality)
    with Image.open(out) as photo:
        return photo.convert("RGB")


def _to_linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(
        np.float32
    )


def _to_srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _add_grass(light: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Slanted, blurred dark blades from the lower edge up to a third of the height or more."""
    height, width = light.shape[:2]
    side = min(height, width)
    down, across = np.mgrid[0:height, 0:width].astype(np.float32)
    for _ in range(camera.stems):
        foot, lean, top = rng.uniform(0, width), rng.normal(0, 0.35), height * rng.uniform(0, 0.67)
        half = side * camera.stem_width * rng.uniform(0.6, 1.4) / 2
        distance = np.abs(across - foot - lean * (height - down)) - half * (down - top) / (
            height - top
        )
        cover = np.clip(0.5 - distance / (0.03 * side), 0, 1) * (down > top)
        light = light * (1 - cover[..., None]) + 0.01 * cover[..., None]
    return light


def _add_motion(light: np.ndarray, length: float, angle: float) -> np.ndarray:
    """The mean along a straight path of `length` × the shorter side, bilinear, every half pixel."""
    height, width = light.shape[:2]
    reach = length * min(height, width)
    steps = max(int(np.ceil(2 * reach)), 1)
    total = np.zeros_like(light)
    for offset in (np.arange(steps) - (steps - 1) / 2) * (reach / steps):
        total += _shift(light, offset * np.sin(angle), offset * np.cos(angle))
    return total / steps


def _shift(light: np.ndarray, down: float, right: float) -> np.ndarray:
    """The image moved by fractions of pixels; edge pixels are repeated."""
    for axis, by in ((0, down), (1, right)):
        positions = np.arange(light.shape[axis]) - by
        low = np.floor(positions).astype(int)
        weight = (positions - low).astype(np.float32)
        weight = weight.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        last = light.shape[axis] - 1
        light = (
            light.take(np.clip(low, 0, last), axis) * (1 - weight)
            + light.take(np.clip(low + 1, 0, last), axis) * weight
        )
    return light


def camera_address(seed: int, number: int, shot: int, path: str | None) -> str:
    """The path under which a photo of a camera is stored; `path` is that of the clean image."""
    return f"{SCHEME}{seed}:{number}:{shot}::{path or ''}"


def parse_address(address: str) -> tuple[Camera, int, str | None]:
    """(camera, shot, path of the clean image) of a `camera_address`."""
    numbers, _, path = address.removeprefix(SCHEME).partition("::")
    seed, number, shot = map(int, numbers.split(":"))
    return draw_camera(seed, number), shot, path or None
