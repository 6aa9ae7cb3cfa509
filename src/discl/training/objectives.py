"""Losses, and post-hoc logit adjustment.

A custom objective is a function `(logits, labels, class_counts) -> scalar`. A recipe sets its
keyword-only arguments, except `progress`. It is named by an entry point of the group
`discl.objectives` or, with `allow_plugins`, as `module:attribute`. With an attribute
`corrected = True` it counts as a loss that corrects for the class prior.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RecipeError, shorten
from ..utils.plugins import (
    check_call,
    check_parameters,
    find_piece,
    is_address,
    named_parameters,
    read_piece,
)


def cross_entropy(logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    """Returns mean −log softmax(z)_y.

    - `logits`: z, `[batch, classes]`; `labels`: y, `[batch]`; `class_counts`: not used.
    """
    return F.cross_entropy(logits, labels)


def balanced_softmax(logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    """Returns CE(z + log n_c, y) (arXiv 2007.10740, eq. 4); at test z is used as it is.

    - `logits`: z, `[batch, classes]`; `labels`: y, `[batch]`; `class_counts`: n, `[classes]`, all
      positive.
    """
    return F.cross_entropy(logits + class_counts.to(logits).log(), labels)


def logit_adjusted(
    logits: Tensor, labels: Tensor, class_counts: Tensor, *, tau: float = 1.0
) -> Tensor:
    """Returns CE(z + τ log π_c, y) with π_c = n_c / N (arXiv 2007.07314, eq. 10).

    - `tau`: τ; at 1 it is the loss of Balanced Softmax.
    """
    return F.cross_entropy(adjust_logits(logits, class_counts, -tau), labels)


def focal(logits: Tensor, labels: Tensor, class_counts: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Returns mean −(1 − p_y)^γ log p_y with p = softmax(z) (arXiv 1708.02002, eq. 4).

    - `gamma`: γ; at 0 it is cross-entropy.
    """
    log_probability = F.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
    # 1 − p_y, clamped so that its power has a finite slope for every γ
    rest = (-torch.expm1(log_probability)).clamp_min(torch.finfo(logits.dtype).tiny ** 0.5)
    return (rest**gamma * -log_probability).mean()


def ldam(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    *,
    max_margin: float = 0.5,
    scale: float = 30.0,
    beta: float = 0.9999,
    defer: float = 0.8,
    progress: float = 0.0,
) -> Tensor:
    """Returns CE(s · (z − Δ_y at y), y) (arXiv 1906.07413, eq. 13).

    - `logits`: z, cosines `[batch, classes]`, as of a cosine head.
    - `max_margin`: the largest of the margins Δ_c ∝ n_c^(−1/4); `scale`: s.
    - `progress`: of training, in [0, 1]. From `defer` on, images are weighted by class with
      `class_weights` (DRW, algorithm 1).
    """
    margins = class_counts.to(logits) ** -0.25
    margins = margins * (max_margin / margins.max())
    moved = logits.scatter_add(1, labels[:, None], -margins[labels][:, None])
    losses = F.cross_entropy(scale * moved, labels, reduction="none")
    return (
        (losses * class_weights(class_counts, beta).to(logits)[labels]).mean()
        if progress >= defer
        else losses.mean()
    )


def class_weights(class_counts: Tensor, beta: float) -> Tensor:
    """Returns weights ∝ (1 − β)/(1 − β^n_c), `[classes]` (arXiv 1901.05555, eq. 5).

    Their mean over the images is 1. They are not normalised per batch, so the losses of a batch's
    shards add up.
    """
    counts = class_counts.to(widest(class_counts.device))
    weights = 1 / -torch.expm1(counts * math.log(beta)) if beta else torch.ones_like(counts)
    return weights * (counts.sum() / (counts * weights).sum())


