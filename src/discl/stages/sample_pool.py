"""Real, hard and kept images of a run as one pool of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from ..audit.table import LEAKED
from ..curriculum.policies import make_policy
from ..curriculum.rounds import hold_out_sources, round_starts
from ..curriculum.sampling import Pool
from ..data import ImageTable
from ..levels import REAL
from ..recipe import Method
from ..recipe.loop import learner_of
from ..recipe.methods import RETRIEVED
from ..run_folder import paths
from ..run_folder.images import stored_images
from ..run_folder.overrides import BY_HAND
from ..run_folder.run import Run
from ..spectrum.clip_filter import judge
from ..spectrum.plan import Request
from ..utils.stored import broken, read_table
from .prepare_data import split_rows_of
from .retrieve import retrieved_images


def kept_images(run: Run, threshold: float | None = None) -> Dataset:
    """The synthetic images that the filter kept, in the order of the plan, memory-mapped.

    Columns are id, image, label, level and source_id, and round in a loop of several rounds. Label
    and level are the plan's, because a picture may have been stored under another numbering of the
    classes.

    - `threshold`: take images of at least this clip_similarity instead, whatever the filter says.
      What was decided by hand remains, and images that copy held-out ones are never taken.
    """

    def is_kept(verdict: Mapping[str, Any]) -> bool:
        if threshold is None:
            return bool(verdict["keep"])
        leaks = verdict["reason"].startswith(LEAKED)
        if verdict["reason"] == BY_HAND:
            return bool(verdict["keep"])
        return not leaks and judge(verdict["clip_similarity"], threshold).keep

    path, names = run.path(paths.FILTER), ["label", "level", "source_id"]
    table = read_table(path)
    if learner_of(run.recipe) is not None:
        _check_rounds(run, table, path)
        names.append("round")
    verdicts = [each for each in table.to_pylist() if is_kept(each)]
    if run.recipe.spectrum.makes_none:
        return Dataset.from_dict({name: [] for name in ("id", "image", *names)})
    images = stored_images(run, [verdict["id"] for verdict in verdicts])
    for name in names:
        images = images.add_column(name, [verdict[name] for verdict in verdicts])
    return images


def _check_rounds(run: Run, table: pa.Table, path: Path) -> None:
    """Raises BrokenFileError if the table of a loop does not say which round made an image."""
    if "round" not in table.column_names:
        raise broken(path, "has no column 'round', so it is of a run without a loop")
    rounds = table["round"].to_numpy()
    last = run.recipe.loop.rounds - 1 if run.recipe.loop else 0
    if len(rounds) and not (rounds.min() >= 0 and rounds.max() <= last):
        raise broken(path, f"names rounds outside of 0 to {last}")
    if (np.diff(rounds) < 0).any():
        raise broken(path, "does not name the rounds in their order")


def added_images(run: Run, method: Method) -> Dataset | ImageTable:
    """The images that a method adds to the real training images, as its threshold has them."""
    if method.images == RETRIEVED:
        return retrieved_images(run, method.threshold)
    return kept_images(run, method.threshold)


def rows_of(images: Dataset | ImageTable) -> Dataset:
    """The rows of added images, with the columns id, label and level."""
    return images.rows if isinstance(images, ImageTable) else images


def added_aspects(run: Run, images: Dataset | ImageTable) -> np.ndarray:
    """Width / height of added images, float64 `[images]`."""
    if not isinstance(images, ImageTable):
        return made_aspects(run, images["source_id"][:])
    listed = read_table(run.path(paths.RETRIEVED), ["id", "width", "height"])
    aspects = (listed["width"].to_numpy() / listed["height"].to_numpy()).tolist()
    aspect_of = dict(zip(listed["id"].to_pylist(), aspects, strict=True))
    return np.array([aspect_of[name] for name in images.ids], np.float64)


def hard_rows(run: Run) -> np.ndarray:
    """Which training images are hard: bool `[real]`."""
    hard = set(read_table(run.path(paths.HARD), ["id"])["id"].to_pylist())
    return np.asarray([name in hard for name in run.tables["train"].ids])


def real_aspects(run: Run, split: str) -> np.ndarray:
    """Width / height of the images of a split, float64 `[images]`."""
    sizes = split_rows_of(run, split, ["width", "height"])
    return sizes["width"].to_numpy() / sizes["height"].to_numpy()


def aspects_for(run: Run, splits: Sequence[str], requests: Sequence[Request]) -> np.ndarray | None:
    """Width / height of real images of some splits, then of requested ones, float64 `[images]`.

    None where training takes squares, which need none.
    """
    if run.recipe.train.resize_mode != "whole":
        return None
    made = np.array([request.width / request.height for request in requests], np.float64)
    return np.concatenate([*(real_aspects(run, split) for split in splits), made])


def made_aspects(run: Run, source_ids: Sequence[str]) -> np.ndarray:
    """Width / height of the synthetic images of these sources, float64 `[images]`."""
    columns = ["source_id", "width", "height"]
    plan = read_table(run.path(paths.PLAN), columns)
    sources, widths, heights = (plan[name].to_pylist() for name in columns)
    shapes = dict(zip(sources, zip(widths, heights, strict=True), strict=True))
    return np.array([shapes[name][0] / shapes[name][1] for name in source_ids], np.float64)


def no_images() -> Dataset:
    """An empty data set of synthetic images."""
    return Dataset.from_dict({"image": [], "label": [], "level": []})


def make_pool(real: ImageTable, hard: np.ndarray, synthetic: Dataset) -> Pool:
    """Every sample that training may draw: the rows of `real`, then those of `synthetic`.

    - `hard`: which real images are hard, bool `[real]`.
    - `synthetic`: columns `label`, `level` and, if known, `source_id`: the id of the real image.
    """
    count, extra = len(real), len(synthetic)
    return Pool(
        labels=np.concatenate([real.labels, np.asarray(synthetic["label"], np.int64)]),
        levels=np.concatenate([np.full(count, REAL), np.asarray(synthetic["level"], np.int64)]),
        synthetic=np.repeat([False, True], [count, extra]),
        hard=np.concatenate([hard, np.zeros(extra, bool)]),
        class_names=real.class_names,
        sources=np.concatenate([np.arange(count), _sources_of(real, synthetic)]),
    )


def join_tables(tables: Sequence[ImageTable], images: Dataset, labels: np.ndarray) -> ImageTable:
    """The images of tables of one data set, then synthetic ones.

    - `images`: columns `id` and `image`; `labels`: int64 `[images]`.
    """
    parts = [each.rows.select_columns(["id", "image", "label"]) for each in tables]
    made = images.select_columns(["id", "image"]).add_column("label", labels)
    return replace(tables[0], rows=concatenate_datasets([*parts, made.cast(parts[0].features)]))


def _sources_of(real: ImageTable, synthetic: Dataset) -> np.ndarray:
    """Rows of the real images that the synthetic ones were made from, int64 `[synthetic]`.

    See `Pool.sources`.
    """
    if "source_id" not in synthetic.column_names:
        return np.full(len(synthetic), -1)
    row_of = {name: row for row, name in enumerate(real.ids)}
    first = len(real) + len(synthetic)
    named = synthetic["source_id"][:]
    return np.array(
        [-1 if name is None else row_of.setdefault(name, first + len(row_of)) for name in named],
        np.int64,
    )


def held_out_sources(run: Run) -> list[str]:
    """Ids of the hard images that a loop's learner is measured on instead of trained."""
    loop = run.recipe.loop
    if loop is None or loop.rounds == 1:
        return []
    if not make_policy(loop.policy, loop.rounds, run.allow_plugins).measures:
        return []
    hard = read_table(run.path(paths.HARD), ["id", "label"]).to_pylist()
    return hold_out_sources([(row["id"], row["label"]) for row in hard], loop.hold_out)


def grow_pool(run: Run, learner: str, pool: Pool, synthetic: Dataset) -> Pool:
    """The pool of a loop's learner: images of later rounds come later, some hard ones never.

    - `synthetic`: the synthetic images of the pool, with their `round`.
    """
    loop, rows = run.recipe.loop, {name: row for row, name in enumerate(run.train.ids)}
    starts = round_starts(
        loop.rounds if loop else 1, run.recipe.training(learner).curriculum_epochs
    )
    since = np.zeros(len(pool.labels), np.int64)
    since[pool.synthetic] = [starts[number] for number in synthetic["round"][:]]
    apart = [rows[name] for name in held_out_sources(run) if name in rows]
    held_out = pool.held_out | np.isin(pool.sources, apart)
    return replace(pool, since=since, held_out=held_out)
