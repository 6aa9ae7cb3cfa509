"""Files appear whole or not at all, and two writers at once do not disturb each other."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from discl.errors import WriteError
from discl.utils.atomic import clear_unfinished, whole


def test_what_was_written_takes_the_place_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with whole(path) as unfinished:
        assert unfinished.parent == tmp_path and re.fullmatch(
            r"\.results\.json\.[0-9a-f]{32}\.new", unfinished.name
        )
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("full"), ValueError("a bug"), KeyboardInterrupt()])
def test_where_anything_fails_the_old_file_stays_alone(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(type(error)), whole(path) as unfinished:
        unfinished.write_text("half of")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_refuses_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with (
        pytest.raises(OSError, match=r"results\.json"),
        whole(tmp_path / "results.json") as unfinished,
    ):
        unfinished.write_text("new")
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]
    with (
        pytest.raises(WriteError, match="No such file"),
        whole(tmp_path / "no folder" / "results.json") as unfinished,
    ):
        unfinished.write_text("new")


def test_two_that_write_it_at_once_do_not_clash(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    with whole(path) as first, whole(path) as second:
        first.write_text("the first's")
        second.write_text("the second's")
    assert path.read_text() == "the first's" and list(tmp_path.iterdir()) == [
        path
    ]  # whose block ended last


def test_only_what_was_left_long_ago_is_cleared(tmp_path: Path) -> None:
    left, written = (tmp_path / f".data.parquet.{number:032x}.new" for number in range(2))
    others = [tmp_path / name for name in ("data.parquet", ".hidden", "mine.new")]
    for file in (left, written, *others):
        file.write_text("")
    for file in (left, *others):
        os.utime(file, (time.time() - 3601,) * 2)
    clear_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([written, *others])
    clear_unfinished(tmp_path, older_than=0)
    assert sorted(tmp_path.iterdir()) == sorted(others)
    clear_unfinished(tmp_path / "not there")
