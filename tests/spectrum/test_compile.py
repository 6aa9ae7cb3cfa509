"""torch.compile of network and decoder: one graph each, the same images, harmless failures."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from discl.pipeline import run_until
from discl.recipe import load_recipe
from discl.run_folder.open import open_run
from discl.spectrum.engine import Engine
from discl.spectrum.models import load_generator
from discl.spectrum.models.stable_diffusion import StableDiffusion

from .test_engine import load_pixels, make_requests


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(tiny_diffusion: Path) -> StableDiffusion:
    return load_generator(str(tiny_diffusion))  # type: ignore[return-value]


@pytest.fixture
def counter() -> Any:
    """A compiler that counts graphs. Its package takes seconds to load, so not at collection."""
    from torch._dynamo.testing import CompileCounter

    return CompileCounter()


def make(model: StableDiffusion, backend: Any = None) -> dict[str, np.ndarray]:
    engine = Engine(
        model, num_inference_steps=5, guidance_scale=7.5, slots=4, guidance_interval=(0.3, 1.0)
    )
    if backend is not None:
        engine.compile(32, 32, backend)
    return {
        request.id: picture
        for request, picture in engine.generate(make_requests(3, (0, 40, 60)), load_pixels)
    }


@pytest.mark.slow
def test_a_run_is_a_graph_of_each_network(model: StableDiffusion, counter: Any) -> None:
    plain = make(model)
    compiled = make(model, counter)
    assert counter.frame_count == 2 and counter.op_count > 50
    assert all(
        np.abs(compiled[name].astype(int) - plain[name].astype(int)).max() <= 1 for name in plain
    )


@pytest.mark.slow
def test_a_compiler_that_fails_leaves_the_network_as_it_was(model: StableDiffusion) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no such compiler")

    plain = make(model)
    with pytest.raises(Exception, match="no such compiler"):
        make(model, broken)
    assert all(np.array_equal(picture, plain[name]) for name, picture in make(model).items())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.slow
def test_a_run_may_ask_for_it(
    fails: bool,
    counter: Any,
    filtered_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no such compiler")

    patched = functools.partialmethod(Engine.compile, backend=broken if fails else counter)
    monkeypatch.setattr(Engine, "compile", patched)
    recipe = load_recipe(
        filtered_run / "recipe.yaml", {"runtime.compile": True, "spectrum.seeds": 1}
    )
    run_until(open_run(recipe, tmp_path / "run"), "generate")
    assert counter.frame_count == (0 if fails else 2)
    assert ("torch.compile failed" in capfd.readouterr().err) == fails
    made = {
        name
        for shard in (tmp_path / "run").glob("spectrum/*.parquet")
        for name in pq.read_table(shard)["id"].to_pylist()
    }
    assert (
        made < set(pq.read_table(filtered_run / "plan.parquet")["id"].to_pylist())
        and len(made) == 16
    )
