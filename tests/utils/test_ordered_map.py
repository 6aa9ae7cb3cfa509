"""Rows by threads: in order, never far ahead, and errors where they belong."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from discl.data import inspect_images, table
from discl.training import image_cache
from discl.utils import ordered_map
from discl.utils.ordered_map import map_rows


class Counted(Executor):
    """Carries a block out only when its result is asked for, and counts how many wait for that."""

    def __init__(self, *_: Any) -> None:
        self.pending, self.most = 0, 0

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        self.pending += 1
        self.most = max(self.most, self.pending)
        pool = self

        class Asked(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                pool.pending -= 1
                return work(*arguments, **named)

        return Asked()


@pytest.mark.parametrize("count", [0, 1, 4, 5, 12, 103])
def test_no_more_than_the_bound_ever_wait_and_all_come_in_order(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_map, "BLOCK", 4)
    monkeypatch.setattr(ordered_map, "AHEAD", 3)
    pool = Counted()
    assert list(map_rows(pool, lambda row: -row, count)) == [-row for row in range(count)]
    assert (pool.most, pool.pending) == (min(3, -(-count // 4)), 0)


def test_threads_that_end_out_of_order_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_map, "BLOCK", 2)
    monkeypatch.setattr(ordered_map, "AHEAD", 4)

    def slow_at_first(row: int) -> int:
        time.sleep(0.02 if row < 4 else 0)
        return row

    with ThreadPoolExecutor(4) as pool:
        assert list(map_rows(pool, slow_at_first, 41)) == list(range(41))


def test_what_fails_is_raised_after_the_results_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_map, "BLOCK", 4)
    monkeypatch.setattr(ordered_map, "AHEAD", 3)
    seen: list[int] = []

    def work(row: int) -> int:
        if row in {6, 9}:
            raise ValueError(f"row {row}")
        return row

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="row 6"):
        for row in map_rows(pool, work, 10_000):
            seen.append(row)
    assert seen == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("module", [image_cache, table])
def test_images_are_not_all_handed_out_before_the_first(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[Counted] = []

    def pool(*_: Any) -> Counted:
        pools.append(Counted())
        return pools[-1]

    monkeypatch.setattr(module, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(ordered_map, "BLOCK", 4)
    monkeypatch.setattr(ordered_map, "AHEAD", 3)
    counted: list[int] = []
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    columns = {
        "id": [f"{row}" for row in range(50)],
        "image": [{"bytes": stream.getvalue(), "path": None}] * 50,
        "label": [0] * 50,
    }
    images = table.make_table(columns, ["bird"])
    if module is table:
        assert len(inspect_images(images, counted.append).digests) == 50
    else:
        assert len(image_cache.ImageCache([images.rows], 4, counted.append)) == 50
    assert [each.most for each in pools] == [3] and counted == [1] * 50
