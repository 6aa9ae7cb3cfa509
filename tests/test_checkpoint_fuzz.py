"""Mutated configurations and indices of checkpoints: each load works or ends in a clear error."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from discl.errors import DisclError
from discl.models.classifier import (
    ClassifierConfig,
    build_classifier,
    load_classifier,
    save_classifier,
)
from discl.recipe import Train
from discl.spectrum.clip_filter import ClipScorer
from discl.spectrum.models import check_generator, describe_generator, load_generator
from discl.stages.classifiers import describe_classifier, starter_of

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    10**30,
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\x00",
    [],
    [1],
    ["a", None],
    {},
    {"a": {}},
    "9" * 5000,
    [[]] * 3,
    {"": 1},
)
TEXTS = (
    "",
    "{",
    "[]",
    "null",
    "1",
    '{"a": NaN}',
    '{"a": 1, "a": 2}',
    "[" * 5000,
    '{"a":' * 5000,
    "\ufeff{}",
    '{"a": 1e999}',
)


def mutate(text: str, rng: random.Random) -> str:
    """One to three changes of a JSON text: a value, a key, or the text itself."""
    if rng.random() < 0.08:
        return rng.choice((*TEXTS, text[: rng.randrange(len(text))]))
    tree = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        node, key = tree, None
        while isinstance(node, dict | list) and node:
            key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
                break
            node = node[key]
        if key is None or not isinstance(node, dict | list) or not node:
            continue
        action = rng.random()
        if action < 0.15:
            del node[key]
        elif action < 0.25 and isinstance(node, dict):
            node[rng.choice(["", "x", "auto_map", "quantization_config", "../x"])] = node.pop(key)
        elif action < 0.4 and isinstance(node[key], int | float):
            node[key] = node[key] * rng.choice([2, -1, 1000, 10**8])
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(tree)


def train_from(folder: Path) -> Any:
    train = Train.model_validate(
        {
            "image_size": 32,
            "model": {"architecture": "clip", "checkpoint": str(folder), "templates": ["{class}"]},
        }
    )
    return starter_of(describe_classifier(train, ("a", "b")), train)()


def load_whole(folder: Path) -> None:
    check_generator(str(folder), 10, size=32)
    describe_generator(str(folder))
    model = load_generator(str(folder))
    model.encode_texts(["a boot"])
    model.schedule(10, 32, 32)
    model.decode(model.encode_images(torch.zeros(1, 3, 32, 32)))


def save_own(folder: Path) -> Path:
    config = ClassifierConfig("resnet10", "3x3", 8, ("a", "b"), 32, 32, (0.5,) * 3, (0.5,) * 3)
    save_classifier(build_classifier(config), config, folder)
    return folder


FAMILIES: dict[str, tuple[str, int, list[Callable[[Path], Any]]]] = {
    "clip": (
        "tiny_clip",
        150,
        [lambda folder: ClipScorer(str(folder), {0: "a"}), train_from],
    ),
    "diffusion": ("tiny_diffusion", 60, [load_whole]),
    "own": ("", 150, [load_classifier]),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "family",
    ["own", *(pytest.param(each, marks=pytest.mark.slow) for each in ("clip", "diffusion"))],
)
def test_mutated_configurations_end_well_or_with_one_clear_error(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fixture, rounds, loads = FAMILIES[family]
    whole = request.getfixturevalue(fixture) if fixture else save_own(tmp_path / "whole")
    folder = Path(shutil.copytree(whole, tmp_path / "mutated"))
    files = [
        file
        for file in sorted(folder.rglob("*.json"))
        if file.name not in {"vocab.json", "tokenizer.json"}
    ]
    rng = random.Random(f"checkpoints {family}")
    ended = 0
    for number in range(rounds):
        file = rng.choice(files)
        before = file.read_text()
        after = mutate(before, rng)
        file.write_text(after)
        try:
            loads[number % len(loads)](folder)
        except DisclError as error:
            ended += 1
            assert len(str(error)) < 1500, (number, after[:300])
            named = (str(folder), file.name, "tokenizer", "configuration of transformers")
            assert any(name in str(error) for name in named), (number, str(error))
        except BaseException as error:
            raise AssertionError(
                f"mutation {number} of {file.relative_to(folder)} ends in {error!r:.300}:\n"
                f"{after[:1500]}"
            ) from error
        file.write_text(before)
    assert ended > rounds // 10  # the mutations matter
