"""CUDA's operations, strengths and level update, against values worked out by hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from discl.baselines import make_system
from discl.baselines.cuda import (
    MAX_LEVEL,
    NAMES,
    OPERATIONS,
    RELEASED,
    Cuda,
    augment,
    augment_batch,
    magnitude,
    training_strengths,
    update_levels,
)
from discl.errors import RecipeError

RANGES = {
    **dict.fromkeys(
        [
            "vertical-flip",
            "mirror",
            "edge-enhance",
            "detail",
            "smooth",
            "auto-contrast",
            "equalise",
            "invert",
        ],
        (0, 0),
    ),
    "blur": (0, 2),
    "resize-crop": (1, 1.5),
    "rotate": (0, 30),
    "posterise": (0, 4),
    "solarise": (0, 256),
    "solarise-add": (0, 110),
    **dict.fromkeys(["colour", "contrast", "brightness", "sharpness"], (0.1, 1.9)),
    **dict.fromkeys(["shear-x", "shear-y"], (0, 0.3)),
    **dict.fromkeys(["translate-x", "translate-y"], (0, 100)),
}
"""(lo, hi) of each operation (arXiv 2302.05499 and its code)."""
EITHER_SIGN = {"rotate", "shear-x", "shear-y", "translate-x", "translate-y"}
FACTORS = ("colour", "contrast", "brightness", "sharpness")


def picture(size: int = 32) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    )


def apply(name: str, value: float, image: Image.Image) -> np.ndarray:
    return np.asarray(OPERATIONS[name][3](image, value))


def test_there_are_22_operations_with_these_ranges():
    assert len(NAMES) == 22
    assert {name: (lo, hi) for name, (lo, hi, _, _) in OPERATIONS.items()} == RANGES
    assert {
        name for name, (_, _, either_sign, _) in OPERATIONS.items() if either_sign
    } == EITHER_SIGN


def drawn_values(name: str, monkeypatch: pytest.MonkeyPatch, strength: int = 4) -> list[float]:
    """What an operation is called with, where it alone is drawn a thousand times."""
    values: list[float] = []
    lo, hi, either_sign, _ = OPERATIONS[name]
    monkeypatch.setattr("discl.baselines.cuda.NAMES", (name,))
    monkeypatch.setitem(
        OPERATIONS,
        name,
        (lo, hi, either_sign, lambda picture, value: values.append(value) or picture),
    )  # type: ignore
    rng = np.random.default_rng(5)
    for _ in range(250):
        augment(picture(4), strength, rng)
    return values


@pytest.mark.parametrize("name", sorted(EITHER_SIGN))
def test_either_sign_is_drawn_equally_often(name, monkeypatch):
    values = drawn_values(name, monkeypatch)
    assert {abs(value) for value in values} == {magnitude(name, 4)}
    assert np.mean(np.asarray(values) > 0) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("name", sorted(set(RANGES) - EITHER_SIGN))
def test_the_others_have_one_sign(name, monkeypatch):
    assert set(drawn_values(name, monkeypatch)) == {magnitude(name, 4)}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_weaken_up_to_the_highest_level(name):
    """They begin at .1 and would change nothing at 1, which no level reaches."""
    original = np.asarray(picture()).astype(int)
    change = [
        np.abs(apply(name, magnitude(name, strength), picture()).astype(int) - original).mean()
        for strength in (1, 4, 7, MAX_LEVEL)
    ]
    assert change == sorted(change, reverse=True) and change[-1] > 0
    assert magnitude(name, MAX_LEVEL) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("name", "strength", "value"),
    [
        ("rotate", 10, 10.0),
        ("rotate", 30, 30.0),
        ("blur", 15, 1.0),
        ("contrast", 0, 0.1),
        ("contrast", 10, 0.7),
        ("resize-crop", 6, 1.1),
        ("translate-x", 3, 10.0),
        ("posterise", 30, 4.0),
        ("solarise", 10, 256 / 3),
        ("shear-y", 10, 0.1),
        ("mirror", 10, 0.0),
    ],
)
def test_magnitude_is_linear_in_strength(name, strength, value):
    assert magnitude(name, strength) == pytest.approx(value)


@pytest.mark.parametrize("name", NAMES)
def test_operations_keep_size_and_mode(name):
    for strength in (0, 1, 10, 30):
        result = OPERATIONS[name][3](picture(), magnitude(name, strength))
        assert (result.size, result.mode) == ((32, 32), "RGB")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in NAMES
        if name not in {"colour", "contrast", "brightness", "sharpness", "resize-crop"}
    ],
)
def test_operations_with_a_magnitude_change_nothing_at_strength_0(name):
    lo, hi, _, _ = OPERATIONS[name]
    if lo != hi:
        assert np.array_equal(apply(name, magnitude(name, 0), picture()), np.asarray(picture()))


@pytest.mark.parametrize("name", ["posterise", "solarise", "solarise-add", "blur"])
def test_the_change_grows_with_strength(name):
    original = np.asarray(picture()).astype(int)
    change = [
        np.abs(apply(name, magnitude(name, strength), picture()).astype(int) - original).mean()
        for strength in (0, 10, 20, 30)
    ]
    assert change == sorted(change)
    assert change[0] < change[-1]


def test_known_pixels():
    image = Image.fromarray(np.asarray([[[10, 127, 200]]], np.uint8))
    assert apply("solarise-add", 50.9, image).ravel().tolist() == [60, 177, 200]
    assert apply("posterise", 4.0, image).ravel().tolist() == [0, 112, 192]
    assert apply("solarise", 128.0, image).ravel().tolist() == [10, 127, 55]
    assert apply("invert", 0.0, image).ravel().tolist() == [245, 128, 55]


CHANGES = {
    "posterise": (63.5, 63.5, 63.5),
    "solarise": (119, 92, 71),
    "solarise-add": (67, 81, 95),
}
"""Mean change in grey levels of the authors' operations at strengths 1, 5 and 10."""


