"""Reads and writes the tables, JSON and tensors of a run folder, with checks.

A file that a kill, a power cut or an incomplete copy has damaged raises one error. It names the
file, what is wrong, and what to do. A file of another kind (other columns, other keys) counts as
broken. The checks are written by hand: a schema library would be a dependency for thirty lines, and
its errors would name neither the file nor the fix.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..errors import BrokenFileError, DisclError, RunError
from ..run_folder import paths
from .atomic import whole
from .yaml_text import read_yaml

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

AGAIN = "Delete it and run the same command again."
"""Advice for a broken file that a stage writes."""
BEFORE = "Run the stages before it with `discl run`."
"""Advice for a missing file."""
REPLACED = (
    "Run the same command with --amend: the recipe replaces it, tables are written again, and "
    "images, scores and classifiers that fit are kept."
)
"""Advice for a broken recipe of a run folder."""

LARGEST_TEXT = 512 << 20
"""Bytes of a text file of a run folder, at most."""

DAMAGE: tuple[type[Exception], ...] = (
    ValueError,  # no JSON, no UTF-8, Parquet that is cut off
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RuntimeError,  # tensors that do not fit a network; too deep nesting
    SafetensorError,
)
"""What reading a damaged file raises, besides the errors of Arrow."""
_IMAGES = dict.fromkeys(("id", "digest"), "text") | dict.fromkeys(
    ("label", "width", "height"), "number"
)
TABLES: dict[str, dict[str, str]] = {
    paths.DATA: {"row": "number", "split": "text", "source_split": "text", **_IMAGES},
    paths.HARD: _IMAGES,
    paths.PLAN: {
        **dict.fromkeys(("id", "source_id", "source_digest", "prompt", "negative_prompt"), "text"),
        **dict.fromkeys(("label", "level", "seed", "attempt", "width", "height"), "number"),
    },
    paths.FILTER: {
        **dict.fromkeys(("id", "source_id", "reason"), "text"),
        **dict.fromkeys(("label", "level", "seed", "attempt"), "number"),
        "clip_similarity": "real",
        "keep": "flag",
    },
    paths.AUDIT: {
        **dict.fromkeys(("kind", "split", "id", "other_split", "other"), "text"),
        **dict.fromkeys(("label", "level"), "number"),
        "value": "real",
    },
    paths.ALIA: {"semantic": "flag", "confidence": "number"},
    paths.RETRIEVED: {"row": "number", "clip_similarity": "real", **_IMAGES},
}
"""Required columns of the tables of a run folder, with their kinds; nulls are not allowed."""
OF_ROUNDS = {"round": "number", "why": "text"}
"""Further columns of the plan and of the filter's table in a loop, with their kinds."""


@contextmanager
def reading(path: Path, advice: str = AGAIN) -> Iterator[None]:
    """Turns errors of reading in the block into BrokenFileErrors that name `path`."""
    try:
        yield
    except DisclError:
        raise
    except FileNotFoundError as error:
        remedy = BEFORE if advice == AGAIN else advice
        raise BrokenFileError(f"{path} does not exist. {remedy}", path) from error
    except OSError as error:
        raise broken(path, f"cannot be read: {error.strerror or error}", advice) from error
    except _damage() as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise broken(path, f"is cut off or no file of its kind ({reason})", advice) from error


def _damage() -> tuple[type[Exception], ...]:
    """`DAMAGE` and, once Arrow is loaded, its own errors."""
    arrow = sys.modules.get("pyarrow")
    return DAMAGE if arrow is None else (*DAMAGE, arrow.ArrowException)


def broken(path: Path, what: str, advice: str = AGAIN) -> BrokenFileError:
    """The error for a broken file; `what` says what is wrong with it."""
    return BrokenFileError(f"{path} {what}. {advice}", path)


def read_table(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    key: str | None = None,
    advice: str = AGAIN,
) -> pa.Table:
    """A Parquet table of a run folder, checked against `TABLES` by its file name.

    - `columns`: columns to read; default all.
    - `key`: digest of what the table was made from. A table with another key counts as broken; a
      table without a key is accepted.
    - `advice`: what to do about a broken file.

    Raises BrokenFileError where the file is missing, cut off, or another one.
    """
    import pyarrow.parquet as pq

    needed = TABLES.get(path.name, {})
    with reading(path, advice):
        _check_plain(path, advice)
        wanted = None if columns is None else list(columns)
        table = pq.read_table(
            path, columns=wanted, partitioning=None, page_checksum_verification=True
        )
        table.validate(full=True)
    kinds = {**OF_ROUNDS, **needed}
    further = [name for name in OF_ROUNDS if needed and name in table.column_names]
    for name in [*(wanted or needed), *further]:
        if name not in table.column_names:
            raise broken(path, f"has no column '{name}', so it is another file", advice)
        kind = kinds.get(name)
        if kind is not None and not _is_kind(kind, table.schema.field(name).type):
            got = table.schema.field(name).type
            raise broken(path, f"has a column '{name}' of {got} instead of {kind}s", advice)
        if kind is not None and table[name].null_count:
            raise broken(path, f"has empty cells in column '{name}'", advice)
    stated = (table.schema.metadata or {}).get(b"key")
    if key is not None and stated is not None and stated != key.encode():
        raise broken(path, "was made from something else", advice)
    return table


