"""Some images of a spectrum, made beside a run and measured, for `discl pilot` and `discl levels`.

All trials of a run share one store in `pilot/`. An image that two of them need is made, scored and
embedded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ..checkpoints import checkpoint_digest
from ..data import ImageTable, decode_image
from ..recipe import Recipe
from ..run_folder import paths
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..spectrum.clip_filter import ClipScorer, find_clip
from ..spectrum.embeddings import embedding_shards, valid_embeddings
from ..spectrum.level_selection import Measured
from ..utils.atomic import make_folder
from ..utils.console import progress
from ..utils.hashing import digest
from ..utils.stored import read_table, write_table
from .filter import filter_spectrum
from .generate import generate
from .pending import filter_texts
from .plan import make_plan
from .prepare_data import split_rows_of

OF_RUN = (paths.DATA, paths.PROMPTS, paths.SETTINGS, paths.CAPTIONS, paths.ADAPTED)
"""Files that a trial takes from the run that it is made for."""
OF_TRIALS = (paths.SPECTRUM, paths.SCORES, paths.CACHE)
"""Folders that all trials of a run share."""
EMBEDDED_AT_ONCE = 512


def trial_run(run: Run, recipe: Recipe, folder: Path) -> Run:
    """A run in `folder` with another recipe, and with the data and texts of `run`.

    Every image has one try, and the filter uses the threshold whatever the rule of the recipe is,
    because a trial measures which fraction is kept.
    """
    store = None if run.recipe.runtime.store is None else str(run.location(paths.PILOT))
    changes = {
        "spectrum": recipe.spectrum.model_copy(
            update={"tries": 1, "wanted": None, "budget": None, "early_rejection": None}
        ),
        "filter": recipe.filter.model_copy(update={"rule": "threshold", "band": None}),
        "runtime": recipe.runtime.model_copy(update={"store": store}),
        "loop": None,
    }
    return replace(
        run,
        recipe=recipe.model_copy(update=changes),
        folder=folder,
        overrides={
            **{name: run.path(name) for name in OF_RUN},
            **{name: run.folder / paths.PILOT / name for name in OF_TRIALS},
        },
    )


def choose_sample(ids: Sequence[str], labels: Sequence[int], count: int) -> list[int]:
    """Up to `count` rows, ascending, taken from the classes in turn.

    The choice depends on ids alone. A larger `count` only adds rows.
    """
    of_class: dict[int, list[int]] = {}
    for row in sorted(range(len(ids)), key=lambda row: digest("survey", ids[row])):
        of_class.setdefault(labels[row], []).append(row)
    turns = [
        (turn, place, row)
        for place, rows in enumerate(of_class.values())
        for turn, row in enumerate(rows)
    ]
    return sorted(row for _, _, row in sorted(turns)[:count])


def set_sample(trial: Run, sample: pa.Table) -> None:
    """Makes the folder of a trial and lists its hard images there.

    - `sample`: rows of the run's `hard.parquet`.
    """
    make_folder(trial.folder)
    write_table(sample, trial.path(paths.HARD))


def make_images(trial: Run) -> None:
    """Makes and scores the images of a trial that the shared store lacks."""
    make_plan(trial, for_training=False)
    generate(trial)
    filter_spectrum(trial)


class Embedder:
    """CLIP embeddings of the images of a run and of its trials, each computed once and stored.

    - `run`: the run that the trials belong to.
    - `address`: a CLIP; default that of the filter.
    """

    def __init__(self, run: Run, address: str | None = None) -> None:
        address = address or run.recipe.filter.checkpoint
        self.run = run
        self.scorer = ClipScorer(address, filter_texts(run), run.device)
        self.clip = checkpoint_digest(find_clip(address))
        self.width = self.scorer.text_embeddings.shape[1]
        self.store = embedding_shards(run.folder / paths.PILOT / paths.CACHED_EMBEDDINGS)
        self.store.clear_unfinished()
        self.known: dict[str, np.ndarray] = {}
        for clip, ids, vectors in valid_embeddings(self.store.read()):
            if clip == self.clip and vectors.shape[1] == self.width:
                self.known |= dict(zip(ids, vectors, strict=True))
        self._digests = cache(self._read_digests)

    def real(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Embeddings of these rows of a split, float32 `[rows, width]`, of length 1."""
        contents = [self._digests(split)[row] for row in rows]

        def load(places: Sequence[int]) -> list[Image.Image]:
            return [self.run.checked_image(rows[place], contents[place], split) for place in places]

        return self._embed(contents, load)

    def synthetic(self, trial: Run, ids: Sequence[str]) -> np.ndarray:
        """Embeddings of images of the store, float32 `[ids, width]`, of length 1."""

        def load(places: Sequence[int]) -> list[Image.Image]:
            images = stored_images(trial, [ids[place] for place in places])
            return [decode_image(images[row]["image"]) for row in range(len(places))]

        return self._embed(ids, load)

    def texts(self, labels: Sequence[int]) -> np.ndarray:
        """Embeddings of the plain text of each label, float32 `[labels, width]`, of length 1."""
        rows = [self.scorer.labels.index(label) for label in labels]
        return self.scorer.text_embeddings[rows].cpu().numpy()

    def _embed(
        self, ids: Sequence[str], load: Callable[[Sequence[int]], list[Image.Image]]
    ) -> np.ndarray:
        first_of = {name: place for place, name in reversed(list(enumerate(ids)))}
        missing = [place for name, place in first_of.items() if name not in self.known]
        if missing:
            with progress("embed", len(missing)) as advance:
                for start in range(0, len(missing), EMBEDDED_AT_ONCE):
                    part = sorted(missing)[start : start + EMBEDDED_AT_ONCE]
                    found = self.scorer.embed(load(part))
                    self._add([ids[place] for place in part], found)
                    advance(len(part))
        empty = np.empty((0, self.width), np.float32)
        return np.stack([self.known[name] for name in ids]) if len(ids) else empty

    def _add(self, ids: Sequence[str], found: np.ndarray) -> None:
        self.known |= dict(zip(ids, found, strict=True))
        self.store.append(
            [
                {"id": name, "clip": self.clip, "embedding": values.tolist()}
                for name, values in zip(ids, found, strict=True)
            ]
        )

    def _read_digests(self, split: str) -> list[str]:
        return split_rows_of(self.run, split, ["digest"])["digest"].to_pylist()


