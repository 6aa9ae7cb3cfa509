"""Texts of a recipe that may name a file or folder: each is marked, found beside its recipe, and hidden where a recipe is handed on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from discl.recipe import Recipe, load_recipe, loading
from discl.recipe.paths import Keys, Step, find_places
from discl.report import text as words
from helpers import miniatures

PLACES = dict(find_places(Recipe))
OURS = [keys for keys, place in PLACES.items() if place.ours]
FOREIGN = [keys for keys, place in PLACES.items() if not place.ours]
REQUIRED = miniatures.REQUIRED
HOME = "/home/somebody/private"
LEFT = [
    "owner/name",
    "owner/name:config@revision",
    "embedded:fashion-mnist/clip",
    "s3://bucket/birds",
    "hf://datasets/owner/name",
    "birds",
]


def told(keys: Keys) -> str:
    return ".".join(key if isinstance(key, str) else key.name for key in keys)


def trees(keys: Keys, value: Any) -> Iterator[Any]:
    """Every way in which a value can stand at a place of the tree."""
    if not keys:
        yield value
        return
    key, left = keys[0], keys[1:]
    if key is Step.DOTTED:
        for end in range(1, len(left) + 1):
            yield from (
                {".".join(map(str, left[:end])): [0, below]} for below in trees(left[end:], value)
            )
    elif key is Step.ANY:
        for below in trees(left, value):
            yield from ([below], {"some": below})
    else:
        yield from ({key: below} for below in trees(left, value))


def keys_of(section: type[BaseModel]) -> set[str]:
    return {str(keys[0]) for keys, _ in find_places(section)}


def sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A section and all that its fields hold."""
    yield section
    for field in section.model_fields.values():
        for part in _parts(field.annotation):
            yield from sections(part)


def _parts(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in getattr(kind, "__args__", ()):
        yield from _parts(part)


def test_a_field_that_speaks_of_files_or_folders_is_marked() -> None:
    spoken = {
        (section, name)
        for section in sections(Recipe)
        for name, field in section.model_fields.items()
        if re.search(r"\b(files?|folders?|paths?|hub)\b", field.description or "")
        or re.search("path|file|checkpoint|folder", name)
    }
    assert len(spoken) >= 11
    assert [
        f"{section.__name__}.{name}" for section, name in spoken if name not in keys_of(section)
    ] == []


@pytest.mark.parametrize("keys", OURS, ids=told)
def test_what_lies_beside_a_recipe_is_found_from_another_folder(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, working = tmp_path / "recipes", tmp_path / "work"
    (beside / "mine").mkdir(parents=True)
    working.mkdir()
    (beside / "mine" / "thing.safetensors").touch()
    monkeypatch.chdir(working)
    monkeypatch.setattr(loading, "validate", lambda tree: tree)  # a place alone makes no recipe
    found = str(beside / "mine" / "thing.safetensors")
    for name, expected in (
        ("mine/thing.safetensors", found),
        (found, found),
        ("mine/other", "mine/other"),
        *((each, each) for each in LEFT),
    ):
        for stated, resolved in zip(trees(keys, name), trees(keys, expected), strict=True):
            (beside / "mine.yaml").write_text(yaml.safe_dump(stated))
            assert load_recipe(beside / "mine.yaml") == resolved
            assert load_recipe("../recipes/mine.yaml") == resolved


@pytest.mark.parametrize("keys", FOREIGN, ids=told)
def test_what_other_programs_read_is_not_looked_up(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thing").touch()
    monkeypatch.setattr(loading, "validate", lambda tree: tree)
    for stated in trees(keys, "thing"):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(stated))
        assert load_recipe(tmp_path / "mine.yaml") == stated


@pytest.mark.parametrize("keys", PLACES, ids=told)
def test_no_folder_of_the_machine_is_handed_on(keys: Keys) -> None:
    private = [
        f"{HOME}/thing",
        "~/private/thing",
        f"file://{HOME}/thing",
        f"local:{HOME}/thing",
        r"C:\Users\somebody\thing",
    ]
    for text, expected in [
        *((each, "…/thing") for each in private),
        *((each, each) for each in LEFT),
    ]:
        for stated, shared in zip(trees(keys, text), trees(keys, expected), strict=True):
            assert words.share_recipe(stated) == shared


def test_a_whole_recipe_is_found_beside_itself_and_handed_on_without_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, working = tmp_path / "somebody", tmp_path / "work"
    for folder in ("images", "settings", "clip", "store"):
        (beside / folder).mkdir(parents=True)
    working.mkdir()
    for file in (
        "images/train.txt",
        "test.txt",
        "digests.txt",
        "phrases.yaml",
        "model.safetensors",
        "style.safetensors",
    ):
        (beside / file).touch()
    network = {"architecture": "clip", "checkpoint": "clip"}
    tree = {
        **REQUIRED,
        "data": {
            "root": "images",
            "files": {"train": "train.txt", "test": "test.txt"},
            "long_tail": {"n_max": 5, "imbalance_ratio": 2, "index": "digests.txt"},
        },
        "prompts": {"phrases": "phrases.yaml"},
        "spectrum": {
            "checkpoint": "model.safetensors",
            "config": "settings",
            "loras": [
                {"path": "style.safetensors", "scale": 0.5},
                {"path": "owner/name/other.safetensors"},
            ],
            "levels": [0],
        },
        "filter": {"checkpoint": "clip"},
        "methods": {"ce": {}, "tuned": {"train": {"model": network}}},
        "compare": {
            "tune": {
                "space": {"train.model": [network]},
                "methods": {"tuned": {"train.model.checkpoint": ["clip"]}},
            }
        },
        "runtime": {"store": "store"},
    }
    (beside / "mine.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(working)
    recipe = load_recipe(beside / "mine.yaml")
    assert recipe.data.files == {
        "train": "train.txt",
        "test": str(beside / "test.txt"),
    }  # the first lies in data.root
    assert recipe.data.long_tail is not None
    assert recipe.data.long_tail.index == str(beside / "digests.txt")
    assert (recipe.spectrum.checkpoint, recipe.spectrum.config) == (
        str(beside / "model.safetensors"),
        str(beside / "settings"),
    )
    assert [lora.path for lora in recipe.spectrum.loras] == [
        str(beside / "style.safetensors"),
        "owner/name/other.safetensors",
    ]
    assert recipe.methods["tuned"].train["model"]["checkpoint"] == str(beside / "clip")
    assert recipe.compare.tune.space["train.model"] == [
        {**network, "checkpoint": str(beside / "clip")}
    ]
    assert recipe.compare.tune.methods["tuned"]["train.model.checkpoint"] == [str(beside / "clip")]
    assert recipe.runtime.store == str(beside / "store")
    shared = words.share_recipe(recipe.plain())
    assert str(tmp_path) not in str(shared)
    assert shared["spectrum"]["loras"][0] == {"path": "…/style.safetensors", "scale": 0.5}
    assert load_recipe(recipe) == recipe


def test_a_list_in_the_root_goes_before_one_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train.txt").touch()
    (tmp_path / "train.txt").touch()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**REQUIRED, "name": "base"}))
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"extends": "base.yaml", "data": {"files": {"train": "train.txt"}}})
    )
    assert load_recipe(tmp_path / "mine.yaml").data.files == {"train": "train.txt"}
    (tmp_path / "images" / "train.txt").unlink()
    assert load_recipe(tmp_path / "mine.yaml").data.files == {"train": str(tmp_path / "train.txt")}


