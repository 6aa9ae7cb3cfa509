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
"""Parameters that kornia draws once per batch; of all others it draws a row per image."""


def make_augmentation(
    names: Sequence[str], image_size: int, crop_scale: tuple[float, float] = (0.08, 1.0)
) -> nn.Module:
    """Returns a module that augments batches on their device.

    It maps float pixels `[batch, 3, resize, resize]` in [0, 1] to `[batch, 3, image_size,
    image_size]`. `names` are of `AUGMENTATIONS`; without one of the two crops it crops the centre.

    - `random-crop` pads by an eighth (4 pixels at 32) and crops back.
    - `random-resized-crop` crops a fraction of the area from `crop_scale`.
    - `color-jitter` is (.4, .4, .4); `cutout` blanks a square of half the side.
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


def augment_shard(
    augmentation: Any,
    pixels: Tensor,
    processes: Processes,
    *,
    aspects: Tensor | None = None,
    crop_scale: tuple[float, float] = (0.08, 1.0),
) -> Tensor:
    """Augments this process's shard of a batch as it is augmented in the whole batch.

    Parameters are drawn for the whole batch, from a random state that the processes share.

    - `pixels`: `[shard, 3, h, w]`.
    - `aspects`: width / height `[shard]` if the pixels are whole pictures, squeezed into squares.
      Random-resized crops then keep the pictures' own aspect.

    Raises TrainingError for whole pictures without random-resized-crop.
    """
    if aspects is not None:
        first, *others = augmentation
        if type(first).__name__ != "RandomResizedCrop":
            raise TrainingError(
                "whole pictures are cropped by random-resized-crop; add it to the augmentations, "
                "or use resize_mode: square."
            )
        side = int(first.flags["size"][0])
        pixels = crop_whole(pixels, aspects, side, crop_scale, processes=processes)
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
    *,
    processes: Processes | None = None,
) -> Tensor:
    """Returns random-resized crops of whole pictures, `[shard, 3, image_size, image_size]`.

    - `aspects`: width / height of the pictures, `[shard]`.
    - `scale`: bounds of a crop's fraction of the area. In the picture's own pixels its width /
      height is 3/4 to 4/3.

    Crops are drawn from torch's random state for the whole batch of all `processes`.
    """
    processes = processes or Processes()
    drawn = torch.rand(processes.size * len(pixels), CROP_TRIES + 1, 2)
    boxes = crop_boxes(aspects.cpu().float(), scale, processes.local_shard(drawn))
    return _sample(pixels, boxes, image_size)


def crop_boxes(aspects: Tensor, scale: tuple[float, float], drawn: Tensor) -> Tensor:
    """Returns (left, top, width, height) as fractions of the sides, float32 `[batch, 4]`.

    - `drawn`: uniform numbers `[batch, CROP_TRIES + 1, 2]`: area and shape of each try, then the
      offset.

    The first try that fits into the picture is used. If none does, it is the largest centre crop of
    an allowed shape, as in torchvision.
    """
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    tries, offsets = drawn[:, :-1], drawn[:, -1]
    area = scale[0] + tries[..., 0] * (scale[1] - scale[0])
    ratio = torch.exp(low + tries[..., 1] * (high - low))
    shape = ratio / aspects[:, None]  # width / height as fractions of the sides
    width, height = (area * shape).sqrt(), (area / shape).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(1, keepdim=True)
    nearest = aspects.clamp(*CROP_RATIO) / aspects
    fits = fits.gather(1, first)[:, 0]
    width = torch.where(fits, width.gather(1, first)[:, 0], nearest.clamp(max=1))
    height = torch.where(fits, height.gather(1, first)[:, 0], (1 / nearest).clamp(max=1))
    offset = torch.where(fits[:, None], offsets, 0.5)
    left, top = offset[:, 0] * (1 - width), offset[:, 1] * (1 - height)
    return torch.stack([left, top, width, height], 1)


def _sample(pixels: Tensor, boxes: Tensor, image_size: int) -> Tensor:
    """Boxes of squares, as of `crop_boxes`, resized bilinearly to `[batch, 3, image_size,
    image_size]`."""
    boxes = boxes.to(pixels.device, pixels.dtype)
    left, top, width, height = boxes.unbind(1)
    zero = torch.zeros_like(left)
    rows = [width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(pixels), 3, image_size, image_size], align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def centre(pixels: Tensor, image_size: int, aspects: Tensor | None = None) -> Tensor:
    """Returns the middle of squares, `[batch, 3, image_size, image_size]`.

    - `aspects`: width / height if the squares are whole pictures, squeezed. Their middle has the
      same field of view, in their own aspect.
    """
    side = pixels.shape[-1]
    first = (side - image_size) // 2
    middle = pixels[..., first : first + image_size, first : first + image_size]
    if aspects is None or bool((aspects == 1).all()):
        return middle
    fraction = image_size / side
    width, height = fraction * (1 / aspects).clamp(max=1), fraction * aspects.clamp(max=1)
    boxes = torch.stack([(1 - width) / 2, (1 - height) / 2, width, height], 1)
    sampled = _sample(pixels.float(), boxes, image_size)
    if not pixels.is_floating_point():
        sampled = sampled.round()
    square = (aspects == 1).to(pixels.device)[:, None, None, None]
    return torch.where(square, middle, sampled.to(pixels.dtype))


def five_crops(pixels: Tensor, image_size: int) -> list[Tensor]:
    """Returns the four corners and the centre of squares, each `[batch, 3, image_size,
    image_size]`."""
    far = pixels.shape[-1] - image_size
    return [
        pixels[..., top : top + image_size, left : left + image_size]
        for top, left in ((0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2))
    ]


def mix_images(images: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor, float]:
    """Returns (mixed images, order `[batch]`, λ in [0, 1]).

    Image i holds λ of itself and 1 − λ of image `order[i]`.

    - `mixup`, `cutmix`: α of Beta(α, α) from which λ is drawn, 0 for off. With both, one of the two
      is chosen at random.

    Mixup (arXiv 1710.09412) blends pixels. CutMix (arXiv 1905.04899) pastes a box; λ is then the
    area that is left.
    """
    order = torch.randperm(len(images)).to(images.device)
    pastes = cutmix > 0 and (mixup <= 0 or bool(torch.rand(()) < 0.5))
    alpha = torch.tensor(cutmix if pastes else mixup, dtype=torch.float64)
    own = float(torch.distributions.Beta(alpha, alpha).sample())
    if not pastes:
        return own * images + (1 - own) * images[order], order, own
    height, width = images.shape[-2:]
    side = (1 - own) ** 0.5
    top, left = int(torch.randint(height, ())), int(torch.randint(width, ()))
    half_height, half_width = round(height * side / 2), round(width * side / 2)
    rows = slice(max(0, top - half_height), min(height, top + half_height))
    columns = slice(max(0, left - half_width), min(width, left + half_width))
    mixed = images.clone()
    mixed[..., rows, columns] = images[order][..., rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, order, 1 - pasted / (height * width)
