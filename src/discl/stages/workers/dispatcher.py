"""Hands pieces of a plan to workers; takes back those of dead ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby

from ...spectrum.plan import Request

PIECES = 8
"""Pieces that each worker takes, at least, where there are sources enough; so that none waits long for the last one."""


class Dispatcher:
    """Hands out pieces of a plan, whole sources each, and knows who has which.

    A worker asks with `take` for a piece after the other. When there is none it finishes what it has, and asks again as `idle`:
    there may be work again, for one that dies gives back what it had not written (`lost`). One thread at a time may call.
    """

    def __init__(self, workers: int) -> None:
        self.workers = max(workers, 1)
        self.waiting: deque[list[Request]] = deque()
        self.taken: dict[str, dict[str, Request]] = {}
        self.denoised, self.stopped = 0, False

    def plan(self, requests: Sequence[Request], most: int = 512) -> None:
        """More to make, the requests of a shape together: in pieces of about `most` requests, or fewer for an even end."""
        self.waiting.extend(cut(requests, min(most, self.even(len(requests)))))

    def even(self, planned: int) -> int:
        """Requests that a worker may have in store so that none ends long before the others."""
        return max(planned // (PIECES * self.workers), 1)

    def take(self, worker: str, idle: bool) -> list[Request] | None:
        """The next piece, empty when there is none for now; None when the worker may go. `idle`: it has written all that it had."""
        had = self.taken.setdefault(worker, {})
        if idle:
            had.clear()
        if self.stopped:
            return None
        piece = self.waiting.popleft() if self.waiting else []
        had.update((request.id, request) for request in piece)
        return piece

    def advance(self, count: int = 1) -> bool:
        """Counts images that were denoised, though they are not written yet; whether to go on."""
        self.denoised += count
        return not self.stopped

    def known(self) -> set[str]:
        """Workers that have asked for something."""
        return set(self.taken)

    def held(self, worker: str) -> set[str]:
        """Ids of what a worker has taken and has not said to be written."""
        return set(self.taken.get(worker, ()))

    def lost(self, worker: str, written: Collection[str]) -> int:
        """Takes back from a dead worker what is not among the ids `written`, to be handed out next; returns how many those are."""
        rest = [
            request for name, request in self.taken.pop(worker, {}).items() if name not in written
        ]
        size = max(map(len, self.waiting), default=len(rest) // self.workers)
        self.waiting.extendleft(reversed(list(cut(rest, max(size, 1)))))
        return len(rest)

    def stop(self) -> None:
        """Nothing more is handed out, and workers end after the image at hand."""
        self.stopped = True

    def progress(self) -> tuple[int, bool]:
        """(images denoised, whether everything is written)."""
        return self.denoised, not self.waiting and not any(self.taken.values())


def cut(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """Pieces of at least `size` requests of one shape, a source never divided as long as its requests follow one another."""
    for _, alike in groupby(requests, lambda request: (request.width, request.height)):
        piece: list[Request] = []
        for _, source in groupby(alike, lambda request: request.source_id):
            piece += source
            if len(piece) >= size:
                yield piece
                piece = []
        if piece:
            yield piece
