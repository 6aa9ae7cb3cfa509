"""ALIA's filters as formulas (arXiv 2305.16289).

Captions, the language model and img2img are in `prompts` and `spectrum`. This module holds the
request that condenses captions into settings, and the semantic and the confidence filter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..utils.hashing import derive_seed

NEGATIVE_PROMPTS = (
    "a photo of an object",
    "a photo of geometric shapes",
    "a photo",
    "an image",
    "a painting",
)


def pick_captions(captions: Sequence[str], count: int = 20, seed: int = 0) -> list[str]:
    """`count` distinct captions (or all), in an order drawn from `seed`."""
    return sorted(set(captions), key=lambda text: derive_seed("alia", seed, text))[:count]


def condense_request(captions: Sequence[str], kind: str, settings: int = 10) -> str:
    """The prompt for a language model that names the settings of captions, without the object.

    - `kind`: the object, for example "an animal".
    - `settings`: most lines of the answer.
    """
    listed = "\n".join(f"- {caption}" for caption in captions)
    return (
        f"These are captions of photos of {kind}:\n{listed}\n\nName at most {settings} settings in "
        "which such photos are taken: place, background, weather, light or time of day. "
        f"Leave {kind} itself and its looks out. One setting a line, each a short "
        f'phrase that can follow "a photo of {kind}", such as "in a meadow at dusk", without a '
        "full stop. Settings should differ from one another. Answer with these lines and with "
        "nothing else."
    )


def semantic_drop(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Where CLIP prefers a negative prompt over the positive one, bool `[edits]`.

    - `positive`: raw cosines, `[edits]`.
    - `negative`: raw cosines, `[edits, negatives]`.
    """
    return negative.max(1) > positive


def mean_self_confidence(
    probabilities: np.ndarray, labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Mean true-class probability of each class, float64 `[classes]`; nan without an image.

    - `probabilities`: of real images by the base model, `[images, classes]`.
    - `labels`: `[images]`.
    """
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=num_classes)
    totals = np.bincount(labels, own, minlength=num_classes)
    return np.divide(totals, counts, out=np.full(num_classes, np.nan), where=counts > 0)


def confidence_drop(
    probabilities: np.ndarray, labels: np.ndarray, self_confidence: np.ndarray
) -> np.ndarray:
    """1 for an edit that is too easy, 2 for one that looks mislabelled, else 0; int64 `[edits]`.

    Both have a highest probability above the mean self-confidence of the predicted class. An edit
    is too easy if that class is its own, and mislabelled if it is another.

    - `probabilities`: of edits by the base model, `[edits, classes]`.
    - `labels`: `[edits]`.
    - `self_confidence`: from `mean_self_confidence`, `[classes]`.
    """
    predicted = probabilities.argmax(1)
    sure = probabilities.max(1) > self_confidence[predicted]
    return np.where(~sure, 0, np.where(predicted == labels, 1, 2))
