"""Parquet shards of images and scores, on disk or in a bucket.

A shard is written beside its place and renamed into it, or put whole where only that is possible, so a row exists whole or
not at all. What is missing is the plan minus the ids present: a crash, a new level or a second worker need no other
bookkeeping. Two workers that made the same row leave it twice, in shards of different names; it is read once. Scores lie in
shards of their own and are joined by id. Every shard opens with `datasets.load_dataset("parquet", data_files=...)`.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import BrokenFileError, StoreError
from ..run_folder import paths
from ..utils.atomic import clear_unfinished, make_folder, whole, why
from ..utils.hashing import digest, digest_bytes
from ..utils.stored import read_json, write_text

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PUT_WHOLE = {"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "hf"}
"""fsspec's names of stores in which an object is there whole or not at all. Elsewhere it is put beside its place and renamed."""
INTERPRETED = {
    "reference",
    "simplecache",
    "filecache",
    "blockcache",
    "cached",
    "zip",
    "tar",
    "libarchive",
}
"""fsspec's names of what is no place of its own: a file or a cache that says where the bytes are."""
DIGEST = "image_digest"
"""The column with the digest of a picture's encoded bytes."""
LATER = ("resize", "steps", "guidance_from", "guidance_to", "loras", DIGEST)
"""Columns of the spectrum that older shards lack."""
READERS = 16
"""Shards of a store elsewhere that are read at once."""


