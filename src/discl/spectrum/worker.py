"""One device: sources read ahead, images encoded, scored and written beside denoising.

Only the network's calls wait for one another. Sources are read ahead of them in one thread; pictures are encoded in others, and
one more scores and writes what is finished. Everything between them is bounded, so a plan of any length takes constant memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Any

import numpy as np

from ..data import decode_image
from ..errors import StoreError
from .clip_filter import ClipScorer
from .diffusers_engine import PlainEngine
from .encoding import encode_image
from .engine import Engine
from .plan import Request, Sampling
from .request_queue import LoadPixels
from .store import Shards

WAITING = 64
"""Pictures, at most, that are denoised and not yet encoded."""
PATIENCE = 60.0
"""Seconds after which a picture is written though its shard is not full."""
AHEAD = 256
"""Requests whose sources are read before the engine asks for them."""


class Worker:
    """Generates, encodes, scores and writes requests with one engine.

    Scores are those of the stored image, decoded from its bytes. `engine.work`, `scored`,
    `sources_read` and `waited` (seconds) count the work.

    - `engine`: generates the images.
    - `images`: store of the images.
    - `sampling`: settings that are stored with each image.
    - `scorer`, `scores`: CLIP and store of the scores; both or neither.
    - `shard_rows`: rows of a Parquet file, 1 or more.

    Raises TypeError for a scorer without a store, or the reverse.

    ```python
    from PIL import Image

    import discl

    address = "embedded:fashion-mnist/diffusion"
    generator = discl.describe_generator(address)
    sampling = discl.Sampling(generator.model, generator.scheduler, 4, 3.0, 32, "float32", "webp")
    engine = discl.Engine(discl.load_generator(address), num_inference_steps=4, guidance_scale=3.0)
    source = {"id": "photos/Bag/000.png", "digest": "0123", "label": 0}
    plan = discl.plan_requests(
        [source], [0, 50], 1, {0: ["a photo of a bag"]}, negative_prompt="", sampling=sampling
    )
    store = discl.spectrum_shards("shards", ["Bag"])
    worker = discl.Worker(engine, store, sampling)
    worker.make(
        plan,
        lambda source: discl.to_square(Image.open(source).convert("RGB"), 32),
        sizes={source["id"]: (28, 28)},
    )
    assert store.ids() == {request.id for request in plan}
    ```
    """

    def __init__(
        self,
        engine: Engine | PlainEngine,
        images: Shards,
        sampling: Sampling,
        *,
        scorer: ClipScorer | None = None,
        scores: Shards | None = None,
        shard_rows: int = 512,
    ) -> None:
        if (scorer is None) != (scores is None):
            raise TypeError("a worker takes a scorer and a store of scores, or neither.")
        self.engine, self.images, self.sampling, self.shard_rows = (
            engine,
            images,
            sampling,
            shard_rows,
        )
        self.scorer, self.scores = scorer, scores
        self.scored = self.sources_read = 0
        self.waited = 0.0
        self.ahead = AHEAD

    def look_ahead(self, requests: int) -> None:
        """Takes about this many requests at most before the slots need them, though always enough for two calls."""
        self.ahead = min(self.ahead, requests)
        if isinstance(self.engine, Engine):
            self.engine.lookahead = min(self.engine.lookahead, max(requests, 2 * self.engine.slots))

    def make(
        self,
        requests: Iterable[Request],
        load_pixels: LoadPixels,
        sizes: Mapping[str, tuple[int, int]],
        finished: Callable[[Request], None] = lambda request: None,
    ) -> None:
        """Makes the requests and returns when all are written; `finished` is called for each, in this thread, once it is denoised.

        `load_pixels` is as in `Engine.generate`, called in a thread of its own; `sizes` maps a source to its own (width, height) in
        pixels, which are kept in the row. Sort requests by shape, those of a source together. What stops it, an error of
        `load_pixels`, of the engine or StoreError of a disk that refuses, is raised here, after the pictures that were finished
        are written as far as the disk takes them; where scoring fails they are written without scores. A killed process loses what is
        in the engine's slots, up to WAITING pictures and one unfinished shard, of which no picture is older than PATIENCE.
        """
        with _Sources(self, requests, load_pixels) as sources, _Output(self, sizes) as output:
            for request, picture in self.engine.generate(sources.requests(), sources.load):
                output.put(request, picture)
                finished(request)


class _Sources:
    """Requests on their way to the engine, the pixels of their sources read meanwhile."""

    def __init__(
        self, worker: Worker, requests: Iterable[Request], load_pixels: LoadPixels
    ) -> None:
        self.worker, self.incoming, self.load_pixels = worker, iter(requests), load_pixels
        self.reader = ThreadPoolExecutor(1, "sources")
        self.waiting: dict[str, Future[np.ndarray]] = {}
        self.recent: OrderedDict[str, None] = (
            OrderedDict()
        )  # read lately: the engine holds their latents, or asks for them again

    def requests(self) -> Iterator[Request]:
        """The requests, each some time after its source was ordered."""
        ahead: deque[Request] = deque()
        for request in self.incoming:
            if request.level > 0 and request.source_id not in self.recent:
                self.waiting[request.source_id] = self._read(request.source_id)
            ahead.append(request)
            if len(ahead) > self.worker.ahead:
                yield ahead.popleft()
        yield from ahead

    def load(self, source: str) -> np.ndarray:
        """The pixels of a source, as soon as they are there."""
        reading = self.waiting.pop(source, None) or self._read(source)
        started = time.perf_counter()
        try:
            return reading.result()
        finally:
            self.worker.waited += time.perf_counter() - started

    def _read(self, source: str) -> Future[np.ndarray]:
        self.worker.sources_read += 1
        self.recent[source] = None
        self.recent.move_to_end(source)
        while len(self.recent) > 4 * AHEAD:
            oldest, _ = self.recent.popitem(last=False)
            self.waiting.pop(oldest, None)
        return self.reader.submit(self.load_pixels, source)

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.shutdown(cancel_futures=True)


class _Output:
    """Finished pictures on their way to the disk: encoded by several threads, scored and written by one."""

    def __init__(self, worker: Worker, sizes: Mapping[str, tuple[int, int]]) -> None:
        self.worker, self.sizes = worker, sizes
        self.settings = {
            name: value for name, value in asdict(worker.sampling).items() if name != "size"
        }
        self.encoders = ThreadPoolExecutor(min(max((os.cpu_count() or 2) - 1, 2), 8), "encode")
        self.queue: Queue[tuple[Request, Future[bytes]] | None] = Queue(WAITING)
        self.error: BaseException | None = None
        self.rows: list[dict[str, Any]] = []  # of the next shard
        self.unscored: list[dict[str, Any]] = []
        self.scores: list[dict[str, Any]] = []
        self.due = 0.0  # when that shard is written at the latest
        self.writer = threading.Thread(target=self._drain, name="write", daemon=True)

    def put(self, request: Request, picture: np.ndarray) -> None:
        """Hands on a finished picture; waits while WAITING others are before it. Raises what stopped the writer."""
        self._hand_on(
            (request, self.encoders.submit(encode_image, picture, self.worker.sampling.encoding))
        )
        if self.error is not None:
            raise self.error

    def _hand_on(self, item: tuple[Request, Future[bytes]] | None) -> None:
        started = time.perf_counter()
        while self.writer.is_alive():
            try:
                self.queue.put(item, timeout=0.1)
                break
            except Full:
                continue
        self.worker.waited += time.perf_counter() - started

    def _drain(self) -> None:
        try:
            while self._take():
                pass
        except BaseException as error:  # handed to the thread that called
            self.error = self.error or error
            with suppress(StoreError):
                self._write()

    def _take(self) -> bool:
        """Waits for a picture or the time to write; whether there is more to come."""
        try:
            item = self.queue.get(
                timeout=max(self.due - time.monotonic(), 0) if self.rows else None
            )
        except Empty:
            self._write()
            return True
        if item is None:
            self._write()
            return False
        request, encoded = item
        row = self._row(request, encoded.result())
        if not self.rows:
            self.due = time.monotonic() + PATIENCE
        self.rows.append(row)
        self.unscored.append(row)
        if self.worker.scorer and len(self.unscored) >= self.worker.scorer.batch:
            self._score()
        if len(self.rows) >= self.worker.shard_rows or time.monotonic() >= self.due:
            self._write()
        return True

    def _write(self) -> None:
        """Scores what has no score yet, and writes one shard of pictures and one of scores."""
        self._score()
        rows, self.rows, scores, self.scores = self.rows, [], self.scores, []
        self.worker.images.append(rows)
        if self.worker.scores is not None:
            self.worker.scores.append(scores)

    def _score(self) -> None:
        """Scores what has no score yet. Where that fails the calling thread is told, and pictures are written without scores."""
        scorer, rows, self.unscored = self.worker.scorer, self.unscored, []
        if scorer is None or not rows or self.error is not None:
            return
        try:
            cosines = scorer(
                [decode_image(row["image"]) for row in rows], [row["label"] for row in rows]
            )
        except BaseException as error:
            self.error = error
            return
        self.worker.scored += len(rows)
        self.scores += [
            {"id": row["id"], "scorer": scorer.id, "clip_similarity": float(cosine)}
            for row, cosine in zip(rows, cosines, strict=True)
        ]

    def _row(self, request: Request, encoded: bytes) -> dict[str, Any]:
        width, height = self.sizes[request.source_id]
        image = {"bytes": encoded, "path": None}
        return {
            **asdict(request),
            **self.settings,
            "source_width": width,
            "source_height": height,
            "image": image,
        }

    def __enter__(self) -> _Output:
        self.writer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hand_on(None)
        self.writer.join()
        self.encoders.shutdown(cancel_futures=True)
        if kind is None and self.error is not None:
            raise self.error
