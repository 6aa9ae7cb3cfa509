"""Work on many rows by threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")

BLOCK = 16
"""Rows per task of a thread."""
AHEAD = 2 * (os.cpu_count() or 1)
"""Maximum number of submitted blocks without a consumed result.

`Executor.map` would submit all rows before it yields the first.
"""


def map_rows(pool: Executor, work: Callable[[int], T], count: int) -> Iterator[T]:
    """Yields `work(row)` for the rows 0 to `count` − 1, in order; its errors come in order too."""

    def carry_out(first: int) -> tuple[list[T], Exception | None]:
        made: list[T] = []
        try:
            for row in range(first, min(first + BLOCK, count)):
                made.append(work(row))
        except Exception as error:
            return made, error
        return made, None

    waiting: deque[Future[tuple[list[T], Exception | None]]] = deque()
    blocks = iter(range(0, count, BLOCK))
    while True:
        while len(waiting) < AHEAD and (first := next(blocks, None)) is not None:
            waiting.append(pool.submit(carry_out, first))
        if not waiting:
            return
        made, error = waiting.popleft().result()
        yield from made
        if error is not None:
            for each in waiting:
                each.cancel()
            raise error
