"""Findings as a table, `audit.parquet`, and what the filter takes from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from ..errors import BrokenFileError
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_table
from .findings import Finding

logger = get_logger(__name__)

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("kind", "split", "id")),
        *((name, pa.int64()) for name in ("label", "level")),
        ("value", pa.float64()),
        *((name, pa.string()) for name in ("other_split", "other")),
    ]
)
LEAKED = "leakage: "
"""Beginning of the filter's reason for an image that copies a held-out one."""
AGAIN = "Run `discl audit` again."
OUTDATED = f"No image is dropped for it. {AGAIN}"


def key_of_real(data: Path) -> str:
    """Digest of the real images in `data.parquet` and their splits, which an audit belongs to."""
    return digest(read_table(data, ["split", "id", "digest"]).to_pydict())


def write_findings(path: Path, findings: Sequence[Finding], key: str) -> None:
    """Writes the findings.

    - `key`: digest of the real images.
    """
    write_table(pa.Table.from_pylist([asdict(each) for each in findings], SCHEMA), path, key)


def read_findings(path: Path, key: str | None = None, advice: str = AGAIN) -> list[Finding]:
    """The findings of a file. Raises BrokenFileError, also where they are of other real images."""
    return [
        Finding(**row) for row in read_table(path, SCHEMA.names, key=key, advice=advice).to_pylist()
    ]


def leaked_images(path: Path, key: str) -> dict[str, str]:
    """`{id: reason}` of the synthetic images that copy a held-out image; empty without an audit.

    - `key`: digest of the real images. An audit of others is not used, with a warning.
    """
    if not path.exists():
        return {}
    try:
        findings = read_findings(path, key, OUTDATED)
    except BrokenFileError as error:
        logger.warning(str(error))
        return {}
    return {
        finding.id: f"{LEAKED}copies the {finding.other_split} image '{finding.other}'"
        for finding in findings
        if finding.kind == "leakage"
    }
