"""Augmentation of whole batches on the training device (kornia)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TrainingError
from .distributed import Processes

CROP_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)
"""Bounds of a random-resized crop's width / height."""
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


def augment_share(
    augmentation: Any,
    pixels: Tensor,
    processes: Processes,
    aspects: Tensor | None = None,
    crop_scale: tuple[float, float] = (0.08, 1.0),
) -> Tensor:
    """ImageCache `[share, 3, h, w]` augmented as they are in the whole batch, of which they are this process's share.

    Parameters are drawn for the whole batch, from a random state that the processes have in common.
    With `aspects`, width / height of each picture, the pixels are whole pictures squeezed into
    squares: the augmentation's random-resized-crop takes its shares of them in their own aspect.
    Raises TrainingError for an augmentation without random-resized-crop then.
    """
    if aspects is not None:
        first, *others = augmentation
        if type(first).__name__ != "RandomResizedCrop":
            raise TrainingError(
                "whole pictures are cropped by random-resized-crop; add it to the augmentations, "
                "or use resize_mode: square."
            )
        side = int(first.flags["size"][0])
        pixels = crop_whole(pixels, aspects, side, crop_scale, processes)
        augmentation = nn.Sequential(*others)
    if processes.size == 1:
        return augmentation(pixels)
    for step in augmentation:
        whole = (processes.size * len(pixels), *pixels.shape[1:])
        drawn = step.forward_parameters(torch.Size(whole))
        own = {
            name: value if name in OF_THE_BATCH else processes.local_shard(value)
            for name, value in drawn.items()
        }
        pixels = step(pixels, params=own)
    return pixels


def crop_whole(
    pixels: Tensor,
    aspects: Tensor,
    image_size: int,
    scale: tuple[float, float],
    processes: Processes | None = None,
) -> Tensor:
    """Random-resized crops `[share, 3, image_size, image_size]` of whole pictures that were
    squeezed into squares.

    Every crop has a share of the picture's area from `scale` and, in the picture's own pixels, a
    width / height from 3/4 to 4/3; `aspects` `[share]` is width / height of the pictures. Drawn
    from torch's random state for the whole batch of all `processes`.
    """
    processes = processes or Processes()
    drawn = torch.rand(processes.size * len(pixels), CROP_TRIES + 1, 2)
    boxes = crop_boxes(aspects.cpu().float(), scale, processes.local_shard(drawn))
    return _sample(pixels, boxes, image_size)


def crop_boxes(aspects: Tensor, scale: tuple[float, float], drawn: Tensor) -> Tensor:
    """(left, top, width, height) as shares of the picture's sides, float32 `[batch, 4]`.

    `drawn` `[batch, CROP_TRIES + 1, 2]` are uniform numbers: area and shape of each try, then the
    place. The first try that fits into the picture is taken; where none does, the greatest centre
    crop of an allowed shape, as torchvision has it.
    """
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    tries, place = drawn[:, :-1], drawn[:, -1]
    area = scale[0] + tries[..., 0] * (scale[1] - scale[0])
    ratio = torch.exp(low + tries[..., 1] * (high - low))
    shape = ratio / aspects[:, None]  # width / height as shares of the sides
    width, height = (area * shape).sqrt(), (area / shape).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(1, keepdim=True)
    nearest = aspects.clamp(*CROP_RATIO) / aspects
    fits = fits.gather(1, first)[:, 0]
    width = torch.where(fits, width.gather(1, first)[:, 0], nearest.clamp(max=1))
    height = torch.where(fits, height.gather(1, first)[:, 0], (1 / nearest).clamp(max=1))
    offset = torch.where(fits[:, None], place, 0.5)
    left, top = offset[:, 0] * (1 - width), offset[:, 1] * (1 - height)
    return torch.stack([left, top, width, height], 1)


def _sample(pixels: Tensor, boxes: Tensor, image_size: int) -> Tensor:
    """The boxes (left, top, width, height as shares) of squares, bilinearly resized to `[batch, 3,
    image_size, image_size]`."""
    boxes = boxes.to(pixels.device, pixels.dtype)
    left, top, width, height = boxes.unbind(1)
    zero = torch.zeros_like(left)
    rows = [width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(pixels), 3, image_size, image_size], align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def centre(pixels: Tensor, image_size: int, aspects: Tensor | None = None) -> Tensor:
    """The middle `[batch, 3, image_size, image_size]` of a batch of squares.

    With `aspects` the squares are whole pictures that were squeezed; their middle has the same
    field of view, in their own aspect.
    """
    side = pixels.shape[-1]
    first = (side - image_size) // 2
    middle = pixels[..., first : first + image_size, first : first + image_size]
    if aspects is None or bool((aspects == 1).all()):
        return middle
    share = image_size / side
    width, height = share * (1 / aspects).clamp(max=1), share * aspects.clamp(max=1)
    boxes = torch.stack([(1 - width) / 2, (1 - height) / 2, width, height], 1)
    found = _sample(pixels.float(), boxes, image_size)
    if not pixels.is_floating_point():
        found = found.round()
    square = (aspects == 1).to(pixels.device)[:, None, None, None]
    return torch.where(square, middle, found.to(pixels.dtype))


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
