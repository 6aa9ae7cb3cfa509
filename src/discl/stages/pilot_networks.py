"""Features of the network that a recipe trains, for `discl pilot`.

What an image is worth depends on what the classifier knows already. A network that is trained from
scratch knows less of a rare class than a CLIP does, so it may gain where a head on the CLIP does
not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from torch import nn

from ..checkpoints import public_name
from ..data import ImageTable
from ..models.classifier import load_classifier
from ..models.heads import HeadInputs
from ..run_folder import paths
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..spectrum.plan import read_plan
from ..training.image_cache import ImageCache
from ..training.inference import predict_logits
from ..utils.counts import count_of
from ..utils.hashing import digest
from ..utils.logging import get_logger
from .classifiers import describe_classifier, starter_of
from .prepare_data import split_rows_of
from .sample_pool import aspects_for, real_aspects
from .train import fit_network

logger = get_logger(__name__)

VERSION = 1
"""Goes up when the same settings give another network."""


def describe_network(run: Run) -> str:
    """What the features of `pilot.features: network` are of."""
    model = run.recipe.train.model
    if _pretrained(run):
        return f"{model.architecture} {public_name(str(model.checkpoint))}"
    epochs = count_of(run.recipe.hard.epochs, "epoch")
    return f"{model.architecture}, {epochs} on the real images"


def _pretrained(run: Run) -> bool:
    model = run.recipe.train.model
    return model.checkpoint is not None and model.pretrained


class Networks:
    """Features by the network of the section `train`.

    A pretrained one is taken as it is. One that starts at random is trained on the real training
    images for `hard.epochs`, for each fold without its hard images. The networks are kept in
    `pilot/networks`, so that a killed pilot goes on.

    - `fold_of`: int64 `[real]`, that of each training image, or -1.

    Raises CheckpointError for a checkpoint that cannot be loaded or has no last layer of its own.
    """

    def __init__(self, run: Run, fold_of: np.ndarray) -> None:
        self.run, self.fold_of = run, fold_of
        train, names = run.recipe.train, run.recipe.prompts.names
        self.config = describe_classifier(train, run.train.class_names, names)
        models = [starter_of(self.config, train, names)()] if _pretrained(run) else self._trained()
        self.towers = [HeadInputs(each).to(run.device).eval() for each in models]

    def real(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Features of these rows of a split.

        `[folds, rows, channels]`; `[rows, channels]` of a pretrained network.
        """
        table, aspects = self.run.tables[split], self._aspects(split)
        chosen = None if aspects is None else aspects[np.asarray(rows)]
        return self._features(table.select(list(rows)), chosen)

    def synthetic(self, trial: Run, ids: Sequence[str]) -> np.ndarray:
        """Features of images of a trial, as those of `real`."""
        requests = {each.id: each for each in read_plan(trial.path(paths.PLAN))}
        aspects = aspects_for(trial, [], [requests[name] for name in ids])
        return self._features(stored_images(trial, list(ids)), aspects)

    def _features(self, images: ImageTable | Dataset, aspects: np.ndarray | None) -> np.ndarray:
        pixels = ImageCache([images], self.config.resize, aspects=aspects)
        rows = np.arange(len(pixels))
        found = [
            predict_logits(each, pixels, rows, self.config, device=self.run.device).numpy()
            for each in self.towers
        ]
        return found[0] if _pretrained(self.run) else np.stack(found)

    def _aspects(self, split: str) -> np.ndarray | None:
        whole = self.run.recipe.train.resize_mode == "whole"
        return real_aspects(self.run, split) if whole else None

    def _trained(self) -> list[nn.Module]:
        """A network for each fold, trained where it is not there yet."""
        run, epochs = self.run, self.run.recipe.hard.epochs
        rows = split_rows_of(run, "train", ["digest", "label"]).to_pydict()
        train = run.recipe.train.model_dump(mode="json")
        key = digest(VERSION, rows, train, epochs, self.fold_of.tolist())
        folders = [
            run.folder / paths.PILOT / paths.NETWORKS / f"{key[:12]}-{fold}"
            for fold in range(max(1, int(self.fold_of.max()) + 1))
        ]
        missing = [folder for folder in folders if not (folder / paths.WEIGHTS).exists()]
        if missing:
            logger.info(
                f"pilot: trains {count_of(len(missing), 'network')} on the real images for "
                f"{count_of(epochs, 'epoch')}; pilot.features: filter needs none"
            )
        aspects = self._aspects("train")
        models = []
        for fold, folder in enumerate(folders):
            if folder in missing:
                seen = np.flatnonzero(self.fold_of != fold)
                table = run.train.select(seen.tolist())
                chosen = None if aspects is None else aspects[seen]
                fit_network(
                    table,
                    ImageCache([table], self.config.resize, aspects=chosen),
                    run.recipe.train,
                    folder,
                    epochs=epochs,
                    device=run.device,
                    fingerprint=key,
                )
            models.append(load_classifier(folder)[0])
        return models
