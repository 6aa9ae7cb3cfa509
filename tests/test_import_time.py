"""What a command line loads: the package, help and lists come without torch, in little time."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = {"torch", "datasets", "pyarrow", "pydantic", "transformers", "diffusers", "pandas"}


def processor_seconds(*words: str) -> float:
    """Seconds of processor time of a command, the least of three."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (("-c", "import discl"), 0.3),
        (("-m", "discl.cli", "--help"), 0.5),
        (("-m", "discl.cli", "recipes"), 0.5),
        (("-m", "discl.cli", "--version"), 0.5),
    ],
)
def test_what_a_command_takes(words: tuple[str, ...], most: float) -> None:
    assert processor_seconds(*words) < most


@pytest.mark.parametrize("code", ["import discl", "import discl.cli", "import discl.assets"])
def test_nothing_heavy_is_loaded(code: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert not HEAVY & set(told.stdout.split())
