"""One device: sources read ahead, images encoded, scored and written beside denoising.

Only the network's calls wait for one another. One thread reads sources ahead of them. Others encode
images, and one more scores and writes them. All queues are bounded, so a plan of any length takes
constant memory.
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
from typing import Any

import numpy as np

from ..data import decode_image
from ..errors import StoreError
from .clip_filter import ClipScorer
from .diffusers_engine import PlainEngine
from .early_rejection import Inspector
from .encoding import encode_image
from .engine import Engine
from .plan import Request, Sampling
from .request_queue import LoadPixels
from .store import Shards

WAITING = 64
"""Maximum number of images that are denoised and not yet written."""
PATIENCE = 60.0
"""Seconds after which an image is written although its shard is not full."""
AHEAD = 256
"""Requests whose sources are read before the engine needs them."""


class Worker:
    """Generates, encodes, scores and writes requests with one engine.

    Scores are those of the stored image, decoded from its bytes. `engine.work`, `scored`,
    `sources_read` and `waited` (seconds) count the work.

    - `engine`: generates the images.
    - `images`: store of the images.
    - `sampling`: settings that are stored with each image.
    - `scorer`, `scores`: CLIP and store of the scores; both or neither.
    - `looks`: store of what the engine's inspector sees, if it has one.
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
        looks: Shards | None = None,
        shard_rows: int = 512,
    ) -> None:
        if (scorer is None) != (scores is None):
            raise TypeError("a worker takes a scorer and a store of scores, or neither of them.")
        self.engine, self.images, self.sampling = engine, images, sampling
        self.shard_rows = shard_rows
        self.scorer, self.scores, self.looks = scorer, scores, looks
        self.scored = self.sources_read = 0
        self.waited = 0.0
        self.ahead = AHEAD

    def look_ahead(self, requests: int) -> None:
        """Limits the requests that are taken ahead of the slots; at least two calls' worth."""
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
        """Makes the requests and returns when all are written.

        - `requests`: sorted by shape, those of a source together.
        - `load_pixels`: as in `Engine.generate`; called in a thread.
        - `sizes`: (width, height) in pixels of each source image, stored with its images.
        - `finished`: called in this thread for each request that is denoised, or dropped on the
          way.

        Raises errors of `load_pixels` and of the engine, and StoreError for a disk that refuses.
        Images that were finished before are written first, without scores where scoring fails. A
        killed process loses what is in the engine's slots, up to WAITING images and one unfinished
        shard, whose images are younger than PATIENCE.
        """
        inspector = self.inspector
        if inspector is not None:
            inspector.reload()
        with _Sources(self, requests, load_pixels) as sources, _Output(self, sizes) as output:
            for request, pixels in self.engine.generate(sources.requests(), sources.load):
                output.put(request, pixels)
                finished(request)
                self._count_dropped(finished)
            self._count_dropped(finished)

    @property
    def inspector(self) -> Inspector | None:
        """Looks at the engine's images on the way; None if nobody does."""
        return self.engine.inspector if isinstance(self.engine, Engine) else None

    def _count_dropped(self, finished: Callable[[Request], None]) -> None:
        while self.inspector is not None and self.inspector.dropped:
            finished(self.inspector.dropped.popleft())


class _Sources:
    """Requests on their way to the engine while the pixels of their sources are read."""

    def __init__(
        self, worker: Worker, requests: Iterable[Request], load_pixels: LoadPixels
    ) -> None:
        self.worker, self.incoming, self.load_pixels = worker, iter(requests), load_pixels
        self.reader = ThreadPoolExecutor(1, "sources")
        self.waiting: dict[str, Future[np.ndarray]] = {}
        # read lately: the engine has their latents, or loads them again
        self.recent: OrderedDict[str, None] = OrderedDict()

    def requests(self) -> Iterator[Request]:
        """The requests, each some time after reading its source began."""
        ahead: deque[Request] = deque()
        for request in self.incoming:
            if request.level > 0 and request.source_id not in self.recent:
                self.waiting[request.source_id] = self._read(request.source_id)
            ahead.append(request)
            if len(ahead) > self.worker.ahead:
                yield ahead.popleft()
        yield from ahead

    def load(self, source: str) -> np.ndarray:
        """The pixels of a source, once they are read."""
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
    """Finished images on their way to disk: several threads encode, one scores and writes."""

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
        self.due = 0.0  # the latest time at which that shard is written
        self.writer = threading.Thread(target=self._drain, name="write", daemon=True)

    def put(self, request: Request, pixels: np.ndarray) -> None:
        """Queues a finished image; waits for room. Raises the error that stopped the writer."""
        self._enqueue(
            (request, self.encoders.submit(encode_image, pixels, self.worker.sampling.encoding))
        )
        if self.error is not None:
            raise self.error

    def _enqueue(self, item: tuple[Request, Future[bytes]] | None) -> None:
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
        except BaseException as error:  # raised in the calling thread
            self.error = self.error or error
            with suppress(StoreError):
                self._write()

    def _take(self) -> bool:
        """Waits for an image or the time to write. Returns whether more images follow."""
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
        """Writes one shard of images and one of scores."""
        self._score()
        rows, self.rows, scores, self.scores = self.rows, [], self.scores, []
        if self.worker.looks is not None and self.worker.inspector is not None:
            seen = self.worker.inspector.rows  # before the images: an image has all its looks
            self.worker.looks.append([seen.popleft() for _ in range(len(seen))])
        self.worker.images.append(rows)
        if self.worker.scores is not None:
            self.worker.scores.append(scores)

    def _score(self) -> None:
        """Scores images without a score. Errors are raised in the calling thread, after writing."""
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._enqueue(None)
        self.writer.join()
        self.encoders.shutdown(cancel_futures=True)
        if kind is None and self.error is not None:
            raise self.error