def _is_kind(name: str, found: pa.DataType) -> bool:
    """Whether a column's type is one of the kinds that `TABLES` names."""
    from pyarrow import types

    if name == "text":
        return types.is_string(found) or types.is_large_string(found)
    is_kind = {"number": types.is_integer, "real": types.is_floating, "flag": types.is_boolean}
    return is_kind[name](found)


def write_table(table: pa.Table, path: Path, key: str | None = None) -> None:
    """Writes a Parquet file atomically; `read_table` compares its `key`."""
    import pyarrow.parquet as pq

    if key is not None:
        stated = {**(table.schema.metadata or {}), b"key": key.encode()}
        table = table.replace_schema_metadata(stated)
    with whole(path) as unfinished:
        pq.write_table(table, unfinished, write_page_checksum=True)


def read_text(path: Path, advice: str = AGAIN) -> str:
    """The text of a UTF-8 file of at most `LARGEST_TEXT` bytes. Raises BrokenFileError."""
    with reading(path, advice):
        _check_plain(path, advice)
        if path.stat().st_size > LARGEST_TEXT:
            raise broken(path, f"is larger than {LARGEST_TEXT >> 20} MB", advice)
        return path.read_text(encoding="utf-8")


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """Writes a UTF-8 file atomically; `sync` as in `atomic.whole`."""
    with whole(path, sync) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_recipe_tree(path: Path) -> dict[str, Any]:
    """The recipe of a run folder as a plain tree. Raises BrokenFileError."""
    try:
        tree = read_yaml(path, error=RunError)
    except RunError as error:
        raise BrokenFileError(f"{str(error).rstrip('.')}. {REPLACED}", path) from error
    return _with_keys(path, tree, (), REPLACED)


def read_json(path: Path, *keys: str, advice: str = AGAIN) -> dict[str, Any]:
    """The mapping in a JSON file, with at least these keys. Raises BrokenFileError."""
    text = read_text(path, advice)
    with reading(path, advice):
        return _with_keys(path, json.loads(text), keys, advice)


def read_lines(path: Path, *keys: str, advice: str = AGAIN) -> list[dict[str, Any]]:
    """The mappings in a JSON lines file, with at least these keys. Raises BrokenFileError."""
    if path.is_file() and not path.stat().st_size:  # nothing was done yet
        return []
    text = read_text(path, advice)
    with reading(path, advice):
        return [_with_keys(path, json.loads(line), keys, advice) for line in text.splitlines()]


def read_tensors(
    path: Path, advice: str = AGAIN, fits: Callable[[Mapping[str, Sequence[int]]], bool] = bool
) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    - `fits`: gets `{name: shape}`; returns whether these are the expected tensors.

    Raises BrokenFileError for other tensors, and where the file is cut off or of another kind.
    """
    shapes, _ = read_header(path, advice)
    if not fits(shapes):
        raise broken(path, "holds other tensors than expected, so it is another file", advice)
    with reading(path, advice), safe_open(path, "pt") as stored:
        return {name: stored.get_tensor(name) for name in shapes}


def read_header(
    path: Path, advice: str = AGAIN
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(`{tensor: shape}`, metadata) of a safetensors file; the tensors are not read.

    Raises BrokenFileError, also for a file that is too short for its tensors.
    """
    with reading(path, advice):
        _check_plain(path, advice)
        with safe_open(path, "pt") as stored:
            shapes = {
                name: tuple(stored.get_slice(name).get_shape())
                for name in stored.keys()  # noqa: SIM118 (not a dict)
            }
            return shapes, dict(stored.metadata() or {})


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically. Raises WriteError; the old file then stays."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as unfinished:
        try:
            save_file(plain, unfinished, dict(metadata) if metadata else None)
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            if found is None and "I/O" not in str(error):
                raise
            reason = re.sub(r" \(os error \d+\)|.*I/O error: ", "", str(error))
            raise OSError(int(found[1]) if found else 5, reason) from error


def _check_plain(path: Path, advice: str) -> None:
    """Raises BrokenFileError for a folder, a pipe or a device where a file is expected."""
    if path.exists() and not path.is_file():
        raise broken(path, "is a folder, not a file" if path.is_dir() else "is no file", advice)
    if path.is_file() and not path.stat().st_size:
        raise broken(path, "is empty", advice)


def _with_keys(path: Path, found: Any, keys: Sequence[str], advice: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise broken(path, "holds no mapping", advice)
    missing = [key for key in keys if key not in found]
    if missing:
        raise broken(path, f"has no {', '.join(missing)}, so it is another file", advice)
    return found
