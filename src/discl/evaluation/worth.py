"""What synthetic images are worth to a classifier, estimated by small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import DataError
from ..mixtures import Mixture

RESAMPLES = 1000


@dataclass(frozen=True)
class Features:
    """What a classifier is trained on.

    - `values`: float32 `[images, dimensions]` for a head; pixels, uint8 `[images, 3, side, side]`,
      for a network.
    - `labels`: int64 `[images]`.
    """

    values: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> Features:
        return Features(self.values[rows], self.labels[rows])


Predict = Callable[[np.ndarray], np.ndarray]
"""From `Features.values` to labels, int64 `[images]`."""
Fit = Callable[[Features, np.ndarray, int], Predict]
"""From images, their weights, float64 `[images]`, and the number of classes to a classifier."""


@dataclass(frozen=True)
class Gain:
    """A difference in accuracy, in points, with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Worth:
    """What a set of synthetic images is expected to bring.

    - `few`: gain on the classes with hard images, mean over classes.
    - `overall`: gain on all classes, mean over the held-out images; None without any.
    - `recognised`: fraction of the synthetic images that a classifier of real images alone assigns
      to their class. It did not see the source of the image.
    - `real`: the same fraction of held-out real images of these classes, mean over classes.
    """

    few: Gain
    overall: Gain | None
    recognised: float
    real: float


@dataclass(frozen=True)
class MixtureScore:
    """Balanced accuracy of a classifier on held-out images, in points.

    - `real`: trained on real images alone.
    - `mixed`: with synthetic images too, in the same mixture; None without any.
    """

    mixture: Mixture
    real: float
    mixed: float | None


def class_totals(
    counts: np.ndarray, tail: np.ndarray, mixture: Mixture, scale: float
) -> np.ndarray:
    """Total weight of each class in training, float64 `[classes]`, synthetic images or not.

    - `counts`: real images per class, int64 `[classes]`.
    - `tail`: classes with hard images, bool `[classes]`.
    - `mixture`: `undersampled` keeps the tail at its fraction of the classes (arXiv 2410.13674);
      `class-balanced` gives all classes the same; `square-root` the root of their images; `all`
      takes all real images.
    - `scale`: synthetic images per real hard image, 0 or more.
    """
    totals = counts * np.where(tail, 1 + scale, 1.0)
    if mixture == "class-balanced":
        return (counts > 0).astype(float)
    if mixture == "square-root":
        return np.sqrt(totals)
    if mixture == "undersampled" and tail.any() and not tail.all():
        wanted = totals[tail].sum() * (~tail).sum() / tail.sum()
        totals = np.where(tail, totals, totals * min(1.0, wanted / totals[~tail].sum()))
    return totals


