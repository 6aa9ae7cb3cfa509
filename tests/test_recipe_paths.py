"""Texts of a recipe that may name a file or folder.

Each has a pattern, is found beside its recipe, and is hidden where a recipe is handed on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from discl.recipe import Method, Recipe, Train, load_recipe, loading
from discl.recipe.paths import CANDIDATES, FOREIGN, PATHS, SPACES, TEXTS, matches
from discl.report import text as words
from helpers import miniatures

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


def trees(pattern: str, value: Any) -> Iterator[Any]:
    """Every way in which a value can be written at a pattern of the tree."""
    for space in SPACES:
        if pattern.startswith(f"{space}."):
            keys = pattern.removeprefix(f"{space}.").split(".")
            yield from searched(space, keys, [{"path": value}] if "loras" in pattern else value)
            return
    yield nested(pattern.split("."), [{"path": value}] if "loras" in pattern else value)


def nested(keys: list[str], value: Any) -> Any:
    for key in reversed([key for key in keys if key != "path"]):
        value = {"some" if key == "*" else key: value}
    return value


def searched(space: str, keys: list[str], value: Any) -> Iterator[Any]:
    """In a search space: a dotted key ends at any level, and the values to try are in a list."""
    for end in range(1, len(keys) + 1):
        below = nested(keys[end:], value)
        tried = {".".join(keys[:end]): below if space == CANDIDATES else [0, below]}
        yield nested(space.split("."), tried)


Keys = tuple[str, ...]


def fields(section: type[BaseModel], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(keys, field) of a section and of all sections below it; `*` is any key or item."""
    for name, field in section.model_fields.items():
        keys = (*above, name)
        yield keys, field
        for below, part in parts(field.annotation, keys):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from fields(part, below)
        own = {"train": Train, "space": Method, "methods": Method}.get(name)
        if own and keys[0] in ("methods", "compare") and keys != ("methods",):
            below = (*keys, "*") if keys[-1] == "methods" else keys
            yield from fields(own, below)


def parts(kind: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    """(keys, type) of all that a type is made of."""
    yield keys, kind
    for part in get_args(kind):
        of_mapping = isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping)
        if not isinstance(part, str):
            yield from parts(part, (*keys, "*") if of_mapping else keys)


FIELDS = list(fields(Recipe))


def test_a_field_that_speaks_of_files_or_folders_has_a_pattern() -> None:
    spoken = [
        keys
        for keys, field in FIELDS
        if re.search(r"\b(files?|folders?|paths?|hub)\b", field.description or "")
        or re.search("path|file|checkpoint$|folder", keys[-1])
    ]
    assert len(spoken) >= 15
    assert [keys for keys in spoken if not matches((*keys, "x"), (*PATHS, *FOREIGN))] == []


def test_a_list_or_mapping_of_texts_has_a_pattern() -> None:
    texts = [
        keys
        for keys, field in FIELDS
        for below, kind in parts(field.annotation, keys)
        if isinstance(get_origin(kind), type)
        and issubclass(get_origin(kind), Collection)
        and len(below) == len(keys)
        and all_texts(get_args(kind)[-1])
    ]
    assert len(texts) >= 15
    assert [keys for keys in texts if not matches(keys, TEXTS)] == []


def all_texts(kind: Any) -> bool:
    if hasattr(kind, "__metadata__"):
        return all_texts(kind.__origin__)
    below = get_args(kind)
    return kind in (str, type(None)) or (
        bool(below) and all(isinstance(each, str) or all_texts(each) for each in below)
    )


@pytest.mark.parametrize("pattern", [*PATHS, *FOREIGN, *TEXTS])
def test_a_pattern_names_a_field(pattern: str) -> None:
    known = {".".join(keys) for keys, _ in FIELDS}
    known |= {f"{CANDIDATES}.{key}" for key in known}
    assert pattern.removesuffix(".*") in known


@pytest.mark.parametrize(
    ("keys", "patterns", "covered"),
    [
        (("data", "root"), PATHS, True),
        (("data", "roots"), PATHS, False),
        (("data",), PATHS, False),
        (("methods", "a.b", "train", "model", "checkpoint"), PATHS, True),
        (("compare", "tune", "methods", "a.b", "train.model", "checkpoint"), PATHS, True),
        (("compare", "tune", "space", "train.model.templates", "[]"), TEXTS, True),
        (("compare", "tune", "space", "train.model.head", "[]"), TEXTS, False),
        (("methods", "one", "system", "deep", "er"), FOREIGN, True),
    ],
)
def test_a_pattern_covers_what_is_below_it(
    keys: Keys, patterns: tuple[str, ...], covered: bool
) -> None:
    assert matches(keys, patterns) == covered


@pytest.mark.parametrize("pattern", PATHS)
def test_what_lies_beside_a_recipe_is_found_from_another_folder(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, working = tmp_path / "recipes", tmp_path / "work"
    (beside / "mine").mkdir(parents=True)
    working.mkdir()
    (beside / "mine" / "thing.safetensors").touch()
    monkeypatch.chdir(working)
    monkeypatch.setattr(loading, "validate", lambda tree: tree)  # a path alone is no recipe
    found = str(beside / "mine" / "thing.safetensors")
    for name, expected in (
        ("mine/thing.safetensors", found),
        (found, found),
        ("mine/other", "mine/other"),
        *((each, each) for each in LEFT),
    ):
        for stated, resolved in zip(trees(pattern, name), trees(pattern, expected), strict=True):
            (beside / "mine.yaml").write_text(yaml.safe_dump(stated))
            assert load_recipe(beside / "mine.yaml") == resolved
            assert load_recipe("../recipes/mine.yaml") == resolved


@pytest.mark.parametrize("pattern", FOREIGN)
def test_what_other_programs_read_is_not_looked_up(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thing").touch()
    monkeypatch.setattr(loading, "validate", lambda tree: tree)
    for stated in trees(pattern, "thing"):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(stated))
        assert load_recipe(tmp_path / "mine.yaml") == stated


@pytest.mark.parametrize("pattern", [*PATHS, *FOREIGN])
def test_no_folder_of_the_machine_is_handed_on(pattern: str) -> None:
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
        for stated, shared in zip(trees(pattern, text), trees(pattern, expected), strict=True):
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
        "retrieval": {"archive": "images", "images": "settings"},
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
    assert recipe.retrieval is not None
    assert recipe.retrieval.archive == str(beside / "images")
    assert recipe.retrieval.images == str(beside / "settings")
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
