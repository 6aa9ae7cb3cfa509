"""Logits of a classifier, and the precision to compute in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.classifier import ClassifierConfig, normalise
from .augmentation import centre, five_crops
from .image_cache import EpochLoader, ImageCache

FEATURES_AT_ONCE = 4096
MARGIN = 24 / 224
"""Margin of five crops as a fraction of the image size (LIFT, arXiv 2309.10019)."""


def side_of_crops(config: ClassifierConfig, crops: int, margin: int | None = None) -> int:
    """Side of the squares that `logits_of` takes.

    - `crops`: 1 for the centre, or 5.
    - `margin`: side of the square of five crops less the image size; None: `MARGIN` of it.
    """
    return config.resize if crops == 1 else side_of_five(config.image_size, margin)


def side_of_five(image_size: int, margin: int | None = None) -> int:
    """Side of the square that five crops are taken from; `margin` as in `side_of_crops`."""
    return image_size + (max(1, round(MARGIN * image_size)) if margin is None else margin)


@torch.inference_mode()
def logits_of(
    model: nn.Module,
    squares: Tensor,
    config: ClassifierConfig,
    precision: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    aspects: Tensor | None = None,
    crops: int = 1,
) -> Tensor:
    """Returns logits of centre crops, float32 `[batch, classes]` on the CPU.

    - `model`: in evaluation mode, on `device`.
    - `squares`: uint8 `[batch, 3, size, size]`.
    - `aspects`: width / height `[batch]` if the squares are whole pictures, squeezed.
    - `crops`: 5 for the mean logits of the centre and the four corners (test-time ensembling).
    """
    pixels = squares.to(device).float() / 255
    if crops == 1:
        views = [centre(pixels, config.image_size, aspects)]
    else:
        views = five_crops(pixels, config.image_size)
    total = torch.zeros(())
    for view in views:
        images = normalise(view, config)
        with autocast(device, precision):
            logits = model(images.contiguous(memory_format=torch.channels_last)).float().cpu()
        total = logits if len(views) == 1 else total + logits / len(views)
    return total


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    pixels: ImageCache,
    rows: np.ndarray,
    config: ClassifierConfig,
    precision: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int = 0,
    crops: int = 1,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Returns logits of the centre crops of some rows, float32 `[rows, classes]` on the CPU.

    - `model`: turned to evaluation mode for the time being.
    - `crops`: as in `logits_of`.
    - `on_progress`: gets the number of images of each batch.
    """
    training = model.training
    model.eval()
    result = []
    loader = EpochLoader(pixels, batch_size, workers, device)
    for chosen, squares in loader.of(rows):
        aspects = loader.aspects_of(chosen)
        result.append(
            logits_of(
                model, squares, config, precision, device=device, aspects=aspects, crops=crops
            )
        )
        on_progress(len(chosen))
    model.train(training)
    return torch.cat(result)


def class_means(
    tower: nn.Module,
    pixels: ImageCache,
    rows: np.ndarray,
    labels: np.ndarray,
    config: ClassifierConfig,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Tensor:
    """Returns normalise(mean of the normalised features) of each class, `[classes, channels]`.

    - `tower`: from pixels to features `[batch, channels]`; moved to `device`.
    - `rows`: images to take, at least one of each class; `labels`: their classes, `[rows]`.
    """
    classes = len(config.class_names)
    tower, total = tower.to(device), torch.zeros(())
    for part in np.array_split(np.arange(len(rows)), -(-len(rows) // FEATURES_AT_ONCE)):
        found = predict_logits(tower, pixels, rows[part], config, device=device, workers=workers)
        total = total + torch.zeros(classes, found.shape[1]).index_add_(
            0, torch.from_numpy(labels[part]), F.normalize(found, dim=1)
        )
    return F.normalize(total, dim=1)


def choose_precision(name: str, device: torch.device | str) -> torch.dtype:
    """Returns the named precision; `auto` is bfloat16 on hardware that is faster with it."""
    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def choose_attention(model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Uses plain matrix products for attention in bfloat16 on a CPU.

    There the backward pass of torch's fused attention takes half of a step
    (benchmarks/training.py).
    """
    if device.type == "cpu" and precision == torch.bfloat16:
        for module in [*model.children(), *getattr(model, "tower", model).children()]:
            choose: Any = getattr(module, "set_attn_implementation", None)
            if choose is not None:
                choose("eager")


def autocast(device: torch.device | str, precision: torch.dtype) -> AbstractContextManager[object]:
    """Computes in that precision where torch deems it safe; changes nothing for float32."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(device).type, precision)
