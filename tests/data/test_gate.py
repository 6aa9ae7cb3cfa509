"""Data never opens a file outside the root: every reader, every kind of path that tries."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_from_disk
from PIL import Image

from discl.data import Gate, ImageTable, Unreadable, decode_image, read_tables
from discl.data.gate import roots_of
from discl.data.readers import tabular
from discl.errors import DataError, DisclError, StoreError
from discl.integrations.dataset import SpectrumDataset
from discl.run_folder.open import open_run
from discl.training.image_cache import ImageCache

SECRET, OWN = (201, 3, 77), (5, 60, 9)
WATCHED: list[str] = []
"""What Python opened, links followed, or connected to, while a test watches."""
watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event == "open" and isinstance(arguments[0], str):
        WATCHED.append(os.path.realpath(arguments[0]))
    elif watching and event in {"socket.connect", "socket.getaddrinfo"}:
        WATCHED.append(f"/dev/{event}")


sys.addaudithook(watch)


@contextmanager
def nothing_escapes(outside: Path) -> Iterator[None]:
    """Fails where anything below the folder, a device or a server is opened."""
    global watching
    WATCHED.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
    foreign = (f"{outside}{os.sep}", "/dev/zero", "/dev/socket")
    assert not [each for each in WATCHED if each.startswith(foreign)]


def draw(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), colour).save(path, "PNG")
    return path


def two_rows(root: Path, path: str) -> dict[str, list]:
    """An image that is held, and one that is only named."""
    own = draw(root / "own.png", OWN).read_bytes()
    stored = [{"bytes": own, "path": None}, {"bytes": None, "path": path}]
    return {"image": stored, "label": [0, 1]}


def parquet(root: Path, path: str) -> str:
    pq.write_table(pa.table(two_rows(root, path)), root / "train.parquet")
    return str(root)


def parquet_text(root: Path, path: str) -> str:
    columns = {"image": [str(root / "own.png"), path], "label": [0, 1]}
    pq.write_table(pa.table(columns), root / "train.parquet")
    return str(root)


def parquet_dictionary(root: Path, path: str) -> str:
    image = pa.array([str(root / "own.png"), path]).dictionary_encode()
    pq.write_table(pa.table({"image": image, "label": [0, 1]}), root / "train.parquet")
    return str(root)


def parquet_path_alone(root: Path, path: str) -> str:
    image = pa.array([{"path": str(root / "own.png")}, {"path": path}])
    pq.write_table(pa.table({"image": image, "label": [0, 1]}), root / "train.parquet")
    return str(root)


def saved(root: Path, path: str) -> str:
    Dataset.from_dict(two_rows(root, path)).save_to_disk(root / "saved")
    return str(root / "saved")


def saved_text(root: Path, path: str) -> str:
    Dataset.from_dict({"image": [path, path], "label": [0, 1]}).save_to_disk(root / "saved")
    return str(root / "saved")


def manifest(root: Path, path: str) -> str:
    rows = [{"path": "own.png", "label": "a"}, {"path": path, "label": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), root / "list.parquet")
    return str(root / "list.parquet")


def manifest_csv(root: Path, path: str) -> str:
    (root / "list.csv").write_text(f"path,label\nown.png,a\n{path},b\n")
    return str(root / "list.csv")


def lists(root: Path, path: str) -> str:
    draw(root / "a" / "own.png", OWN)
    for split in ("train", "val", "test"):
        (root / f"ImageNet_LT_{split}.txt").write_text(f"a/own.png 0\n{path} 1\n")
    return str(root)


def inaturalist(root: Path, path: str) -> str:
    content = {
        "images": [{"id": 1, "file_name": "own.png"}, {"id": 2, "file_name": path}],
        "annotations": [{"image_id": 1, "category_id": 1}, {"image_id": 2, "category_id": 2}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (root / "train2018.json").write_text(json.dumps(content))
    return str(root)


def coco(root: Path, path: str) -> str:
    inaturalist(root, path)
    (root / "annotations").mkdir()
    (root / "train2018.json").rename(root / "annotations" / "instances_train.json")
    return str(root)


def wilds(root: Path, path: str) -> str:
    draw(root / "train" / "own.png", OWN)
    rows = [f"{split},0,own.png" for split in ("train", "id_val", "id_test", "val", "test")]
    listed = ["split,y,filename", *rows, f"train,1,{path}"]
    (root / "metadata.csv").write_text("\n".join(listed) + "\n")
    return str(root)


WRITERS: dict[str, Callable[[Path, str], str]] = {
    "parquet": parquet,
    "parquet in place": parquet,
    "text": parquet_text,
    "dictionary": parquet_dictionary,
    "path alone": parquet_path_alone,
    "saved": saved,
    "saved text": saved_text,
    "manifest": manifest,
    "csv": manifest_csv,
    "lists": lists,
    "inaturalist": inaturalist,
    "coco": coco,
    "wilds": wilds,
}

KINDS = {"text": "parquet", "dictionary": "parquet", "coco": "coco"}
"""Readers that have to be named; a Parquet file of texts, for example, is taken for a list."""

HOSTILE = {
    "absolute": "{outside}/secret.png",
    "up": "../outside/secret.png",
    "up far": "{root}/../outside/secret.png",
    "link": "{root}/link.png",
    "link to a folder": "{root}/there/secret.png",
    "relative to the working directory": "secret.png",
    "file URL": "file://{outside}/secret.png",
    "file": "file:{outside}/secret.png",
    "home": "~/secret.png",
    "slice": "slice://0:999::{outside}/secret.png",
    "cell": "parquet://0:image::{outside}/secret.parquet",
    "camera": "camera://0:0:1::{outside}/secret.png",
    "camera of a slice": "camera://0:0:1::slice://0:999::{outside}/secret.png",
    "URL": "http://127.0.0.1:9/secret.png",
    "hub": "hf://datasets/owner/name/secret.png",
    "chained": "zip://secret.png::{outside}/secret.zip",
    "Windows": "C:\\secret.png",
    "share": "\\\\host\\share\\secret.png",
    "device": "/dev/zero",
}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the secret: also working directory and home folder; `root` is beside it."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    draw(outside / "secret.png", SECRET)
    pq.write_table(
        pa.table({"image": [{"bytes": (outside / "secret.png").read_bytes(), "path": None}]}),
        outside / "secret.parquet",
    )
    draw(root / "own.png", OWN)
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "there").symlink_to(outside)
    monkeypatch.chdir(outside)
    monkeypatch.setenv("HOME", str(outside))
    return outside


def pictures(tables: dict[str, ImageTable]) -> Iterator[np.ndarray]:
    """Every picture that any way of decoding gives."""
    for table in tables.values():
        for row in range(len(table)):
            for decode in (
                lambda row=row, table=table: np.asarray(table.image(row)),
                lambda row=row, table=table: ImageCache([table.select([row])], 6).memory,
            ):
                try:
                    yield np.asarray(decode())
                except DisclError:
                    continue


def close_to(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    picture = picture.reshape(-1, 6, 6) if picture.ndim == 4 else picture.transpose(2, 0, 1)
    return bool((picture[:, 3, 3] == colour).all())


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("reader", WRITERS)
def test_no_path_of_any_reader_leaves_the_root(
    reader: str, kind: str, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = outside.parent / "root"
    if "in place" in reader:
        monkeypatch.setattr(tabular, "COPIED_BYTES", 0)
    where = WRITERS[reader](root, HOSTILE[kind].format(root=root, outside=outside))
    with nothing_escapes(outside):
        try:
            tables = read_tables(where, KINDS.get(reader, "auto"))
        except DisclError:
            tables = {}
        assert all(close_to(picture, OWN) for picture in pictures(tables))


@pytest.mark.parametrize("reader", WRITERS)
def test_what_lies_below_the_root_is_read(
    reader: str, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above would hold for readers that read nothing."""
    root = outside.parent / "root"
    if "in place" in reader:
        monkeypatch.setattr(tabular, "COPIED_BYTES", 0)
    folder = {"saved": root / "saved", "saved text": root / "saved", "wilds": root / "train"}
    named = draw(folder.get(reader, root) / "named.png", OWN)
    tables = read_tables(WRITERS[reader](root, str(named)), KINDS.get(reader, "auto"))
    assert tables["train"].labels.tolist()[-1] == 1
    assert close_to(np.asarray(tables["train"].image(len(tables["train"]) - 1)), OWN)


