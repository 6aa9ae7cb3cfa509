"""What a pilot measures gains with: a small network that starts at random, or a head on a CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..checkpoints import public_name
from ..data import decode_image, to_square
from ..evaluation.proxy import Proxies
from ..evaluation.worth import Fit, fit_linear
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..utils.console import progress
from .prepare_data import split_rows_of
from .trial import Embedder

LARGEST = 64
"""Side of the squares that a network gets, in pixels, at most."""
MORE_REAL = 5
"""A network gets this many times the real images of a head, from which it learns its features."""


class Judge(Protocol):
    """Trains the classifiers of a pilot.

    - `name`: of the classifier, with its article.
    - `real_per_class`: real images of each class without hard images.
    """

    name: str
    real_per_class: int

    @property
    def fit(self) -> Fit:
        """Trains a classifier."""
        ...

    def real(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """`Features.values` of these rows of a split."""
        ...

    def synthetic(self, trial: Run, ids: Sequence[str]) -> np.ndarray:
        """`Features.values` of images of a trial."""
        ...


def judge_of(run: Run, embedder: Embedder) -> Judge:
    """The judge that `pilot.judge` names."""
    own = run.recipe.pilot.judge == "network"
    return NetworkJudge(run) if own else HeadJudge(run, embedder)


class HeadJudge:
    """A linear head on features of the filter's CLIP."""

    def __init__(self, run: Run, embedder: Embedder) -> None:
        self.name = f"a linear head on features of {public_name(run.recipe.filter.checkpoint)}"
        self.real_per_class = run.recipe.pilot.real_per_class
        self.real, self.synthetic = embedder.real, embedder.synthetic
        self.fit = fit_linear


class NetworkJudge:
    """A small network that learns its features from the same images."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.side = min(LARGEST, run.recipe.train.image_size)
        self.name = f"a small network, trained from scratch on {self.side} pixels"
        self.real_per_class = MORE_REAL * run.recipe.pilot.real_per_class
        self.fit = Proxies(run.device).fit

    def real(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """uint8 `[rows, 3, side, side]`."""
        contents = split_rows_of(self.run, split, ["digest"])["digest"].to_pylist()
        squares = np.empty((len(rows), 3, self.side, self.side), np.uint8)
        with progress("decode", len(rows)) as advance:
            for place, row in enumerate(rows):
                image = self.run.checked_image(row, contents[row], split)
                squares[place] = to_square(image, self.side).transpose(2, 0, 1)
                advance(1)
        return squares

    def synthetic(self, trial: Run, ids: Sequence[str]) -> np.ndarray:
        """uint8 `[ids, 3, side, side]`."""
        images = stored_images(trial, ids)
        squares = [
            to_square(decode_image(images[row]["image"]), self.side) for row in range(len(ids))
        ]
        return np.stack(squares).transpose(0, 3, 1, 2)
