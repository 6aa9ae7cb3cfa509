"""`discl retrieve`: real images of an unlabelled archive, chosen by CLIP."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..checkpoints import checkpoint_digest
from ..data import ImageTable, digest_image
from ..data.retrieval import (
    Candidates,
    assign_classes,
    choose_images,
    first_of_each,
    mean_embeddings,
)
from ..errors import BrokenFileError, DataError, RunError
from ..escaping import one_line
from ..levels import REAL
from ..recipe.methods import RETRIEVED
from ..run_folder import paths
from ..run_folder.earlier import restore_table
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer, describe_scorer, find_clip
from ..utils.atomic import make_folder
from ..utils.console import progress
from ..utils.counts import count_be, count_of, list_some
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_table
from .pending import filter_texts
from .prepare_data import split_rows_of

logger = get_logger(__name__)

PART = 2048
"""Images whose embeddings are in one file of the cache."""
BATCH = 32
"""Images that are decoded at a time."""
SHOWN = 5
COLUMNS = ("digest", "width", "height", "problem", "embedding")


def retrieve(run: Run) -> Path:
    """Chooses images of `retrieval.archive` for the classes with hard images: `retrieved.parquet`.

    Each image of the archive belongs to the class that CLIP finds it closest to. The closest ones
    are taken, `retrieval.per_image` for each hard image. Copies of images of the data set, and of
    one another, are left out. Returns the path; the run folder if no method trains on such images.

    Raises DataError for an archive without a readable image, or without a usable one for any class.
    """
    config = run.recipe.retrieval
    if config is None or not needs_archive(run):
        return run.folder
    path, archive = run.path(paths.RETRIEVED), _archive(run)
    texts, threshold = filter_texts(run), _threshold(run)
    listed = read_table(run.path(paths.DATA), ["split", "id", "label", "digest"])
    hard = read_table(run.path(paths.HARD), ["id", "label"])
    key = digest(
        describe_scorer(run.recipe.filter.checkpoint, texts),
        [config.per_image, threshold, config.image_weight, config.copy_cosine],
        listed.to_pydict(),
        hard.to_pydict(),
        archive.ids,
    )
    if restore_table(path, key, "images of the archive are chosen again"):
        return path
    scorer = ClipScorer(run.recipe.filter.checkpoint, texts, run.device)
    found = _read_archive(run, scorer, archive)
    usable, counts = _usable(
        found, set(listed["digest"].to_pylist()), threshold, config.copy_cosine
    )
    hard_counts = np.bincount(hard["label"].to_numpy(), minlength=len(texts))
    wanted = {
        label: max(1, round(config.per_image * int(hard_counts[label])))
        for label in np.flatnonzero(hard_counts).tolist()
    }
    rows = choose_images(found.candidates, usable, wanted)
    _report(run, found, rows, wanted, counts)
    write_table(_table(archive, found, rows), path, key)
    return path


def needs_archive(run: Run) -> bool:
    """Whether a method trains on images of the archive."""
    return any(method.images == RETRIEVED for method in run.recipe.methods.values())


def retrieved_images(run: Run, threshold: float | None = None) -> ImageTable:
    """The chosen images of the archive with their classes; a column `level` holds 100.

    - `threshold`: take those of at least this clip_similarity only.

    Raises RunError where the archive has changed since they were chosen.
    """
    chosen = read_table(run.path(paths.RETRIEVED))
    if threshold is not None:
        chosen = chosen.filter(pc.greater_equal(chosen["clip_similarity"], threshold))
    archive, rows = _archive(run), chosen["row"].to_numpy()
    names, contents = chosen["id"].to_pylist(), chosen["digest"].to_pylist()
    inside = not len(rows) or 0 <= rows.min() <= rows.max() < len(archive)
    table = archive.select(rows) if inside else archive
    if table.ids != names and len(rows):
        raise RunError(_changed(run, "its images are no longer those"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(lambda row: digest_image(table.image(row)), range(len(rows))))
    for name, before, now in zip(names, contents, digests, strict=True):
        if before != now:
            raise RunError(_changed(run, f"image '{name}' is no longer the one"))
    plain = table.rows.remove_columns("label").add_column("label", chosen["label"].to_numpy())
    plain = plain.add_column("level", np.full(len(rows), REAL))
    return replace(table, rows=plain, class_names=run.train.class_names)


def _changed(run: Run, what: str) -> str:
    return (
        f"the archive has changed: {what} that {run.path(paths.RETRIEVED)} lists. Delete this file "
        f"and {run.path(paths.CACHE)}, and run the same command again."
    )


def _archive(run: Run) -> ImageTable:
    """The archive; deep grey images are decoded as those of the data set."""
    return replace(run.archive, depth=run.train.depth)


def _threshold(run: Run) -> float:
    config = run.recipe.retrieval
    stated = None if config is None else config.threshold
    return run.recipe.filter.threshold if stated is None else stated


@dataclass(frozen=True)
class _Found:
    """What was read of the archive, one row per image.

    - `digests`: of the contents; empty for unreadable images.
    - `sizes`: (width, height), int64 `[images, 2]`.
    - `problems`: of unreadable images, with their ids.
    """

    digests: list[str]
    sizes: np.ndarray
    problems: list[str]
    candidates: Candidates


def _read_archive(run: Run, scorer: ClipScorer, archive: ImageTable) -> _Found:
    """Embeds the data set and the archive. Raises DataError if no image of it is readable."""
    config, train = run.recipe.retrieval, run.train
    known = {split: _embed_split(run, scorer, split) for split in run.tables}
    prototypes = mean_embeddings(known["train"], train.labels, len(train.class_names))
    everything = np.concatenate(list(known.values()))
    address = [] if config is None else [config.archive, config.format]
    texts = scorer.text_embeddings.float().cpu().numpy()
    digests: list[str] = []
    problems: list[str] = []
    sizes, candidates = [], []
    with progress("embed the archive", len(archive)) as advance:
        for part in _embed(run, scorer, archive, address, advance):
            digests += part["digest"].to_pylist()
            problems += filter(None, part["problem"].to_pylist())
            sizes.append(np.stack([part[name].to_numpy() for name in ("width", "height")], 1))
            candidates.append(
                assign_classes(
                    _vectors(part),
                    texts,
                    prototypes,
                    everything,
                    image_weight=0.0 if config is None else config.image_weight,
                )
            )
    if len(problems) == len(archive):
        raise DataError(
            f"no image of the archive can be read:\n{_listing(problems)}",
            argument="retrieval.archive",
        )
    return _Found(digests, np.concatenate(sizes), problems, Candidates.joined(candidates))


def _embed_split(run: Run, scorer: ClipScorer, split: str) -> np.ndarray:
    """Embeddings of the images of a split, `[images, dimensions]`. Raises DataError."""
    table = run.tables[split]
    contents = split_rows_of(run, split, ["digest"])["digest"].to_pylist()
    with progress(f"embed {split} images", len(table)) as advance:
        parts = list(_embed(run, scorer, table, contents, advance))
    for part in parts:
        for problem in filter(None, part["problem"].to_pylist()):
            raise DataError(problem)
    return np.concatenate([_vectors(part) for part in parts])


def _listing(problems: list[str]) -> str:
    more = [f"  … and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
    return "\n".join([*(f"  {one_line(each)}" for each in problems[:SHOWN]), *more])


def _embed(
    run: Run,
    scorer: ClipScorer,
    table: ImageTable,
    identity: list[str],
    advance: Callable[[int], None],
) -> Iterator[pa.Table]:
    """Digests, sizes and embeddings of a table, part by part; parts of the cache are reused.

    - `identity`: tells the table from others with the same ids.
    """
    folder = make_folder(run.path(paths.CACHE) / paths.CACHED_EMBEDDINGS)
    clip = checkpoint_digest(find_clip(scorer.address))
    depth = None if table.depth is None else table.depth.plain()
    for first in range(0, len(table), PART):
        rows = range(first, min(first + PART, len(table)))
        key = digest(clip, identity, depth, [table.ids[row] for row in rows])
        file = folder / paths.CACHED_PART.format(key)
        part = _cached(file, key, len(rows), scorer) if file.exists() else None
        if part is None:
            part = _embed_part(scorer, table, rows, advance)
            write_table(part, file, key)
        else:
            advance(len(rows))
        yield part


def _cached(file: Path, key: str, rows: int, scorer: ClipScorer) -> pa.Table | None:
    """A part of the cache; None for a broken one."""
    try:
        part = read_table(file, COLUMNS, key=key)
    except BrokenFileError:
        return None
    fits = part.schema.field("embedding").type == _vector_type(scorer) and len(part) == rows
    return part if fits and not any(part[name].null_count for name in COLUMNS) else None


def _vector_type(scorer: ClipScorer) -> pa.DataType:
    return pa.list_(pa.float32(), scorer.text_embeddings.shape[1])


def _vectors(part: pa.Table) -> np.ndarray:
    """The embeddings of a part, float32 `[images, dimensions]`; zeros for unreadable images."""
    column = part["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(part), -1)


def _embed_part(
    scorer: ClipScorer, table: ImageTable, rows: range, advance: Callable[[int], None]
) -> pa.Table:
    vectors = np.zeros((len(rows), scorer.text_embeddings.shape[1]), np.float32)
    digests, problems = [""] * len(rows), [""] * len(rows)
    sizes = np.zeros((len(rows), 2), np.int64)

    def load(row: int) -> Image.Image | DataError:
        try:
            return table.image(row)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(rows), BATCH):
            loaded = list(pool.map(load, rows[first : first + BATCH]))
            pictures: dict[int, Image.Image] = {}
            for place, each in enumerate(loaded, first):
                if isinstance(each, DataError):
                    problems[place] = str(each)
                else:
                    pictures[place] = each
                    digests[place], sizes[place] = digest_image(each), each.size
            if pictures:
                vectors[list(pictures)] = scorer.embed(list(pictures.values()))
            advance(len(loaded))
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    columns = [digests, sizes[:, 0], sizes[:, 1], problems, flat]
    return pa.table(dict(zip(COLUMNS, columns, strict=True)))


def _usable(
    found: _Found, known: set[str], threshold: float, copy_cosine: float
) -> tuple[np.ndarray, dict[str, int]]:
    """(images that may be chosen, bool `[images]`; how many of the others there are, by reason).

    - `known`: contents of the images of the data set.
    """
    readable = np.asarray([bool(each) for each in found.digests])
    copied = np.asarray([each in known for each in found.digests])
    reasons = {
        "unreadable": ~readable,
        "equal to images of the data set": copied,
        "twice in the archive": ~first_of_each(found.digests),
        f"near copies of images of the data set (cosine {copy_cosine:g} or more)": (
            found.candidates.nearest >= copy_cosine
        ),
        f"below clip_similarity {threshold:g}": found.candidates.similarity < threshold,
    }
    usable, counts = np.ones(len(readable), bool), {}
    for reason, applies in reasons.items():
        counts[reason] = int((usable & applies).sum())
        usable &= ~applies
    return usable, {reason: count for reason, count in counts.items() if count}


def _report(
    run: Run, found: _Found, rows: np.ndarray, wanted: dict[int, int], counts: dict[str, int]
) -> None:
    """Logs what was chosen and what is missing. Raises DataError if nothing was chosen."""
    names, total = run.train.class_names, len(found.digests)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    of_them = f" ({left_out})" if left_out else ""
    if not len(rows):
        raise DataError(
            f"none of {count_of(total, 'image')} of the archive can be used for a class with hard "
            f"images{of_them}. Name an archive with such images, lower retrieval.threshold, or "
            "raise retrieval.copy_cosine if the near copies are none.",
            argument="retrieval.archive",
        )
    chosen = np.bincount(found.candidates.labels[rows], minlength=len(names))
    logger.info(
        f"retrieve: {len(rows):,} of {count_of(sum(wanted.values()), 'wanted image')} chosen from "
        f"{total:,} of the archive{of_them}"
    )
    if found.problems:
        broken = count_be(len(found.problems), "image")
        logger.warning(f"{broken} unreadable in the archive:\n{_listing(found.problems)}")
    short = {label: count for label, count in wanted.items() if chosen[label] < count}
    if short:
        listed = [
            f"{names[label]} {chosen[label]:,} of {count:,}" for label, count in short.items()
        ]
        logger.warning(
            f"the archive has too few images of {count_of(len(short), 'class', 'classes')} "
            f"({list_some(listed, SHOWN)}): theirs are drawn more often, and the real images of "
            "a class without any"
        )


def _table(archive: ImageTable, found: _Found, rows: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "id": [archive.ids[row] for row in rows.tolist()],
            "row": rows,
            "label": found.candidates.labels[rows],
            "digest": [found.digests[row] for row in rows.tolist()],
            "width": found.sizes[rows, 0],
            "height": found.sizes[rows, 1],
            "clip_similarity": pa.array(found.candidates.similarity[rows], pa.float32()),
        }
    )