def change(operation, value: float) -> float:
    original = picture(128)
    altered = np.asarray(operation[3](original, value)).astype(int)
    return np.abs(altered - np.asarray(original)).mean()


@pytest.mark.parametrize("name", CHANGES)
def test_the_released_operations_change_a_picture_as_the_authors_do(name):
    found = [change(RELEASED[name], magnitude(name, strength)) for strength in (1, 5, 10)]
    assert found == pytest.approx(CHANGES[name], abs=1)
    assert RELEASED[name][:3] == OPERATIONS[name][:3]
    gradual = [change(OPERATIONS[name], magnitude(name, strength)) for strength in (1, 5, 10)]
    assert all(weak < strong for weak, strong in zip(gradual, found, strict=True))


def test_a_recipe_chooses_the_form_of_the_operations():
    batch = np.random.default_rng(2).integers(0, 256, (16, 3, 8, 8), dtype=np.uint8)
    images, labels = torch.from_numpy(batch).float() / 255, torch.zeros(16, dtype=torch.long)
    altered = {}
    for form in ("gradual", "released"):
        cuda = make_system({"name": "cuda", "operations": form, "probability": 1.0})
        cuda.load_state({"levels": torch.tensor([6])})
        torch.manual_seed(0)
        altered[form] = cuda.alter(images, labels)
    assert not torch.equal(altered["gradual"], altered["released"])
    with pytest.raises(RecipeError, match="gradual or released; got 'strong'"):
        make_system({"name": "cuda", "operations": "strong"})


def test_translation_is_in_pixels():
    original = np.asarray(picture())
    assert np.array_equal(apply("translate-x", 5.0, picture())[:, :-5], original[:, 5:])
    assert np.array_equal(apply("translate-y", -5.0, picture())[5:], original[:-5])


def test_strength_0_changes_nothing_and_draws_nothing():
    rng = np.random.default_rng(1)
    before = rng.bit_generator.state
    assert np.array_equal(np.asarray(augment(picture(), 0, rng)), np.asarray(picture()))
    assert rng.bit_generator.state == before