class Shards:
    """A folder of Parquet shards of one kind of row, keyed by `id`, or by all the columns `keys`: a shard is called by those of its rows.

    `folder` is a path, or a URL that fsspec knows, such as `s3://bucket/birds`; its keys come from the environment or from
    fsspec's own configuration. Columns in `later` may lack in older shards, where they are null.
    Pages of a shard carry checksums, and a column `image_digest` that of the picture's bytes.
    Raises StoreError where fsspec knows no such place or lacks the package for it.
    """

    def __init__(
        self,
        folder: Path | str,
        schema: pa.Schema,
        keys: Sequence[str] = ("id",),
        later: Sequence[str] = (),
    ) -> None:
        self.schema, self.keys, self.later = schema, tuple(keys), frozenset(later)
        self.elsewhere, path = open_place(folder)
        self.folder: Any = Path(path) if self.elsewhere is None else str(folder).rstrip("/")
        self.root = path.rstrip("/")

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the rows as one shard, those with a picture with its digest.

        Raises StoreError, with nothing half-written in place, if the disk refuses.
        """
        if not rows:
            return
        if DIGEST in self.schema.names:
            rows = [{**row, DIGEST: digest_bytes(row["image"]["bytes"])} for row in rows]
        names = sorted(
            row["id"] if self.keys == ("id",) else [row[key] for key in self.keys] for row in rows
        )
        name = paths.SHARD.format(digest(names))
        table = pa.Table.from_pylist(list(rows), self.schema)
        try:
            if self.elsewhere is None:
                self._write(table, name)
            else:
                self._put(table, name, self.elsewhere)
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.folder}: {why(error)}. Finished shards are intact; mend the cause and run the same command again."
            ) from error

    def _write(self, table: pa.Table, name: str) -> None:
        place = Path(self.folder) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole(place) as unfinished:
            pq.write_table(table, unfinished, row_group_size=256, write_page_checksum=True)

    def _put(self, table: pa.Table, name: str, elsewhere: AbstractFileSystem) -> None:
        shard = io.BytesIO()
        pq.write_table(table, shard, row_group_size=256, write_page_checksum=True)
        with _elsewhere():
            elsewhere.makedirs(self.root, exist_ok=True)
            if PUT_WHOLE.intersection(_protocols(elsewhere)):
                elsewhere.pipe_file(f"{self.root}/{name}", shard.getvalue())
                return
            unfinished = f"{self.root}/.{name}.{uuid.uuid4().hex}"
            elsewhere.pipe_file(unfinished, shard.getvalue())
            elsewhere.mv(unfinished, f"{self.root}/{name}")

    def files(self) -> Sequence[PurePath]:
        """Finished shards, sorted by name: paths on this machine, or in the file system elsewhere."""
        if self.elsewhere is None:
            return sorted(Path(self.folder).glob(paths.SHARD.format("*")))
        try:
            with _elsewhere():
                self.elsewhere.invalidate_cache()
                return sorted(
                    PurePosixPath(file)
                    for file in self.elsewhere.glob(f"{self.root}/{paths.SHARD.format('*')}")
                )
        except OSError as error:
            raise StoreError(f"cannot list {self.folder}: {error}") from error

    def local_files(self, cache: Path) -> list[str]:
        """Finished shards as files on this machine; those of a store elsewhere are copied into `cache`, each once."""
        files, elsewhere = self.files(), self.elsewhere
        if elsewhere is None:
            return [str(file) for file in files]
        make_folder(cache)
        clear_unfinished(cache)

        def copy(file: PurePath) -> str:
            place = cache / file.name
            if not place.exists():
                try:
                    with whole(place) as unfinished, _elsewhere():
                        elsewhere.get_file(str(file), str(unfinished))
                except OSError as error:
                    raise StoreError(
                        f"cannot copy {file} of {self.folder} to {cache}: {why(error)}"
                    ) from error
            return str(place)

        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(copy, files))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of the finished shards, in no particular order; only the columns asked for are read.

        A row that two workers made is there twice: take it by its id.
        """
        tables = self._each(lambda file: self._read_columns(_open(file), columns))
        if not tables:
            return (
                self.schema
                if columns is None
                else pa.schema([self.schema.field(name) for name in columns])
            ).empty_table()
        return pa.concat_tables(tables, promote_options="default")

    def _read_columns(
        self,
        shard: pq.ParquetFile,
        columns: Sequence[str] | None = None,
        groups: Sequence[int] | None = None,
    ) -> pa.Table:
        """Columns of a shard (default all that it has), those of the schema with its types.

        Raises ValueError for a file of another kind.
        """
        there = shard.schema_arrow.names
        own = [name for name in self.schema.names if columns is None or name in columns]
        lacking = [name for name in own if name not in there]
        if strange := [name for name in lacking if name not in self.later]:
            raise ValueError(f"it is another file, without the column '{strange[0]}'")
        wanted = [name for name in columns or there if name in there]
        every = range(shard.num_row_groups) if groups is None else groups
        table = shard.read_row_groups(list(every), wanted)
        for name in own:
            kind = self.schema.field(name).type
            if name in lacking:
                table = table.append_column(name, pa.nulls(len(table), kind))
            elif table.schema.field(name).type != kind:
                column = table[name].cast(kind)
                table = table.set_column(table.column_names.index(name), name, column)
        for name in self.keys:
            if name in table.column_names and table[name].null_count:
                raise ValueError(f"it has rows without '{name}'")
        table.validate(full=True)
        return table

    def ids(self) -> set[str]:
        """Ids of the rows present."""
        return set(self.read(["id"]).column("id").to_pylist())

    def rows(self, ids: Collection[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
        """`{id: row}` of those that are there; only the row groups with one of them are read.

        Raises StoreError where a picture among them has changed since it was written.
        """
        wanted = pa.array(sorted(set(ids)), pa.string())
        names = ["id", *columns]
        if "image" in columns and DIGEST in self.schema.names:
            names.append(DIGEST)

        def chosen(file: PurePath | IO[bytes]) -> list[dict[str, Any]]:
            shard, found = _open(file), []
            for group in range(shard.num_row_groups):
                there = pc.is_in(self._read_columns(shard, ["id"], [group])["id"], wanted)
                if pc.any(there).as_py():
                    table = self._read_columns(shard, names, [group])
                    found += table.filter(there).to_pylist()
            _check_rows(found)
            return found

        return {row["id"]: row for rows in self._each(chosen) for row in rows}

    def check_pictures(self, files: Sequence[str], checked: Path) -> None:
        """Raises StoreError that names a shard and those of its pictures that have changed since they were written.

        `files` are the shards on this machine. Those that were checked before, as the file
        `checked` remembers by size and time, are not read again.
        """
        try:
            known = read_json(checked) if checked.exists() else {}
        except BrokenFileError:
            known = {}
        stamps = {file: [(stat := Path(file).stat()).st_size, stat.st_mtime_ns] for file in files}
        waiting = [file for file in files if known.get(Path(file).name) != stamps[file]]
        if not waiting or DIGEST not in self.schema.names:
            return

        def check(file: str) -> None:
            with self._named(PurePath(file)):
                shard = _open(file)
                for group in range(shard.num_row_groups):
                    table = self._read_columns(shard, ["id", "image", DIGEST], [group])
                    _check_rows(table.to_pylist(), 256 * group)

        for file in waiting:
            try:
                check(file)
            except StoreError:
                if self.elsewhere is not None:
                    Path(file).unlink(missing_ok=True)  # the copy; the next is made from the shard
                raise
        make_folder(checked.parent)
        told = {Path(file).name: stamp for file, stamp in stamps.items()}
        write_text(checked, json.dumps(told), sync=False)

    def clear_unfinished(self, older_than: float = 3600.0) -> None:
        """Deletes what a killed writer left behind, never a finished shard nor, within `older_than` seconds, one that is being written."""
        if self.elsewhere is None:
            clear_unfinished(Path(self.folder), older_than, f".{paths.SHARD.format('*')}*")

    def _each(self, read: Callable[[Any], Any]) -> list[Any]:
        """What `read` makes of each shard, which it is handed as a path or an open file."""

        def one(file: PurePath) -> Any:
            with self._named(file):
                if self.elsewhere is None:
                    return read(file)
                with (
                    _elsewhere(),
                    self.elsewhere.open(str(file), "rb", cache_type="none") as stream,
                ):
                    return read(stream)

        files = self.files()
        if self.elsewhere is None:
            return [one(file) for file in files]
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(one, files))

    @contextmanager
    def _named(self, file: PurePath) -> Iterator[None]:
        """Makes a StoreError that names the shard of whatever reading it fails with."""
        try:
            yield
        except (OSError, ValueError, KeyError, IndexError, TypeError, pa.ArrowException) as error:
            told = " ".join(str(error).split())
            raise StoreError(
                f"shard {file} cannot be read: {told}. Delete it and run the same command again."
            ) from error


def _open(file: PurePath | IO[bytes] | str) -> pq.ParquetFile:
    return pq.ParquetFile(file, page_checksum_verification=True)


def _check_rows(rows: Sequence[Mapping[str, Any]], first: int = 0) -> None:
    """Raises ValueError where the bytes of a picture are not those of its `image_digest`, if it has one."""
    for place, row in enumerate(rows):
        stated, image = row.get(DIGEST), row.get("image") or {}
        if stated is not None and digest_bytes(image.get("bytes") or b"") != stated:
            raise ValueError(
                f"the picture '{row['id']}' in row {first + place} has changed since it was "
                "written, by a fault of a disk or of a copy"
            )


def open_place(folder: Path | str) -> tuple[AbstractFileSystem | None, str]:
    """(file system, path in it) of a folder; None for this machine's own. Raises StoreError for a URL that fsspec cannot open."""
    if isinstance(folder, Path) or "://" not in folder:
        return None, str(folder)
    protocol = folder.partition("://")[0]
    if "::" in folder or protocol in INTERPRETED:
        raise StoreError(
            f"store '{folder}' cannot be opened: it is read through another file, which may lead anywhere; "
            "name one place without '::', such as s3://bucket/birds."
        )
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(folder)
    except Exception as error:  # each package has errors of its own
        raise StoreError(
            f"store '{folder}' cannot be opened: {error}; write a folder, or a URL whose package for fsspec is installed."
        ) from error
    if not path.strip("/"):
        raise StoreError(
            f"store '{folder}' cannot be opened: it names no folder; write one, such as {folder.rstrip('/')}//birds."
        )
    return (None if "file" in _protocols(filesystem) else filesystem), path


def _protocols(filesystem: AbstractFileSystem) -> tuple[str, ...]:
    names = filesystem.protocol
    return (names,) if isinstance(names, str) else tuple(names)


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Whatever a store elsewhere fails with (each package has errors of its own) becomes an OSError, as it would be here."""
    try:
        yield
    except (OSError, pa.ArrowInvalid):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def spectrum_shards(folder: Path | str, class_names: Sequence[str]) -> Shards:
    """The store of synthetic images: encoded image and settings of each.

    - `folder`: a folder, or a URL that fsspec knows, such as `s3://bucket/run`.
    - `class_names`: names of the labels, `[classes]`.

    ```python
    import discl

    store = discl.spectrum_shards("shards", ["Bag", "Trouser"])
    print(len(store.ids()))
    ```
    """
    from datasets import ClassLabel, Features, Image, Value

    text, number, real = Value("string"), Value("int32"), Value("float64")
    features = Features(
        {
            "id": text, "image": Image(), "label": ClassLabel(names=list(class_names)), "level": number, "seed": number, "attempt": number,
            "prompt": text, "negative_prompt": text, "source_id": text, "source_digest": text, "source_width": number,
            "source_height": number,
            "width": number, "height": number, "model": text, "scheduler": text, "num_inference_steps": number, "guidance_scale": real,
            "dtype": text, "encoding": text, "resize": text, "steps": text, "guidance_from": real, "guidance_to": real, "loras": text,
            DIGEST: text,
        }
    )  # fmt: skip
    return Shards(folder, features.arrow_schema, later=LATER)


def score_shards(folder: Path | str) -> Shards:
    """The store of filter scores, keyed by image and scorer (checkpoint and text).

    - `folder`: a folder, or a URL that fsspec knows.

    ```python
    import discl

    scores = discl.score_shards("scores").read().to_pylist()
    ```
    """
    columns = [("id", pa.string()), ("scorer", pa.string()), ("clip_similarity", pa.float32())]
    return Shards(folder, pa.schema(columns), ("id", "scorer"))
