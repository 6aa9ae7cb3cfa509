"""Files of a run are checked: whole and of the right kind, or one error names the file."""

from __future__ import annotations

import copy
import errno
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from discl.errors import BrokenFileError, WriteError
from discl.utils.stored import (
    read_header,
    read_json,
    read_lines,
    read_recipe_tree,
    read_table,
    read_tensors,
    read_text,
    save_tensors,
    write_table,
    write_text,
)

HARD = {"id": ["a"], "digest": ["0"], "label": [1], "width": [32], "height": [32]}


def no_fits(shapes: Any) -> bool:
    return "other" in shapes


READERS: dict[str, Callable[[Path], Any]] = {
    "hard.parquet": read_table,
    "results.json": lambda path: read_json(path, "ce"),
    "history.jsonl": lambda path: read_lines(path, "epoch"),
    "recipe.yaml": read_recipe_tree,
    "logits.safetensors": read_tensors,
}


def write_good(path: Path) -> None:
    if path.suffix == ".parquet":
        write_table(pa.table(HARD), path, "a key")
    elif path.suffix == ".safetensors":
        save_tensors({"test": torch.zeros(3, 2)}, path, {"fingerprint": "x"})
    else:
        texts = {".json": '{"ce": {}}', ".jsonl": '{"epoch": 0}\n{"epoch": 1}\n'}
        write_text(path, texts.get(path.suffix, "name: birds\n"))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content",
    ["half", b"\x00" * 40, b"\xff\xfe nonsense {", b"[1, 2]", b"[" * 5000, "folder", None],
)
def test_whatever_is_no_file_of_its_kind_is_named(name: str, content: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    write_good(path)
    READERS[name](path)
    whole = path.read_bytes()
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(whole[: len(whole) // 2 + 1] if content == "half" else content)
    if content == "half" and name == "recipe.yaml":
        path.write_bytes(b"name: [birds\n")
    with pytest.raises(BrokenFileError, match=str(path)) as told:
        READERS[name](path)
    assert told.value.path == path and len(str(told.value)) < 700


@pytest.mark.parametrize("name", ["hard.parquet", "results.json", "logits.safetensors"])
def test_an_empty_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(BrokenFileError, match="is empty"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"colour": ["red"]}, "no column 'id'"),
        ({**HARD, "label": ["one"]}, "column 'label' of string"),
        ({**HARD, "id": [None]}, "column 'id' of null"),
        (
            {**HARD, "id": ["a"], "width": pa.array([None], pa.int32())},
            "empty cells in column 'width'",
        ),
    ],
)
def test_a_table_of_another_kind_is_broken(
    columns: dict[str, Any], told: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "hard.parquet")
    with pytest.raises(BrokenFileError, match=told):
        read_table(tmp_path / "hard.parquet")


def test_a_table_that_was_made_from_something_else(tmp_path: Path) -> None:
    path = tmp_path / "hard.parquet"
    write_table(pa.table(HARD), path, "one")
    write_table(read_table(path, key="one"), path, "two")  # what it was made from is replaced
    assert read_table(path, ["id"], key="two")["id"].to_pylist() == ["a"]
    with pytest.raises(BrokenFileError, match="made from something else"):
        read_table(path, key="one")
    pq.write_table(pa.table(HARD), path)  # as they were written before there was a key
    read_table(path, key="one")


def test_a_bit_that_flips_in_a_table_is_found(tmp_path: Path) -> None:
    """Every bit of the pages; before, most of them gave another text or number."""
    path = tmp_path / "hard.parquet"
    write_table(pa.table({**HARD, "id": ["a" * 64]}), path)
    whole, column = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    for place in range(start, start + column.total_compressed_size):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert read_table(path)["id"].to_pylist() == ["a" * 64]  # a bit that says nothing
        except BrokenFileError:
            continue


def test_lines_of_a_history(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("")
    assert read_lines(path, "epoch") == []  # nothing was trained
    path.write_text('{"epoch": 0}\n{"epo')
    with pytest.raises(BrokenFileError, match="cut off"):
        read_lines(path, "epoch")


def test_tensors_of_another_file(tmp_path: Path) -> None:
    path = tmp_path / "logits.safetensors"
    save_file({"test": torch.ones(2, 3)}, path, {"fingerprint": "x"})
    assert read_header(path) == ({"test": (2, 3)}, {"fingerprint": "x"})
    with pytest.raises(BrokenFileError, match="holds other tensors"):
        read_tensors(path, fits=no_fits)


def test_tensors_on_a_full_disk_leave_those_of_before(tmp_path: Path) -> None:
    """safetensors has an error of its own for what the system refuses."""
    path = tmp_path / "checkpoint.safetensors"
    save_tensors({"weight": torch.zeros(4)}, path)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limit[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*checkpoint\.safetensors: ") as told:
            save_tensors({"weight": torch.zeros(40_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert told.value.errno == errno.EFBIG and isinstance(told.value, OSError)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert str(copy.deepcopy(told.value)) == str(told.value)


def test_a_text_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(BrokenFileError):
        read_text(tmp_path / "report.html")
    (tmp_path / "results.json").write_text(json.dumps({"ce": 1}))
    with pytest.raises(BrokenFileError, match="discl"):
        read_json(tmp_path / "results.json", "discl")
