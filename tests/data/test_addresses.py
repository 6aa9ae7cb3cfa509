"""Images that stay inside Parquet files: tables and pixels as of a copy, nothing written."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from discl.data import (
    Gate,
    ImageTable,
    Unreadable,
    addresses,
    decode_image,
    inspect_images,
    read_tables,
)
from discl.data.readers import tabular
from discl.errors import DataError

FEATURES = Features(
    {
        "img": ImageFeature(),
        "kind": ClassLabel(names=["cat", "dog"]),
        "camera": Value("string"),
        "key": Value("int64"),
    }
)
COLUMNS = {"image": "img", "label": "kind", "domain": "camera", "id": "key"}


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 7, 9)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of seven rows in row groups of three, and a test shard, as of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data ü"
    folder.mkdir()
    for place, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test")):
        numbers = range(10 * place, 10 * place + 7)
        columns = {
            "img": [{"bytes": picture(number), "path": None} for number in numbers],
            "kind": [number % 2 for number in numbers],
            "camera": [f"c{number % 3}" for number in numbers],
            "key": list(numbers),
        }
        Dataset.from_dict(columns, FEATURES).to_parquet(folder / f"{name}.parquet", batch_size=3)
    return folder


def told(table: ImageTable) -> list[tuple[str, str, str, int]]:
    facts = zip(table.ids, table.labels, table.rows["domain"][:], strict=True)
    return [
        (name, table.class_names[label], domain, table.image(row).getpixel((0, 0))[0])
        for row, (name, label, domain) in enumerate(facts)
    ]


def test_what_stays_in_its_shards_is_what_a_copy_holds(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = {
        split: (told(table), inspect_images(table))
        for split, table in read_tables(str(root), columns=COLUMNS).items()
    }
    written = len(list((root.parent / "cache").rglob("*.arrow")))
    assert written and copied["train"][0][8] == ("11", "dog", "c2", 11)
    monkeypatch.setattr(tabular, "COPIED_BYTES", 0)
    tables = read_tables(str(root), columns=COLUMNS)
    assert {
        split: (told(table), inspect_images(table)) for split, table in tables.items()
    } == copied
    assert len(list((root.parent / "cache").rglob("*.arrow"))) == written
    stored = tables["train"].rows[8]["image"]
    assert stored == {
        "bytes": None,
        "path": f"parquet://1:img::{root}/train-00001-of-00002.parquet",
    }


def test_a_row_group_is_read_once_for_neighbours(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tabular, "COPIED_BYTES", 0)
    addresses._read_group.cache_clear()
    inspect_images(read_tables(str(root), columns=COLUMNS)["train"])
    assert (
        addresses._read_group.cache_info().misses <= 12
    )  # six groups, by many threads that are a little out of step
    assert addresses._read_group.cache_info().currsize <= addresses.KEPT_GROUPS


@pytest.mark.parametrize("kept", ["bytes", "binary", "path"])
def test_cells_of_every_kind(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabular, "COPIED_BYTES", 0)
    (tmp_path / "a.png").write_bytes(picture(5))
    cell = {
        "bytes": {"bytes": picture(5), "path": None},
        "binary": picture(5),
        "path": {"bytes": None, "path": str(tmp_path / "a.png")},
    }
    pq.write_table(pa.table({"image": [cell[kept]], "label": [0]}), tmp_path / "train.parquet")
    assert np.asarray(read_tables(str(tmp_path))["train"].image(0))[0, 0].tolist() == [5, 7, 9]


@pytest.mark.parametrize("copied_bytes", [0, 10**9])
@pytest.mark.parametrize(
    "path",
    [
        "{outside}/secret.png",
        "{root}/../secret.png",
        "{root}/link.png",
        "secret.png",
        "slice://0:9::{root}/a",
    ],
)
def test_a_named_file_stays_below_the_folder(
    path: str, copied_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tabular, "COPIED_BYTES", copied_bytes)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(5))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    cell = {"bytes": None, "path": path.format(outside=tmp_path, root=root)}
    pq.write_table(pa.table({"image": [cell], "label": [0]}), root / "train.parquet")
    with pytest.raises(DataError, match=r"secret\.png|slice://0:9"):
        read_tables(str(root))["train"].image(0)


def test_a_file_that_has_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabular, "COPIED_BYTES", 0)
    gate = Gate((root,), frozenset({addresses.CELL}))
    with pytest.raises(Unreadable, match=r"has 7 rows and no row 99"):
        decode_image({"bytes": None, "path": f"parquet://99:img::{root}/test.parquet"}, gate)
    with pytest.raises(Unreadable, match="No such file"):
        decode_image({"bytes": None, "path": f"parquet://0:img::{root}/lost.parquet"}, gate)
    table = read_tables(str(root), columns=COLUMNS)["test"]
    (root / "test.parquet").write_bytes(b"")
    addresses._read_group.cache_clear()
    addresses._group_starts.cache_clear()
    with pytest.raises(DataError, match="cannot be read"):
        table.image(0)
