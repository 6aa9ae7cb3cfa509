"""A run small enough to be made again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def small_tree(
    tmp_path_factory: pytest.TempPathFactory, tiny_diffusion: Path, tiny_clip: Path
) -> dict[str, Any]:
    """A recipe over 10 hard images of noise at 2 levels with 2 seeds: 40 images in shards of 4."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 5), ("validation", 1), ("test", 1)):
        for label, name in enumerate(("boot", "hat")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                noise = np.random.default_rng([label, index, len(split)]).integers(
                    256, size=(32, 32, 3), dtype=np.uint8
                )
                Image.fromarray(noise).save(root / split / name / f"{index}.png")
    return {
        "name": "crew",
        "data": {"root": str(root)},
        "hard": {"fewer_than": 100},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [0, 50],
            "seeds": 2,
            "num_inference_steps": 4,
        },
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "methods": {"ce": {}},
        "train": {"batch_size": 4},
        "runtime": {"device": "cpu", "threads": 1, "slots": 2, "shard_rows": 4},
    }
