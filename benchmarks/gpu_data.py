"""CIFAR100-LT with its spectrum as `.npz` files, read with numpy and Pillow alone.

`gpu_pack.py` writes them, and `gpu_cifar.py` trains on them.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from discl.curriculum.sampling import Pool
from discl.models.classifier import ClassifierConfig
from discl.utils.atomic import whole
from discl.utils.hashing import digest

PARTS = ("train", "test", "spectrum", "oracle")
SETTINGS = "cifar.json"
STRIP = 500
"""Images of 32 pixels in one lossless WebP, whose sides are bounded."""


@dataclass(frozen=True)
class Data:
    """What is trained on, and how.

    - `settings`: as `gpu_pack.py` writes them: `train`, `classifier`, `rows`, `levels`, `groups`.
    - `images`: by part, arrays by name: `pixels` uint8 `[n, 32, 32, 3]`, `labels`, and `hard` of
      the real images, `levels`, `sources` and `scores` of the spectrum.
    """

    settings: dict[str, Any]
    images: dict[str, dict[str, np.ndarray]]

    @cached_property
    def config(self) -> ClassifierConfig:
        plain = self.settings["classifier"]
        return ClassifierConfig(
            **{
                name: tuple(each) if isinstance(each, list) else each
                for name, each in plain.items()
            }
        )

    @cached_property
    def digest(self) -> str:
        """Identifies the images by everything but their pixels."""
        arrays = [
            array.tobytes().hex()
            for part in PARTS
            for name, array in sorted(self.images[part].items())
            if name != "pixels"
        ]
        return digest(*arrays)

    def pixels(self, name: str) -> np.ndarray:
        """Those of the pool of a row, uint8 `[rows, 32, 32, 3]`."""
        extra = self.settings["rows"][name]["images"]
        return np.concatenate([self.images["train"]["pixels"], self.images[extra]["pixels"]])

    def pool(self, name: str) -> Pool:
        """All samples that a row may draw: real images, then synthetic or the oracle's."""
        real, extra = self.images["train"], self.images[self.settings["rows"][name]["images"]]
        count, more = len(real["labels"]), len(extra["labels"])
        return Pool(
            labels=np.concatenate([real["labels"], extra["labels"]]).astype(np.int64),
            levels=np.concatenate([np.full(count, 100), extra["levels"]]).astype(np.int64),
            synthetic=np.repeat([False, True], [count, more]),
            hard=np.concatenate([real["hard"], np.zeros(more, bool)]),
            class_names=self.config.class_names,
            sources=np.concatenate([np.arange(count), extra["sources"]]).astype(np.int64),
        )


def write_data(data: Data, folder: Path) -> None:
    """Writes an `.npz` for each part, and the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, arrays in data.images.items():
        plain = {name: array for name, array in arrays.items() if name != "pixels"}
        strips = [_encode(strip) for strip in _split(arrays["pixels"])]
        sizes = np.array([len(strip) for strip in strips])
        pixels = np.frombuffer(b"".join(strips), np.uint8)
        with whole(folder / f"cifar-{part}.npz") as unfinished, unfinished.open("wb") as file:
            np.savez(file, strips=pixels, sizes=sizes, **plain)
    with whole(folder / SETTINGS) as unfinished:
        unfinished.write_text(json.dumps(data.settings, indent=1))


def read_data(folder: Path) -> Data:
    """Reads what `write_data` has written; raises SystemExit where a file is missing."""
    missing = [name for name in _files() if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(missing)}; gpu_pack.py makes them.")
    images = {}
    for part in PARTS:
        with np.load(folder / f"cifar-{part}.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        strips, sizes = arrays.pop("strips"), arrays.pop("sizes")
        ends = np.cumsum(sizes)
        decoded = [
            _decode(strips[end - size : end].tobytes())
            for end, size in zip(ends, sizes, strict=True)
        ]
        images[part] = arrays | {"pixels": np.concatenate(decoded)}
    return Data(json.loads((folder / SETTINGS).read_text()), images)


def _files() -> list[str]:
    return [SETTINGS, *(f"cifar-{part}.npz" for part in PARTS)]


def _split(pixels: np.ndarray) -> list[np.ndarray]:
    return [pixels[first : first + STRIP] for first in range(0, len(pixels), STRIP)]


def _encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    column = Image.fromarray(pixels.reshape(-1, *pixels.shape[2:]))
    column.save(file, "WEBP", lossless=True, exact=True, quality=80, method=4)
    return file.getvalue()


def _decode(strip: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(strip)) as column:
        pixels = np.asarray(column.convert("RGB"))
    return pixels.reshape(-1, pixels.shape[1], pixels.shape[1], 3)


def smoke_data() -> Data:
    """Six classes of random patches, with rows of every kind; two epochs of a thin network."""
    rng = np.random.default_rng(0)

    def draw(labels: np.ndarray) -> dict[str, np.ndarray]:
        means = np.random.default_rng(1).integers(40, 216, (6, 4, 4, 3))
        noisy = means[labels] + rng.integers(-30, 31, (len(labels), 4, 4, 3))
        pixels = noisy.clip(0, 255).astype(np.uint8).repeat(8, 1).repeat(8, 2)
        return {"pixels": pixels, "labels": labels.astype(np.uint8)}

    real = np.repeat(np.arange(6), (40, 30, 20, 6, 4, 4))
    made = np.repeat([3, 4, 5], 8)
    images = {
        "train": draw(real) | {"hard": real > 2},
        "test": draw(np.repeat(np.arange(6), 5)),
        "spectrum": draw(made)
        | {
            "levels": np.tile([0, 50], 12).astype(np.uint8),
            "sources": np.repeat([90, 96, 100], 8).astype(np.int32),
            "scores": np.full(24, 0.5, np.float32),
        },
        "oracle": draw(made)
        | {"levels": np.full(24, 100, np.uint8), "sources": np.full(24, -1, np.int32)},
    }
    row = {
        "strategy": "real-only",
        "level": None,
        "objective": "cross-entropy",
        "undersample": False,
        "synthetic_scale": 3.0,
        "shortage": "repeat",
        "missing": "nearest",
        "class_power": 1.0,
        "curriculum_epochs": 2,
        "images": "spectrum",
    }
    rows = {
        "ce": row,
        "bs": row | {"objective": "balanced-softmax"},
        "ce-discl": row | {"strategy": "diverse-to-specific", "undersample": True},
        "discl-balanced": row | {"strategy": "diverse-to-specific", "class_power": 0.0},
        "oracle": row | {"strategy": "fixed", "level": 100, "images": "oracle"},
    }
    names = [f"class {label}" for label in range(6)]
    classifier = {"architecture": "resnet32-cifar", "stem": "3x3", "width": 4, "image_size": 32}
    classifier |= {"resize": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "class_names": names}
    train = {
        "epochs": 2,
        "batch_size": 16,
        "steps_per_epoch": 3,
        "optimizer": {
            "name": "sgd",
            "lr": 0.1,
            "weight_decay": 2e-4,
            "momentum": 0.9,
            "nesterov": True,
        },
        "learning_rate": {"peak": 0.1, "schedule": "cosine", "epochs": 2, "warm_up_epochs": 1},
    }
    groups = {"many": [0, 1], "medium": [2], "few": [3, 4, 5]}
    told = {"levels": [0, 50], "groups": groups, "rows": rows, "seeds": [0]}
    return Data(told | {"classifier": classifier, "train": train}, images)