@pytest.mark.parametrize("kind", HOSTILE)
def test_tables_of_the_hub_and_shards_of_a_store_open_nothing(
    kind: str, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = outside.parent / "root"
    path = HOSTILE[kind].format(root=root, outside=outside)
    rows = Dataset.from_dict(two_rows(root, path))
    monkeypatch.setattr(tabular, "load_dataset", lambda *_, **__: {"train": rows})
    columns = {**two_rows(root, path), "level": [50, 50], "id": ["a", "b"]}
    (root / "store").mkdir()
    pq.write_table(pa.table(columns), root / "store" / "part-0.parquet")
    for name in ("a", "b"):
        draw(root / "real" / name / "1.png", OWN)
    with nothing_escapes(outside):
        try:
            tables = read_tables("owner/name", "hub")
        except DisclError:
            tables = {}
        assert all(close_to(picture, OWN) for picture in pictures(tables))
        made = SpectrumDataset.of_shards(root / "store", root / "real", hard=[True, True])
        assert close_to(np.asarray(made[2].image), OWN)
        with pytest.raises(DataError, match=r"'b' cannot be read: it names"):
            made[3]


@pytest.mark.parametrize("inner", ["state", "splits"])
def test_a_saved_folder_names_no_files_elsewhere(inner: str, outside: Path) -> None:
    """Its lists name the Arrow files and the splits; `datasets` follows them anywhere."""
    root = outside.parent / "root"
    Dataset.from_dict(two_rows(outside, "")).save_to_disk(outside / "saved")
    saved(root, str(root / "own.png"))
    if inner == "state":
        state = json.loads((root / "saved" / "state.json").read_text())
        state["_data_files"] = [{"filename": "../../outside/saved/data-00000-of-00001.arrow"}]
        (root / "saved" / "state.json").write_text(json.dumps(state))
        assert len(load_from_disk(str(root / "saved"))) == 2
    else:
        listed = {"splits": ["../../outside/saved"]}
        (root / "saved" / "dataset_dict.json").write_text(json.dumps(listed))
    with pytest.raises(DataError, match="outside"):
        read_tables(str(root / "saved"))


def test_shards_that_are_links_to_elsewhere(outside: Path) -> None:
    root = outside.parent / "linked"
    root.mkdir()
    with tarfile.open(outside / "secret.tar", "w") as tar:
        tar.add(outside / "secret.png", "0.png")
    (root / "train.tar").symlink_to(outside / "secret.tar")
    (root / "train.parquet").symlink_to(outside / "secret.parquet")
    for kind in ("webdataset", "parquet"):
        with pytest.raises(DataError, match=r"outside/secret\.(tar|parquet)"):
            read_tables(str(root), kind)


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        ("lists", "classnames.txt"),
        ("lists", "ImageNet_LT_val.txt"),
        ("inaturalist", "train2018.json"),
        ("inaturalist", "categories.json"),
        ("coco", "annotations/instances_train.json"),
        ("wilds", "metadata.csv"),
        ("wilds", "categories.csv"),
    ],
)
def test_lists_that_are_links_to_elsewhere(reader: str, name: str, outside: Path) -> None:
    """What they say becomes names of classes, and goes on into texts and reports."""
    root = outside.parent / "root"
    named = "train/own.png" if reader == "lists" else "own.png"
    WRITERS[reader](root, str(draw(root / ("train" if reader == "wilds" else "") / named, OWN)))
    file = root / name
    (outside / "secret.txt").write_bytes(file.read_bytes() if file.exists() else b"a secret\n")
    file.unlink(missing_ok=True)
    file.symlink_to(outside / "secret.txt")
    with pytest.raises(DataError, match=r"leads to .*outside/secret\.txt"):
        read_tables(str(root), KINDS.get(reader, "auto"))


