"""Parquet shards of images and scores, on disk or in a bucket.

Shards are written atomically, so a row exists whole or not at all. What is missing is the plan
minus the ids present: a crash, a new level or a second worker need no other bookkeeping. Where two
workers made the same row, it is in two shards and is read once. Scores have shards of their own and
are joined by id. Every shard opens with `datasets.load_dataset("parquet", data_files=...)`.
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
from .filesystems import as_os_errors, open_filesystem, puts_atomically

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SHARDS = paths.SHARD.format("*")
DIGEST = "image_digest"
"""The column with the digest of an image's encoded bytes."""
OPTIONAL = (
    "resize",
    "steps",
    "guidance_from",
    "guidance_to",
    "loras",
    "sampler",
    "timestep_spacing",
    "class_tokens",
    DIGEST,
)
"""Columns of the spectrum that older shards lack."""
READERS = 16
"""Shards of a remote store that are read at once."""
ROWS_PER_GROUP = 256
WRITING: dict[str, Any] = {"row_group_size": ROWS_PER_GROUP, "write_page_checksum": True}
"""How a shard is written: its pages carry checksums."""


class Shards:
    """A folder of Parquet shards with one kind of row.

    - `folder`: a path, or a URL that fsspec knows, such as `s3://bucket/birds`. Credentials come
      from the environment or from fsspec's own configuration.
    - `schema`: of the rows. Images are a column `image`; with a column `image_digest` their bytes
      are checked when they are read.
    - `keys`: the columns that identify a row. The name of a shard is a digest of its rows' keys.
    - `optional`: columns that may be missing in older shards; they are null there.
    - `filled`: columns without nulls, besides the keys. A shard with one is refused.

    Raises StoreError for a URL that fsspec cannot open.
    """

    def __init__(
        self,
        folder: Path | str,
        schema: pa.Schema,
        keys: Sequence[str] = ("id",),
        optional: Sequence[str] = (),
        filled: Sequence[str] = (),
    ) -> None:
        self.schema, self.keys, self.optional = schema, tuple(keys), frozenset(optional)
        self.filled = (*self.keys, *filled)
        self.remote, path = open_filesystem(folder)
        self.folder: Any = Path(path) if self.remote is None else str(folder).rstrip("/")
        self.root = path.rstrip("/")

    # ------------------------------------------------------------ writing

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows as one shard; rows with an image get its digest.

        Raises StoreError, with no partial shard in place, if the disk refuses.
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
            if self.remote is None:
                self._write(table, name)
            else:
                self._put(table, name, self.remote)
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.folder}: {why(error)}. Finished shards are intact; fix the "
                "cause and run the same command again."
            ) from error

    def _write(self, table: pa.Table, name: str) -> None:
        path = Path(self.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            pq.write_table(table, unfinished, **WRITING)

    def _put(self, table: pa.Table, name: str, remote: AbstractFileSystem) -> None:
        shard = io.BytesIO()
        pq.write_table(table, shard, **WRITING)
        with as_os_errors():
            remote.makedirs(self.root, exist_ok=True)
            if puts_atomically(remote):
                remote.pipe_file(f"{self.root}/{name}", shard.getvalue())
                return
            unfinished = f"{self.root}/.{name}.{uuid.uuid4().hex}"
            remote.pipe_file(unfinished, shard.getvalue())
            remote.mv(unfinished, f"{self.root}/{name}")

    def clear_unfinished(self, older_than: float = 3600.0) -> None:
        """Deletes temporary files of killed writers that are older than so many seconds."""
        if self.remote is None:
            clear_unfinished(Path(self.folder), older_than, f".{SHARDS}*")

    # ------------------------------------------------------------ listing

    def files(self) -> Sequence[PurePath]:
        """Finished shards, sorted by name: local paths, or paths in the remote file system."""
        if self.remote is None:
            return sorted(Path(self.folder).glob(SHARDS))
        try:
            with as_os_errors():
                self.remote.invalidate_cache()
                return sorted(
                    PurePosixPath(file) for file in self.remote.glob(f"{self.root}/{SHARDS}")
                )
        except OSError as error:
            raise StoreError(f"cannot list {self.folder}: {error}") from error

    def local_files(self, cache: Path) -> list[str]:
        """Finished shards as local files; those of a remote store are copied to `cache` once."""
        files, remote = self.files(), self.remote
        if remote is None:
            return [str(file) for file in files]
        make_folder(cache)
        clear_unfinished(cache)

        def copy(file: PurePath) -> str:
            path = cache / file.name
            if not path.exists():
                try:
                    with whole(path) as unfinished, as_os_errors():
                        remote.get_file(str(file), str(unfinished))
                except OSError as error:
                    raise StoreError(
                        f"cannot copy {file} of {self.folder} to {cache}: {why(error)}"
                    ) from error
            return str(path)

        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(copy, files))

    # ------------------------------------------------------------ reading

    def ids(self) -> set[str]:
        """Ids of the rows present."""
        return set(self.read(["id"]).column("id").to_pylist())

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of the finished shards, in no particular order.

        A row that two workers made is there twice; use its id.

        - `columns`: those to read; by default all.

        Raises StoreError that names a shard which cannot be read.
        """
        tables = self._map_shards(lambda shard: self.read_columns(shard, columns))
        if not tables:
            if columns is None:
                return self.schema.empty_table()
            return pa.schema([self.schema.field(name) for name in columns]).empty_table()
        return pa.concat_tables(tables, promote_options="default")

    def rows(self, ids: Collection[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
        """`{id: row}` of those present. Only row groups with one of them are read.

        Raises StoreError for an image that has changed since it was written.
        """
        wanted = pa.array(sorted(set(ids)), pa.string())
        names = ["id", *columns]
        if "image" in columns and DIGEST in self.schema.names:
            names.append(DIGEST)

        def select(shard: pq.ParquetFile) -> list[dict[str, Any]]:
            selected = []
            for group in range(shard.num_row_groups):
                present = pc.is_in(self.read_columns(shard, ["id"], [group])["id"], wanted)
                if pc.any(present).as_py():
                    table = self.read_columns(shard, names, [group])
                    selected += table.filter(present).to_pylist()
            check_digests(selected)
            return selected

        return {row["id"]: row for rows in self._map_shards(select) for row in rows}

    def check_images(self, files: Sequence[str], checked: Path) -> None:
        """Raises StoreError for an image that has changed since it was written.

        - `files`: the shards as local files.
        - `checked`: the file that remembers, by size and time, the shards checked before; they are
          not read again.
        """
        try:
            known = read_json(checked) if checked.exists() else {}
        except BrokenFileError:
            known = {}
        stamps = {file: [(stat := Path(file).stat()).st_size, stat.st_mtime_ns] for file in files}
        waiting = [file for file in files if known.get(Path(file).name) != stamps[file]]
        if not waiting or DIGEST not in self.schema.names:
            return
        for file in waiting:
            try:
                self._check_shard(file)
            except StoreError:
                if self.remote is not None:
                    Path(file).unlink(missing_ok=True)  # the copy: the next one is made again
                raise
        make_folder(checked.parent)
        by_name = {Path(file).name: stamp for file, stamp in stamps.items()}
        write_text(checked, json.dumps(by_name), sync=False)

    def _check_shard(self, file: str) -> None:
        with _naming_shard(PurePath(file)):
            shard = _open(file)
            for group in range(shard.num_row_groups):
                table = self.read_columns(shard, ["id", "image", DIGEST], [group])
                check_digests(table.to_pylist(), ROWS_PER_GROUP * group)

    @contextmanager
    def opened(self, file: PurePath) -> Iterator[pq.ParquetFile]:
        """A finished shard, open. Raises StoreError that names it if it cannot be read."""
        with _naming_shard(file):
            if self.remote is None:
                yield _open(file)
                return
            with as_os_errors(), self.remote.open(str(file), "rb", cache_type="none") as stream:
                yield _open(stream)

    def _map_shards(self, read: Callable[[pq.ParquetFile], Any]) -> list[Any]:
        """The result of `read` for each shard."""

        def read_one(file: PurePath) -> Any:
            with self.opened(file) as shard:
                return read(shard)

        files = self.files()
        if self.remote is None:
            return [read_one(file) for file in files]
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(read_one, files))

    def read_columns(
        self,
        shard: pq.ParquetFile,
        columns: Sequence[str] | None = None,
        groups: Sequence[int] | None = None,
    ) -> pa.Table:
        """Columns of a shard (default all), those of the schema with its types.

        Raises ValueError for a file of another kind.
        """
        present = shard.schema_arrow.names
        expected = [name for name in self.schema.names if columns is None or name in columns]
        missing = [name for name in expected if name not in present]
        if unknown := [name for name in missing if name not in self.optional]:
            raise ValueError(f"it is another file, without the column '{unknown[0]}'")
        wanted = [name for name in columns or present if name in present]
        every = range(shard.num_row_groups) if groups is None else groups
        table = shard.read_row_groups(list(every), wanted)
        for name in expected:
            kind = self.schema.field(name).type
            if name in missing:
                table = table.append_column(name, pa.nulls(len(table), kind))
            elif table.schema.field(name).type != kind:
                column = table[name].cast(kind)
                table = table.set_column(table.column_names.index(name), name, column)
        for name in self.filled:
            if name in table.column_names and table[name].null_count:
                raise ValueError(f"it has rows without '{name}'")
        table.validate(full=True)
        return table


# ---------------------------------------------------------------- one shard


def _open(file: PurePath | IO[bytes] | str) -> pq.ParquetFile:
    return pq.ParquetFile(file, page_checksum_verification=True)


def check_digests(rows: Sequence[Mapping[str, Any]], first: int = 0) -> None:
    """Raises ValueError where an image's bytes differ from its `image_digest`, if it has one."""
    for index, row in enumerate(rows):
        expected, image = row.get(DIGEST), row.get("image") or {}
        if expected is not None and digest_bytes(image.get("bytes") or b"") != expected:
            raise ValueError(
                f"the image '{row['id']}' in row {first + index} has changed since it was written, "
                "by a fault of a disk or of a copy"
            )


