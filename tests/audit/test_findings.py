"""Findings about single images and about classes; the table that keeps them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from discl.audit.coefficients import SIDE
from discl.audit.findings import (
    KINDS,
    Finding,
    Images,
    as_columns,
    describe_findings,
    exact_duplicates,
    expected_coverage,
    find_drift,
    find_poor,
    raise_limit,
)
from discl.audit.limits import Limits
from discl.audit.measures import measure_image
from discl.audit.table import leaked_images, read_findings, write_findings
from discl.errors import BrokenFileError


def scene(number: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """An image in colour with edges at several scales."""
    random = np.random.default_rng(number)
    image = Image.new("RGB", size, tuple(random.integers(30, 220, 3).tolist()))
    for _ in range(40):
        left, top = random.integers(0, size[0]), random.integers(0, size[1])
        colour = tuple(random.integers(0, 256, 3).tolist())
        wide, high = random.integers(2, 24, 2)
        image.paste(colour, (int(left), int(top), int(left + wide), int(top + high)))
    return image


def images_of(pictures: list[Image.Image], split: str = "train") -> Images:
    count = len(pictures)
    return Images(
        split,
        [f"{split} {number}" for number in range(count)],
        [image.tobytes().hex()[:400] for image in pictures],
        np.zeros(count, np.int64),
        np.full(count, 100),
        [""] * count,
        np.zeros((count, SIDE, SIDE), np.uint8),
        np.asarray([image.size for image in pictures]).reshape(-1, 2),
        as_columns([measure_image(image) for image in pictures]),
    )


def found(pictures: list[Image.Image], **limits: float) -> set[tuple[str, int]]:
    findings = find_poor(images_of(pictures), Limits(**limits))
    return {(finding.kind, int(finding.id.split()[1])) for finding in findings}


def test_quantiles_are_those_of_numpy() -> None:
    """To the last bit: stored findings stay the same."""
    random = np.random.default_rng(0)
    for size in ((1, 1), (2, 1), (3, 7), (41, 20), (64, 96)):
        pixels = random.integers(0, random.integers(1, 256), (*size, 3)).astype(np.uint8)
        image = Image.fromarray(pixels)
        measures = measure_image(image)
        bright, dark = np.quantile(np.asarray(image.convert("L")), (0.05, 0.95)) / 255
        colour = np.quantile(pixels.max(2) - pixels.min(2), 0.99) / 255
        assert (measures.dark, measures.bright, measures.colour) == (dark, bright, colour)


def test_poor_images_are_found_and_good_ones_are_not() -> None:
    good = [scene(number) for number in range(8)]
    assert found(good) == set()
    dark = scene(20).point(lambda value: value // 6)
    bright = scene(21).point(lambda value: 235 + value // 14)
    blurred = scene(22).filter(ImageFilter.GaussianBlur(6))
    flat = Image.new("RGB", (96, 64), (120, 40, 40))
    poor = [dark, bright, blurred, flat, scene(23, (400, 40)), scene(24, (8, 8))]
    poor.append(scene(25).convert("L").convert("RGB"))
    kinds = ("dark", "bright", "blurred", "low-information", "odd-aspect", "odd-size", "grey")
    assert found([*good, *poor]) == {(kind, 8 + place) for place, kind in enumerate(kinds)}


def test_limits_decide_and_grey_sets_have_no_grey_findings() -> None:
    grey = [scene(number).convert("L").convert("RGB") for number in range(4)]
    assert found(grey) == set()
    assert {kind for kind, _ in found(grey, dark=1.0)} == {"dark"}
    assert found([scene(0, (200, 40))]) == {("odd-aspect", 0)}
    assert found([scene(0, (200, 40))], aspect=6) == set()
    assert find_poor(images_of([]), Limits()) == []


def test_the_earlier_image_of_exact_duplicates_is_the_first() -> None:
    pictures = [scene(0), scene(1), scene(0)]
    train, test = images_of(pictures), images_of([scene(1), scene(2)], "test")
    assert [
        (each.split, each.id, each.other_split, each.other)
        for each in exact_duplicates([train, test])
    ] == [("train", "train 2", "train", "train 0"), ("test", "test 0", "train", "train 1")]


def test_where_images_look_alike_the_limit_rises_to_one_in_a_hundred() -> None:
    def pairs(*values: float) -> list[Finding]:
        return [
            Finding("near-duplicate", "train", f"a{place}", 0, 100, value, "test", f"b{place}")
            for place, value in enumerate(values)
        ]

    limits, exact = Limits(), Finding("exact-duplicate", "train", "x", 0, 100, 1.0, "train", "y")
    assert raise_limit(limits, [*pairs(0.99), exact], 200) == limits
    alike = pairs(*np.linspace(0.9, 0.95, 51))
    assert raise_limit(limits, alike, 1000).copies == pytest.approx(0.945)
    assert raise_limit(limits, alike, 10_200) == limits
    assert raise_limit(limits, pairs(0.91, 0.92, 0.93, 0.94, 0.95), 60) == limits, "few are shown"
    assert raise_limit(limits, pairs(*[0.999] * 60), 1000).copies == 0.97
    assert raise_limit(Limits(copies=0.98), alike, 1000).copies == 0.98


def test_expected_coverage_is_what_a_simulation_finds() -> None:
    from discl.evaluation.worth import precision_and_coverage

    random = np.random.default_rng(0)
    measured = [
        precision_and_coverage(random.normal(size=(30, 4)), random.normal(size=(12, 4)))[1]
        for _ in range(200)
    ]
    assert np.mean(measured) == pytest.approx(expected_coverage(30, 12), abs=0.02)


def test_classes_that_collapse_or_wander_off_are_found() -> None:
    random = np.random.default_rng(0)
    real, labels = random.normal(size=(120, 8)), np.repeat([0, 1, 2, 3], [40, 40, 36, 4])
    made = random.normal(size=(160, 8))
    made_labels, levels = np.repeat([0, 1, 2, 3], 40), np.tile([0, 50], 80)
    made[(made_labels == 1) & (levels == 0)] = real[50] + 0.01  # one image again and again
    made[(made_labels == 2) & (levels == 50)] += 20  # nothing like the class
    findings = find_drift(real, labels, made, made_labels, levels=levels, limits=Limits())
    assert {(each.kind, each.label, each.level) for each in findings} == {
        ("collapsed", 1, 0),
        ("collapsed", 2, 50),
        ("wandered", 2, 50),
    }


def test_ten_thousand_classes() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(10_000), 2)
    labels[:14] = 0
    features = random.normal(size=(20_000, 4)).astype(np.float32)
    levels = np.zeros(20_000, np.int64)
    found = find_drift(features, labels, features, labels, levels=levels, limits=Limits())
    assert found == []
    many = [Finding("wandered", "synthetic", "", label, 0, 0.1) for label in range(10_000)]
    lines = describe_findings(many)
    assert lines == [f"synthetic: {KINDS['wandered']}: 10,000"]


def test_the_table_is_read_back_and_belongs_to_its_data(tmp_path: Path) -> None:
    leak = Finding("leakage", "synthetic", "a", 1, 50, 0.97, "test", "hat/1.png")
    other = Finding("dark", "train", "b", 0, 100, 0.1)
    file = tmp_path / "audit.parquet"
    write_findings(file, [leak, other], "key")
    assert read_findings(file, "key") == [leak, other]
    assert leaked_images(file, "key") == {"a": "leakage: copies the test image 'hat/1.png'"}
    assert leaked_images(file, "another") == {} == leaked_images(tmp_path / "none", "key")
    with pytest.raises(BrokenFileError, match="made from something else"):
        read_findings(file, "another")
    write_findings(file, [], "key")
    assert read_findings(file) == []


def test_every_kind_is_described_with_an_example() -> None:
    findings = [Finding(kind, "synthetic", "a", 0, 0, 1.0, "test", "b") for kind in reversed(KINDS)]
    lines = describe_findings(findings)
    assert len(lines) == len(KINDS) and lines[0].startswith("synthetic against test: ")
    assert all(": 1 (for example 'a' of 'b')" in line for line in lines)


def test_limits_of_the_recipe_are_those_of_the_package() -> None:
    from discl.recipe import Audit

    assert Audit().limits == Limits()
    assert {field.name for field in dataclasses.fields(Limits)} <= set(Audit.model_fields)