def weighted_loss(
    loss: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    labels: Tensor,
    weights: np.ndarray | None,
) -> Tensor:
    """Returns Σ_i w_i ℓ_i / batch, where `loss` is the mean of ℓ_i over its rows.

    - `loss`: of logits `[rows, classes]` and labels `[rows]`; called once for each distinct weight.
    - `logits`: `[batch, classes]`; `labels`: `[batch]`.
    - `weights`: w, `[batch]`; None where all are 1.
    """
    if weights is None:
        return loss(logits, labels)
    total = logits.new_zeros(())
    for weight in np.unique(weights).tolist():
        rows = torch.from_numpy(np.flatnonzero(weights == weight)).to(logits.device)
        total = total + weight * len(rows) / len(weights) * loss(logits[rows], labels[rows])
    return total


def contrastive(
    images: Tensor, texts: Tensor, scale: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Returns the symmetric InfoNCE of FLYP (arXiv 2212.00638, eq. 2).

    It is the mean of CE over images → texts and texts → images. Other images of the same class
    count as negatives, as in the paper.

    - `images`, `texts`: normalised embeddings of pairs, `[batch, dim]`.
    - `scale`: multiplies their cosines.
    - `weights`: of the pairs, `[batch]`, whose weighted sum is divided by the batch; default 1.
    """
    cosines = scale * images @ texts.T
    pairs = torch.arange(len(images), device=images.device)
    if weights is None:
        return (F.cross_entropy(cosines, pairs) + F.cross_entropy(cosines.T, pairs)) / 2
    both = [F.cross_entropy(each, pairs, reduction="none") for each in (cosines, cosines.T)]
    return (weights.to(cosines) * (both[0] + both[1])).mean() / 2


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": cross_entropy,
    "balanced-softmax": balanced_softmax,
    "logit-adjusted": logit_adjusted,
    "focal": focal,
    "ldam": ldam,
}
"""Losses of (logits, labels, class counts). Recipes set keyword-only arguments but `progress`."""

GROUP = "discl.objectives"
FLYP = "flyp"
"""The contrastive objective, of images and class prompts instead of logits. It needs a CLIP."""

CORRECTED = frozenset({"balanced-softmax", "logit-adjusted", "ldam"})
"""Built-in objectives that correct for the class prior; adjustment on top would correct twice."""

BOUNDS: dict[str, tuple[float, float]] = {
    "tau": (0, 100),
    "gamma": (0, 100),
    "max_margin": (0, 1),
    "scale": (1e-3, 1e3),
    "beta": (0, 1 - 1e-12),
    "defer": (0, 1),
}
"""Bounds of the parameters of built-in objectives; those of custom ones have to be finite."""


@dataclass(frozen=True)
class Objective:
    """A loss by name with its parameters.

    - `allow_plugins`: whether a name `module:attribute` may be imported.
    """

    name: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    allow_plugins: bool = field(default=False, compare=False)

    def loss(
        self, logits: Tensor, labels: Tensor, class_counts: Tensor, progress: float = 0.0
    ) -> Tensor:
        """Returns the mean loss of a batch.

        - `logits`: `[batch, classes]`; `labels`: `[batch]`; `class_counts`: `[classes]`.
        - `progress`: of training, in [0, 1].

        Raises RecipeError for `flyp`, which is no loss of logits, and for a custom objective that
        returns no number.
        """
        if self.name == FLYP:
            raise RecipeError(
                "objective flyp compares images with class prompts and has no loss over logits."
            )
        objective = find_objective(self.name, self.allow_plugins)
        function = partial(objective, **self.parameters)
        if "progress" in inspect.signature(objective).parameters:
            function = partial(function, progress=progress)
        loss = function(logits, labels, class_counts)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)[:80]
            raise RecipeError(f"objective '{self.name}' has to return one number; got {got}.")
        return loss

    @property
    def corrected(self) -> bool:
        """Whether it corrects for the class prior."""
        if self.name in CORRECTED or self.name in OBJECTIVES or self.name == FLYP:
            return self.name in CORRECTED
        return getattr(find_objective(self.name, self.allow_plugins), "corrected", False) is True


def find_objective(name: str, allow_plugins: bool = False) -> Callable[..., Tensor]:
    """Returns the loss of a name.

    Raises RecipeError for an unknown one, and for an address without `allow_plugins`.
    """
    return OBJECTIVES[name] if name in OBJECTIVES else _find_custom(name, allow_plugins)


@cache
def _find_custom(name: str, allow_plugins: bool) -> Callable[..., Tensor]:
    return find_piece("objective", name, {**OBJECTIVES, FLYP: contrastive}, GROUP, allow_plugins)


def read_objective(config: str | Mapping[str, Any]) -> Objective:
    """Returns the objective of a name or of `{name: focal, gamma: 2}`, without imports.

    Raises RecipeError for an unknown name or parameter, or a value out of range. Of an address it
    only checks that its parameters are finite numbers.
    """
    name, given = read_piece("objective", config)
    if not is_address(name):
        check_parameters("objective", name, given, parameters_of(name))
    for key, value in given.items():
        low, high = BOUNDS[key] if name in OBJECTIVES else (-sys.float_info.max, sys.float_info.max)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            allowed = (
                f"is a number from {low:g} to {high:g}"
                if name in OBJECTIVES
                else "is a finite number"
            )
            raise RecipeError(f"objective {name}: {key} {allowed}; got {shorten(value)}.")
    return Objective(name, {key: float(value) for key, value in given.items()})


def make_objective(
    config: str | Mapping[str, Any] | Objective, allow_plugins: bool = False
) -> Objective:
    """Returns the objective of a name or of `{name: focal, gamma: 2}`, ready to be called.

    - `allow_plugins`: whether a name `module:attribute` may be imported.

    Raises RecipeError for an unknown name or parameter, a value out of range, an address without
    `allow_plugins`, and for what cannot be a loss.
    """
    if isinstance(config, Objective):
        return config
    objective = read_objective(config)
    name, given = objective.name, objective.parameters
    if name in OBJECTIVES or name == FLYP:
        return objective
    function = find_objective(name, allow_plugins)
    if isinstance(function, type):
        raise RecipeError(f"objective '{name}' is a class and was not called; name a function.")
    check_parameters("objective", name, given, parameters_of(name, allow_plugins))
    check_call("objective", name, function, "logits", "labels", "class_counts", **given)
    keywords = inspect.Parameter.KEYWORD_ONLY
    if len([each for each in named_parameters(function) if each.kind is not keywords]) < 3:
        raise RecipeError(
            f"objective '{name}' has to name its arguments (logits, labels, class_counts) and was "
            "not called."
        )
    return replace(objective, allow_plugins=allow_plugins)


def parameters_of(name: str, allow_plugins: bool = False) -> list[str]:
    """Returns the names of the parameters of an objective that a recipe may set."""
    if name == FLYP:
        return []
    parameters = named_parameters(find_objective(name, allow_plugins))
    return [
        each.name
        for each in parameters
        if each.kind is each.KEYWORD_ONLY and each.name != "progress"
    ]


def widest(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 on Apple's GPUs, which have no wider numbers."""
    return torch.float32 if device.type == "mps" else torch.float64


def adjust_logits(logits: Tensor, class_counts: Tensor, tau: float = 1.0) -> Tensor:
    """Returns z_c − τ log(n_c / N), post-hoc logit adjustment (arXiv 2007.07314, eq. 9).

    - `logits`: z, `[rows, classes]`; `class_counts`: n, `[classes]`.
    """
    counts = class_counts.to(widest(class_counts.device))
    return logits - tau * (counts / counts.sum()).log().to(logits)


def normalise_head(logits: Tensor, weight: Tensor, bias: Tensor | None, tau: float) -> Tensor:
    """Returns the logits of a linear head with w_c / ‖w_c‖^τ and no bias (arXiv 1910.09217).

    - `logits`: W f + b of the head as it was trained, `[rows, classes]`.
    - `weight`: W, `[classes, features]`; `bias`: b, `[classes]`, or None.
    - `tau`: τ; at 0 only the bias is left out, at 1 all classes have vectors of length 1.
    """
    wide = logits.to(widest(logits.device))
    lengths = weight.to(wide).norm(dim=1).clamp_min(torch.finfo(wide.dtype).tiny)
    return ((wide if bias is None else wide - bias.to(wide)) / lengths**tau).to(logits)
