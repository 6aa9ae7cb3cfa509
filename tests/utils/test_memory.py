"""Freed memory is kept for the next tensor, in processes of our own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import discl

COUNT = """
import resource
from discl.cli import program

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def app():
    faults()
    print(by_default, faults())

by_default, program.app = faults(), app
program.main()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_the_pages_of_freed_memory_are_filled_once() -> None:
    settings = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    settings["PYTHONPATH"] = str(Path(discl.__file__).parents[1])
    told = subprocess.run(
        [sys.executable, "-c", COUNT], env=settings, capture_output=True, text=True, check=True
    )
    by_default, kept = map(int, told.stdout.split())
    assert kept < 10 < by_default
