"""Benchmarks for GPUs run with tiny networks on the CPU, and what they compare is equal."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sdxl(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sdxl")


@pytest.mark.slow
def test_sdxl_in_small(
    sdxl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sdxl.py", "--smoke", "--json", str(tmp_path / "sdxl.json")])
    monkeypatch.setattr(sdxl, "score_seconds", lambda *_: 0.0)
    sdxl.main()
    found = json.loads((tmp_path / "sdxl.json").read_text())
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert (
        found["settings"]["smoke"] and figures["difference from diffusers' latents, float32"]["met"]
    )
    assert figures["plain: images/s"]["value"] > 0 and "plain: images/s" in capsys.readouterr().out


def test_no_speed_is_measured_of_an_engine_that_makes_something_else(
    sdxl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sdxl.py", "--smoke"])
    denoise = sdxl.Engine.denoise
    monkeypatch.setattr(
        sdxl.Engine,
        "denoise",
        lambda *given: ((request, 1.01 * latents) for request, latents in denoise(*given)),
    )
    with pytest.raises(SystemExit, match="latents differ from diffusers' by"):
        sdxl.main()
