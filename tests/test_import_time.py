"""Importing the package, help pages and lists load no heavy package and take little time."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = {"torch", "datasets", "pyarrow", "pydantic", "transformers", "diffusers", "pandas"}


def processor_seconds(*words: str) -> float:
    """Processor time of a command in seconds, the minimum of three runs."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (("-c", "import discl"), 0.3),
        (("-m", "discl.cli", "--help"), 0.5),
        (("-m", "discl.cli", "recipes"), 0.5),
        (("-m", "discl.cli", "--version"), 0.5),
    ],
)
def test_light_commands_are_quick(words: tuple[str, ...], limit: float) -> None:
    assert processor_seconds(*words) < limit


@pytest.mark.parametrize("code", ["import discl", "import discl.cli", "import discl.assets"])
def test_nothing_heavy_is_loaded(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert not HEAVY & set(done.stdout.split())
