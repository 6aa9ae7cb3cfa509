"""A run small enough to be made again and again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from discl.recipe import load_recipe
from discl.run_folder.open import open_run
from discl.run_folder.run import Run


@pytest.fixture
def amended(filtered_run: Path, tmp_path: Path) -> Callable[..., Run]:
    """A copy of the filtered run under a recipe with other values, as `filter__rule="alia"`."""
    shutil.copytree(filtered_run, tmp_path / "run")

    def amend(**values: object) -> Run:
        tree = yaml.safe_load((filtered_run / "recipe.yaml").read_text())
        overrides = {key.replace("__", "."): value for key, value in values.items()}
        return open_run(load_recipe(tree, overrides), tmp_path / "run", amend=True)

    return amend


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