def test_a_link_that_changes_after_the_check(outside: Path) -> None:
    root = outside.parent / "classes"
    draw(root / "a" / "1.png", OWN), draw(root / "b" / "1.png", OWN)
    table = read_tables(str(root))["train"]
    (root / "a" / "1.png").unlink()
    (root / "a" / "1.png").symlink_to(outside / "secret.png")
    with pytest.raises(DataError, match=r"a/1\.png.*leads to .*secret\.png, outside"):
        table.image(0)


def test_pipes_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, told in (("pipe.png", "a pipe"), ("folder.png", "a folder"), ("", "a folder")):
        with pytest.raises(Unreadable, match=f"it is {told}, not a regular file"):
            decode_image({"bytes": None, "path": name}, Gate((tmp_path,)))
    with pytest.raises(Unreadable, match="it is a device, not a regular file"):
        decode_image({"bytes": None, "path": "null"}, Gate((Path("/dev"),)))
    with pytest.raises(Unreadable, match="zero byte"):
        decode_image({"bytes": None, "path": "a\0.png"}, Gate((tmp_path,)))


def test_by_default_a_path_opens_nothing(tmp_path: Path) -> None:
    stored = {"bytes": None, "path": str(draw(tmp_path / "a.png", OWN))}
    with pytest.raises(Unreadable, match=r"a\.png.*stored as bytes"):
        decode_image(stored)
    assert decode_image(stored, Gate((tmp_path,))).size == (6, 6)
    assert decode_image({"bytes": None, "path": "a.png"}, Gate((tmp_path,))).size == (6, 6)


def test_a_snapshot_of_the_hubs_cache_is_a_folder_of_links(tmp_path: Path) -> None:
    blob = draw(tmp_path / "hub" / "datasets--a--b" / "blobs" / "d0c5", OWN)
    snapshot = tmp_path / "hub" / "datasets--a--b" / "snapshots" / "1f"
    for name in ("cat", "dog"):
        (snapshot / name).mkdir(parents=True)
        (snapshot / name / "1.png").symlink_to(blob)
    assert roots_of(snapshot) == (snapshot, blob.parent)
    assert close_to(np.asarray(read_tables(str(snapshot))["train"].image(1)), OWN)


@pytest.mark.parametrize("kind", ["absolute", "slice", "camera", "URL"])
def test_rows_of_a_run_folder_s_store_open_nothing(
    kind: str, outside: Path, filtered_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(filtered_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    shard = next((folder / "spectrum").glob("*.parquet"))
    table = pq.read_table(shard)
    rows = table.to_pylist()
    path = HOSTILE[kind].format(root=tmp_path / "root", outside=outside)
    rows[0] |= {"image": {"bytes": None, "path": path}, "image_digest": None}
    rows = [{name: row.get(name) for name in table.column_names} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), shard)
    with nothing_escapes(outside):
        with pytest.raises(StoreError, match=r"image without its bytes|picture"):
            SpectrumDataset.of_run(folder)
        run = open_run(folder / "recipe.yaml", folder)
        with pytest.raises(DisclError):
            decode_image(run.spectrum.rows([rows[0]["id"]], ["image"])[rows[0]["id"]]["image"])
