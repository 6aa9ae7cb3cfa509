"""The difficulty of synthetic images to a cross-fitted classifier of the real ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ..data.hardness import assign_folds, even_probability
from ..errors import arguments_named
from ..run_folder import paths
from ..run_folder.earlier import restore_table
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..spectrum.plan import Request
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_table, write_table
from .prepare_data import listed_units, split_rows_of
from .sample_pool import aspects_for, join_tables
from .train import fit_classifier

logger = get_logger(__name__)


def class_probabilities(run: Run, requests: Sequence[Request]) -> dict[str, float]:
    """`{id: probability of the image's class}`, if all classes were equally likely.

    An image is scored by a classifier whose training did not see its source. The classifiers are
    those of `hard.rule: probability`: `hard.folds` of them, trained for `hard.epochs`. The value is
    nan for a class without an image in the other folds. Results are kept in `difficulty.parquet`.

    - `requests`: images that are stored.
    """
    rule, path = run.recipe.hard, run.path(paths.DIFFICULTY)
    listed = read_table(run.path(paths.DATA), ["split", "digest", "label"]).to_pydict()
    ids, train = [request.id for request in requests], run.recipe.train.model_dump(mode="json")
    labels = [request.label for request in requests]
    key = digest(ids, labels, train, [rule.folds, rule.epochs], listed)
    if not restore_table(path, key, "the classifiers run again"):
        probability = _probabilities(run, requests) if ids else np.zeros(0)
        write_table(pa.table({"id": ids, "probability": probability}), path, key)
    found = read_table(path, key=key).to_pydict()
    if len(known := [each for each in found["probability"] if not np.isnan(each)]):
        quantiles = np.quantile(known, [0.05, 0.25, 0.5, 0.75, 0.95])
        shown = ", ".join(f"{value:.3f}" for value in quantiles)
        logger.info(
            "filter: probabilities of their classes at 5, 25, 50, 75 and 95 % of the images: "
            f"{shown}"
        )
    if unknown := len(ids) - len(known):
        logger.warning(
            f"filter: {unknown} images are of classes too small to be judged and are kept"
        )
    return dict(zip(found["id"], found["probability"], strict=True))


def _probabilities(run: Run, requests: Sequence[Request]) -> np.ndarray:
    """Probability of the class of each image, float64 `[images]`."""
    rule, real, train = run.recipe.hard, run.train, run.recipe.train
    units = listed_units(split_rows_of(run, "train"))  # copies of one picture are in one fold
    with arguments_named(folds="hard.folds"):
        folds = assign_folds(real.ids, real.labels.tolist(), units, rule.folds)
    fold_of = dict(zip(real.ids, folds.tolist(), strict=True))
    labels = np.array([request.label for request in requests])
    images = stored_images(run, [request.id for request in requests])
    joint, aspects = join_tables([real], images, labels), aspects_for(run, ["train"], requests)
    result = np.full(len(requests), np.nan)
    own = np.array([fold_of[request.source_id] for request in requests])
    for fold in np.unique(own).tolist():
        fitted, scored = np.flatnonzero(folds != fold), np.flatnonzero(own == fold)
        counts = np.bincount(real.labels[fitted], minlength=len(real.class_names))
        probabilities = fit_classifier(
            joint,
            fitted.tolist(),
            (len(real) + scored).tolist(),
            train,
            epochs=rule.epochs,
            device=run.device,
            aspects=aspects,
        )
        even = even_probability(probabilities, counts)[np.arange(len(scored)), labels[scored]]
        result[scored] = np.where(counts[labels[scored]] > 0, even, np.nan)
    return result
