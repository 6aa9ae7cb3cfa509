"""Augmentation of whole batches on the training device, by kornia; every image draws its own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .processes import Processes

AUGMENTATIONS = ("flip", "random-crop", "random-resized-crop", "color-jitter", "cutout")

OF_THE_BATCH = ("order", "forward_input_shape")
"""Parameters that kornia draws once for a batch; of all others each image has its own row."""


def make_augmentation(
    names: Sequence[str], image_size: int, crop_scale: tuple[float, float] = (0.08, 1.0)
) -> nn.Module:
    """A module from float pixels `[batch, 3, resize, resize]` in [0, 1] to `[batch, 3, image_size, image_size]`.

    `random-crop` pads by an eighth (4 pixels at 32) and crops back; `random-resized-crop` takes a share of the area from
    `crop_scale`; `color-jitter` is (.4, .4, .4); `cutout` blanks a square of half the side. Without one of the two crops the
    centre is taken.
    """
    import kornia.augmentation as K

    size = (image_size, image_size)
    steps: list[Any] = []
    if "random-resized-crop" in names:
        steps.append(K.RandomResizedCrop(size, scale=crop_scale, cropping_mode="resample"))
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


def augment_share(augmentation: Any, pixels: Tensor, processes: Processes) -> Tensor:
    """Pixels `[share, 3, h, w]` augmented as they are in the whole batch, of which they are this process's share.

    Parameters are drawn for the whole batch, from a random state that the processes have in common.
    """
    if processes.size == 1:
        return augmentation(pixels)
    for step in augmentation:
        whole = (processes.size * len(pixels), *pixels.shape[1:])
        drawn = step.forward_parameters(torch.Size(whole))
        own = {
            name: value if name in OF_THE_BATCH else processes.own(value)
            for name, value in drawn.items()
        }
        pixels = step(pixels, params=own)
    return pixels


def centre(pixels: Tensor, image_size: int) -> Tensor:
    """The middle `[batch, 3, image_size, image_size]` of a batch of squares."""
    first = (pixels.shape[-1] - image_size) // 2
    return pixels[..., first : first + image_size, first : first + image_size]


def mix_images(images: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor, float]:
    """(mixed images, order `[batch]`, share λ in [0, 1]): image i holds λ of itself and 1 − λ of image `order[i]`.

    `mixup` and `cutmix` are the α of Beta(α, α) from which λ is drawn, 0 for off; with both, one of the two by chance.
    Mixup (arXiv 1710.09412) blends pixels, CutMix (arXiv 1905.04899) pastes a box; λ is then what the box leaves.
    """
    order = torch.randperm(len(images)).to(images.device)
    pastes = cutmix > 0 and (mixup <= 0 or bool(torch.rand(()) < 0.5))
    alpha = torch.tensor(cutmix if pastes else mixup, dtype=torch.float64)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if not pastes:
        return share * images + (1 - share) * images[order], order, share
    height, width = images.shape[-2:]
    side = (1 - share) ** 0.5
    top, left = int(torch.randint(height, ())), int(torch.randint(width, ()))
    half_height, half_width = round(height * side / 2), round(width * side / 2)
    rows = slice(max(0, top - half_height), min(height, top + half_height))
    columns = slice(max(0, left - half_width), min(width, left + half_width))
    mixed = images.clone()
    mixed[..., rows, columns] = images[order][..., rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, order, 1 - pasted / (height * width)