@dataclass(frozen=True)
class Similarities:
    """Raw CLIP cosines of a trial.

    - `measured`: those of the synthetic images by level.
    - `real_text`: those of the sampled hard images with the text of their class, `[sources]`.
    - `pair`: mean cosine of two real images of one class; None if no class has two.
    """

    measured: Mapping[int, Measured]
    real_text: np.ndarray
    pair: float | None


def measure_similarities(trials: Sequence[Run], embedder: Embedder) -> Similarities:
    """Cosines of the images of trials that belong together, with their sources and texts."""
    train = embedder.run.train
    places = {name: row for row, name in enumerate(train.ids)}
    sources: list[dict[str, Any]] = []
    cosines: dict[int, list[tuple[float, float]]] = {}
    for trial in trials:
        hard = read_table(trial.path(paths.HARD), ["id", "label"]).to_pylist()
        sources += hard
        rows = [places[row["id"]] for row in hard]
        real = dict(zip((row["id"] for row in hard), embedder.real("train", rows), strict=True))
        verdicts = read_table(trial.path(paths.FILTER)).to_pylist()
        made = embedder.synthetic(trial, [row["id"] for row in verdicts])
        for row, embedding in zip(verdicts, made, strict=True):
            image = float(embedding @ real[row["source_id"]])
            cosines.setdefault(row["level"], []).append((image, row["clip_similarity"]))
    measured = {
        level: Measured(*(np.asarray(each, np.float64) for each in zip(*pairs, strict=True)))
        for level, pairs in sorted(cosines.items())
    }
    rows = [places[row["id"]] for row in sources]
    real_text = embedder.real("train", rows) * embedder.texts([row["label"] for row in sources])
    return Similarities(measured, real_text.sum(1), _pair_similarity(train, rows, embedder))


def _pair_similarity(train: ImageTable, rows: Sequence[int], embedder: Embedder) -> float | None:
    """Mean cosine of these images with another one of their class; None if no class has two."""
    of_class: dict[int, list[int]] = {}
    for row in sorted(range(len(train)), key=lambda row: digest("pair", train.ids[row])):
        of_class.setdefault(int(train.labels[row]), []).append(row)
    partners = {}
    for row in rows:
        others = of_class[int(train.labels[row])]
        if len(others) > 1:
            partners[row] = others[(others.index(row) + 1) % len(others)]
    if not partners:
        return None
    mine = embedder.real("train", list(partners))
    theirs = embedder.real("train", list(partners.values()))
    return float((mine * theirs).sum(1).mean())