def test_batches_do_not_depend_on_threads():
    batch = np.random.default_rng(2).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
    strengths = [0, 1, 2, 3, 4, 5, 10, 10]
    alone = augment_batch(batch, strengths, seed=3)
    with ThreadPoolExecutor(4) as threads:
        assert np.array_equal(alone, augment_batch(batch, strengths, seed=3, threads=threads))
    assert np.array_equal(alone[0], batch[0])
    assert not np.array_equal(alone, augment_batch(batch, strengths, seed=4))


def test_half_of_the_rows_get_their_class_level():
    levels = np.asarray([0, 4, 10])
    labels = np.repeat([0, 1, 2], 2000)
    strengths = training_strengths(levels, labels, np.random.default_rng(0))
    assert set(strengths[labels == 1]) == {0, 4}
    assert (strengths[labels == 2] == 10).mean() == pytest.approx(0.5, abs=0.05)
    assert not strengths[labels == 0].any()


def test_levels_rise_and_fall():
    """Class 0 always passes, class 1 never, class 2 below strength 2; class 3 is at the top."""
    rows_of_class = [np.asarray([0, 1]), np.asarray([2]), np.asarray([3]), np.asarray([4])]
    owner = np.asarray([0, 0, 1, 2, 3])
    strengths: dict[int, list[int]] = {}

    def recognised(rows, strength, rng):
        for label in owner[rows]:
            strengths.setdefault(int(label), []).append(strength)
        return np.select(
            [owner[rows] == 0, owner[rows] == 1, owner[rows] == 2],
            [True, False, strength < 2],
            True,
        )

    updated = update_levels(
        np.asarray([1, 0, 2, 10]),
        rows_of_class,
        recognised,
        threshold=0.6,
        rng=np.random.default_rng(0),
    )
    assert updated.tolist() == [2, 0, 1, 10]
    assert {strength: strengths[2].count(strength) for strength in set(strengths[2])} == {
        0: 10,
        1: 20,
        2: 30,
    }
    assert len(strengths[3]) == sum(10 * (s + 1) for s in range(11))


def test_a_class_without_an_image_keeps_its_level():
    rows_of_class = [np.arange(4), np.empty(0, np.int64), np.arange(4, 6)]

    def recognised(rows, strength, rng):
        return rows < 4

    updated = update_levels(
        np.asarray([2, 3, 2]),
        rows_of_class,
        recognised,
        threshold=0.5,
        rng=np.random.default_rng(0),
    )
    assert updated.tolist() == [3, 3, 1]
    empty = [np.empty(0, np.int64)] * 2
    assert update_levels(
        np.asarray([0, 4]), empty, recognised, threshold=0.5, rng=np.random.default_rng(0)
    ).tolist() == [0, 4]


def test_an_accuracy_at_the_threshold_does_not_pass():
    rows = [np.arange(10)]

    def recognised(chosen, strength, rng):
        return np.arange(len(chosen)) < 0.6 * len(chosen)

    assert update_levels(
        np.asarray([3]), rows, recognised, threshold=0.6, rng=np.random.default_rng(0)
    ).tolist() == [2]
    assert update_levels(
        np.asarray([3]), rows, recognised, threshold=0.59, rng=np.random.default_rng(0)
    ).tolist() == [4]


def test_one_process_judges_for_all():
    """The levels of rank 0 hold in every process, so that all augment alike."""
    actions, cuda = [], Cuda()
    levels = np.asarray([3, 0])
    pool = SimpleNamespace(
        held_out=np.zeros(2, bool), synthetic=np.zeros(2, bool), labels=np.arange(2), num_classes=2
    )
    state = SimpleNamespace(
        processes=SimpleNamespace(on_main=lambda action: actions.append(action) or levels)
    )
    cuda.begin_epoch(SimpleNamespace(pool=pool, state=state, seed=0), 0)
    assert len(actions) == 1 and cuda.levels is levels
