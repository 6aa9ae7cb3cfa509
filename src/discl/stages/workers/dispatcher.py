"""Hands pieces of a plan to workers; takes back those of dead ones."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby

from ...spectrum.plan import Request

PIECES = 8
"""Pieces per worker, at least, if there are enough sources: a short wait for the last one."""
LARGEST = 512
"""Requests of a piece, at most, beside those of its last source."""


class Dispatcher:
    """Hands out pieces of a plan, whole sources each, and knows which worker holds what.

    A worker calls `take` for one piece after the other. If there is none, it finishes what it has
    and calls `take` with `written=True`: there may be work again, because a worker that dies gives
    back what it had not written (`lost`). Any thread may call.
    """

    def __init__(self, workers: int) -> None:
        self.workers = max(workers, 1)
        self.waiting: deque[list[Request]] = deque()
        self.taken: dict[str, dict[str, Request]] = {}
        self.denoised, self.stopped = 0, False
        self.lock = threading.Lock()

    def plan(self, requests: Sequence[Request]) -> None:
        """Adds requests, in pieces small enough for an even end; sort them by shape."""
        with self.lock:
            self.waiting.extend(cut(requests, min(LARGEST, self.even(len(requests)))))

    def even(self, planned: int) -> int:
        """Returns how many requests a worker may hold so that all end at about the same time."""
        return max(planned // (PIECES * self.workers), 1)

    def take(self, worker: str, written: bool) -> list[Request] | None:
        """Returns the next piece, empty if there is none at the moment, None if the worker may end.

        - `written`: whether the worker has written all that it took before.
        """
        with self.lock:
            held = self.taken.setdefault(worker, {})
            if written:
                held.clear()
            if self.stopped:
                return None
            piece = self.waiting.popleft() if self.waiting else []
            held.update((request.id, request) for request in piece)
            return piece

    def advance(self, count: int = 1) -> bool:
        """Counts denoised images, which are not written yet; returns whether to go on."""
        with self.lock:
            self.denoised += count
            return not self.stopped

    def known(self) -> set[str]:
        """Returns the workers that have taken something."""
        with self.lock:
            return set(self.taken)

    def held(self, worker: str) -> set[str]:
        """Returns the ids of what a worker has taken and not reported as written."""
        with self.lock:
            return set(self.taken.get(worker, ()))

    def lost(self, worker: str, written: Collection[str]) -> int:
        """Takes back from a dead worker what is not among the ids `written`; returns the number.

        It is handed out next, in pieces as large as those that wait, or divided evenly if none do.
        """
        with self.lock:
            held = self.taken.pop(worker, {})
            rest = [request for name, request in held.items() if name not in written]
            size = max(map(len, self.waiting), default=len(rest) // self.workers)
            self.waiting.extendleft(reversed(list(cut(rest, max(size, 1)))))
            return len(rest)

    def stop(self) -> None:
        """Stops the workers after the image at hand; nothing more is handed out."""
        with self.lock:
            self.stopped = True

    def progress(self) -> tuple[int, bool]:
        """Returns (images denoised, whether everything is written)."""
        with self.lock:
            return self.denoised, not self.waiting and not any(self.taken.values())


def cut(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """Yields pieces of at least `size` requests of one shape.

    Requests of a source that follow one another stay in one piece.
    """
    for _, alike in groupby(requests, lambda request: (request.width, request.height)):
        piece: list[Request] = []
        for _, source in groupby(alike, lambda request: request.source_id):
            piece += source
            if len(piece) >= size:
                yield piece
                piece = []
        if piece:
            yield piece
