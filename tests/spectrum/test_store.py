"""The store: rows exist whole or not at all, and other programs open the shards."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from PIL import Image

from discl.errors import StoreError
from discl.spectrum import store as store_module
from discl.spectrum.encoding import ENCODINGS, encode_image
from discl.spectrum.store import Shards, score_shards, spectrum_shards
from discl.utils.hashing import digest_bytes

NAMES = ("bag", "hat")


def make_picture(shade: int) -> np.ndarray:
    picture = np.full((8, 8, 3), shade, np.uint8)
    picture[:4] = 255 - shade
    return picture


def make_row(index: int) -> dict[str, Any]:
    encoded = encode_image(make_picture(index), "webp-lossless")
    return {
        "id": f"id-{index}",
        "image": {"bytes": encoded, "path": None},
        "label": index % 2,
        "level": 10 * (index % 5),
        "seed": index // 5,
        "attempt": 0,
        "prompt": "a bag",
        "negative_prompt": "",
        "source_id": f"bag/{index}.png",
        "source_digest": "d",
        "source_width": 30,
        "source_height": 20,
        "width": 8,
        "height": 8,
        "model": "m",
        "scheduler": "s",
        "num_inference_steps": 50,
        "guidance_scale": 10.0,
        "dtype": "float32",
        "encoding": "webp-lossless",
        "resize": "square",
        "steps": "per-level",
        "guidance_from": 0.0,
        "guidance_to": 1.0,
        "loras": "",
        "sampler": "ddim",
        "timestep_spacing": "",
        "class_tokens": "",
        "image_digest": digest_bytes(encoded),
    }


def make_rows(indices: Sequence[int]) -> list[dict[str, Any]]:
    return [make_row(index) for index in indices]


@pytest.fixture
def spectrum(tmp_path: Path) -> Shards:
    return spectrum_shards(tmp_path / "spectrum", NAMES)


def files(store: Shards) -> list[str]:
    """All names in the folder, hidden files too."""
    return sorted(path.name for path in store.folder.iterdir()) if store.folder.exists() else []


def test_an_empty_store(spectrum: Shards) -> None:
    assert spectrum.ids() == set()
    assert spectrum.files() == []
    assert spectrum.read().num_rows == 0
    assert spectrum.read(["id", "level"]).column_names == ["id", "level"]
    spectrum.append([])
    spectrum.clear_unfinished(older_than=-1)
    assert files(spectrum) == []


def test_rows_come_back_as_they_were(spectrum: Shards) -> None:
    spectrum.append(make_rows([0, 1, 2]))
    spectrum.append(make_rows([3, 4]))
    assert len(spectrum.files()) == 2
    assert spectrum.ids() == {f"id-{index}" for index in range(5)}
    stored = sorted(spectrum.read().to_pylist(), key=lambda row: row["id"])
    assert stored == make_rows(range(5))
    assert spectrum.read(["level", "id"]).column_names == ["level", "id"]


def test_the_same_rows_twice_are_one_shard(spectrum: Shards) -> None:
    for rows in ([0, 1, 2], [0, 1, 2], [2, 0, 1]):
        spectrum.append(make_rows(rows))
    assert len(spectrum.files()) == 1
    assert spectrum.read().num_rows == 3


def test_duplicate_rows_are_harmless(spectrum: Shards) -> None:
    """Two workers that made the same images: each is counted and found once."""
    spectrum.append(make_rows([0, 1, 2]))
    spectrum.append(make_rows([1, 2, 3]))
    assert spectrum.ids() == {f"id-{index}" for index in range(4)}
    assert {row["id"]: row for row in spectrum.read().to_pylist()} == {
        row["id"]: row for row in make_rows(range(4))
    }


def test_opens_with_datasets_and_shows_pictures(spectrum: Shards, tmp_path: Path) -> None:
    from datasets import ClassLabel, load_dataset
    from datasets import Image as ImageFeature

    spectrum.append(make_rows([0, 1, 2]))
    spectrum.append(make_rows([3]))
    opened = load_dataset(
        "parquet",
        data_files=[str(path) for path in spectrum.files()],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert len(opened) == 4
    assert isinstance(opened.features["image"], ImageFeature)
    assert opened.features["label"] == ClassLabel(names=list(NAMES))
    row = next(row for row in opened if row["id"] == "id-3")
    assert isinstance(row["image"], Image.Image)
    assert np.array_equal(np.asarray(row["image"].convert("RGB")), make_picture(3))
    assert opened.features["label"].int2str(row["label"]) == "hat"
    assert (row["prompt"], row["level"], row["guidance_scale"]) == ("a bag", 30, 10.0)


def fail(number: int) -> Callable[..., None]:
    """A writer that fills half of its file and is then refused more."""

    def write_table(table: pa.Table, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"PAR1 half of a shard")
        raise OSError(number, "No space left on device")

    return write_table


def test_a_full_disk_leaves_nothing_half_written(
    spectrum: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    spectrum.append(make_rows([0, 1]))
    before = {path.name: path.read_bytes() for path in spectrum.folder.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(store_module.pq, "write_table", fail(errno.ENOSPC))
        with pytest.raises(
            StoreError,
            match=r"cannot write to .*No space left on device.*Finished shards are intact",
        ):
            spectrum.append(make_rows([2, 3]))
    assert {path.name: path.read_bytes() for path in spectrum.folder.iterdir()} == before
    spectrum.append(make_rows([2, 3]))
    assert spectrum.ids() == {f"id-{index}" for index in range(4)}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_refuses_later_leaves_nothing_either(
    step: str, spectrum: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os if step == "fsync" else Path, step, refuse)
    with pytest.raises(StoreError, match="Input/output error"):
        spectrum.append(make_rows([0, 1]))
    assert files(spectrum) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "spectrum").write_text("a file is in the way")
    with pytest.raises(StoreError, match="cannot write to"):
        spectrum_shards(tmp_path / "spectrum", NAMES).append(make_rows([0]))


def test_what_a_killed_writer_left_is_ignored_and_cleared(spectrum: Shards) -> None:
    spectrum.append(make_rows([0, 1]))
    finished = files(spectrum)
    left = spectrum.folder / ".part-0123456789abcdef.parquet.fedcba9876543210"
    left.write_bytes(b"PAR1 half of a shard")
    assert spectrum.ids() == {"id-0", "id-1"}
    assert [path.name for path in spectrum.files()] == finished
    spectrum.clear_unfinished(older_than=-1)
    assert files(spectrum) == finished


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no parquet",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
    ],
)
def test_a_corrupted_shard_is_named(damage: Callable[[bytes], bytes], spectrum: Shards) -> None:
    spectrum.append(make_rows([0, 1]))
    spectrum.append(make_rows([2, 3]))
    shard = spectrum.files()[1]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(StoreError, match="cannot be read") as raised:
        spectrum.ids()
    assert str(shard) in str(raised.value)
    assert "Delete it and run the same command again" in str(raised.value)
    shard.unlink()
    assert len(spectrum.ids()) == 2


@pytest.mark.parametrize("column", ["id", "caption"])
def test_a_shard_with_a_null_where_none_may_be_is_named(column: str, tmp_path: Path) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("id", "caption", "note")])
    shards = Shards(tmp_path / "captions", schema, filled=("caption",))
    shards.append([{"id": "a", "caption": "", "note": None}])
    assert shards.read()["note"].to_pylist() == [None]
    (file,) = shards.files()
    rows = [{"id": "a", "caption": "b", "note": "c", column: None}]
    pq.write_table(pa.Table.from_pylist(rows, schema), file)
    with pytest.raises(StoreError, match=rf"{file.name} .* it has rows without '{column}'.*Delete"):
        shards.read()


def test_scores_lie_in_shards_of_their_own(tmp_path: Path) -> None:
    scores = score_shards(tmp_path / "scores")
    scores.append([{"id": "id-0", "scorer": "a", "clip_similarity": 0.25}])
    scores.append([{"id": "id-1", "scorer": "b", "clip_similarity": -0.5}])
    assert sorted(scores.read().to_pylist(), key=lambda row: row["id"]) == [
        {"id": "id-0", "scorer": "a", "clip_similarity": 0.25},
        {"id": "id-1", "scorer": "b", "clip_similarity": -0.5},
    ]
    scores.append(
        [{"id": "id-0", "scorer": "b", "clip_similarity": 0.5}]
    )  # of another scorer, beside the first
    assert {(row["id"], row["scorer"]) for row in scores.read().to_pylist()} == {
        ("id-0", "a"),
        ("id-1", "b"),
        ("id-0", "b"),
    }
    assert pq.read_schema(scores.files()[0]).field("clip_similarity").type == pa.float32()


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_every_encoding_can_be_read_back(encoding: str) -> None:
    """The lossless ones bit for bit, the others to within a few grey values on a smooth picture."""
    ramp = np.broadcast_to(np.linspace(20, 220, 32).astype(np.uint8)[:, None, None], (32, 32, 3))
    with Image.open(io.BytesIO(encode_image(ramp, encoding))) as image:
        assert image.size == (32, 32)
        back = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(back - ramp.astype(int)).max() <= (
        0 if encoding in {"png", "webp-lossless"} else 8
    )


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_encoding_is_deterministic(encoding: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert encode_image(picture, encoding) == encode_image(picture.copy(), encoding)


def test_images_of_a_store_from_before_the_options_are_read_beside_new_ones(
    spectrum: Shards,
) -> None:
    spectrum.append(make_rows([0, 1]))
    older = pa.schema(
        [field for field in spectrum.schema if field.name not in store_module.OPTIONAL]
    )
    Shards(spectrum.folder, older).append(
        [{name: row[name] for name in older.names} for row in make_rows([2, 3])]
    )
    assert spectrum.ids() == {f"id-{index}" for index in range(4)}
    assert {row["id"]: row["steps"] for row in spectrum.read().to_pylist()} == {
        "id-0": "per-level",
        "id-1": "per-level",
        "id-2": None,
        "id-3": None,
    }
    opened = Dataset.from_parquet(
        [str(file) for file in spectrum.files()],
        columns=["id", "image"],
        cache_dir=str(spectrum.folder / "cache"),
    )
    assert set(opened["id"]) == {f"id-{index}" for index in range(4)}


def flip_a_picture(shard: Path, name: str) -> None:
    """Changes a bit of a picture's bytes and nothing else, as a copy of the shard that is whole."""
    rows = pq.read_table(shard)
    pictures = rows["image"].to_pylist()
    place = rows["id"].to_pylist().index(name)
    data = bytearray(pictures[place]["bytes"])
    data[-3] ^= 1
    pictures[place]["bytes"] = bytes(data)
    column = pa.array(pictures, rows.schema.field("image").type)
    place = rows.column_names.index("image")
    pq.write_table(rows.set_column(place, rows.schema.field("image"), column), shard)


