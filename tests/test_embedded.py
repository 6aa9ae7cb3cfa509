"""The embedded data and weights have the properties that the docs state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import discl.assets
from discl.assets import embedded
from discl.data import read_tables
from discl.data.table import inspect_images
from discl.prompts import class_prompts
from discl.recipe import load_recipe
from discl.spectrum.clip_filter import ClipScorer
from discl.spectrum.engine import Engine
from discl.spectrum.models import load_generator
from discl.spectrum.plan import Request

CLIP, DIFFUSION = "embedded:fashion-mnist/clip", "embedded:fashion-mnist/diffusion"


def test_what_ships_is_small_and_licensed() -> None:
    folder = Path(discl.assets.__file__).parent
    files = [
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]
    assert "MIT License" in (folder / "fashion_mnist/LICENSE-DATA").read_text()


@pytest.mark.slow
def test_splits_share_no_image() -> None:
    tables = read_tables("embedded:fashion-mnist/data")
    assert {name: len(table) for name, table in tables.items()} == {
        "train": 5000,
        "validation": 1000,
        "test": 10000,
    }
    assert (tables["train"].class_counts == 500).all()
    assert (tables["validation"].class_counts == 100).all()
    seen = [inspect_images(table) for table in tables.values()]
    assert not any(inspection.unreadable for inspection in seen)
    digests = [content for inspection in seen for content in inspection.digests]
    assert len(set(digests)) == len(digests)


def zero_shot(images: list, names: tuple[str, ...]) -> np.ndarray:
    """Cosines `[images, classes]` with "a photo of {class}"."""
    scorer = ClipScorer(CLIP, {label: f"a photo of {name}" for label, name in enumerate(names)})
    return scorer.embed(images) @ scorer.text_embeddings.numpy().T


@pytest.mark.slow
def test_clip_recognises_the_validation_images() -> None:
    table = read_tables("embedded:fashion-mnist/data")["validation"]
    cosines = zero_shot([table.image(row) for row in range(len(table))], table.class_names)
    assert (cosines.argmax(1) == table.labels).mean() > 0.82


@pytest.mark.parametrize("seed", [0])
@pytest.mark.slow
def test_text_only_images_show_their_class(seed: int) -> None:
    from PIL import Image

    names = read_tables("embedded:fashion-mnist/data")["train"].class_names
    texts = class_prompts(names, [], "embedded:fashion-mnist")
    recipe = load_recipe("fashion-lt").spectrum
    settings = {
        "num_inference_steps": recipe.num_inference_steps,
        "guidance_scale": recipe.guidance_scale,
    }
    engine = Engine(load_generator(DIFFUSION), **settings, slots=50)
    requests = []
    for label, name in enumerate(names):
        for number in range(5):
            name_of = f"{label}-{number}"
            text = texts[name][number]
            requests.append(Request(name_of, name_of, "", label, 0, seed, 0, text, "", 32, 32))
    torch.manual_seed(0)
    source = np.zeros((32, 32, 3), np.uint8)
    made = {request.id: image for request, image in engine.generate(requests, lambda _: source)}
    cosines = zero_shot([Image.fromarray(made[request.id]) for request in requests], names)
    assert (cosines.argmax(1) == [request.label for request in requests]).mean() > 0.75


def test_unknown_asset_is_named() -> None:
    with pytest.raises(discl.RecipeError, match="Did you mean 'fashion-mnist'"):
        embedded("embedded:fashion-mnst/data")
