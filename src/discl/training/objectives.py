"""Losses, and post-hoc logit adjustment.

An objective of your own is a function `(logits, labels, class_counts) -> scalar`; what it takes by keyword only is
the recipe's to give, but for `progress`. It is named by an entry point of the group `discl.objectives` or, with
`allow_plugins`, as `module:attribute`; with an attribute `corrected = True` it counts among those that correct for
the class prior.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RecipeError, shorten, unknown
from ..utils.plugins import check_call, find_piece, is_address, named_parameters


def cross_entropy(logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    """mean −log softmax(z)_y for logits `[batch, classes]` and labels `[batch]`; the class counts are not used."""
    return F.cross_entropy(logits, labels)


def balanced_softmax(logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    """CE(z + log n_c, y) in training, plain z at test (arXiv 2007.10740, eq. 4); `class_counts` `[classes]`, all positive."""
    return F.cross_entropy(logits + class_counts.to(logits).log(), labels)


def logit_adjusted(
    logits: Tensor, labels: Tensor, class_counts: Tensor, *, tau: float = 1.0
) -> Tensor:
    """CE(z + τ log π_c, y) with π_c = n_c / N (arXiv 2007.07314, eq. 10); at τ = 1 the loss of Balanced Softmax."""
    return F.cross_entropy(adjust_logits(logits, class_counts, -tau), labels)


def focal(logits: Tensor, labels: Tensor, class_counts: Tensor, *, gamma: float = 2.0) -> Tensor:
    """mean −(1 − p_y)^γ log p_y with p = softmax(z) (arXiv 1708.02002, eq. 4); γ = 0 is cross-entropy."""
    log_probability = F.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
    # 1 − p_y from expm1, and not below the smallest normal number, whose power has a finite slope for every γ
    missing = (-torch.expm1(log_probability)).clamp_min(torch.finfo(logits.dtype).tiny ** 0.5)
    return (missing**gamma * -log_probability).mean()


def ldam(
    logits: Tensor, labels: Tensor, class_counts: Tensor, *,
    max_margin: float = 0.5, scale: float = 30.0, beta: float = 0.9999, defer: float = 0.8, progress: float = 0.0,
) -> Tensor:  # fmt: skip
    """CE(s · (z − Δ_y at y), y) with margins Δ_c ∝ n_c^(−1/4), the largest `max_margin` (arXiv 1906.07413, eq. 13).

    The logits are cosines (`train.model.head: cosine`), s is `scale`. From the share `defer` of the epochs on, images are
    weighted by their class (DRW, algorithm 1) with `class_weights`; `progress` is the share that has passed.
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
    """Weights ∝ (1 − β)/(1 − β^n_c) (arXiv 1901.05555, eq. 5), `widest` `[classes]`, with mean 1 over the images.

    The weights of a batch are not divided by their own sum, so that shares of a batch on several devices add up.
    """
    counts = class_counts.to(widest(class_counts.device))
    weights = 1 / -torch.expm1(counts * math.log(beta)) if beta else torch.ones_like(counts)
    return weights * (counts.sum() / (counts * weights).sum())


def contrastive(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of FLYP (arXiv 2212.00638, eq. 2): the mean of CE over images → texts and texts → images.

    `images` and `texts` are normalised embeddings `[batch, dim]` of pairs, `scale` multiplies their cosines. Other images of the same
    class count as negatives, as in the paper.
    """
    cosines = scale * images @ texts.T
    pairs = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(cosines, pairs) + F.cross_entropy(cosines.T, pairs)) / 2


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": cross_entropy,
    "balanced-softmax": balanced_softmax,
    "logit-adjusted": logit_adjusted,
    "focal": focal,
    "ldam": ldam,
}
"""Losses of (logits, labels, class counts); what stands behind the star is the recipe's to choose, but for `progress`."""

GROUP = "discl.objectives"
FLYP = "flyp"
"""The contrastive objective: it is of (images, class prompts), not of logits, and needs a CLIP."""

CORRECTED = frozenset({"balanced-softmax", "logit-adjusted", "ldam"})
"""Objectives here that already correct for the class prior; post-hoc adjustment on top would correct twice."""

BOUNDS: dict[str, tuple[float, float]] = {
    "tau": (0, 100), "gamma": (0, 100), "max_margin": (0, 1), "scale": (1e-3, 1e3), "beta": (0, 1 - 1e-12), "defer": (0, 1),
}  # fmt: skip
"""Least and greatest value of each parameter of an objective; those of your own only have to be finite."""


@dataclass(frozen=True)
class Objective:
    """A loss by name with its parameters; `loss(logits, labels, class_counts, progress)` with progress in [0, 1].

    `allow_plugins` gives leave to import a name that is `module:attribute`.
    """

    name: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    allow_plugins: bool = field(default=False, compare=False)

    def loss(
        self, logits: Tensor, labels: Tensor, class_counts: Tensor, progress: float = 0.0
    ) -> Tensor:
        """The mean loss of a batch. Raises RecipeError for `flyp`, which is no loss of logits."""
        if self.name == FLYP:
            raise RecipeError(
                "objective flyp compares images with class prompts and has no loss over logits."
            )
        found = find_objective(self.name, self.allow_plugins)
        function = partial(found, **self.parameters)
        if "progress" in inspect.signature(found).parameters:
            function = partial(function, progress=progress)
        loss = function(logits, labels, class_counts)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)[:80]
            raise RecipeError(f"objective '{self.name}' has to give one number; got {got}.")
        return loss

    @property
    def corrected(self) -> bool:
        """Whether it corrects for the class prior itself."""
        if self.name in CORRECTED or self.name in OBJECTIVES or self.name == FLYP:
            return self.name in CORRECTED
        return getattr(find_objective(self.name, self.allow_plugins), "corrected", False) is True


