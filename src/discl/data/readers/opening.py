"""Opens untrusted files, with limits and clear errors.

Written by hand because `open` waits at a pipe, and `json` fails on deep nesting with a crash of its
own.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from ...errors import DataError

SHOWN_CHARACTERS = 120
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
BYTE_ORDER_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)
TO_UTF8 = "save it as UTF-8, for example with iconv -f latin1 -t utf-8"


def whole_path(written: str) -> Path:
    """The absolute path that a text names; `~` is the home folder.

    Raises DataError for the home of an unknown user.
    """
    try:
        return Path(written).expanduser().absolute()
    except RuntimeError as error:
        raise DataError(f"{written!r} names a home folder that does not exist.") from error


def plain_file(file: Path) -> Path:
    """The path itself. Raises DataError unless it is a plain file: a pipe may never end."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for fits, name in KINDS if fits(mode)), "of another kind")
        raise DataError(f"{file} is {kind}; a plain file is expected there. Move it away.")
    return file


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises DataError for an unreadable file, and for another encoding.
    """
    try:
        data = plain_file(file).read_bytes()
        encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); {TO_UTF8}.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    - `where`: the file, for messages.

    Raises DataError for invalid JSON, and for nesting that is too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply to be read as JSON.") from error
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {str(error)[:SHOWN_CHARACTERS]}") from error


def read_json(file: Path) -> Any:
    """The value in a JSON file. Raises DataError as `read_text` and `parse_json` do."""
    return parse_json(read_text(file), str(file))