def fit_head(
    features: Features, weights: np.ndarray, num_classes: int, penalty: float = 1e-2
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression, (`[dimensions, classes]`, `[classes]`), by L-BFGS.

    Features are standardised first; the returned weights apply to features as they are. The
    penalty is on the squared weights, per unit of weight.
    """
    values = torch.from_numpy(features.values).double()
    labels = torch.from_numpy(features.labels)
    share = torch.from_numpy(weights / weights.sum())
    mean = (share[:, None] * values).sum(0)
    spread = ((share[:, None] * (values - mean) ** 2).sum(0)).sqrt().clamp_min(1e-6)
    inputs = (values - mean) / spread
    matrix = torch.zeros(values.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([matrix, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(inputs @ matrix + bias, labels, reduction="none")
        loss = (share * losses).sum() + penalty * matrix.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    scaled = (matrix / spread[:, None]).detach()
    return scaled.numpy(), (bias.detach() - mean @ scaled).numpy()


def fit_linear(features: Features, weights: np.ndarray, num_classes: int) -> Predict:
    """The classifier of `fit_head`."""
    matrix, bias = fit_head(features, weights, num_classes)
    return lambda values: (values @ matrix + bias).argmax(1)


def estimate_worth(
    real: Features,
    hard: np.ndarray,
    synthetic: Features,
    sources: np.ndarray,
    *,
    fold_of: np.ndarray,
    fit: Fit = fit_linear,
    held_out: Features | None = None,
    class_counts: np.ndarray | None = None,
    mixture: Mixture = "class-balanced",
    scale: float = 3.0,
    seed: int = 0,
) -> Worth:
    """Gain of a classifier with the synthetic images over the same mixture of real images.

    Cross-validated over the hard images: a classifier sees neither the hard images of its fold nor
    the synthetic images made from them. It is measured on that fold and on `held_out`. No synthetic
    image weighs more than a real one of its class, however few there are: a whole spectrum has
    more.

    - `real`: the real training images; `hard` bool `[real]` marks those with a spectrum.
    - `synthetic`: the images to judge; `sources` int64 `[synthetic]` is the row of `real` that
      each was made from.
    - `fold_of`: that of each image of `real`, by `deal_folds`.
    - `fit`: trains a classifier; a linear head by default.
    - `held_out`: validation images, which no classifier sees.
    - `class_counts`: real training images per class, int64 `[classes]`, if `real` has only some.
    - `mixture`, `scale`: see `class_totals`.

    Raises DataError where no class has two hard images and nothing is held out.
    """
    tail = _tail(hard, real, synthetic, held_out)
    if not tail.any():
        raise DataError("no image is hard, so there is nothing to estimate a gain on.")
    measured = held_out is not None and tail[held_out.labels].any()
    if (fold_of[hard] < 0).all() and not measured:
        raise DataError(
            "every class has one hard image, so none can be held out; add validation images.",
            argument="held_out",
        )
    labels, changes, later, recognised, plain = [], [], [], [], []
    for fold in range(max(1, int(fold_of.max()) + 1)):
        made = fold_of[sources] != fold
        control, judged = _fit_both(
            real.take(np.flatnonzero(fold_of != fold)),
            synthetic.take(np.flatnonzero(made)),
            tail,
            class_counts,
            fit=fit,
            mixture=mixture,
            scale=scale,
        )
        held = real.take(np.flatnonzero(hard & (fold_of == fold)))
        labels.append(held.labels)
        plain.append(_right(control, held))
        changes.append(_right(judged, held) - plain[-1])
        recognised.append(_right(control, synthetic.take(np.flatnonzero(~made))))
        if held_out is not None:
            later.append((_right(control, held_out), _right(judged, held_out)))
    overall = None
    if held_out is not None:
        before, after = (np.mean(each, 0) for each in zip(*later, strict=True))
        in_tail = tail[held_out.labels]
        labels.append(held_out.labels[in_tail])
        plain.append(before[in_tail])
        changes.append((after - before)[in_tail])
        overall = _gain(np.zeros_like(held_out.labels), after - before, seed)
    few = _gain(np.concatenate(labels), np.concatenate(changes), seed)
    found = np.concatenate(recognised)
    return Worth(
        few,
        overall,
        float(found.mean()) if len(found) else 0.0,
        _mean_over_classes(np.concatenate(labels), np.concatenate(plain)),
    )


def score_mixtures(
    real: Features,
    hard: np.ndarray,
    synthetic: Features | None,
    held_out: Features,
    *,
    mixtures: Sequence[Mixture],
    fit: Fit = fit_linear,
    class_counts: np.ndarray | None = None,
    scale: float = 3.0,
) -> list[MixtureScore]:
    """Scores of classifiers that differ in how classes are mixed; see `estimate_worth`.

    - `synthetic`: None without any.
    - `held_out`: images that no classifier sees.
    """
    tail = _tail(hard, real, synthetic, held_out)
    scores = []
    for mixture in mixtures:
        fitted = _fit_both(
            real, synthetic, tail, class_counts, fit=fit, mixture=mixture, scale=scale
        )
        found = [_balanced(predict, held_out) for predict in fitted]
        scores.append(MixtureScore(mixture, found[0], found[1] if len(found) > 1 else None))
    return scores


def precision_and_coverage(
    real: np.ndarray, synthetic: np.ndarray, neighbours: int = 5
) -> tuple[float, float]:
    """Precision and coverage of synthetic features (arXiv 2002.09797, eq. 3 and 9), each 0 to 1.

    - `real` `[n, dimensions]`, `synthetic` `[m, dimensions]`, of one class.
    - `neighbours`: k. A ball around a real image reaches to its k-th nearest real one; with fewer
      real images, to the farthest.

    Raises DataError with fewer than two real images or without synthetic ones.
    """
    if len(real) < 2 or not len(synthetic):
        raise DataError(
            f"{len(real)} real and {len(synthetic)} synthetic images; precision and coverage need "
            "two real ones and one synthetic one."
        )
    within = np.linalg.norm(real[:, None] - real[None], axis=2)
    radius = np.sort(within, 1)[:, min(neighbours, len(real) - 1)]
    between = np.linalg.norm(real[:, None] - synthetic[None], axis=2)
    inside = between <= radius[:, None]
    return float(inside.any(0).mean()), float(inside.any(1).mean())


def _tail(hard: np.ndarray, real: Features, *others: Features | None) -> np.ndarray:
    """Which classes have hard images, bool `[classes]`, of all classes that occur."""
    labels = np.concatenate([each.labels for each in (real, *others) if each is not None])
    return np.bincount(real.labels[hard], minlength=int(labels.max()) + 1) > 0


def deal_folds(labels: np.ndarray, hard: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Fold of each real image, int64; -1 for those that every classifier sees.

    Hard images of a class are dealt out in turn. A class with one hard image keeps it.

    - `folds`: 2 or more; a class with fewer hard images has that many.
    """
    rng = np.random.default_rng(seed)
    fold_of = np.full(len(labels), -1)
    start = 0
    for label in np.unique(labels[hard]).tolist():
        rows = rng.permutation(np.flatnonzero(hard & (labels == label)))
        if len(rows) > 1:
            fold_of[rows] = (start + np.arange(len(rows))) % folds
            start += len(rows)
    return fold_of


def _fit_both(
    real: Features,
    synthetic: Features | None,
    tail: np.ndarray,
    class_counts: np.ndarray | None,
    *,
    fit: Fit,
    mixture: Mixture,
    scale: float,
) -> list[Predict]:
    """A classifier of the real images and, given synthetic ones, one of both, in one mixture.

    - `tail`: whether a class has a spectrum, bool `[classes]`.
    """
    counts = np.bincount(real.labels, minlength=len(tail))
    if class_counts is not None:
        counts = np.where(tail, counts, class_counts[: len(tail)])
    totals = class_totals(counts, tail, mixture, scale)
    kinds = [None] if synthetic is None else [None, synthetic]
    return [_fit(real, made, totals, scale, fit) for made in kinds]


def _fit(
    real: Features, synthetic: Features | None, totals: np.ndarray, scale: float, fit: Fit
) -> Predict:
    """A classifier to which each class has its total weight.

    A class with both kinds divides it 1 : `scale`, or evenly among its images where the synthetic
    ones would weigh more than the real ones.
    """
    classes = len(totals)
    real_counts = np.bincount(real.labels, minlength=classes)
    if synthetic is None or not len(synthetic.labels):
        weights = (totals / np.maximum(real_counts, 1))[real.labels]
        return fit(real, weights, classes)
    made_counts = np.bincount(synthetic.labels, minlength=classes)
    even = made_counts / np.maximum(made_counts + real_counts, 1)
    part = np.where(real_counts > 0, np.minimum(even, scale / (1 + scale)), even)
    weights = np.concatenate(
        [
            (totals * (1 - part) / np.maximum(real_counts, 1))[real.labels],
            (totals * part / np.maximum(made_counts, 1))[synthetic.labels],
        ]
    )
    both = Features(
        np.concatenate([real.values, synthetic.values]),
        np.concatenate([real.labels, synthetic.labels]),
    )
    return fit(both, weights, classes)


def _right(predict: Predict, features: Features) -> np.ndarray:
    """1.0 where a classifier names the image's class, float64 `[images]`."""
    return (predict(features.values) == features.labels).astype(float)


def _balanced(predict: Predict, features: Features) -> float:
    """Mean accuracy over the classes that are present, in points."""
    return 100 * _mean_over_classes(features.labels, _right(predict, features))


def _mean_over_classes(labels: np.ndarray, values: np.ndarray) -> float:
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def _gain(labels: np.ndarray, difference: np.ndarray, seed: int) -> Gain:
    """Mean over classes in points; its interval resamples the images of each class."""
    rng = np.random.default_rng(seed)
    groups: Sequence[np.ndarray] = [difference[labels == label] for label in np.unique(labels)]
    draws = np.mean(
        [rng.choice(group, (RESAMPLES, len(group))).mean(1) for group in groups], axis=0
    )
    low, high = np.quantile(draws, [0.025, 0.975])
    mean = _mean_over_classes(labels, difference)
    return Gain(100 * mean, 100 * float(low), 100 * float(high))