def find_objective(name: str, allow_plugins: bool = False) -> Callable[..., Tensor]:
    """The loss of that name. Raises RecipeError for an unknown one, and for an address without leave."""
    return OBJECTIVES[name] if name in OBJECTIVES else _own(name, allow_plugins)


@cache
def _own(name: str, allow_plugins: bool) -> Callable[..., Tensor]:
    return find_piece("objective", name, {**OBJECTIVES, FLYP: contrastive}, GROUP, allow_plugins)


def read_objective(asked: str | Mapping[str, Any]) -> Objective:
    """The objective of a name or of `{name: focal, gamma: 2}`; one that is an address is not looked up.

    Raises RecipeError for an unknown name or parameter, or a value out of range; of an address only that its
    parameters are finite numbers is checked.
    """
    if not isinstance(asked, (str, Mapping)) or (
        not isinstance(asked, str) and not isinstance(asked.get("name"), str)
    ):
        raise RecipeError(
            f"an objective is a name or a mapping such as {{name: focal, gamma: 2}}; got {shorten(asked)}."
        )
    name = asked if isinstance(asked, str) else asked["name"]
    given = (
        {}
        if isinstance(asked, str)
        else {key: value for key, value in asked.items() if key != "name"}
    )
    if not is_address(name):
        _check_parameters(name, given, parameters_of(name))
    for key, value in given.items():
        low, high = BOUNDS[key] if name in OBJECTIVES else (-sys.float_info.max, sys.float_info.max)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            allowed = (
                f"lies between {low:g} and {high:g}" if name in OBJECTIVES else "is a finite number"
            )
            raise RecipeError(f"objective {name}: {key} {allowed}; got {shorten(value)}.")
    return Objective(name, {key: float(value) for key, value in given.items()})


def make_objective(
    asked: str | Mapping[str, Any] | Objective, allow_plugins: bool = False
) -> Objective:
    """The objective of a name or of `{name: focal, gamma: 2}`, ready to be called.

    `allow_plugins` gives leave to import `module:attribute`. Raises RecipeError for an unknown name or
    parameter, a value out of range, an address without leave, and for what cannot be a loss.
    """
    if isinstance(asked, Objective):
        return asked
    read = read_objective(asked)
    name, given = read.name, read.parameters
    if name in OBJECTIVES or name == FLYP:
        return read
    found = find_objective(name, allow_plugins)
    if isinstance(found, type):
        raise RecipeError(f"objective '{name}' is a class, and was not called; name a function.")
    _check_parameters(name, given, parameters_of(name, allow_plugins))
    check_call("objective", name, found, "logits", "labels", "class_counts", **given)
    keywords = inspect.Parameter.KEYWORD_ONLY
    if len([each for each in named_parameters(found) if each.kind is not keywords]) < 3:
        raise RecipeError(
            f"objective '{name}' has to name its arguments (logits, labels, class_counts), and was not called."
        )
    return replace(read, allow_plugins=allow_plugins)


def _check_parameters(name: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise RecipeError(
                unknown(f"parameter of objective {name}", key, known)
                if known
                else f"objective {name} has no parameter; got {shorten(key)}."
            )


def parameters_of(name: str, allow_plugins: bool = False) -> list[str]:
    """Names of the parameters of an objective that a recipe may give."""
    if name == FLYP:
        return []
    found = named_parameters(find_objective(name, allow_plugins))
    return [
        each.name for each in found if each.kind is each.KEYWORD_ONLY and each.name != "progress"
    ]


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no wider numbers."""
    return torch.float32 if device.type == "mps" else torch.float64


def adjust_logits(logits: Tensor, class_counts: Tensor, tau: float = 1.0) -> Tensor:
    """z_c − τ log(n_c / N), post-hoc logit adjustment (arXiv 2007.07314, eq. 9), for logits `[rows, classes]`."""
    counts = class_counts.to(widest(class_counts.device))
    return logits - tau * (counts / counts.sum()).log().to(logits)
