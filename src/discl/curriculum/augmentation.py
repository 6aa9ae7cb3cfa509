"""Augmentation of whole batches on the training device, by kornia; every image draws its own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

AUGMENTATIONS = ("flip", "random-crop", "random-resized-crop", "color-jitter", "cutout")


def make_augmentation(names: Sequence[str], image_size: int) -> nn.Module:
    """A module from float pixels `[batch, 3, resize, resize]` in [0, 1] to `[batch, 3, image_size, image_size]`.

    `random-crop` pads by an eighth (4 pixels at 32) and crops back; `random-resized-crop` takes 8–100 % of the area;
    `color-jitter` is (.4, .4, .4); `cutout` blanks a square of half the side. Without one of the two crops the centre is taken.
    """
    import kornia.augmentation as K

    size = (image_size, image_size)
    steps: list[Any] = []
    if "random-resized-crop" in names:
        steps.append(K.RandomResizedCrop(size, scale=(0.08, 1.0), cropping_mode="resample"))
    elif "random-crop" in names:
        steps.append(K.RandomCrop(size, padding=image_size // 8, cropping_mode="slice"))
    else:
        steps.append(K.CenterCrop(size, cropping_mode="slice"))
    if "flip" in names:
        steps.append(K.RandomHorizontalFlip(p=0.5))
    if "color-jitter" in names:
        steps.append(K.ColorJitter(0.4, 0.4, 0.4, 0.0, p=1.0))
    if "cutout" in names:
        steps.append(K.RandomErasing(scale=(0.25, 0.25), ratio=(1.0, 1.0), p=1.0))
    return nn.Sequential(*steps)


def centre(pixels: Tensor, image_size: int) -> Tensor:
    """The middle `[batch, 3, image_size, image_size]` of a batch of squares."""
    first = (pixels.shape[-1] - image_size) // 2
    return pixels[..., first : first + image_size, first : first + image_size]
