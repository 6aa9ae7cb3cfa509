"""Losses over logits, and the post-hoc correction for label shift."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    """mean −log softmax(z)_y for logits `[batch, classes]` and labels `[batch]`; the class counts are not used."""
    return F.cross_entropy(logits, labels)


def balanced_softmax(logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    """CE(z + log n_c, y) in training, plain z at test (arXiv 2007.10740, eq. 4); `class_counts` `[classes]`, all positive."""
    return F.cross_entropy(logits + class_counts.to(logits).log(), labels)


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross-entropy": cross_entropy,
    "balanced-softmax": balanced_softmax,
}

CORRECTED = frozenset({"balanced-softmax"})
"""Objectives that already correct for the class prior; post-hoc adjustment on top would correct twice."""


def adjust_logits(logits: Tensor, class_counts: Tensor, tau: float = 1.0) -> Tensor:
    """z_c − τ log(n_c / N), post-hoc logit adjustment (arXiv 2007.07314, eq. 9), for logits `[rows, classes]`."""
    counts = class_counts.to(torch.float64)
    return logits - tau * (counts / counts.sum()).log().to(logits)
