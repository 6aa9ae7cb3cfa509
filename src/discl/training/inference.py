"""Logits of a classifier, and the precision to compute in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ..models.classifier import ClassifierConfig, normalise
from .augmentation import centre
from .image_cache import EpochLoader, ImageCache


@torch.inference_mode()
def logits_of(
    model: nn.Module,
    squares: Tensor,
    config: ClassifierConfig,
    precision: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    aspects: Tensor | None = None,
) -> Tensor:
    """Returns logits of centre crops, float32 `[batch, classes]` on the CPU.

    - `model`: in evaluation mode, on `device`.
    - `squares`: uint8 `[batch, 3, size, size]`.
    - `aspects`: width / height `[batch]` if the squares are whole pictures, squeezed.
    """
    middle = centre(squares.to(device).float() / 255, config.image_size, aspects)
    images = normalise(middle, config)
    with autocast(device, precision):
        return model(images.contiguous(memory_format=torch.channels_last)).float().cpu()


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
    on_progress: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Returns logits of the centre crops of some rows, float32 `[rows, classes]` on the CPU.

    - `model`: turned to evaluation mode for the time being.
    - `on_progress`: gets the number of images of each batch.
    """
    training = model.training
    model.eval()
    result = []
    loader = EpochLoader(pixels, batch_size, workers)
    for chosen, squares in loader.of(rows):
        aspects = loader.aspects_of(chosen)
        result.append(logits_of(model, squares, config, precision, device=device, aspects=aspects))
        on_progress(len(chosen))
    model.train(training)
    return torch.cat(result)


def choose_precision(name: str, device: torch.device | str) -> torch.dtype:
    """Returns the named precision; `auto` is bfloat16 on hardware that is faster with it."""
    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device | str, precision: torch.dtype) -> AbstractContextManager[object]:
    """Computes in that precision where torch deems it safe; changes nothing for float32."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(device).type, precision)
