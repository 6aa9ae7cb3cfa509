"""Images in memory and from workers; workers go on with new rows."""

from __future__ import annotations

import gc
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from discl.errors import DataError
from discl.training import image_cache as pixels_module
from discl.training.image_cache import EpochLoader, ImageCache, fetched_ahead

EPOCHS = ([5, 0, 5, 11, 3, 8, 9], [1, 2, 3], [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0])


def make_rows(first: int, count: int) -> list[dict[str, object]]:
    """Undecoded 12×12 drawings, each with a shade of its own."""
    rows: list[dict[str, object]] = []
    for index in range(first, first + count):
        buffer = io.BytesIO()
        Image.fromarray(np.full((12, 12, 3), index, np.uint8)).save(buffer, "PNG")
        rows.append({"id": f"image-{index}", "image": {"bytes": buffer.getvalue(), "path": None}})
    return rows


def make_pixels(size: int = 8) -> ImageCache:
    return ImageCache([make_rows(0, 7), make_rows(7, 5)], size)


@pytest.fixture
def on_demand(monkeypatch: pytest.MonkeyPatch) -> ImageCache:
    """ImageCache that are too many to be kept in memory."""
    monkeypatch.setattr(pixels_module, "MEMORY_LIMIT", 0)
    pixels = make_pixels()
    assert pixels.memory is None
    return pixels


def test_tables_follow_one_another() -> None:
    pixels = make_pixels()
    assert len(pixels) == 12
    batch = pixels.__getitems__([11, 6, 7, 0])
    assert batch.shape == (4, 3, 8, 8)
    assert batch.dtype == torch.uint8
    assert batch[:, 0, 0, 0].tolist() == [11, 6, 7, 0]


def test_whole_pictures_keep_what_lies_beside_the_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, :8], wide[:, 16:] = 100, 200
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    rows = [{"id": "wide", "image": {"bytes": buffer.getvalue(), "path": None}}, *make_rows(0, 1)]
    aspects = np.array([3.0, 1.0])
    square, whole = ImageCache([rows], 12), ImageCache([rows], 12, aspects=aspects)
    assert square.__getitems__([0]).max() < 100
    assert whole.__getitems__([0])[0, 0, 6].unique().tolist() != [0]
    assert whole.__getitems__([0])[0, 0, 6, [0, 6, 11]].tolist() == [100, 0, 200]
    assert torch.equal(whole.__getitems__([1]), square.__getitems__([1]))
    some = whole.of_rows(np.array([1, 0]))
    assert torch.equal(some.__getitems__([0, 1]), whole.__getitems__([1, 0]))
    assert some.aspects is not None and some.aspects.tolist() == [1.0, 3.0]
    monkeypatch.setattr(pixels_module, "MEMORY_LIMIT", 0)
    demanded = ImageCache([rows], 12, aspects=aspects)
    assert torch.equal(demanded.__getitems__([0, 1]), whole.__getitems__([0, 1]))


def test_progress_counts_every_image() -> None:
    counted: list[int] = []
    ImageCache([make_rows(0, 7), make_rows(7, 5)], 8, counted.append)
    assert sum(counted) == 12


def test_on_demand_is_the_same_as_in_memory(on_demand: ImageCache) -> None:
    memory = make_pixels()
    squares = np.stack([memory._decode(row) for row in range(12)])
    memory.memory = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous()
    assert torch.equal(on_demand.__getitems__([11, 6, 7, 0]), memory.__getitems__([11, 6, 7, 0]))


def test_batches_in_order_the_last_one_shorter() -> None:
    batches = EpochLoader(make_pixels(), 3)
    for rows in EPOCHS:
        parts = list(batches.of(np.array(rows)))
        assert [len(chosen) for chosen, _ in parts] == [
            len(rows[first : first + 3]) for first in range(0, len(rows), 3)
        ]
        assert np.concatenate([chosen for chosen, _ in parts]).tolist() == rows
        assert torch.cat([stored for _, stored in parts])[:, 0, 0, 0].tolist() == rows
        assert all(len(chosen) == len(stored) for chosen, stored in parts)


def test_the_same_workers_serve_one_epoch_after_another(on_demand: ImageCache) -> None:
    batches = EpochLoader(on_demand, 3, workers=2)
    seen: list[list[int]] = []
    for rows in EPOCHS:
        parts = list(batches.of(np.array(rows)))
        assert np.concatenate([chosen for chosen, _ in parts]).tolist() == rows
        assert torch.cat([stored for _, stored in parts])[:, 0, 0, 0].tolist() == rows
        workers: Any = batches.loader._iterator
        seen.append([worker.pid for worker in workers._workers])
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]


def test_workers_end_with_their_batches(on_demand: ImageCache) -> None:
    """At once: workers that a garbage collector has to end take five seconds each."""
    batches = EpochLoader(on_demand, 3, workers=2)
    list(batches.of(np.array(EPOCHS[0])))
    workers = batches.loader._iterator._workers  # type: ignore[union-attr]
    assert all(worker.is_alive() for worker in workers)
    gc.disable()
    try:
        del batches
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()


def test_no_worker_where_all_is_in_memory() -> None:
    assert EpochLoader(make_pixels(), 3, workers=2).loader.num_workers == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_draw_nothing_from_the_random_state(workers: int, on_demand: ImageCache) -> None:
    """Augmentation draws from it, so that workers or a restart would change the images of a run."""
    batches = EpochLoader(on_demand, 3, workers)
    for rows in EPOCHS:
        torch.manual_seed(0)
        list(batches.of(np.array(rows)))
        drawn = torch.rand(4)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(4))


def test_items_are_fetched_ahead_in_order() -> None:
    seen: list[int] = []

    def items() -> Iterator[int]:
        for item in range(5):
            seen.append(item)
            yield item
        raise ValueError("broken")

    fetched = fetched_ahead(items(), lambda item: -item)
    assert next(fetched) == 0
    assert [next(fetched) for _ in range(4)] == [-1, -2, -3, -4]
    with pytest.raises(ValueError, match="broken"):
        next(fetched)
    some = fetched_ahead(iter(range(9)), str)
    assert next(some) == "0"
    some.close()  # its thread ends
    assert not [each for each in threading.enumerate() if each.name.startswith("ThreadPool")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_on_a_gpu(workers: int, on_demand: ImageCache) -> None:
    batches = EpochLoader(on_demand, 3, workers, "cuda")
    for rows in EPOCHS:
        for chosen, squares in batches.of(np.array(rows)):
            assert squares.is_cuda
            assert torch.equal(squares.cpu(), on_demand.__getitems__(chosen.tolist()))


def test_an_image_that_went_missing_is_named(tmp_path: Path) -> None:
    gone = {"id": "kitchen/42.png", "image": {"bytes": None, "path": str(tmp_path / "42.png")}}
    with pytest.raises(DataError, match=r"image 'kitchen/42\.png' cannot be read any more"):
        ImageCache([[gone]], 8)
