"""Top-1, many/medium/few, worst-k, macro F1, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts `[true class, predicted class]`."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # over a second

    return multiclass_confusion_matrix(predicted, labels, num_classes)


def class_accuracies(confusion: Tensor) -> dict[int, float]:
    """`{label: accuracy}` in [0, 1], for the classes that have images.

    - `confusion`: counts `[true class, predicted class]`.
    """
    totals = confusion.sum(1)
    return {
        label: confusion[label, label].item() / total
        for label, total in enumerate(totals.tolist())
        if total
    }


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 over the labels that are present (arXiv 2012.07421, appendix E.1).

    - `confusion`: counts `[true class, predicted class]`.
    """
    hits = confusion.diagonal().double()
    present = confusion.sum(1) > 0
    return (2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp_min(1))[present].mean().item()


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in [0, 1] (arXiv 1706.04599, eq. 3).

    Σ |B| / n · |accuracy(B) − confidence(B)| over 15 equal-width bins B of the largest probability.

    - `logits`: `[images, classes]`.
    - `labels`: `[images]`.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    return multiclass_calibration_error(
        softmax_rows(logits), labels, logits.shape[1], n_bins=15
    ).item()


def measure_domains(
    predicted: Tensor, labels: Tensor, domains: Sequence[Any], num_classes: int
) -> dict[str, dict[str, Any]]:
    """`{domain: {"images", "accuracy", "macro_f1"}}`.

    - `predicted`, `labels`, `domains`: one per image, `[images]`. Macro F1 is over the labels that
      are present in the domain.
    """
    rows_of: dict[str, list[int]] = {}
    for row, domain in enumerate(domains):
        rows_of.setdefault(str(domain), []).append(row)
    result = {}
    for domain, rows in sorted(rows_of.items()):
        confusion = confusion_matrix(predicted[rows], labels[rows], num_classes)
        accuracy = confusion.diagonal().sum().item() / len(rows)
        result[domain] = {
            "images": len(rows),
            "accuracy": accuracy,
            "macro_f1": macro_f1(confusion),
        }
    return result


def measure(
    logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    groups: Mapping[str, Sequence[int]],
    *,
    worst_k: Sequence[int] = (),
    domains: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Metrics in [0, 1]; a group without images has none.

    `accuracy` is top-1 over all images. `many`, `medium` and `few` are mean class accuracies of a
    group. `worst_k` is the mean of the k lowest class accuracies. `per_class` maps names to
    accuracies.

    - `logits`: `[images, classes]`.
    - `labels`: `[images]`.
    - `groups`: labels of each group.
    - `worst_k`: each k to report.
    - `domains`: domain of each image, `[images]`. Adds `per_domain` and its lowest values,
      `worst_domain_accuracy` and `worst_domain_macro_f1`.
    """
    confusion = confusion_matrix(logits.argmax(1), labels, len(class_names))
    accuracies = class_accuracies(confusion)
    result: dict[str, Any] = {
        "images": len(labels),
        "accuracy": confusion.diagonal().sum().item() / len(labels),
        "macro_f1": macro_f1(confusion),
        "calibration_error": calibration_error(logits, labels),
    }
    for name, members in groups.items():
        present = [accuracies[label] for label in members if label in accuracies]
        if present:
            result[name] = sum(present) / len(present)
    ordered = sorted(accuracies.values())
    for k in worst_k:
        if k <= len(ordered):
            result[f"worst_{k}"] = sum(ordered[:k]) / k
    if domains is not None:
        result["per_domain"] = measure_domains(logits.argmax(1), labels, domains, len(class_names))
        for metric in ("accuracy", "macro_f1"):
            result[f"worst_domain_{metric}"] = min(
                each[metric] for each in result["per_domain"].values()
            )
    result["per_class"] = {class_names[label]: accuracy for label, accuracy in accuracies.items()}
    return result


def true_class_probability(logits: Tensor, labels: np.ndarray) -> np.ndarray:
    """Softmax probability of the true class, float64 `[images]` in [0, 1].

    - `logits`: `[images, classes]`, on the CPU.
    - `labels`: `[images]`.
    """
    rows = torch.arange(len(labels))
    return softmax_rows(logits)[rows, torch.from_numpy(labels)].numpy()


def softmax_rows(logits: Tensor) -> Tensor:
    """Probabilities `[rows, classes]` in float64."""
    return torch.softmax(logits.double(), dim=1)
