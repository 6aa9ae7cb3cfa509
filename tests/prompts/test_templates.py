"""Class names, templates and phrase lists to prompts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Features

from discl.assets import embedded, embedded_phrases
from discl.errors import RecipeError
from discl.prompts import class_prompts, draw_prompt, fill, read_phrases
from discl.prompts.class_descriptions import find_problem
from discl.prompts.templates import by_any_name


def test_templates_are_filled_with_the_names_to_use() -> None:
    texts = class_prompts(
        ["Ursus_arctos", "cat"],
        ["a photo of a {class}", "{class}, {class}"],
        names={"Ursus_arctos": "brown bear"},
    )
    assert texts == {
        "Ursus_arctos": ["a photo of a brown bear", "brown bear, brown bear"],
        "cat": ["a photo of a cat", "cat, cat"],
    }


def test_a_template_without_the_class_is_refused() -> None:
    with pytest.raises(
        RecipeError,
        match=r"template 'a photo' lacks \{class\}, so every class would get the same text\.",
    ):
        fill("a photo", "cat")


def test_a_name_for_no_class_is_refused() -> None:
    with pytest.raises(
        RecipeError,
        match=r"names: unknown class 'Ursus_artos'; known: .* Did you mean 'Ursus_arctos'\?",
    ):
        class_prompts(["Ursus_arctos"], ["{class}"], names={"Ursus_artos": "bear"})


def test_phrases_of_a_file_are_used_instead_of_templates(tmp_path: Path) -> None:
    path = tmp_path / "phrases.yaml"
    path.write_text("cat: [a cat on a mat, a cat in a hat]\n7: [a seven]\nother: [unused]\n")
    assert class_prompts(["7", "cat"], ["{class}"], str(path)) == {
        "7": ["a seven"],
        "cat": ["a cat on a mat", "a cat in a hat"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat: [a cat]\n", r"has no texts for 1 of the 2 classes that need them: dog\."),
        ("cat: [a cat]\ndog: []\n", r"has no texts for 1 of the 2 classes that need them: dog\."),
        ("cat: a cat\ndog: a dog\n", "holds no mapping from class names to lists of texts"),
        ("- cat\n", "holds no mapping from class names to lists of texts"),
        ("cat: [\n", "is not valid YAML"),
    ],
)
def test_a_phrase_file_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "phrases.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        class_prompts(["cat", "dog"], ["{class}"], str(path))


def test_phrases_may_cover_the_classes_that_need_texts_alone(tmp_path: Path) -> None:
    path = tmp_path / "phrases.yaml"
    path.write_text("robin, American robin: [a robin on a lawn]\n")
    classes = ["tench", "American robin"]
    needed = class_prompts(classes, ["{class}"], str(path), needed={"American robin"})
    assert needed == {"American robin": ["a robin on a lawn"]}
    with pytest.raises(RecipeError, match=r"1 of the 1 classes that need them: tench\."):
        class_prompts(classes, ["{class}"], str(path), needed={"tench"})
    filled = class_prompts(classes, ["a {class}"], needed={"tench"})
    assert filled == {"tench": ["a tench"]}


def test_a_name_in_several_keys_is_nobodys_and_a_whole_key_goes_first() -> None:
    texts = {"crane, bird": ["wades"], "crane, machine": ["lifts"], "machine": ["runs"]}
    found = by_any_name(texts)
    assert found == {**texts, "bird": ["wades"]}


def test_missing_phrase_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*none\.yaml"):
        class_prompts(["cat"], ["{class}"], str(tmp_path / "none.yaml"))
    with pytest.raises(
        RecipeError,
        match=r"'cifar10'; known: cifar100, fashion-mnist, imagenet-lt\. .* 'cifar100'\?",
    ):
        class_prompts(["cat"], ["{class}"], "embedded:cifar10")


@pytest.mark.parametrize(
    ("name", "classes"), [("fashion-mnist", 10), ("cifar100", 100), ("imagenet-lt", 136)]
)
def test_shipped_phrases_are_ten_different_scenes_of_at_least_fifteen_words(
    name: str, classes: int
) -> None:
    listed = yaml.safe_load(embedded_phrases(name).read_text())
    assert len(listed) == classes
    for texts in listed.values():
        assert len(set(texts)) == len(texts) == 10
        assert min(len(text.split()) for text in texts) >= 15
    everything = [text for texts in listed.values() for text in texts]
    assert len(set(everything)) == len(everything)


def test_phrases_of_the_tail_of_imagenet_name_their_class_and_no_other_of_the_tail() -> None:
    listed = read_phrases(embedded_phrases("imagenet-lt"))
    for key, texts in listed.items():
        others = [other.split(",")[0] for other in listed if other != key]
        assert [find_problem(text, key, others, 15) for text in texts] == [None] * 10
    assert {"plane", "pot", "chow", "slot"}.isdisjoint(
        key.split(",")[0] for key in listed
    )  # these say too little; see assets/names/imagenet.yaml
    assert all(by_any_name(listed)[each] for each in ("robin", "American robin", "Shih Tzu"))


def test_shipped_phrases_fit_the_shipped_classes() -> None:
    schema = pq.read_schema(embedded("embedded:fashion-mnist/data") / "train.parquet")
    names = Features.from_arrow_schema(schema)["label"].names
    assert list(class_prompts(names, ["{class}"], "embedded:fashion-mnist")) == names


def test_a_draw_is_pure_and_uses_all_texts() -> None:
    texts = [f"text {number}" for number in range(10)]
    draws = [
        draw_prompt(texts, f"source {source}", seed, 0)
        for source in range(100)
        for seed in range(8)
    ]
    assert draws == [
        draw_prompt(texts, f"source {source}", seed, 0)
        for source in range(100)
        for seed in range(8)
    ]
    counts = Counter(draws)
    assert set(counts) == set(texts)
    assert min(counts.values()) > 50  # 80 expected
    assert len({draw_prompt(texts, "source", 0, attempt) for attempt in range(50)}) == 10


def test_what_does_not_ship_is_named() -> None:
    with pytest.raises(
        RecipeError,
        match=r"unknown embedded asset 'fashion-mnst'; .* Did you mean 'fashion-mnist'\?",
    ):
        embedded("embedded:fashion-mnst/data")
    with pytest.raises(
        RecipeError,
        match=r"'embedded:fashion-mnist/a/b' is not in the package; .* clip, data, diffusion",
    ):
        embedded("embedded:fashion-mnist/a/b")
