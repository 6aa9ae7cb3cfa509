"""The images of a run as columns of plain numbers, which the page sorts, filters and counts."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..audit.table import LEAKED
from ..errors import BrokenFileError
from ..run_folder import paths
from ..run_folder.overrides import BY_HAND, Override
from ..utils.stored import read_table

VERDICTS = (
    "not judged",
    "kept",
    "below the threshold",
    "copies a held-out image",
    "dropped by another rule",
    "kept by hand",
    "dropped by hand",
)
UNJUDGED, KEPT, BELOW, LEAK, OTHER, KEPT_BY_HAND, DROPPED_BY_HAND = range(len(VERDICTS))
HAND = ("none", "keep", "drop")
DIGITS = 32
"""Characters of an id and of a digest."""
MOST_METHODS = 32
DTYPES = {"uint8": "u8", "uint16": "u16", "uint32": "u32", "float32": "f32"}
LISTED = ("id", "source_id", "label", "level", "seed", "attempt")


@dataclass(frozen=True)
class MethodRule:
    """Which synthetic images the training of a method may draw.

    - `levels`: in per cent; empty if it draws none.
    - `threshold`: in the place of the filter's, or None.
    - `scale`: synthetic images in an epoch per source.
    """

    name: str
    levels: Sequence[int]
    threshold: float | None
    scale: float

    def draws(self, level: np.ndarray, score: np.ndarray, verdict: np.ndarray) -> np.ndarray:
        """bool `[rows]`."""
        kept = np.isin(verdict, (KEPT, KEPT_BY_HAND))
        if self.threshold is not None:
            decided = np.isin(verdict, (LEAK, KEPT_BY_HAND, DROPPED_BY_HAND))
            kept = np.where(decided, kept, score >= self.threshold)
        return kept & np.isin(level, self.levels)


@dataclass(frozen=True)
class Rows:
    """The stored images that the plan or the filter names, by source, seed, try and level.

    - `ids`: of the images; `reasons`: the filter's.
    - `columns`: by name, `[rows]` each, as `/api/columns` has them; without hand and tag.
    - `prompts`: texts.
    - `source_ids`, `source_digests`: of the sources; the digest is empty where it is not known.
    - `source_labels`: their classes; −1 where they are not known.
    - `planned`: images that plan and filter name, stored or not.
    - `others`: stored images that they do not name.
    - `same_labels`: whether the store numbers the classes as the plan does.
    """

    ids: list[str]
    reasons: list[str]
    columns: Mapping[str, np.ndarray]
    prompts: list[str]
    source_ids: list[str]
    source_digests: list[str]
    source_labels: np.ndarray
    planned: frozenset[str]
    others: int
    same_labels: bool
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of each id."""
        return {name: row for row, name in enumerate(self.ids)}

    def siblings(self, row: int) -> range:
        """Rows of the same source."""
        sources = self.columns["source"]
        first, last = (np.searchsorted(sources, sources[row], side) for side in ("left", "right"))
        return range(int(first), int(last))


def read_rows(folder: Path, stored: pa.Table, scores: pa.Table) -> Rows:
    """The images of a run folder that are in its store. Broken tables become `problems`.

    - `stored`: id, label and prompt of the images in the store.
    - `scores`: id, scorer and clip_similarity.
    """
    problems: list[str] = []
    listed = _listed(folder, problems)
    hard = _read(folder / paths.HARD, ["id", "digest", "label"], problems)
    names = hard["id"].to_pylist()
    place = _one(pc.index_in(listed["id"], value_set=_one(stored["id"])))
    present = pc.is_valid(place)
    planned = frozenset(listed["id"].to_pylist())
    others = len(stored) - pc.sum(present.cast(pa.int64())).as_py() if len(listed) else len(stored)
    listed, place = listed.filter(present), place.drop_null()
    same = pc.equal(_one(stored["label"]).take(place), _one(listed["label"]))
    found = listed["source_id"].to_pylist()
    source_of = {name: number for number, name in enumerate(dict.fromkeys([*names, *found]))}
    unknown = len(source_of) - len(names)
    source = np.asarray([source_of[name] for name in found], np.uint32)
    keys = {name: _numbers(listed[name]) for name in ("level", "attempt", "seed", "label")}
    order = np.lexsort((keys["level"], keys["attempt"], keys["seed"], source))
    prompts = _one(stored["prompt"]).take(place).fill_null("").dictionary_encode()
    score = _numbers(listed["clip_similarity"], np.float32)
    score = np.where(np.isnan(score), _known_scores(listed["id"], scores), score)
    columns = {
        "class": keys["label"].astype(np.uint32),
        "level": keys["level"].astype(np.uint8),
        "seed": np.minimum(keys["seed"], 2**16 - 1).astype(np.uint16),
        "try": np.minimum(keys["attempt"], 2**16 - 1).astype(np.uint16),
        "prompt": prompts.indices.to_numpy().astype(np.uint32),
        "source": source,
        "score": score.astype(np.float32),
        "verdict": _numbers(listed["verdict"]).astype(np.uint8),
    }
    return Rows(
        listed["id"].take(order).to_pylist(),
        listed["reason"].take(order).to_pylist(),
        {name: np.ascontiguousarray(column[order]) for name, column in columns.items()},
        prompts.dictionary.to_pylist(),
        list(source_of),
        [*hard["digest"].to_pylist(), *[""] * unknown],
        np.concatenate([_numbers(hard["label"]), np.full(unknown, -1)]),
        planned,
        others,
        len(listed) > 0 and pc.all(pc.fill_null(same, False)).as_py(),
        problems,
    )


