"""Chooses the images that a page shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..data import ImageTable
from ..run_folder import paths
from ..spectrum.clip_filter import judge
from ..utils.stored import read_table
from .run_summary import read_pictures

MAX_CLASSES, MAX_SOURCES, MAX_SEEDS, MAX_LEVELS = 6, 2, 3, 8
MAX_PICTURES, MAX_BYTES = 200, 2_000_000
LARGEST_SIDE = 160


@dataclass(frozen=True)
class Picture:
    """A synthetic image and the filter's verdict.

    - `uri`: None if the store lacks it.
    - `side`: longer side in pixels.
    """

    level: int
    uri: str | None
    side: int
    clip_similarity: float
    keep: bool
    reason: str


@dataclass(frozen=True)
class Row:
    """One seed of a source, with pictures in the order of the shown levels."""

    seed: int
    prompt: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Example:
    """A hard image and part of its spectrum."""

    source_id: str
    class_name: str
    class_count: int
    size: tuple[int, int]
    uri: str
    rows: tuple[Row, ...]

    @property
    def bytes(self) -> int:
        """Size of its pictures on the page."""
        return len(self.uri) * len(self.rows) + sum(
            len(picture.uri or "") for row in self.rows for picture in row.pictures
        )


@dataclass(frozen=True)
class Gallery:
    """The shown levels, from high to low, and the examples."""

    levels: tuple[int, ...]
    examples: tuple[Example, ...]


class Pictured(Protocol):
    """A run whose examples are shown: rows of `hard.parquet`, plan, verdicts and class counts."""

    @property
    def hard(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def plan(self) -> pa.Table: ...

    @property
    def verdicts(self) -> pa.Table: ...

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def class_counts(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Trials:
    """Trials of one spectrum, of `discl levels` or `discl pilot`, as the part of a run to show.

    - `folders`: one for each trial.
    - `threshold`: the filter's for the verdicts; None: those that the trials have.
    """

    folders: Sequence[Path]
    class_names: Sequence[str]
    class_counts: np.ndarray
    threshold: float | None = None

    @cached_property
    def hard(self) -> list[dict[str, Any]]:
        columns = ["id", "label"]
        tables = [read_table(folder / paths.HARD, columns) for folder in self.folders]
        return pa.concat_tables(tables).to_pylist()

    @cached_property
    def plan(self) -> pa.Table:
        return pa.concat_tables(read_table(folder / paths.PLAN) for folder in self.folders)

    @cached_property
    def verdicts(self) -> pa.Table:
        found = pa.concat_tables(read_table(folder / paths.FILTER) for folder in self.folders)
        if self.threshold is None:
            return found
        similarities = found["clip_similarity"].to_pylist()
        judged = [judge(similarity, self.threshold) for similarity in similarities]
        columns = {
            "keep": [each.keep for each in judged],
            "reason": [each.reason for each in judged],
        }
        for name, values in columns.items():
            place = found.column_names.index(name)
            found = found.set_column(place, name, pa.array(values))
        return found


def make_gallery(
    run: Pictured, train: ImageTable, store: Path | str, most_bytes: int = MAX_BYTES
) -> Gallery:
    """Examples of up to 6 classes, rarest first, with up to 2 images each and the first seeds.

    - `store`: folder of the spectrum's shards.
    - `most_bytes`: what the pictures take at most, nearly.

    There are fewer with many levels or large pictures. The choice depends on ids and counts only,
    never on the pictures.
    """
    levels = spread(sorted(pc.unique(run.plan["level"]).to_pylist(), reverse=True), MAX_LEVELS)
    seeds = sorted(pc.unique(run.plan["seed"]).to_pylist())[:MAX_SEEDS]
    most = max(1, MAX_PICTURES // (len(seeds) * (1 + len(levels)))) if seeds else 0
    sources = choose_sources(run.hard, run.class_counts.tolist())[:most]
    shown = run.plan
    for name, values in (
        ("source_id", [row["id"] for row in sources]),
        ("seed", seeds),
        ("level", levels),
    ):
        shown = shown.filter(_among(shown[name], values))
    requests = {
        (row["source_id"], row["seed"], row["level"]): row
        for row in shown.sort_by("attempt").to_pylist()
    }
    verdicts = {
        row["id"]: row
        for row in run.verdicts.filter(
            _among(run.verdicts["id"], shown["id"].to_pylist())
        ).to_pylist()
    }
    stored = read_pictures(store, shown["id"].to_pylist())
    places = {name: row for row, name in enumerate(train.ids)}

    examples: list[Example] = []
    for source in sources:
        rows = []
        for seed in seeds:
            planned = [
                requests[key]
                for level in levels
                if (key := (source["id"], seed, level)) in requests
            ]
            if planned:
                rows.append(
                    Row(
                        seed,
                        planned[0]["prompt"],
                        tuple(_picture(request, verdicts, stored) for request in planned),
                    )
                )
        real, label = train.image(places[source["id"]]), source["label"]
        example = Example(
            source["id"],
            run.class_names[label],
            int(run.class_counts[label]),
            real.size,
            to_uri(real),
            tuple(rows),
        )
        if examples and sum(each.bytes for each in examples) + example.bytes > most_bytes:
            break
        examples.append(example)
    return Gallery(
        tuple(levels),
        tuple(sorted(examples, key=lambda example: (example.class_count, example.class_name))),
    )


def choose_sources(
    hard: Sequence[Mapping[str, Any]], class_counts: Sequence[int]
) -> list[Mapping[str, Any]]:
    """The hard images to show, by priority: the first of every class, then the second."""
    by_class: dict[int, list[Mapping[str, Any]]] = {}
    for row in hard:
        by_class.setdefault(row["label"], []).append(row)
    chosen = [
        by_class[label]
        for label in spread(
            sorted(by_class, key=lambda label: (class_counts[label], label)), MAX_CLASSES
        )
    ]
    return [rows[turn] for turn in range(MAX_SOURCES) for rows in chosen if turn < len(rows)]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` (> 1) of the items, evenly spread, with both ends."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def to_uri(image: Image.Image) -> str:
    """The picture as a data: URI, at most 160 pixels a side; small ones lossless."""
    picture = image.copy()
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=max(picture.size) <= 64, quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture(
    request: Mapping[str, Any], verdicts: Mapping[str, Any], stored: Mapping[str, Image.Image]
) -> Picture:
    verdict = verdicts[request["id"]]
    image = stored.get(request["id"])
    uri, side = (to_uri(image), max(image.size)) if image is not None else (None, 0)
    return Picture(
        request["level"], uri, side, verdict["clip_similarity"], verdict["keep"], verdict["reason"]
    )


def _among(column: pa.ChunkedArray, values: Sequence[Any]) -> pa.ChunkedArray:
    return pc.is_in(column, pa.array(values, column.type))
