"""Decoded images, in memory or by worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import Unreadable, decode_image, to_square, to_whole
from ..errors import DataError
from ..utils.ordered_map import map_rows

MEMORY_LIMIT = 2 * 1024**3

T = TypeVar("T")
S = TypeVar("S")


class ImageCache(Dataset):
    """The images of some tables as uint8 squares `[3, size, size]`, in order.

    Up to 2 GB of squares are decoded once and kept. Beyond that each is decoded when it is read.

    - `tables`: an `ImageTable`, which may read files, or rows that hold `image` as {bytes, path},
      such as an undecoded Hugging Face data set. Of the latter only bytes are decoded.
    - `size`: the shorter side of a picture is resized to it, and the centre is cropped.
    - `on_progress`: gets the number of images decoded since its last call.
    - `aspects`: width / height of every picture, float `[images]`. A square is then the whole
      picture, squeezed. `augmentation.crop_whole` crops it in its own aspect.
    """

    def __init__(
        self,
        tables: Sequence[Any],
        size: int,
        on_progress: Callable[[int], None] = lambda count: None,
        aspects: np.ndarray | None = None,
    ) -> None:
        self.tables, self.size, self.aspects = list(tables), size, aspects
        self.starts = np.cumsum([0, *(len(table) for table in self.tables)])
        self.memory: Tensor | None = None
        if len(self) * 3 * size * size <= MEMORY_LIMIT:
            self.memory = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for row, square in enumerate(map_rows(pool, self._decode, len(self))):
                    self.memory[row] = torch.from_numpy(square).permute(2, 0, 1)
                    on_progress(1)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitems__(self, rows: Sequence[int]) -> Tensor:
        """Returns the squares of some rows, uint8 `[rows, 3, size, size]`."""
        if self.memory is not None:
            return self.memory[torch.as_tensor(rows)]
        squares = torch.stack([torch.from_numpy(self._decode(row)) for row in rows])
        return squares.permute(0, 3, 1, 2).contiguous()

    def of_rows(self, rows: Sequence[int] | np.ndarray) -> ImageCache:
        """Returns a cache of some rows alone, decoded."""
        chosen = np.asarray(rows)
        aspects = None if self.aspects is None else self.aspects[chosen]
        return ImageCache([_Chosen(self, chosen)], self.size, aspects=aspects)

    def picture(self, row: int) -> Image.Image:
        """Returns the decoded picture of a row; raises DataError where it is unreadable."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        table, index = self.tables[number], int(row - self.starts[number])
        if hasattr(table, "image"):  # an ImageTable; rows hold their images by key
            return table.image(index)
        if isinstance(table, _Chosen):
            return table.pixels.picture(int(table.rows[index]))
        stored = table[index]
        try:
            return decode_image(stored["image"])
        except Unreadable as error:
            raise DataError(
                f"image '{stored.get('id', row)}' cannot be read any more: {error}."
            ) from error

    def _decode(self, row: int) -> np.ndarray:
        fit = to_square if self.aspects is None else to_whole
        return fit(self.picture(row), self.size)


@dataclass(frozen=True)
class _Chosen:
    """Some rows of another cache."""

    pixels: ImageCache
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


class _Order:
    """The batches of row numbers that a loader goes through."""

    def __init__(self, batch_size: int) -> None:
        self.rows: np.ndarray = np.empty(0, np.int64)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self.rows), self.batch_size):
            yield self.rows[first : first + self.batch_size].tolist()

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)


class EpochLoader:
    """Batches of one epoch after the other from the same workers; new rows restart nothing.

    - `device`: where the squares are yielded. For a GPU a thread fetches and sends the next batch
      while one is used.
    """

    def __init__(
        self,
        pixels: ImageCache,
        batch_size: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        # A separate object: workers end at once only if nothing refers back to their loader
        self.order = _Order(batch_size)
        self.aspects_of = partial(aspects_of, pixels)
        workers = 0 if pixels.memory is not None else workers
        self.loader = DataLoader(
            pixels,
            batch_sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_same,
            generator=torch.Generator(),  # else the loader draws from torch's random state
        )

    def of(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yields (row numbers, uint8 squares) of each batch of `rows`, in order."""
        self.order.rows, size = rows, self.order.batch_size
        batches: Iterator[Tensor] = iter(self.loader)
        if self.device.type == "cuda":
            batches = sent_ahead(batches, self.device)
        for number, pixels in enumerate(batches):
            yield rows[number * size : (number + 1) * size], pixels


def sent_ahead(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yields the batches on a GPU. The next one is sent on a stream of its own meanwhile."""
    stream = torch.cuda.Stream(device)

    def send(batch: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            sent = batch.pin_memory().to(device, non_blocking=True)
            return sent, stream.record_event()

    for batch, arrived in fetched_ahead(batches, send):
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        batch.record_stream(current)  # its memory is not given away before this stream is done
        yield batch


def fetched_ahead(items: Iterator[T], prepare: Callable[[T], S]) -> Iterator[S]:
    """Yields `prepare` of each item, in order; a thread fetches the next while one is used."""
    ended = object()

    def fetch() -> Any:
        item = next(items, ended)
        return ended if item is ended else prepare(item)  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(fetch)
        while (found := waiting.result()) is not ended:
            waiting = thread.submit(fetch)
            yield found


def aspects_of(pixels: ImageCache, rows: np.ndarray) -> Tensor | None:
    """Returns width / height of some rows, float32 `[rows]`; None if their squares are centres."""
    aspects = getattr(pixels, "aspects", None)
    return None if aspects is None else torch.from_numpy(aspects[rows]).float()


def _same(batch: Any) -> Any:
    return batch