def test_a_picture_that_has_changed_is_named(spectrum: Shards, tmp_path: Path) -> None:
    spectrum.append(make_rows(range(250)))
    shard, checked = Path(spectrum.files()[0]), tmp_path / "cache" / "checked.json"
    spectrum.check_images([str(shard)], checked)
    flip_a_picture(shard, "id-42")
    with pytest.raises(StoreError, match=rf"shard {shard} .* image 'id-42' in row \d+ has changed"):
        spectrum.check_images([str(shard)], checked)
    with pytest.raises(StoreError, match="id-42"):
        spectrum.rows(["id-42"], ["image"])
    assert spectrum.rows(["id-41"], ["image"])["id-41"]["image"] == make_row(41)["image"]
    shard.unlink()
    spectrum.append(make_rows(range(250)))
    spectrum.check_images([str(shard)], checked)


def test_what_was_checked_once_is_not_read_again(
    spectrum: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spectrum.append(make_rows([0]))
    files, checked = [str(file) for file in spectrum.files()], tmp_path / "checked.json"
    spectrum.check_images(files, checked)
    monkeypatch.setattr(store_module, "_open", lambda file: pytest.fail(f"{file} was read again"))
    spectrum.check_images(files, checked)


def test_a_bit_that_flips_in_a_shard_is_found(spectrum: Shards) -> None:
    spectrum.append(make_rows(range(5)))
    shard, wanted = Path(spectrum.files()[0]), spectrum.read().to_pylist()
    whole, found = shard.read_bytes(), 0
    pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # then the footer
    for place in np.random.default_rng(0).integers(4, pages, 200):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            assert spectrum.read().to_pylist() == wanted
        except StoreError as error:
            assert str(shard) in str(error)
            found += 1
    assert found > 100


def test_a_shard_of_another_kind_is_named(spectrum: Shards, tmp_path: Path) -> None:
    spectrum.append(make_rows([0]))
    foreign = spectrum.folder / "part-foreign.parquet"
    for columns in ({"colour": ["red"]}, {"id": [None]}, {"id": [[1]]}):
        pq.write_table(pa.table(columns), foreign)
        for read in (spectrum.ids, lambda: spectrum.rows(["id-0"], ["image"])):
            with pytest.raises(StoreError, match=rf"shard {foreign} .* Delete it"):
                read()


@pytest.fixture
def bucket() -> Iterator[str]:
    """A store of objects, in the memory of this process."""
    yield "memory://bucket/birds"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_store_elsewhere_is_the_same_store(bucket: str, tmp_path: Path) -> None:
    store = spectrum_shards(f"{bucket}/", NAMES)
    assert (store.ids(), list(store.files()), store.local_files(tmp_path / "cache")) == (
        set(),
        [],
        [],
    )
    store.append(make_rows([0, 1, 2]))
    store.append(make_rows([2, 3]))
    assert store.folder == bucket and [file.name for file in store.files()] == sorted(
        file.name for file in store.files()
    )
    again = spectrum_shards(bucket, NAMES)
    assert again.ids() == {f"id-{index}" for index in range(4)}
    assert {row["id"]: row for row in again.read().to_pylist()} == {
        row["id"]: row for row in make_rows(range(4))
    }
    assert again.read(["id", "level"]).column_names == ["id", "level"]
    assert again.rows(["id-3", "id-9"], ["level"]) == {"id-3": {"id": "id-3", "level": 30}}
    names = [path.rsplit("/", 1)[1] for path in fsspec.filesystem("memory").find("/bucket/birds")]
    assert sorted(names) == [file.name for file in store.files()]  # nothing beside the shards


def test_shards_from_elsewhere_are_copied_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = spectrum_shards(bucket, NAMES)
    store.append(make_rows([0, 1]))
    first = store.local_files(tmp_path / "cache")
    store.append(make_rows([2]))
    taken: list[str] = []
    get_file = MemoryFileSystem.get_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "get_file",
        lambda self, path, *rest, **named: taken.append(path) or get_file(self, path, *rest),
    )
    files_here = store.local_files(tmp_path / "cache")
    assert len(files_here) == 2 and set(first) < set(files_here) and len(taken) == 1
    assert {
        row["id"] for file in files_here for row in pq.read_table(file, columns=["id"]).to_pylist()
    } == {"id-0", "id-1", "id-2"}