def test_a_link_in_the_cache_of_the_hub_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "d0c5").touch()
    (tmp_path / "style.safetensors").symlink_to(tmp_path / "blobs" / "d0c5")
    (tmp_path / "images").symlink_to(tmp_path / "blobs")
    tree = {
        **REQUIRED,
        "spectrum": {**REQUIRED["spectrum"], "loras": [{"path": "style.safetensors"}]},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.spectrum.loras[0].path == str(tmp_path / "style.safetensors")
    assert recipe.data.root == str(tmp_path / "blobs")


@pytest.mark.parametrize(
    "system",
    [
        {"name": "own:System", "weights": "~/private/w.safetensors"},
        {"deep": [{"er": f"{HOME}/x"}, 3]},
    ],
)
def test_parameters_of_a_piece_of_ones_own_are_hidden_at_any_depth(system: dict[str, Any]) -> None:
    shared = words.share_recipe(
        {
            "methods": {"one": {"system": system}},
            "compare": {"tune": {"space": {"system": [system]}}},
        }
    )
    assert "private" not in str(shared) and "…/" in str(shared["compare"])
    below = words.share_recipe(
        {"compare": {"tune": {"space": {"system.weights": [f"{HOME}/w", None]}}}}
    )
    assert below["compare"]["tune"]["space"] == {"system.weights": ["…/w", None]}


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"data": None},
        {"data": "x", "methods": ["x"]},
        {"spectrum": {"loras": {"a": 1}}},
        {"compare": {"tune": {"space": [1]}}},
    ],
)
def test_what_is_no_recipe_stays_as_it_is(tree: dict[str, Any]) -> None:
    assert words.share_recipe(tree) == tree
    with pytest.raises(Exception, match="data"):
        load_recipe(tree)


def test_texts_that_are_no_places_stay_as_they_are() -> None:
    tree = {
        "prompts": {"templates": ["/a {class}"], "negative": "~"},
        "compare": {"tune": {"space": {"train.augment": [["/x"]]}}},
    }
    assert words.share_recipe(tree) == tree
