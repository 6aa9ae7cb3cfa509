"""Figures of a classifier, all from its confusion matrix; a group or class without images is absent, never 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts `[true class, predicted class]`."""
    return multiclass_confusion_matrix(predicted, labels, num_classes)


def class_accuracies(confusion: Tensor) -> dict[int, float]:
    """`{label: share of its images that are recognised}` in [0, 1], for the classes that have images."""
    totals = confusion.sum(1)
    return {label: confusion[label, label].item() / total for label, total in enumerate(totals.tolist()) if total}


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 over the labels that are present, as WILDS defines it (arXiv 2012.07421, appendix E.1)."""
    hits = confusion.diagonal().double()
    present = confusion.sum(1) > 0
    return (2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp_min(1))[present].mean().item()


def measure(
    logits: Tensor, labels: Tensor, class_names: Sequence[str], groups: Mapping[str, Sequence[int]], worst_k: Sequence[int] = ()
) -> dict[str, Any]:
    """Metrics of logits `[rows, classes]`; all shares in [0, 1].

    `accuracy` is top-1 over all images; `many`, `medium` and `few` are means over the classes of a group; `worst_k` is
    the mean of the k lowest class accuracies; `per_class` maps a name to its accuracy.
    """
    confusion = confusion_matrix(logits.argmax(1), labels, len(class_names))
    accuracies = class_accuracies(confusion)
    result: dict[str, Any] = {
        "images": len(labels),
        "accuracy": confusion.diagonal().sum().item() / len(labels),
        "macro_f1": macro_f1(confusion),
    }
    for name, members in groups.items():
        present = [accuracies[label] for label in members if label in accuracies]
        if present:
            result[name] = sum(present) / len(present)
    ordered = sorted(accuracies.values())
    for k in worst_k:
        if k <= len(ordered):
            result[f"worst_{k}"] = sum(ordered[:k]) / k
    result["per_class"] = {class_names[label]: accuracy for label, accuracy in accuracies.items()}
    return result


def softmax_rows(logits: Tensor) -> Tensor:
    """Probabilities `[rows, classes]` in float64."""
    return torch.softmax(logits.double(), dim=1)
