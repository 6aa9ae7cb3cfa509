"""On a GPU the engine makes the images that it makes on a CPU, and low-rank weights train.

`pytest -m gpu` runs these where there is one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from discl.spectrum.adaptation import train_adapter
from discl.spectrum.engine import Engine
from discl.spectrum.low_rank import AdapterSettings
from discl.spectrum.models import load_generator

from .test_adaptation import make_images
from .test_engine import load_pixels, make_requests

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA"),
]


def generate(folder: Path, device: str, slots: int) -> dict[str, np.ndarray]:
    """`{id: uint8 image}` of a small plan over all levels."""
    engine = Engine(
        load_generator(str(folder), "float32", device),
        num_inference_steps=20,
        guidance_scale=7.5,
        slots=slots,
    )
    requests = make_requests(2)
    return {request.id: image for request, image in engine.generate(requests, load_pixels)}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions in float32, for which torch takes TF32 otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("family", ["tiny_diffusion", "tiny_xl", "tiny_sd3"])
def test_images_are_those_of_the_cpu(family, request):
    folder = request.getfixturevalue(family)
    expected, found = generate(folder, "cpu", 4), generate(folder, DEVICE, 7)
    assert expected.keys() == found.keys()
    for name, image in expected.items():
        difference = np.abs(image.astype(int) - found[name].astype(int))
        assert difference.max() <= 2, name
        assert difference.mean() < 0.1, name


def test_slots_are_found_by_trying(tiny_diffusion):
    engine = Engine(
        load_generator(str(tiny_diffusion), "bfloat16", DEVICE),
        num_inference_steps=20,
        guidance_scale=7.5,
        slots=1,
    )
    engine.fit_slots(32, 32)
    assert engine.rows > 2


def test_low_rank_weights_train(tiny_diffusion, tmp_path):
    model = load_generator(str(tiny_diffusion), "bfloat16", DEVICE)
    settings = AdapterSettings(rank=2, steps=3, learning_rate=1e-2, batch_size=2)
    assert train_adapter(model, make_images(), settings, tmp_path / "a.safetensors").exists()