def _listed(folder: Path, problems: list[str]) -> pa.Table:
    """Rows of the filter's table, then those of the plan that it does not have."""
    judged = ["clip_similarity", "keep", "reason"]
    verdicts = _read(folder / paths.FILTER, [*LISTED, *judged], problems)
    plan = _read(folder / paths.PLAN, [*LISTED], problems)
    plan = plan.filter(pc.invert(pc.is_in(plan["id"], verdicts["id"].combine_chunks())))
    verdicts = verdicts.append_column("verdict", _verdicts(verdicts["keep"], verdicts["reason"]))
    count = len(plan)
    plan = (
        plan.append_column("clip_similarity", pa.array(np.full(count, np.nan, np.float32)))
        .append_column("reason", pa.array([""] * count, pa.string()))
        .append_column("verdict", pa.array(np.zeros(count, np.int64)))
    )
    both = pa.concat_tables([verdicts.select(plan.column_names), plan])
    return both.combine_chunks()


def _verdicts(keep: pa.ChunkedArray, reason: pa.ChunkedArray) -> pa.ChunkedArray:
    """Places in `VERDICTS`, as int64."""
    by_hand = pc.equal(reason, BY_HAND)
    cases = [
        pc.and_(keep, by_hand),
        keep,
        by_hand,
        pc.starts_with(reason, "clip_similarity"),
        pc.starts_with(reason, LEAKED),
    ]
    conditions = pa.StructArray.from_arrays(
        [pc.fill_null(case, False).combine_chunks() for case in cases],
        [str(number) for number in range(len(cases))],
    )
    places = (KEPT_BY_HAND, KEPT, DROPPED_BY_HAND, BELOW, LEAK, OTHER)
    found = pc.case_when(conditions, *(pa.scalar(place, pa.int64()) for place in places))
    return pa.chunked_array([found])


EMPTY = {
    **dict.fromkeys(("id", "source_id", "reason", "digest"), pa.string()),
    **dict.fromkeys(("label", "level", "seed", "attempt"), pa.int64()),
    "clip_similarity": pa.float32(),
    "keep": pa.bool_(),
}
"""Columns of the tables that are read."""


def _read(path: Path, columns: list[str], problems: list[str]) -> pa.Table:
    """The columns of a table with these types; empty if it is missing or broken."""
    schema = pa.schema([(name, EMPTY[name]) for name in columns])
    if not path.exists():
        return schema.empty_table()
    try:
        table = read_table(path, columns).replace_schema_metadata().select(columns).cast(schema)
    except (BrokenFileError, pa.ArrowInvalid) as error:
        problems.append(str(error))
        return schema.empty_table()
    return table


def _numbers(column: pa.ChunkedArray, kind: Any = np.int64) -> np.ndarray:
    return column.to_numpy().astype(kind)


def _known_scores(ids: pa.ChunkedArray, scores: pa.Table) -> np.ndarray:
    """Scores of the ids where one scorer has made all scores; NaN otherwise."""
    if not len(scores) or pc.count_distinct(scores["scorer"]).as_py() != 1:
        return np.full(len(ids), np.nan, np.float32)
    place = pc.index_in(_one(ids), value_set=_one(scores["id"]))
    return _one(scores["clip_similarity"]).take(place).to_numpy(zero_copy_only=False)


def hand_columns(
    rows: Rows, overrides: Mapping[str, Override]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(`hand` u8, `tag` u16, the tags) of the rows; tag 0 is none."""
    hand, tag = np.zeros(len(rows), np.uint8), np.zeros(len(rows), np.uint16)
    tags = {"": 0}
    for name, override in overrides.items():
        row = rows.row_of.get(name)
        if row is None:
            continue
        hand[row] = HAND.index(override.verdict)
        if len(tags) < 2**16:
            tag[row] = tags.setdefault(override.tag, len(tags))
    return hand, tag, list(tags)


def pack_columns(head: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> bytes:
    """The head as JSON and the columns, as `/api/columns` sends them.

    - `columns`: u8, u16, u32 or f32 `[rows]` or `[rows, width]`.
    """
    described, parts, offset = [], [], 0
    for name, column in columns.items():
        data = np.ascontiguousarray(column, column.dtype.newbyteorder("<")).tobytes()
        described.append(
            {
                "name": name,
                "dtype": DTYPES[column.dtype.name],
                "offset": offset,
                "length": column.size,
                "width": column.shape[1] if column.ndim > 1 else 1,
            }
        )
        padding = -len(data) % 8
        parts += [data, bytes(padding)]
        offset += len(data) + padding
    text = json.dumps({**head, "columns": described}, ensure_ascii=True).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return b"".join([struct.pack("<I", len(text)), text, *parts])


def as_letters(texts: Sequence[str]) -> np.ndarray:
    """ASCII of ids or digests, u8 `[texts, 32]`; shorter ones end with zeros."""
    letters = np.zeros((len(texts), DIGITS), np.uint8)
    if not texts:
        return letters
    fixed = np.asarray([text.encode("ascii", "replace")[:DIGITS] for text in texts], f"S{DIGITS}")
    return fixed.view(np.uint8).reshape(-1, DIGITS)


def _one(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
