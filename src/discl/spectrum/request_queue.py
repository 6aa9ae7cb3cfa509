"""Requests and sources that wait for a slot."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, DataError, arguments_named
from ..levels import REAL, check_level, check_levels, format_level
from .plan import Request

if TYPE_CHECKING:
    from .engine import Engine

LoadPixels = Callable[[str], np.ndarray]
"""uint8 `[height, width, 3]` of a source, in the size of its requests."""


def checked(load_pixels: LoadPixels, height: int, width: int) -> LoadPixels:
    """`load_pixels`, which raises DataError for anything but pixels of that shape."""

    def load(source: str) -> np.ndarray:
        pixels = load_pixels(source)
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.dtype != np.uint8
            or pixels.shape != (height, width, 3)
        ):
            got = (
                f"{pixels.dtype} {list(pixels.shape)}"
                if isinstance(pixels, np.ndarray)
                else f"of the type {type(pixels).__name__}"
            )
            raise DataError(
                f"the pixels of source '{source}' are {got}; a numpy array uint8 "
                f"{[height, width, 3]} is needed: discl.to_size(image, {width}, {height}) makes it "
                "of a PIL image."
            )
        return pixels

    return load


def check_takes_steps(
    level: int, spans: Mapping[int, range], num_inference_steps: int, fixed: bool
) -> None:
    """Raises RecipeError for an invalid level or one without a denoising step.

    Raises CheckpointError for a level that the generator's schedule lacks.
    """
    if level in spans:
        return
    if check_level(level) == REAL or not fixed:
        with arguments_named(levels="requests"):
            check_levels([level], num_inference_steps)
    raise CheckpointError(
        f"this generator's schedule of {num_inference_steps} steps has none for level "
        f"{format_level(level)}; use a lower level."
    )


class RequestQueue:
    """Requests that wait for a slot, the longest first, with the latents of their sources.

    It looks ahead over a bounded number of requests, so a plan of any length takes constant memory.

    - `requests`: of one shape.
    - `engine`: encodes texts and sources, and counts them.
    - `spans`: the steps of each level.
    - `load_pixels`: uint8 pixels of a source.
    - `shape`: (height, width) of the images in pixels.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        engine: Engine,
        spans: Mapping[int, range],
        load_pixels: LoadPixels,
        shape: tuple[int, int],
    ) -> None:
        self.shape = shape
        self.incoming = iter(requests)
        self.engine, self.spans, self.load_pixels = engine, spans, load_pixels
        self.heap: list[tuple[int, int, Request]] = []
        self.latents: dict[str, Tensor] = {}
        self.users: Counter[str] = Counter()
        # source of the last request in sight, which the next ones may share
        self.newest: str | None = None
        self.taken = 0
        self.exhausted = False

    def pop(self) -> tuple[Request, Tensor | None] | None:
        """The longest request in sight with its clean latents; None when no request is left.

        The latents of a request at level 0 are None.
        """
        if not self.exhausted and len(self.heap) <= self.engine.lookahead // 2:
            self._look_ahead()
        if not self.heap:
            return None
        _, _, request = heapq.heappop(self.heap)
        clean = None
        if request.level > 0:
            clean = self.latents[request.source_id]
            self.users[request.source_id] -= 1
            self._release(request.source_id)
        return request, clean

    def _release(self, source: str | None) -> None:
        """Drops the latents of a source that no request in sight and none of the next may need."""
        if source is not None and source != self.newest and not self.users[source]:
            del self.users[source]
            self.latents.pop(source, None)

    def _look_ahead(self) -> None:
        new: list[Request] = []
        while len(self.heap) + len(new) < self.engine.lookahead:
            request = next(self.incoming, None)
            if request is None:
                self.exhausted = True
                break
            check_takes_steps(
                request.level, self.spans, self.engine.num_inference_steps, self.engine.fixed
            )
            new.append(request)
        self.engine.texts.encode(text for request in new for text in self.engine.texts_of(request))
        sources = dict.fromkeys(request.source_id for request in new if request.level > 0)
        before, self.newest = self.newest, new[-1].source_id if new else None
        self.users.update(request.source_id for request in new if request.level > 0)
        self._release(before)
        self._encode([source for source in sources if source not in self.latents])
        for request in new:
            heapq.heappush(self.heap, (-len(self.spans[request.level]), self.taken, request))
            self.taken += 1
        self.engine.texts.trim(
            {text for _, _, request in self.heap for text in self.engine.texts_of(request)}
        )

    def _encode(self, sources: list[str]) -> None:
        engine = self.engine
        height, width = self.shape
        size = engine.vae_batch_for(height, width)
        for first in range(0, len(sources), size):
            part = sources[first : first + size]
            pixels = (
                torch.from_numpy(np.stack([self.load_pixels(source) for source in part]))
                .permute(0, 3, 1, 2)
                .contiguous()
                .float()
                / 127.5
                - 1
            )
            for source, latents in zip(part, engine.encode(pixels), strict=True):
                self.latents[source] = latents.clone()
            engine.work.vae_encodes += len(part)
