"""Augmentation of batches: shapes, ranges, and that every image draws for itself from torch's random state."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from discl.curriculum.augmentation import AUGMENTATIONS, centre, make_augmentation

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
    """Nothing is remembered between batches, so that a resumed run draws as one that was never stopped."""
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
    """A picture whose pixels grow from left to right stays so in every crop, over a smaller range."""
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(30, 3, 64, 64)
    result = augmented(("random-resized-crop",), ramp, 32)
    assert (result[..., 1:] - result[..., :-1] >= -1e-6).all()
    ranges = result[:, 0, 0, -1] - result[:, 0, 0, 0]
    assert ranges.min() < 0.5
    assert ranges.max() <= 1
