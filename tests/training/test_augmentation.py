"""Augmentation of batches: shapes, ranges, and one draw per image from torch's random state."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from discl.data import to_square, to_whole
from discl.errors import TrainingError
from discl.training.augmentation import (
    AUGMENTATIONS,
    CROP_TRIES,
    augment_shard,
    centre,
    crop_boxes,
    crop_whole,
    make_augmentation,
    mix_images,
)
from discl.training.distributed import Processes

COMBINATIONS = [
    names for count in range(len(AUGMENTATIONS) + 1) for names in combinations(AUGMENTATIONS, count)
]


def pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """Float pixels in [0.1, 1], so that 0 can only be padding or a blanked square."""
    return 0.1 + 0.9 * torch.rand(
        count, 3, side, side, generator=torch.Generator().manual_seed(seed)
    )


def augmented(names: tuple[str, ...], pixels: Tensor, size: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return make_augmentation(names, size)(pixels)


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "none")
def test_every_combination_gives_squares_of_the_size_asked_for(names: tuple[str, ...]) -> None:
    for resize in (32, 40):
        result = augmented(names, pictures(6, resize), 32)
        assert result.shape == (6, 3, 32, 32)
        assert result.dtype == torch.float32
        assert result.min() >= 0
        assert result.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_drawn_from_the_random_state_and_anew_for_every_image(name: str) -> None:
    one = pictures(1, 40).expand(16, -1, -1, -1)
    first, again, other = (augmented((name,), one, 32, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(image.flatten().tolist()) for image in first}) >= 2


def test_one_augmentation_used_twice_draws_what_two_of_them_draw() -> None:
    """Nothing is kept between batches, so a resumed run draws as an uninterrupted one."""
    pixels = pictures(8, 32)
    used = make_augmentation(AUGMENTATIONS, 32)
    used(pictures(5, 32, seed=1))
    torch.manual_seed(3)
    expected = used(pixels)
    assert torch.equal(augmented(AUGMENTATIONS, pixels, 32, seed=3), expected)


def test_without_any_the_centre_is_taken() -> None:
    pixels = pictures(4, 40)
    assert torch.equal(augmented((), pixels, 32), pixels[..., 4:36, 4:36])
    assert torch.equal(augmented((), pixels, 32), centre(pixels, 32))
    assert torch.equal(centre(pixels, 40), pixels)


def test_color_jitter_is_the_published_one() -> None:
    """Brightness × [.6, 1.4], contrast × [.6, 1.4] around the mean; saturation changes no grey."""
    grey = torch.full((400, 3, 8, 8), 0.4)
    grey[..., 4:] = 0.6
    result = augmented(("color-jitter",), grey, 8)
    assert (result.max(1).values - result.min(1).values).abs().max() < 1e-5
    mean = result.mean((1, 2, 3))
    brightness = mean / 0.5
    contrast = (result[:, 0, :, 4:].mean((1, 2)) - result[:, 0, :, :4].mean((1, 2))) / (0.4 * mean)
    for factor in (brightness, contrast):
        assert 0.599 < factor.min() < 0.65 and 1.35 < factor.max() < 1.401
        assert abs(factor.mean() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([brightness, contrast]))[0, 1]) < 0.2


# ---------------------------------------------------------------- crops of whole pictures


def ramps(count: int, side: int) -> Tensor:
    """Whole pictures in which red is the place from the left and green that from the top, as shares
    of the sides."""
    places = (torch.arange(side) + 0.5) / side
    red, green = places.expand(side, side), places[:, None].expand(side, side)
    return torch.stack([red, green, torch.zeros_like(red)]).expand(count, -1, -1, -1)


def draw_boxes(aspect: float, scale: tuple[float, float], count: int = 2000) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(count, CROP_TRIES + 1, 2, generator=generator)
    return crop_boxes(torch.full((count,), aspect), scale, drawn)


@pytest.mark.parametrize("aspect", [0.4, 0.75, 1.0, 16 / 9, 3.0])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0), (0.1, 0.2)])
def test_crops_have_their_share_of_the_whole_picture_in_its_own_aspect(
    aspect: float, scale: tuple[float, float]
) -> None:
    left, top, width, height = draw_boxes(aspect, scale).unbind(1)
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    ratio, area = aspect * width / height, width * height
    assert ratio.min() > 0.749 and ratio.max() < 1.334
    # a picture that is wider than any crop of that share: the greatest centre crop
    fitted = area >= scale[0] - 1e-6
    assert area.max() <= scale[1] + 1e-6
    greatest = min(4 / 3 / aspect, 1.0) * min(aspect / (3 / 4), 1.0)
    assert torch.allclose(area[~fitted], torch.tensor(greatest))
    if scale[1] < 0.25:
        assert fitted.all() and left.min() < 0.01 and (left + width).max() > 0.99
        middle = (top + height / 2)[width < 0.9]
        assert abs(middle.mean() - 0.5) < 0.03


def test_a_crop_holds_what_lies_in_its_box() -> None:
    torch.manual_seed(5)
    aspects = torch.tensor([2.0, 0.5, 1.0, 1.5] * 8)
    state = torch.get_rng_state()
    cropped = crop_whole(ramps(32, 64), aspects, 16, (0.08, 1.0))
    torch.set_rng_state(state)
    boxes = crop_boxes(aspects, (0.08, 1.0), torch.rand(32, CROP_TRIES + 1, 2))
    inside = (torch.arange(16) + 0.5) / 16
    for image, (left, top, width, height) in zip(cropped, boxes, strict=True):
        places = (left + width * inside).clamp(0.5 / 64, 1 - 0.5 / 64)
        assert torch.allclose(image[0], places.expand(16, 16), atol=1e-5)
        places = (top + height * inside).clamp(0.5 / 64, 1 - 0.5 / 64)
        assert torch.allclose(image[1], places[:, None].expand(16, 16), atol=1e-5)


def test_crops_reach_what_a_centre_square_leaves_out() -> None:
    torch.manual_seed(0)
    augmentation = make_augmentation(("random-resized-crop",), 16)
    wide = torch.full((300,), 3.0)
    whole = augment_shard(
        augmentation, ramps(300, 48), Processes(), aspects=wide, crop_scale=(0.08, 0.5)
    )
    assert whole[:, 0].min() < 0.05 and whole[:, 0].max() > 0.95
    flipped = make_augmentation(("random-resized-crop", "flip"), 16)
    result = augment_shard(flipped, ramps(300, 48), Processes(), aspects=wide)
    right = (result[:, 0, 0, -1] > result[:, 0, 0, 0]).float().mean()
    assert 0.4 < right < 0.6, "what follows the crop is done too"
    with pytest.raises(TrainingError, match=r"resize_mode: square"):
        augment_shard(make_augmentation(("flip",), 16), ramps(2, 48), Processes(), aspects=wide[:2])


def test_processes_together_crop_what_one_process_crops() -> None:
    augmentation = make_augmentation(("random-resized-crop", "flip"), 8)
    pixels, aspects = pictures(6, 12), torch.tensor([2.0, 1.0, 0.5, 1.5, 3.0, 0.7])
    parts = []
    for rank in range(2):
        processes = Processes(rank, 2)
        torch.manual_seed(3)
        own = processes.local_shard(pixels), processes.local_shard(aspects)
        parts.append(augment_shard(augmentation, own[0], processes, aspects=own[1]))
    torch.manual_seed(3)
    alone = augment_shard(augmentation, pixels, Processes(), aspects=aspects)
    assert torch.equal(torch.cat(parts), alone)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (48, 36)])
def test_the_middle_of_a_whole_picture_is_the_centre_crop(size: tuple[int, int]) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    whole, square = (
        torch.from_numpy(fit(picture, 32)).permute(2, 0, 1)[None] for fit in (to_whole, to_square)
    )
    middle = centre(whole, 24, torch.tensor([size[0] / size[1]]))
    assert middle.dtype == torch.uint8 and middle.shape == (1, 3, 24, 24)
    assert (middle.float() - centre(square, 24).float()).abs().mean() < 3


def test_square_pictures_are_as_they_were() -> None:
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(centre(pixels, 24, torch.ones(4)), centre(pixels, 24))
    mixed = centre(pixels, 24, torch.tensor([1.0, 2.0, 1.0, 0.5]))
    assert torch.equal(mixed[::2], centre(pixels, 24)[::2])
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert np.array_equal(to_whole(picture, 16), to_square(picture, 16))


def test_flip_mirrors_about_half_of_the_images() -> None:
    pixels = pictures(200, 8)
    result = augmented(("flip",), pixels, 8)
    kept = torch.tensor(
        [torch.equal(after, before) for after, before in zip(result, pixels, strict=True)]
    )
    assert torch.equal(result[~kept], pixels[~kept].flip(-1))
    assert 60 < kept.sum() < 140


def test_random_crop_is_a_window_of_the_padded_image() -> None:
    """Padding is an eighth, 4 pixels at 32, so that there are 9 × 9 windows."""
    pixels = pictures(40, 32)
    padded = F.pad(pixels, (4, 4, 4, 4))
    places = []
    for row, result in enumerate(augmented(("random-crop",), pixels, 32)):
        windows = padded[row].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        found = (windows == result).flatten(2).all(2).nonzero().tolist()
        assert len(found) == 1
        places += [tuple(found[0])]
    assert len(set(places)) > 20
    assert {place for pair in places for place in pair} == set(range(9))


def test_cutout_blanks_one_square_of_half_the_side() -> None:
    for result in augmented(("cutout",), pictures(20, 32), 32):
        blank = (result == 0).all(0)
        rows, columns = blank.any(1).nonzero().flatten(), blank.any(0).nonzero().flatten()
        assert (len(rows), len(columns)) == (16, 16)
        assert blank.sum() == 16 * 16


def test_color_jitter_keeps_the_shapes() -> None:
    """Grey stays grey: only brightness, contrast and saturation are drawn, no hue."""
    grey = pictures(8, 16)[:, :1].expand(-1, 3, -1, -1)
    result = augmented(("color-jitter",), grey, 16)
    torch.testing.assert_close(result[:, 0], result[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(result[:, 0], result[:, 2], atol=1e-5, rtol=0)
    assert not torch.allclose(result, grey, atol=1e-2)


def test_random_resized_crop_enlarges_a_part() -> None:
    """Pixels that grow from left to right do so in every crop, over a smaller range."""
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(30, 3, 64, 64)
    result = augmented(("random-resized-crop",), ramp, 32)
    assert (result[..., 1:] - result[..., :-1] >= -1e-6).all()
    ranges = result[:, 0, 0, -1] - result[:, 0, 0, 0]
    assert ranges.min() < 0.5
    assert ranges.max() <= 1


def test_mixup_blends_and_cutmix_pastes() -> None:
    torch.manual_seed(3)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    for _ in range(20):
        mixed, order, share = mix_images(images, 0.4, 0.0)
        torch.testing.assert_close(mixed, share * images + (1 - share) * images[order])
        pasted, order, share = mix_images(images, 0.0, 1.0)
        own = pasted == images
        assert (own | (pasted == images[order])).all()
        moved = order != torch.arange(4)
        torch.testing.assert_close(
            own[moved].float().mean((1, 2, 3)), torch.full((int(moved.sum()),), share)
        )
