"""Last layers of classifiers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TrainingError


class CosineHead(nn.Module):
    """Cosines of features and one vector per class, `[batch, classes]` (LDAM, arXiv 1906.07413).

    - `scale`: factor of the cosines.
    """

    def __init__(self, channels: int, num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, channels))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))
        return cosines if self.scale == 1 else self.scale * cosines


def head_of(model: nn.Module) -> nn.Module:
    """Returns the last layer of a classifier; raises TrainingError for one without `head`."""
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        raise TrainingError(
            f"a {type(model).__name__} has no separate head to train; train the whole network."
        )
    return head
