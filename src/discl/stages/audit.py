"""`discl audit`: copies, leakage, poor images and drifting classes, of real and synthetic images.

What is measured of an image is stored once, in shards of `audit/`, so a killed audit continues.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ..audit.coefficients import SIDE
from ..audit.copies import make_thumbnail
from ..audit.findings import (
    SYNTHETIC,
    Finding,
    Images,
    describe_findings,
    exact_duplicates,
    find_drift,
    find_poor,
    find_synthetic_copies,
    judge_duplicates,
)
from ..audit.measures import Measures, measure_image
from ..audit.table import key_of_real, read_findings, write_findings
from ..data import Unreadable, decode_image, digest_image
from ..errors import DataError, StoreError, arguments_named
from ..escaping import one_line
from ..levels import REAL
from ..run_folder import paths
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..spectrum.clip_filter import find_clip
from ..spectrum.store import Shards
from ..utils.atomic import make_folder, why
from ..utils.console import progress
from ..utils.counts import count_have
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.ordered_map import map_rows
from ..utils.stored import read_table
from .prepare_data import split_rows_of
from .trial import Embedder

logger = get_logger(__name__)

AT_ONCE = 512
"""Images per shard, and the most that a killed audit measures again."""
SIZE = ("width", "height")
FIGURES = tuple(field.name for field in fields(Measures))
MEASURED = pa.schema(
    [
        *(("id", pa.string()), ("content", pa.string()), ("thumbnail", pa.binary(SIDE * SIDE))),
        *((name, pa.int32()) for name in SIZE),
        *((name, pa.float32()) for name in FIGURES),
    ]
)


@dataclass(frozen=True)
class _Part:
    """The images of a split, or the synthetic ones, before they are measured.

    - `keys`: what identifies them in `audit/`: content of real images, request of synthetic ones.
    - `decode`: returns the RGB image of a row; raises DataError or Unreadable.
    """

    split: str
    ids: Sequence[str]
    keys: Sequence[str]
    labels: np.ndarray
    levels: np.ndarray
    sources: Sequence[str]
    decode: Callable[[int], Image.Image]


def audit(run: Run) -> Path:
    """Writes the findings about all images so far to `audit.parquet`; returns its path.

    Nothing is generated. Without synthetic images the real ones are audited.
    """
    limits = run.recipe.audit.limits
    measured = Shards(run.path(paths.AUDITED) / paths.THUMBNAILS, MEASURED, filled=MEASURED.names)
    measured.clear_unfinished()
    findings: list[Finding] = []
    parts = [*_real_parts(run), *_synthetic_part(run)]
    if parts[-1].split == SYNTHETIC:
        with arguments_named("audit.features", address="audit.features"):
            find_clip(run.recipe.audit.features or run.recipe.filter.checkpoint)
    else:
        logger.warning("audit: there is no synthetic image yet, so only real images are audited")
    for part in parts:
        findings += _ensure_measured(measured, part)
    images = _gather(measured, parts)
    real = [each for each in images if each.split != SYNTHETIC]
    total = sum(map(len, real)) ** 2
    with progress("audit: copies among real images", total) as advance:
        duplicates, limits = judge_duplicates(real, limits, advance)
    if limits.copies > run.recipe.audit.copies:
        logger.info(
            f"audit: real images of this data look alike, so copies are those with a similarity of "
            f"{limits.copies:.3f} (audit.copies is {run.recipe.audit.copies:g})"
        )
    findings += duplicates
    for synthetic in images[len(real) :]:
        findings += exact_duplicates([synthetic])
        total = len(synthetic) * sum(map(len, real))
        with progress("audit: copies of real images", total) as advance:
            findings += find_synthetic_copies(synthetic, real, limits, advance)
        findings += _drift(run, images)
    for each in images:
        findings += find_poor(each, limits)
    path = run.path(paths.AUDIT)
    write_findings(path, findings, key_of_real(run.path(paths.DATA)))
    return path


# ---------------------------------------------------------------- the images


def _real_parts(run: Run) -> Iterator[_Part]:
    for split, table in run.tables.items():
        yield _Part(
            split,
            table.ids,
            split_rows_of(run, split, ["digest"])["digest"].to_pylist(),
            table.labels,
            np.full(len(table), REAL),
            [""] * len(table),
            table.image,
        )


def _synthetic_part(run: Run) -> list[_Part]:
    """The images of the plan that the store has, further draws included; none before `generate`."""
    names = ["id", "source_id", "label", "level"]
    listed: dict[str, dict[str, Any]] = {}
    for file in (paths.PLAN, paths.FILTER):
        if run.path(file).exists():
            listed |= {row["id"]: row for row in read_table(run.path(file), names).to_pylist()}
    present = run.spectrum.ids() if listed else set()
    rows = [row for name, row in listed.items() if name in present]
    if not rows:
        return []
    images = stored_images(run, [row["id"] for row in rows])
    hard = read_table(run.path(paths.HARD), ["id", "digest"]).to_pylist()
    content_of = {row["id"]: row["digest"] for row in hard}
    return [
        _Part(
            SYNTHETIC,
            [row["id"] for row in rows],
            [row["id"] for row in rows],
            np.asarray([row["label"] for row in rows], np.int64),
            np.asarray([row["level"] for row in rows], np.int64),
            [content_of.get(row["source_id"], "") for row in rows],
            lambda row: decode_image(images[row]["image"]),
        )
    ]


def _ensure_measured(measured: Shards, part: _Part) -> list[Finding]:
    """Measures the images that are not yet; returns findings about those that cannot be decoded."""
    known = measured.ids()
    waiting = [row for row, key in enumerate(part.keys) if key not in known]
    findings, rows = [], []
    if not waiting:
        return []
    with (
        progress(f"audit: measure {part.split} images", len(waiting)) as advance,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        work = partial(_measure_row, part, waiting)
        for row, found in zip(waiting, map_rows(pool, work, len(waiting)), strict=True):
            advance(1)
            if found is None:
                label, level = int(part.labels[row]), int(part.levels[row])
                findings.append(Finding("unreadable", part.split, part.ids[row], label, level))
                continue
            rows.append({"id": part.keys[row], **found})
            if len(rows) == AT_ONCE:
                measured.append(rows)
                rows = []
        measured.append(rows)
    return findings


def _measure_row(part: _Part, waiting: Sequence[int], number: int) -> dict[str, Any] | None:
    """Columns of `MEASURED`; None for an image that cannot be decoded."""
    try:
        image = part.decode(waiting[number])
    except (DataError, Unreadable) as error:
        logger.warning(f"audit: {part.split} image '{part.ids[waiting[number]]}': {error}")
        return None
    return {
        "content": digest_image(image),
        "thumbnail": make_thumbnail(image).tobytes(),
        "width": image.width,
        "height": image.height,
        **asdict(measure_image(image)),
    }


def _gather(measured: Shards, parts: Sequence[_Part]) -> list[Images]:
    """What was measured of the images of each part, without those that cannot be decoded."""
    table = measured.read([name for name in MEASURED.names if name != "thumbnail"])
    place = {key: row for row, key in enumerate(table["id"].to_pylist())}
    kept = [[row for row, key in enumerate(part.keys) if key in place] for part in parts]
    ends = np.cumsum([0, *map(len, kept)]).tolist()
    keys = [part.keys[row] for part, rows in zip(parts, kept, strict=True) for row in rows]
    thumbnails = _mapped_thumbnails(measured, keys)
    images = []
    for part, rows, first, end in zip(parts, kept, ends, ends[1:], strict=False):
        chosen = table.take([place[key] for key in keys[first:end]])
        images.append(
            Images(
                part.split,
                [part.ids[row] for row in rows],
                chosen["content"].to_pylist(),
                part.labels[rows],
                part.levels[rows],
                [part.sources[row] for row in rows],
                thumbnails[first:end],
                np.stack([chosen[name].to_numpy().astype(np.int64) for name in SIZE], 1),
                {name: chosen[name].to_numpy() for name in FIGURES},
            )
        )
    return images


def _mapped_thumbnails(measured: Shards, keys: Sequence[str]) -> np.ndarray:
    """Thumbnails of the keys, in this order, mapped from a file that has no name.

    Raises StoreError where the disk has no room.
    """
    rows_of: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    pixels = SIDE * SIDE
    try:
        with tempfile.TemporaryFile(dir=make_folder(Path(measured.folder))) as stream:
            for file in measured.files():
                with measured.opened(file) as shard:
                    table = measured.read_columns(shard, ["id", "thumbnail"])
                columns = table["id"].to_pylist(), table["thumbnail"].to_pylist()
                for key, thumbnail in zip(*columns, strict=True):
                    for row in rows_of.get(key, ()):
                        stream.seek(row * pixels)
                        stream.write(thumbnail)
            stream.flush()
            if not keys:
                return np.zeros((0, SIDE, SIDE), np.uint8)
            return np.memmap(stream, np.uint8, "r", shape=(len(keys), SIDE, SIDE))
    except OSError as error:
        raise StoreError(
            f"cannot write to {measured.folder}: {why(error)}; free space and run again."
        ) from error


# ---------------------------------------------------------------- features


def _drift(run: Run, images: Sequence[Images]) -> list[Finding]:
    """Collapsed and wandered classes, in features of some images of each class and level.

    Test images are not looked at.
    """
    settings = run.recipe.audit
    made = images[-1]
    classes = set(made.labels.tolist())
    embedder = Embedder(run, settings.features)
    features, labels = [], []
    for each in images[:-1]:
        if each.split in {"train", "validation"}:
            rows = _some_rows(each, classes, settings.per_class)
            row_of = {name: row for row, name in enumerate(run.tables[each.split].ids)}
            features.append(embedder.real(each.split, [row_of[each.ids[row]] for row in rows]))
            labels.append(each.labels[rows])
    rows = _some_rows(made, classes, settings.per_class)
    return find_drift(
        np.concatenate(features),
        np.concatenate(labels),
        embedder.synthetic(run, [made.ids[row] for row in rows]),
        made.labels[rows],
        levels=made.levels[rows],
        limits=settings.limits,
    )


def _some_rows(images: Images, classes: set[int], most: int) -> list[int]:
    """Up to `most` rows of each class and level, ascending, chosen by the ids alone."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, label in enumerate(images.labels.tolist()):
        if label in classes:
            groups.setdefault((label, int(images.levels[row])), []).append(row)
    return sorted(
        row
        for rows in groups.values()
        for row in sorted(rows, key=lambda row: digest("audit", images.ids[row]))[:most]
    )


# ---------------------------------------------------------------- in words


def describe_audit(run: Run) -> tuple[str, bool]:
    """(the findings as text, whether one is fatal).

    Fatal are synthetic images that copy a held-out image and that the filter has kept.
    """
    path = run.path(paths.AUDIT)
    findings = read_findings(path)
    lines = [f"note: {one_line(line)}" for line in describe_findings(findings)]
    leaked = {finding.id for finding in findings if finding.kind == "leakage"}
    kept = 0
    if run.recipe.audit.leakage == "drop" and run.path(paths.FILTER).exists():
        verdicts = read_table(run.path(paths.FILTER), ["id", "keep"]).to_pylist()
        kept = sum(row["keep"] and row["id"] in leaked for row in verdicts)
    if kept:
        lines.insert(
            0,
            f"error: {count_have(kept, 'kept synthetic image')} the picture of a validation or "
            "test image; run `discl filter`, which drops them, or set audit.leakage: keep.",
        )
    return "\n".join(lines or ["no finding"]), bool(kept)
