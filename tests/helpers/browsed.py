"""Run folders as generation and filter leave them, written as tables, without models."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from discl.data import digest_image
from discl.recipe import load_recipe
from discl.run_folder import paths
from discl.spectrum.plan import Request, write_plan
from discl.spectrum.store import score_shards, spectrum_shards
from discl.utils.hashing import digest
from discl.utils.stored import write_table, write_text

TYPES = {"u8": "u1", "u16": "<u2", "u32": "<u4", "f32": "<f4"}
HOSTILE = "<img src=x onerror=alert(1)>"


def make_browsed(
    folder: Path,
    *,
    sources: int = 6,
    levels: Sequence[int] = (0, 50),
    seeds: int = 2,
    classes: Sequence[str] = (HOSTILE, "bag", "hat"),
    stored: Sequence[int] | None = None,
    store: str | None = None,
    shard_rows: int = 8,
    side: int = 8,
) -> Path:
    """A run folder in `folder/run` with `sources × levels × seeds` images; returns it.

    Scores rise with the plan from −1 to 1 and the threshold is 0, so the second half is kept.

    - `stored`: rows of the plan that the store has; default all.
    - `store`: value of `runtime.store`.
    """
    run = folder / "run"
    run.mkdir(parents=True)
    hard = _write_data(folder, run, sources, classes, side)
    tree = {
        "name": "browsed",
        "data": {"root": str(folder / "data" / "train.csv")},
        "spectrum": {"checkpoint": "none", "levels": list(levels), "seeds": seeds},
        "filter": {"checkpoint": "none", "threshold": 0.0},
        "methods": {
            "ce": {},
            "all": {"strategy": "all-levels"},
            "text": {"strategy": "text-only", "threshold": 0.5},
        },
        "runtime": {"store": store},
    }
    write_text(run / paths.RECIPE, load_recipe(tree).to_yaml())
    plan = [
        _request(source, level, seed, classes, side)
        for source in hard
        for seed in range(seeds)
        for level in levels
    ]
    write_plan(plan, run / paths.PLAN)
    score = np.linspace(-1, 1, len(plan), dtype=np.float32)
    where = run if store is None else store
    chosen = range(len(plan)) if stored is None else stored
    add_images(run, plan, chosen, classes, where=where, shard_rows=shard_rows)
    rows = [
        {"id": plan[row].id, "scorer": "s", "clip_similarity": float(score[row])} for row in chosen
    ]
    score_shards(_below(where, paths.SCORES)).append(rows)
    write_verdicts(run, plan, score)
    return run


def write_verdicts(run: Path, plan: Sequence[Request], score: np.ndarray) -> None:
    """`filter.parquet` at the threshold 0."""
    keep = score >= 0
    names = ("id", "source_id", "label", "level", "seed", "attempt")
    columns: dict[str, Any] = {name: [getattr(each, name) for each in plan] for name in names}
    columns["clip_similarity"] = pa.array(score, pa.float32())
    columns["keep"] = keep
    columns["reason"] = ["" if each else "clip_similarity low" for each in keep]
    write_table(pa.table(columns), run / paths.FILTER)


def add_images(
    run: Path,
    plan: Sequence[Request],
    rows: Iterable[int],
    classes: Sequence[str],
    *,
    where: Path | str | None = None,
    shard_rows: int = 8,
) -> None:
    """Stores pictures of these rows of the plan; there are 16 different ones."""
    rows = list(rows)
    if not rows:
        return
    shards = spectrum_shards(_below(where or run, paths.SPECTRUM), classes)
    side = plan[0].width
    pictures = [_png(number, side) for number in range(16)]
    for first in range(0, len(rows), shard_rows):
        shards.append(
            [
                {
                    **{name: getattr(plan[row], name) for name in OF_REQUEST},
                    "image": {"bytes": pictures[row % 16], "path": None},
                    "model": "m",
                }
                for row in rows[first : first + shard_rows]
            ]
        )


OF_REQUEST = (
    *("id", "label", "level", "seed", "attempt", "prompt", "negative_prompt"),
    *("source_id", "source_digest", "width", "height"),
)


def decode_columns(answer: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(head, columns) of `/api/columns`; ids and digests as texts."""
    length = struct.unpack("<I", answer[:4])[0]
    head = json.loads(answer[4 : 4 + length])
    columns = {}
    for each in head["columns"]:
        start = 4 + length + each["offset"]
        values = np.frombuffer(answer, TYPES[each["dtype"]], each["length"], start)
        if each["width"] > 1:
            values = values.view(f"S{each['width']}").astype(str)
        columns[each["name"]] = values
    return head, columns


def _below(where: Path | str, name: str) -> Path | str:
    return where / name if isinstance(where, Path) else f"{where}/{name}"


def _png(number: int, side: int) -> bytes:
    pixels = np.random.default_rng(number).integers(256, size=(side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write_data(
    folder: Path, run: Path, sources: int, classes: Sequence[str], side: int
) -> list[dict[str, Any]]:
    """Real images by class as a list, `data.parquet` and `hard.parquet`; returns the hard ones."""
    images = folder / "data"
    images.mkdir()
    rows, listed = [], ["path,label"]
    for number in range(max(sources, len(classes))):
        name = f"{number:05d}.png"
        (images / name).write_bytes(_png(100 + number % 500, side))
        label = number % len(classes)
        listed.append(f"{name},{classes[label]}")
        with Image.open(images / name) as picture:
            content = digest_image(picture.convert("RGB"))
        rows.append({"id": name, "row": number, "label": label, "digest": content})
    (images / "train.csv").write_text("\n".join(listed) + "\n")
    for row in rows:
        row |= {"split": "train", "source_split": "train", "width": side, "height": side}
    write_table(pa.Table.from_pylist(rows), run / paths.DATA)
    hard = [
        {name: row[name] for name in ("id", "label", "digest", "width", "height")}
        for row in rows[:sources]
    ]
    write_table(pa.Table.from_pylist(hard), run / paths.HARD)
    return hard


def _request(
    source: dict[str, Any], level: int, seed: int, classes: Sequence[str], side: int
) -> Request:
    return Request(
        id=digest(source["id"], level, seed),
        source_id=source["id"],
        source_digest=source["digest"],
        label=source["label"],
        level=level,
        seed=seed,
        attempt=0,
        prompt=f"a photo of {classes[source['label']]}",
        negative_prompt="",
        width=side,
        height=side,
    )
