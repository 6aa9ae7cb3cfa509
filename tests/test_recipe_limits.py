"""Recipes that others made: nothing hangs, nothing stands twice, names and numbers fit what they
are for."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from discl.cli import app
from discl.errors import DisclError, RecipeError, RunError
from discl.prompts.settings import read_settings
from discl.prompts.templates import read_phrases
from discl.recipe import Recipe, load_recipe, parse_override, shipped_recipes
from discl.recipe.types import as_name
from discl.run_folder.open import open_run
from helpers import miniatures

REQUIRED = miniatures.REQUIRED


def with_value(key: str, value: Any) -> Recipe:
    return load_recipe(REQUIRED, {key: value})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def quickly(call: Any, error: type[DisclError] = RecipeError) -> str:
    """What is told of a recipe that is refused within five seconds of a processor and in at most
    4,000 characters."""
    start = time.process_time()
    with pytest.raises(error) as caught:
        call()
    assert time.process_time() - start < 5
    assert len(str(caught.value)) <= 4000
    return str(caught.value)


def test_each_file_is_read_once_however_often_it_is_extended(tmp_path: Path) -> None:
    base = yaml.safe_dump(REQUIRED)
    write(tmp_path / "r25.yaml", base + "prompts: {templates: ['{class}']}\n")
    for step in range(25):
        names = [f"r{step + 1}.yaml"] * 30
        write(tmp_path / f"r{step}.yaml", yaml.safe_dump({"extends": names}))
    start = time.perf_counter()
    assert load_recipe(tmp_path / "r0.yaml").prompts.templates == ["{class}"]
    assert time.perf_counter() - start < 5


def test_too_many_files_or_bases_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "r60.yaml", yaml.safe_dump(REQUIRED))
    for step in range(60):
        write(tmp_path / f"r{step}.yaml", f"extends: r{step + 1}.yaml")
    assert "more than 32 files" in quickly(lambda: load_recipe(tmp_path / "r0.yaml"))
    many = {**REQUIRED, "extends": ["fashion-lt"] * 1000}
    assert "1000" in quickly(lambda: load_recipe(many))


def test_what_is_no_regular_file_is_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    monkeypatch.chdir(tmp_path)
    for source in (
        "pipe.yaml",
        "/dev/zero",
        "./",
        "x" * 5000 + ".yaml",
        "a\0.yaml",
        "~nobody/x.yaml",
    ):
        quickly(lambda source=source: load_recipe(source))
        quickly(lambda source=source: load_recipe({**REQUIRED, "extends": source}))
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(2_000_000_000)
    assert "4,000,000 bytes" in quickly(lambda: load_recipe(large))


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_aliases_that_multiply_end_no_reader(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", ALIASES)
    quickly(lambda: load_recipe(file))
    quickly(lambda: load_recipe({**REQUIRED, "extends": str(file)}))
    quickly(lambda: read_phrases(file))
    quickly(lambda: read_settings(file))
    flow = ALIASES.replace("\n", ", ").rstrip(", ")
    quickly(lambda: parse_override(f"prompts.endpoint={{{flow}}}"))
    run = open_run(REQUIRED, tmp_path / "run")
    write(run.folder / "recipe.yaml", ALIASES)
    quickly(lambda: open_run(REQUIRED, run.folder), RunError)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("name: again\n", "name"),
        ("train: {epochs: 70, batch_size: 8, epochs: 80}\n", "epochs"),
        ("prompts:\n  names:\n    no: a\n    'no': b\n", "no"),
        ("methods:\n  ce: {train: {optimizer: {lr: 0.1, lr: 0.2}}}\n", "lr"),
    ],
)
def test_a_key_that_stands_twice_in_a_recipe_is_refused(
    tmp_path: Path, text: str, key: str
) -> None:
    kept = {name: value for name, value in REQUIRED.items() if name not in ("train", "methods")}
    file = write(tmp_path / "mine.yaml", yaml.safe_dump(kept) + text)
    assert f"'{key}' occurs twice" in quickly(lambda: load_recipe(file))
    base = write(tmp_path / "base.yaml", f"extends: {file.name}")
    assert f"'{key}' occurs twice" in quickly(lambda: load_recipe(base))


def test_a_key_that_stands_twice_is_refused_elsewhere_too(tmp_path: Path) -> None:
    file = write(tmp_path / "texts.yaml", "cat: [a]\ndog: [b]\ncat: [c]\n")
    assert "lines 1 and 3" in quickly(lambda: read_phrases(file))
    with pytest.raises(RecipeError, match="'lr' occurs twice"):
        parse_override("train.optimizer={lr: 0.1, lr: 0.2}")
    run = open_run(REQUIRED, tmp_path / "run")
    kept = run.folder / "recipe.yaml"
    write(kept, kept.read_text() + "name: other\n")
    assert "'name' occurs twice" in quickly(lambda: open_run(REQUIRED, run.folder), RunError)


STRANGE_NAMES = ["yes", "no", "on", "off", "y", "001", "1e3", "null", "2024-01-01", "1:30", "~"]


def test_class_names_are_taken_as_they_are_written(tmp_path: Path) -> None:
    listed = ", ".join(STRANGE_NAMES)
    texts = f"""
