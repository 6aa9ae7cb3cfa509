"""Memory that Python has freed: the C library can keep it for the next tensor."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of parameters of `mallopt` (malloc.h of glibc)."""
KEPT = 128 << 20
"""Blocks below this size, in bytes, come from the heap; twice as much of it may lie idle."""


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, up to 256 MiB; elsewhere it does nothing.

    By default every large tensor is a new mapping, and the system fills its pages with zeros
    again. The setting holds for the whole process, so only processes of our own call it.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, KEPT)
        mallopt(TRIM_THRESHOLD, 2 * KEPT)