@contextmanager
def _naming_shard(file: PurePath) -> Iterator[None]:
    """Turns errors of reading into a StoreError that names the shard."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"shard {file} cannot be read: {reason}. Delete it and run the same command again."
        ) from error


# ---------------------------------------------------------------- the stores


def picture_shards(folder: Path | str, columns: Mapping[str, pa.DataType] | None = None) -> Shards:
    """A store of encoded images by id, without importing `datasets`.

    - `columns`: further columns with their types.
    """
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = {"id": pa.string(), "image": image, DIGEST: pa.string(), **(columns or {})}
    return Shards(folder, pa.schema(list(fields.items())), optional=(DIGEST,))


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
            "id": text,
            "image": Image(),
            "label": ClassLabel(names=list(class_names)),
            "level": number,
            "seed": number,
            "attempt": number,
            "prompt": text,
            "negative_prompt": text,
            "source_id": text,
            "source_digest": text,
            "source_width": number,
            "source_height": number,
            "width": number,
            "height": number,
            "model": text,
            "scheduler": text,
            "num_inference_steps": number,
            "guidance_scale": real,
            "dtype": text,
            "encoding": text,
            "resize": text,
            "steps": text,
            "guidance_from": real,
            "guidance_to": real,
            "loras": text,
            "sampler": text,
            "timestep_spacing": text,
            "class_tokens": text,
            DIGEST: text,
        }
    )
    return Shards(folder, features.arrow_schema, optional=OPTIONAL)


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
