"""Labels as they are written: whole numbers of any size are names, and what is no label is told."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from discl.data import ImageTable, read_tables
from discl.data.readers.labels import name_numbers
from discl.errors import DataError
from helpers import miniatures


def picture(number: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 7)).save(stream, "PNG")
    return stream.getvalue()


def write_list(root: Path, *labels: str) -> Path:
    rows = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    (root / "list.csv").write_text("\n".join(("path,label", *rows)) + "\n")
    return root / "list.csv"


def write_pictures(root: Path, labels: pa.Array, **columns: pa.Array) -> Path:
    stored = pa.array(
        [{"bytes": picture(number), "path": None} for number in range(len(labels))],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    pq.write_table(pa.table({"image": stored, "label": labels, **columns}), root / "train.parquet")
    return root / "train.parquet"


def write_shard(root: Path, **members: bytes) -> Path:
    """`__` in a name stands for the dot."""
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return root / "train-0.tar"


def named(table: ImageTable) -> list[str]:
    return [table.class_names[label] for label in table.labels]


WHOLE = [
    (("1", "2", "3"), ("1", "2", "3")),
    (("10", "9", "2"), ("2", "9", "10")),
    (("001", "010", "002"), ("001", "002", "010")),
    (("4000000000", "7"), ("7", "4000000000")),
    (("2435099", "99999999999999999999999", "5219404"), ("2435099", "5219404", "9" * 23)),
    (("2", "0", "1"), ("0", "1", "2")),
]


@pytest.mark.parametrize(("labels", "names"), WHOLE)
def test_whole_numbers_of_a_list_are_names(
    labels: tuple[str, ...], names: tuple[str, ...], tmp_path: Path
) -> None:
    table = read_tables(str(write_list(tmp_path, *labels)))["train"]
    assert (table.class_names, named(table)) == (names, list(labels))


@pytest.mark.parametrize(("labels", "names"), WHOLE)
def test_whole_numbers_of_shards_are_names(
    labels: tuple[str, ...], names: tuple[str, ...], tmp_path: Path
) -> None:
    members = {f"{number}__cls": label.encode() for number, label in enumerate(labels)}
    pictures = {f"{number}__png": picture(number) for number in range(len(labels))}
    table = read_tables(str(write_shard(tmp_path, **pictures, **members)))["train"]
    assert (table.class_names, named(table)) == (names, list(labels))


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        (pa.int64(), [4_000_000_000, 3, 3], ("3", "4000000000")),
        (pa.uint64(), [2**64 - 1, 5], ("5", "18446744073709551615")),
        (pa.int8(), [1, 2, 3], ("1", "2", "3")),
        (pa.int32(), [2, 0, 1], ("0", "1", "2")),
        (pa.dictionary(pa.int8(), pa.string()), ["b", "a"], ("a", "b")),
    ],
)
def test_numbers_of_a_parquet_file_are_names(
    kind: pa.DataType, labels: list[Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    table = read_tables(str(write_pictures(tmp_path, pa.array(labels, kind))))["train"]
    assert (table.class_names, named(table)) == (names, list(map(str, labels)))


def test_numbers_in_lists_of_paths_and_in_wilds_may_begin_anywhere(tmp_path: Path) -> None:
    root = miniatures.imagenet_lt(tmp_path / "lt")
    for file in root.glob("ImageNet_LT_*.txt"):
        lines = [line.rpartition(" ") for line in file.read_text().splitlines()]
        file.write_text("".join(f"{path} {4_000_000_000 + 2 * int(n)}\n" for path, _, n in lines))
    assert read_tables(str(root))["train"].class_names == ("tench", "goldfish", "flamingo")
    root = miniatures.iwildcam(tmp_path / "wilds")
    (root / "categories.csv").unlink()
    text = (root / "metadata.csv").read_text().splitlines()
    place = text[0].split(",").index("y")
    rows = [line.split(",") for line in text[1:]]
    for row in rows:
        row[place] = str(3 * int(row[place]) + 1)
    (root / "metadata.csv").write_text("\n".join([text[0], *map(",".join, rows)]) + "\n")
    assert read_tables(str(root))["train"].class_names == ("1", "4", "7")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("1", "01"), r"the label 1 is written as '01' and as '1'"),
        (("1", "-1"), r"labels below 0 \(-1\).*\{test: null\}"),
        (("1", "-1.0"), r"labels below 0 \(-1\)"),
        (("1", "0.5", "2.25"), r"fractions \(0\.5, 2\.25\)"),
        (("1", "NaN"), r"images without a label; .*row 2"),
        (("1", "None"), r"images without a label; .*row 2"),
    ],
)
def test_numbers_that_are_no_labels(labels: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_tables(str(write_list(tmp_path, *labels)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([True, False]), "labels of type bool"),
        (pa.array([0.0, 1.0]), "labels of type float64"),
        (pa.array([[1], [2]]), r"labels of type List\(.*int64.*; whole numbers, texts"),
        (pa.array([{"a": 1}, {"a": 2}]), r"labels of type .*'a'"),
        (pa.array([b"a", b"b"]), "labels of type binary"),
        (pa.nulls(2), "images without a label"),
    ],
)
def test_columns_that_are_no_labels(labels: pa.Array, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_tables(str(write_pictures(tmp_path, labels)))


@pytest.mark.parametrize("label", [b"true", b"1.5", b"[1]", b'{"a": 1}'])
def test_labels_in_the_json_of_a_sample(label: bytes, tmp_path: Path) -> None:
    shard = write_shard(tmp_path, a__png=picture(), a__json=b'{"label": ' + label + b"}")
    with pytest.raises(DataError, match=r"sample 'a' has the label .* whole number or a text"):
        read_tables(str(shard))
    write_shard(tmp_path, a__png=picture(), a__cls=b" \n")
    with pytest.raises(DataError, match="sample 'a' has no label"):
        read_tables(str(shard))


def test_ids_that_are_missing_are_told(tmp_path: Path) -> None:
    for ids in (["a", None], ["a", " "]):
        file = write_pictures(tmp_path, pa.array([0, 1]), id=pa.array(ids))
        with pytest.raises(DataError, match=r"row 2 of the images has no id \(1 such rows\)"):
            read_tables(str(file))
    file = write_pictures(tmp_path, pa.array([0, 1]), id=pa.array([[1], [2]]))
    with pytest.raises(DataError, match="the column 'id' holds"):
        read_tables(str(file))


def test_a_split_without_labels_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(
        "path,label,split\na.png,cat,train\nb.png,dog,train\nc.png,,test\n"
    )
    root = str(tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"split 'test' of .* images without a label"):
        read_tables(root)
    tables = read_tables(root, splits={"test": None})
    assert (list(tables), tables["train"].class_names) == (["train"], ("cat", "dog"))
    with pytest.raises(DataError, match=r"^splits: train is null"):
        read_tables(root, splits={"train": None})


def test_a_name_is_the_number_as_written_whatever_its_length() -> None:
    long = "9" * 5000
    assert name_numbers([long, "10", "009", "0"], "here") == ("0", "009", "10", long)
