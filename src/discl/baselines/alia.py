"""ALIA's filters as formulas (arXiv 2305.16289).

Captions, a language model and img2img are the project's own (`prompts`, `spectrum`); what is ALIA's is here: the request that condenses
captions into settings (recipe key `prompts.settings`), and the semantic and the confidence filter (`filter.rule`).
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
    """`count` distinct captions (or all there are), in an order drawn from `seed`."""
    return sorted(set(captions), key=lambda text: derive_seed("alia", seed, text))[:count]


def condense_request(captions: Sequence[str], kind: str, settings: int = 10) -> str:
    """What the language model is asked: at most `settings` places and conditions of the captions, without the object."""
    listed = "\n".join(f"- {caption}" for caption in captions)
    return (
        f"These are captions of photos of {kind}:\n{listed}\n\nName at most {settings} settings in which such photos are taken: "
        f"place, background, weather, light or time of day. Leave {kind} itself and its looks out. One setting a line, each a short "
        f'phrase that can follow "a photo of {kind}", such as "in a meadow at dusk", without a full stop. Settings should differ from '
        "one another. Answer with these lines and with nothing else."
    )


def semantic_drop(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """bool `[edits]`: True where CLIP prefers a negative prompt over the positive one.

    `positive` `[edits]` and `negative` `[edits, negatives]` are raw cosines.
    """
    return negative.max(1) > positive


def mean_self_confidence(
    probabilities: np.ndarray, labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """float64 `[classes]`: mean probability of the true class by the base model over the real images of each class; nan without any."""
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=num_classes)
    totals = np.bincount(labels, own, minlength=num_classes)
    return np.divide(totals, counts, out=np.full(num_classes, np.nan), where=counts > 0)


def confidence_drop(
    probabilities: np.ndarray, labels: np.ndarray, self_confidence: np.ndarray
) -> np.ndarray:
    """int64 `[edits]`: 1 where the edit is too easy, 2 where it looks mislabelled, 0 where it stays.

    The base model's highest probability exceeds the mean self-confidence of the class it predicts; it is too easy if that class
    is the edit's own, mislabelled if it is another.
    """
    predicted = probabilities.argmax(1)
    sure = probabilities.max(1) > self_confidence[predicted]
    return np.where(~sure, 0, np.where(predicted == labels, 1, 2))
