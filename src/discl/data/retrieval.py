"""Assigns images of an archive to classes and chooses the closest, by embeddings alone.

Images retrieved from a large archive are a baseline for synthetic ones (arXiv 2406.05184).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 256
"""Images that are compared with all others at a time."""


@dataclass(frozen=True)
class Candidates:
    """Images of an archive, each with the class that it is closest to.

    - `labels`: int64 `[images]`.
    - `similarity`: cosine with the text of that class, float32 `[images]`.
    - `scores`: what the closest images are chosen by, float32 `[images]`.
    - `nearest`: largest cosine with an image of the data set, float32 `[images]`.
    """

    labels: np.ndarray
    similarity: np.ndarray
    scores: np.ndarray
    nearest: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Candidates]) -> Candidates:
        """All images of the parts, in order."""
        names = ("labels", "similarity", "scores", "nearest")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def assign_classes(
    images: np.ndarray,
    texts: np.ndarray,
    prototypes: np.ndarray,
    known: np.ndarray,
    *,
    image_weight: float,
) -> Candidates:
    """The class of each image: the greatest (1 − w) · cos(image, text) + w · cos(image, prototype).

    All embeddings have length 1.

    - `images`: float32 `[images, dimensions]`.
    - `texts`, `prototypes`: the text of each class and its mean training image,
      `[classes, dimensions]`.
    - `known`: images of the data set, `[known, dimensions]`, at least one.
    - `image_weight`: w, in [0, 1].
    """
    cosines = images @ texts.T
    scores = (1 - image_weight) * cosines + image_weight * (images @ prototypes.T)
    labels, rows = scores.argmax(1), np.arange(len(images))
    blocks = [images[first : first + BLOCK] for first in range(0, len(images), BLOCK)]
    nearest = np.concatenate([(block @ known.T).max(1) for block in blocks])
    return Candidates(labels, cosines[rows, labels], scores[rows, labels], nearest)


def mean_embeddings(embeddings: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The mean embedding of each class at length 1, `[classes, dimensions]`; 0 for no image."""
    sums = np.zeros((classes, embeddings.shape[1]), np.float32)
    np.add.at(sums, labels, embeddings)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.where(lengths > 0, lengths, 1)


def first_of_each(digests: Sequence[str]) -> np.ndarray:
    """Which images are the first with their content, bool `[images]`."""
    first = {each: row for row, each in reversed(list(enumerate(digests)))}
    return np.asarray([first[each] == row for row, each in enumerate(digests)], bool)


def choose_images(
    candidates: Candidates, usable: np.ndarray, wanted: Mapping[int, int]
) -> np.ndarray:
    """Rows of the best usable images of each class, int64: class by class, the best first.

    An image has one class, so it is chosen once at most. Of equal scores the earlier row wins.

    - `usable`: bool `[images]`.
    - `wanted`: images of each label, at most.
    """
    order = np.lexsort((np.arange(len(usable)), -candidates.scores))
    order = order[usable[order]]
    chosen = [order[candidates.labels[order] == label][:count] for label, count in wanted.items()]
    return np.concatenate([np.empty(0, np.int64), *chosen])