def test_only_the_columns_asked_for_travel(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of a store of large pictures are read without the pictures."""
    store = spectrum_shards(bucket, NAMES)
    noise = np.random.default_rng(0).bytes(3_000_000)
    store.append([{**row, "image": {"bytes": noise, "path": None}} for row in make_rows([0])])
    travelled = 0
    read = MemoryFile.read

    def counted(self: MemoryFile, *arguments: Any) -> bytes:
        nonlocal travelled
        data = read(self, *arguments)
        travelled += len(data)
        return data

    monkeypatch.setattr(MemoryFile, "read", counted)
    assert store.ids() == {"id-0"}
    assert 0 < travelled < 300_000


def test_a_path_as_a_url_is_a_folder(tmp_path: Path) -> None:
    store = spectrum_shards(f"file://{tmp_path}/spectrum", NAMES)
    store.append(make_rows([0]))
    assert store.folder == tmp_path / "spectrum" and store.remote is None
    assert spectrum_shards(tmp_path / "spectrum", NAMES).ids() == {"id-0"}


def test_where_renaming_is_all_there_is_a_shard_is_put_beside_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dir://` shows files while they are written. A write that fails leaves no shard."""
    monkeypatch.setattr(
        store_module,
        "open_filesystem",
        lambda folder: (DirFileSystem(str(folder), fsspec.filesystem("file")), "birds"),
    )
    store = spectrum_shards(tmp_path, NAMES)
    store.append(make_rows([0, 1]))
    assert store.ids() == {"id-0", "id-1"}
    monkeypatch.setattr(
        DirFileSystem,
        "mv",
        lambda *_, **__: (_ for _ in ()).throw(TimeoutError("the line is down")),
    )
    with pytest.raises(StoreError, match=r"cannot write to .*the line is down"):
        store.append(make_rows([2]))
    assert store.ids() == {"id-0", "id-1"}


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s4://bucket/birds", "Protocol not known: s4"),
        ("gdrive://bucket", "installed"),
        ("memory://", "names no folder"),
        ("github://birds", ""),
    ],
)
def test_a_place_that_cannot_be_opened_is_told(url: str, told: str) -> None:
    with pytest.raises(StoreError, match=rf"store '{url}' cannot be opened: .*{told}"):
        spectrum_shards(url, NAMES)


def test_what_a_store_elsewhere_fails_with_is_told(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(Exception):
        """An error that is no OSError, as some packages have."""

    def refuse(*_: Any, **__: Any) -> None:
        raise Refused("no such key")

    store = spectrum_shards(bucket, NAMES)
    store.append(make_rows([0]))
    for name, call in (
        ("pipe_file", lambda: store.append(make_rows([1]))),
        ("glob", store.files),
        ("open", store.ids),
    ):
        with (
            monkeypatch.context() as patched,
            pytest.raises(StoreError, match="Refused: no such key"),
        ):
            patched.setattr(MemoryFileSystem, name, refuse)
            call()
    assert store.ids() == {"id-0"}