data: {{root: images, long_tail: {{n_max: 5, imbalance_ratio: 2, class_order: [{listed}]}}}}
hard: {{exclude: [{listed}]}}
prompts:
  names: {{{", ".join(f"{name}: {name}" for name in STRANGE_NAMES if name not in ("null", "~"))},
  null: nothing}}
"""
    kept = {name: value for name, value in REQUIRED.items() if name not in ("data", "prompts")}
    recipe = load_recipe(write(tmp_path / "mine.yaml", yaml.safe_dump(kept) + texts))
    assert recipe.data.long_tail is not None
    assert recipe.data.long_tail.class_order == STRANGE_NAMES
    assert recipe.hard.exclude == STRANGE_NAMES
    same = {name: name for name in STRANGE_NAMES if name not in ("null", "~")}
    assert recipe.prompts.names == {**same, "null": "nothing"}
    assert load_recipe(write(tmp_path / "kept.yaml", recipe.to_yaml())) == recipe
    assert parse_override(f"hard.exclude=[{listed}]") == ("hard.exclude", STRANGE_NAMES)
    assert parse_override("prompts.names.cat=on") == ("prompts.names.cat", "on")
    phrases = write(
        tmp_path / "p.yaml", "".join(f"{each}: [{each}, a]\n" for each in STRANGE_NAMES)
    )
    assert read_phrases(phrases) == {each: [each, "a"] for each in STRANGE_NAMES}


def test_ordinary_values_are_numbers_and_truth_values_as_before(tmp_path: Path) -> None:
    assert parse_override("train.select=on") == ("train.select", True)
    text = yaml.safe_dump(REQUIRED) + "train: {epochs: 0x50, optimizer: {lr: 1e-4, nesterov: on}}\n"
    train = load_recipe(write(tmp_path / "mine.yaml", text)).train
    assert (train.epochs, train.optimizer.lr, train.optimizer.nesterov) == (80, 1e-4, True)


@pytest.mark.parametrize(
    "name", ["a" * 101, "a/b", "..", "a.", "CON", "nul.txt", "a\0", "a\nb", "-a", "é", "", " "]
)
def test_what_is_no_name_of_a_folder_names_nothing(name: str) -> None:
    quickly(lambda: with_value("name", name))
    quickly(lambda: load_recipe({**REQUIRED, "methods": {name: {}}}))


@pytest.mark.parametrize(
    "text", ["a" * 255, "CON", "..", "é", "my birds", "con." + "x" * 99, "x" * 99 + "-.", "nul.tar"]
)
def test_any_folder_gives_a_recipe_a_name(text: str) -> None:
    assert with_value("name", as_name(text)).name == as_name(text)


def test_methods_differ_in_more_than_capitals() -> None:
    told = quickly(lambda: load_recipe({**REQUIRED, "methods": {"ce": {}, "CE": {}}}))
    assert "'ce'" in told
    assert "'CE'" in told


@pytest.mark.parametrize(
    "key", ["data.root", "filter.checkpoint", "prompts.phrases", "runtime.store"]
)
@pytest.mark.parametrize(
    "value", ["a" * 256, "é" * 200, "a/" * 3000], ids=["name", "bytes", "path"]
)
def test_a_path_that_no_file_system_takes_is_refused(key: str, value: str) -> None:
    assert key in quickly(lambda: with_value(key, value))


BOUNDED = [
    "data.cameras.seed",
    "data.cameras.seen",
    "hard.folds",
    "hard.epochs",
    "hard.fewer_than",
    "groups.many",
    "spectrum.seeds",
    "spectrum.tries",
    "spectrum.num_inference_steps",
    "spectrum.guidance_scale",
    "spectrum.size",
    "train.epochs",
    "train.batch_size",
    "train.steps_per_epoch",
    "train.image_size",
    "train.resize",
    "train.seed",
    "train.optimizer.lr",
    "train.mixup",
    "train.model.width",
    "methods.ce.synthetic_scale",
    "compare.tune.trials",
    "runtime.threads",
    "runtime.slots",
    "runtime.workers",
    "runtime.processes",
    "runtime.shard_rows",
]


@pytest.mark.parametrize("key", BOUNDED)
@pytest.mark.parametrize("value", [10**17, -1, float("nan"), float("inf")])
def test_a_number_out_of_range_is_refused(key: str, value: float) -> None:
    told = quickly(lambda: with_value(key, value))
    assert key in told
    if value == 10**17:
        assert "llowed: " in told or "write a whole number from 1 to" in told


CHECKED = {"data.long_tail.class_order", "train.std", "train.model.light.width", "runtime.slots"}
"""Numbers whose range a function knows."""


def test_every_number_of_a_recipe_has_two_bounds() -> None:
    """Of each number in the tree of all sections a huge and a tiny value are refused."""
    free = []
    for keys, kind in numbers(Recipe):
        low, high = bounds(kind)
        if not (low and high):
            free.append(".".join(keys))
    assert set(free) == CHECKED


def numbers(section: Any, above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """(keys, schema) of the numbers below a section, from its JSON schema."""
    whole = section.model_json_schema()

    def below(schema: Any, keys: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
        if "$ref" in schema:
            schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
        own = [(keys, schema)] if schema.get("type") in ("integer", "number") else []
        parts = [
            (keys, each) for each in [*schema.get("anyOf", []), *schema.get("prefixItems", [])]
        ]
        parts += [((*keys, name), each) for name, each in schema.get("properties", {}).items()]
        for inside in ("items", "additionalProperties"):
            if isinstance(schema.get(inside), dict):
                parts.append(((*keys, "*"), schema[inside]))
        return [*own, *(found for name, each in parts for found in below(each, name))]

    return below(whole, above)


def bounds(schema: Any) -> tuple[bool, bool]:
    if "enum" in schema:
        return True, True
    return (
        "minimum" in schema or "exclusiveMinimum" in schema,
        "maximum" in schema or "exclusiveMaximum" in schema,
    )


MANY: dict[str, Any] = {
    "keys": {**REQUIRED, **{f"methodz{number}": 1 for number in range(5_000)}},
    "methods": {
        **REQUIRED,
        "methods": {f"m{number}": {"strategy": "diverz"} for number in range(200)},
    },
    "augmentations": {**REQUIRED, "train": {"augment": ["flipp"] * 5_000}},
    "a circle": {**REQUIRED, "prompts": {}},
}
MANY["a circle"]["prompts"]["names"] = MANY["a circle"]


@pytest.mark.parametrize("tree", MANY.values(), ids=MANY)
def test_many_problems_are_told_in_short(tree: dict[str, Any]) -> None:
    quickly(lambda: load_recipe(tree))


def test_the_command_line_refuses_numbers_out_of_range() -> None:
    for words in (
        ["compare", "fashion-lt", "--seeds", "9" * 5000],
        ["compare", "fashion-lt", "--seeds", str(2**70)],
        ["generate", "fashion-lt", "--shard", f"1/{'9' * 5000}"],
        ["plan", "fashion-lt", "--set", "a." * 5000 + "b=1"],
        ["plan", "fashion-lt", "--set", "train.epochs=" + "9" * 5000],
    ):
        failure = CliRunner().invoke(app, words).exception
        assert isinstance(failure, RecipeError), words[2][:20]
        assert len(str(failure)) < 4000


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_lie_within_all_limits(name: str) -> None:
    start = time.perf_counter()
    recipe = load_recipe(name)
    assert load_recipe(recipe) == recipe
    assert time.perf_counter() - start < 5
