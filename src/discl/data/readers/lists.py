"""Lists as other programs write them: separators, encodings.

pandas guesses types, and so changes labels. Arrow reads the files; this module detects separator
and encoding, and keeps labels as they are written.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from ...errors import DataError
from .labels import labels_as_written
from .opening import BYTE_ORDER_MARKS, TO_UTF8, plain_file, read_text

HEADING_BYTES = 65_536
JSON_BLOCK = 16_000_000
DELIMITERS = (",", "\t", ";", "|")
LIST_SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl", ".parquet")


def read_list(file: Path, label: str, wanted: Collection[str]) -> tuple[pa.Table, bool]:
    """(the table in a list; whether its column `label` holds whole numbers as texts).

    Labels of a CSV are read as written: "001", true and 2024-01-01 stay texts. Columns without a
    name are dropped.

    - `label`: name of the column of labels.
    - `wanted`: columns that may not occur twice.

    Raises DataError for a file that is no table, and for a duplicate column among `wanted`.
    """
    if file.suffix.lower() == ".parquet":
        return tidy(_read_parquet(file), file, wanted), False
    if file.suffix.lower() == ".jsonl":
        return tidy(_read_json_lines(file), file, wanted), False
    listed = tidy(read_csv(file, texts=(label,)), file, wanted)
    if label not in listed.column_names:
        return listed, False
    written = listed.column(label).cast(pa.string())
    values, whole = labels_as_written(written, str(file))
    return listed.set_column(listed.column_names.index(label), label, values), whole


def read_csv(file: Path, texts: Collection[str] = ()) -> pa.Table:
    """The table in a CSV file, UTF-8 or UTF-16 with a byte order mark.

    Quoted cells may hold new lines. The delimiter is the most frequent one of comma, tab,
    semicolon and bar in the heading.

    - `texts`: columns that are read as texts; others get the type of their values.

    Raises DataError for a file that is no table, or of another encoding.
    """
    heading, source = _open(file)
    if len(heading) >= HEADING_BYTES // 4 and not set("\r\n") & set(heading):
        raise DataError(
            f"{file} cannot be read as a table: its first line, the names of the columns, has no "
            f"end within {len(heading):,} characters."
        )
    usual = "\t" if file.suffix.lower() in {".tsv", ".tab"} else ","
    try:
        delimiter = _delimiter(heading, usual)
        names = next(csv.reader(io.StringIO(heading), delimiter=delimiter), [])
        types = {name: pa.string() for name in names if name.strip() in texts}
        table = pacsv.read_csv(
            source,
            parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(column_types=types),
        )
        foreign = [
            name
            for name, kind in zip(table.column_names, table.schema.types, strict=True)
            if pa.types.is_binary(kind)
        ]
    except UnicodeDecodeError:
        foreign = ["names of the columns"]
    except (OSError, pa.ArrowException, csv.Error) as error:
        if "invalid UTF8" not in str(error):
            raise DataError(f"{file} cannot be read as a table: {error}") from error
        foreign = [*texts]
    if foreign:
        raise DataError(f"{file} is not UTF-8 ({', '.join(foreign)}); {TO_UTF8}.")
    return table.rename_columns([name.strip() for name in table.column_names])


def read_schema(file: Path) -> pa.Schema:
    """The columns of a list, with their types. Raises DataError as `read_list` does."""
    if file.suffix.lower() != ".parquet":
        return read_list(file, "label", ())[0].schema
    try:
        return pq.read_schema(plain_file(file))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read as a table: {error}") from error


def heading_of(file: Path) -> str:
    """The first line of a text file."""
    return next(iter(_open(file)[0].splitlines()), "")


def _open(file: Path) -> tuple[str, pa.NativeFile]:
    """(the beginning of a text file, the whole of it as UTF-8)."""
    try:
        with plain_file(file).open("rb") as stream:
            start = stream.read(HEADING_BYTES)
        if any(start.startswith(mark) for mark, name in BYTE_ORDER_MARKS if name != "utf-8-sig"):
            text = read_text(file)
            return text[:HEADING_BYTES], pa.BufferReader(text.removeprefix("\ufeff").encode())
        heading = start.decode("utf-8-sig", errors="replace")
        return heading, pa.OSFile(str(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _delimiter(heading: str, usual: str) -> str:
    line = next((line for line in heading.splitlines() if line.strip()), "")
    plain = "".join(line.split('"')[::2])
    return max((usual, *DELIMITERS), key=plain.count)


def _read_json_lines(file: Path) -> pa.Table:
    _, source = _open(file)
    text = source.read()
    text = text.removeprefix(b"\xef\xbb\xbf")
    lines = b"\n".join(line for line in text.splitlines() if line.strip())
    try:
        table = pajson.read_json(
            pa.BufferReader(lines), pajson.ReadOptions(use_threads=False, block_size=JSON_BLOCK)
        )
        table.validate(full=True)
        return table.rename_columns([name.strip() for name in table.column_names])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read as lines of JSON: {error}") from error


def _read_parquet(file: Path) -> pa.Table:
    try:
        table = pq.read_table(plain_file(file), partitioning=None)
        table.validate(full=True)
        return table
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read as a table: {error}") from error


def tidy(table: pa.Table, file: Path, wanted: Collection[str]) -> pa.Table:
    """The columns with a unique name, categories decoded.

    Raises DataError for a duplicate column among `wanted`.
    """
    twice = {name for name in table.column_names if name and table.column_names.count(name) > 1}
    if clash := sorted(twice & set(wanted)):
        raise DataError(
            f"{file}: the column {' and the column '.join(clash)} occurs twice; rename one of the "
            "two."
        )
    kept = [
        number
        for number, name in enumerate(table.column_names)
        if name and "\0" not in name and name not in twice
    ]
    return decode_categories(table.select(kept))


def decode_categories(table: pa.Table) -> pa.Table:
    """The table with its dictionary columns (categories of pandas) decoded."""
    for number, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = table.column(number).cast(field.type.value_type)
            table = table.set_column(number, field.name, plain)
    return table
