"""Parts of `gpu.py` that check: what tests/spectrum/test_gpu.py asks, without its data libraries.

Then the tests themselves, where pytest and what they import are installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sdxl
from discl.spectrum.engine import Engine
from discl.spectrum.models import load_generator
from figures import Figure
from gpu_bench import Bench

GENERATOR = "embedded:fashion-mnist/diffusion"
ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/spectrum/test_gpu.py",
    "tests/training/test_image_cache.py",
    "tests/test_gpu_scripts.py",
)
NEEDED = ("pytest", "datasets", "pyarrow", "pandas")


def generate(model: Any, slots: int, steps: int) -> dict[str, np.ndarray]:
    """`{id: uint8 image}` of a small plan over all levels."""
    engine = Engine(model, num_inference_steps=steps, guidance_scale=7.5, slots=slots)
    requests = sdxl.make_requests(1, steps, model.size)
    made = engine.generate(requests, lambda source: sdxl.pixels_of(source, model.size))
    return {request.id: image.astype(int) for request, image in made}


def checks(bench: Bench) -> Iterator[Figure]:
    """Images of the device against those of the CPU in float32, with another number of slots.

    TF32 is off, because torch has it on for convolutions.
    """
    torch.backends.cudnn.allow_tf32 = False
    steps = 10 if bench.smoke else 20
    families = {
        "a tiny SDXL": lambda device: sdxl.build(sdxl.TINY, device, torch.float32, "cpu"),
        "the embedded generator": lambda device: load_generator(GENERATOR, "float32", device),
    }
    for name, build in list(families.items())[: 1 if bench.smoke else 2]:
        expected, found = generate(build("cpu"), 4, steps), generate(build(bench.device), 7, steps)
        apart = [np.abs(image - found[key]) for key, image in expected.items()]
        most, mean = max(each.max() for each in apart), max(each.mean() for each in apart)
        yield Figure(f"grey levels between CPU and device, {name}: most", float(most), "<=", 2)
        yield Figure(f"grey levels between CPU and device, {name}: mean", float(mean), "<=", 0.1)
    engine = Engine(
        load_generator(GENERATOR, "float32" if bench.smoke else "bfloat16", bench.device),
        num_inference_steps=steps,
        guidance_scale=7.5,
        slots=1,
    )
    yield Figure("slots found for 32 pixels", engine.fit_slots(32, 32), ">=", 2)


def adapter(bench: Bench) -> Iterator[Figure]:
    """Low-rank weights train on the device; needs peft."""
    from discl.spectrum.adaptation import AdapterImages, AdapterSettings, train_adapter

    def load(row: int) -> np.ndarray:
        return np.random.default_rng(row).integers(0, 200, (32, 32, 3), dtype=np.uint8)

    images = AdapterImages(load, np.arange(6) % 2, [["a photo of a bag"]] * 6)
    settings = AdapterSettings(rank=2, steps=3, learning_rate=1e-2, batch_size=2)
    dtype = "float32" if bench.smoke else "bfloat16"
    model = load_generator(GENERATOR, dtype, bench.device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = train_adapter(model, images, settings, Path(folder) / "a.safetensors")
        size = file.stat().st_size
    yield Figure("low-rank weights: bytes written", size, ">=", 1)
    yield Figure("low-rank weights: seconds of 3 steps", time.perf_counter() - started)


def tests(bench: Bench) -> Iterator[Figure]:
    """`pytest -m gpu`; 0 failures."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing or bench.smoke:
        raise RuntimeError(f"not run: {', '.join(missing) or 'they'} need more than this machine")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    told = (done.stdout + done.stderr)[-1500:]
    yield Figure("pytest -m gpu: exit status", done.returncode, "<=", 0, told)
