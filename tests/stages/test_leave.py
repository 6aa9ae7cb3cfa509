"""Code that a recipe names runs only with leave, and only in the stages that train with it."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.main import get_command

import discl
from discl import cli, pipeline
from discl.baselines import make_system
from discl.browse.answers import about_run
from discl.browse.run_view import RunView
from discl.curriculum.strategies import make_strategy
from discl.errors import RecipeError, RunError
from discl.recipe import check_own_pieces, load_recipe
from discl.run_folder.open import open_run
from discl.stages import evaluate as evaluate_stage
from discl.stages.workers.base import Assignment
from discl.training.objectives import make_objective

CANARY = """
from pathlib import Path

Path(__file__).with_name("imported").touch()

from dataclasses import dataclass

import torch.nn.functional as F

from discl.training.hooks import TrainingHook
from discl.curriculum.strategies import Planned


class System(TrainingHook):
    pass


@dataclass(frozen=True)
class Always(Planned):
    levels_of_mine: tuple
    curriculum_epochs: int

    def levels(self, epoch, history):
        return self.levels_of_mine if epoch < self.curriculum_epochs else ()


def strategy(levels, curriculum_epochs, **_):
    return Always(tuple(levels), curriculum_epochs)


def objective(logits, labels, class_counts):
    return F.cross_entropy(logits, labels)


objective.corrected = True
"""
PIECES = {key: f"canary_pieces:{key}" for key in ("strategy", "objective")}
PIECES["system"] = "canary_pieces:System"
SMALL = {"width": 4, "stem": "3x3"}
TRAINING = {"run", "train", "evaluate", "report", "compare"}
OTHERS = {
    "data check": [],
    "data prepare": [],
    "hard": [],
    "prompts": [],
    "plan": [],
    "generate": [],
    "filter": [],
    "adapt": [],
    "audit": [],
    "retrieve": [],
    "pilot": ["--set", "pilot.images=8"],
    "levels": ["--sources", "1", "--grid", "0,50"],
    "export": ["--to", "imagefolder"],
}
"""Commands that open a recipe and train nothing, with what else they need."""

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`call("train", "mine.yaml")` -> (exit status, stdout, stderr) of a command."""

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["discl", *arguments])
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capsys.readouterr()

    return called


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary")


@pytest.fixture
def imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """Whether the canary has been imported since it was last asked, in this process or another."""
    (folder / "canary_pieces.py").write_text(CANARY)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    mark = folder / "imported"

    def asked() -> bool:
        there = mark.exists()
        mark.unlink(missing_ok=True)
        sys.modules.pop("canary_pieces", None)
        importlib.invalidate_caches()
        return there

    asked()
    yield asked


@pytest.fixture(scope="module")
def tree(small_tree: dict[str, Any]) -> dict[str, Any]:
    return {
        **small_tree,
        "methods": {"ce": {}, "mine": PIECES},
        "train": {
            "batch_size": 4,
            "epochs": 2,
            "curriculum_epochs": 1,
            "image_size": 16,
            "model": SMALL,
        },
        "compare": {"seeds": [0]},
    }


def recipe_commands() -> set[str]:
    """Names of all commands that take a recipe."""
    found = set()
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        for inner, each in below.items() if below else [(None, command)]:
            if any(parameter.name == "recipe" for parameter in each.params):
                found.add(f"{name} {inner}" if inner else name)
    return found


def test_every_command_that_takes_a_recipe_is_gone_over() -> None:
    assert recipe_commands() == TRAINING | set(OTHERS)


@pytest.mark.slow
def test_no_command_imports_without_leave_and_with_leave_only_those_that_train(
    tree: dict[str, Any], folder: Path, call: Call, imported: Callable[[], bool]
) -> None:
    recipe, out = folder / "mine.yaml", folder / "run"
    recipe.write_text(yaml.safe_dump(tree))

    def carry_out(command: str, *more: str) -> tuple[int, str, str]:
        place = (
            ["--run", str(out), "--out", str(folder / "exported")] if command == "export" else []
        )
        if command != "data check":
            place = place or ["--out", str(out)]
        return call(*command.split(), str(recipe), *place, *more)

    for command in sorted(TRAINING):
        status, _, told = carry_out(command)
        assert status == 1 and not imported() and not out.exists()
        for key, address in PIECES.items():
            assert f"methods.mine.{key}" in told and address in told and "--allow-plugins" in told
    for command, more in OTHERS.items():
        assert carry_out(command, *more)[0] == 0, command
        assert not imported(), command
        if command != "data check":
            assert carry_out(command, *more, "--allow-plugins")[0] == 0, command
            assert not imported(), command
    for command in ("train", "evaluate", "report", "run", "compare"):
        status, _, told = carry_out(command, "--allow-plugins")
        assert status == 0 and imported(), (command, told)
    trained = json.loads((out / "train" / "mine" / "method.json").read_text())
    assert trained["corrected"] is True
    assert "mine+la" not in json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_a_run_folder_imports_nothing_however_it_is_opened(
    tree: dict[str, Any], folder: Path, call: Call, imported: Callable[[], bool]
) -> None:
    """Goes on in the folder of the test above, which is trained."""
    out = folder / "run"
    assert (out / "train" / "mine" / "model.safetensors").exists()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "new.png")
    predicted = folder / "predicted.csv"
    for method in ([], ["--method", "mine"], ["--method", "ce"]):
        assert (
            call("predict", str(out), str(folder / "new.png"), "--out", str(predicted), *method)[0]
            == 0
        )
    assert discl.SpectrumDataset.of_run(out, size=16) and not imported()
    view = RunView(out, lambda changes: None)
    assert about_run(view)["methods"][1]["levels"] and view.real() and not imported()
    run = open_run(load_recipe(out / "recipe.yaml"), out)
    evaluate_stage.evaluate(run)  # what was trained is measured without the code that trained it
    assert pipeline.report(run).exists() and not imported()
    assert Assignment.of(run, "cpu", 1, 0).open().recipe.methods == run.recipe.methods
    assert not imported()
    plain = {**tree, "methods": {"ce": {}}}
    (folder / "plain.yaml").write_text(yaml.safe_dump(plain))
    opened = call("plan", str(folder / "plain.yaml"), "--out", str(out))
    assert opened[0] == 1 and "--amend" in opened[2] and not imported()
    for leave in ([], ["--allow-plugins"]):
        assert (
            call("plan", str(folder / "plain.yaml"), "--out", str(out), "--amend", *leave)[0] == 0
        )
        assert list(out.glob("earlier/*/recipe.yaml")) and not imported()
    assert call("plan", str(folder / "mine.yaml"), "--out", str(out), "--amend")[0] == 0
    assert not imported()


def test_in_python_leave_is_an_argument(
    tree: dict[str, Any], folder: Path, imported: Callable[[], bool]
) -> None:
    for refused in (
        lambda: discl.run(tree, folder / "none"),
        lambda: discl.run_until(discl.open_run(tree, folder / "none"), "train"),
        lambda: check_own_pieces(load_recipe(tree), allow_plugins=False),
        lambda: make_strategy(PIECES["strategy"], levels=(), curriculum_epochs=1),
        lambda: make_objective(PIECES["objective"]),
        lambda: make_system(PIECES["system"]),
        lambda: load_recipe(tree).methods["mine"].loss.corrected,
    ):
        with pytest.raises(RecipeError, match=r"canary_pieces:.*allow_plugins=True"):
            refused()
        assert not imported()
    check_own_pieces(load_recipe(tree), allow_plugins=True)
    assert imported()


@pytest.mark.parametrize("key", ["system", "strategy", "objective"])
@pytest.mark.parametrize(
    "address",
    [
        "os:system",
        "os:abort",
        "sys:exit",
        "builtins:exec",
        "subprocess:run",
        "antigravity:fly",
        "this:s",
        "shutil:rmtree",
        "runpy:run_path",
        "importlib:import_module",
        "os.path:os.system",
        "..x:y",
        "a b:c",
        "canary_pieces:__builtins__",
        "canary_pieces:Path.__init__.__globals__",
        "a:",
        ":b",
        "a:b:c",
    ],
)
def test_what_is_python_s_own_is_refused_as_the_recipe_is_read(
    key: str, address: str, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the leave, and before anything is imported."""
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    value: Any = address
    if key == "system":
        value = {"name": address, "command": f"touch {tmp_path / 'touched'}"}
    with pytest.raises(RecipeError, match=f"methods.mine.{key}"):
        load_recipe({**tree, "methods": {"mine": {key: value}}})
    assert not (tmp_path / "touched").exists()


CALLS = """
import os, subprocess, functools, builtins
from os import system
from subprocess import run, Popen
from pathlib import Path

MARK = Path(__file__).with_name("called")


def anything(*_, **__):
    MARK.touch()


class Anything:
    def __init__(self, *_, **__):
        MARK.touch()


def factory(levels=None, name=None, share=1):
    MARK.touch()


wrapped = functools.partial(anything, 1)
shell = functools.partial(subprocess.run, "touch called", shell=True)
"""


@pytest.mark.parametrize(
    "attribute",
    [
        "system",
        "run",
        "Popen",
        "os.system",
        "subprocess.run",
        "builtins.exec",
        "Path",
        "anything",
        "Anything",
        "wrapped",
        "shell",
        "functools.partial",
        "MARK",
    ],
)
def test_what_is_of_another_kind_is_refused_without_being_called(
    attribute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callable with any arguments is no strategy, no objective and no system, even if allowed."""
    (tmp_path / "calling_pieces.py").write_text(CALLS)
    sys.modules.pop("calling_pieces", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    name, levels = f"calling_pieces:{attribute}", (0,)
    with pytest.raises(RecipeError, match=f"strategy '{name}'"):
        make_strategy(name, levels=levels, curriculum_epochs=1, allow_plugins=True)
    with pytest.raises(RecipeError, match=f"objective '{name}'"):
        make_objective(name, allow_plugins=True)
    for each in (name, {"name": name, "args": "touch called"}, "calling_pieces:factory"):
        with pytest.raises(RecipeError, match="system 'calling_pieces:"):
            make_system(each, allow_plugins=True)
    assert not (tmp_path / "called").exists()


def test_an_objective_that_gives_no_number_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    (tmp_path / "text_pieces.py").write_text(
        "def loss(logits, labels, class_counts):\n    return 'no'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = make_objective("text_pieces:loss", allow_plugins=True).loss
    with pytest.raises(RecipeError, match="'no'"):
        loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), torch.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("link", ["train", "train/ce"])
def test_a_link_in_a_run_folder_has_nothing_deleted_elsewhere(
    link: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    """A method is trained again in its old folder; the folder of others may link anywhere."""
    mine = tmp_path / "mine"
    (mine / "ce").mkdir(parents=True)
    (mine / "ce" / "letters.txt").write_text("dear")
    run = open_run({**tree, "methods": {"ce": {}}}, tmp_path / "run")
    place = run.folder / link
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(mine if link == "train" else mine / "ce")
    with pytest.raises(RunError, match=re.escape(str(mine / "ce"))):
        pipeline.run_until(run, "train")
    assert (mine / "ce" / "letters.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("space", "key"),
    [
        (
            {"space": {"strategy": ["all-levels", PIECES["strategy"]]}},
            "compare.tune.space.strategy",
        ),
        (
            {"methods": {"ce": {"system": [{"name": PIECES["system"]}]}}},
            "compare.tune.methods.ce.system",
        ),
        ({"space": {"objective.name": [PIECES["objective"]]}}, "compare.tune.space.objective.name"),
    ],
)
def test_what_is_only_tried_needs_leave_before_any_image_is_made(
    space: dict[str, Any],
    key: str,
    tree: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    imported: Callable[[], bool],
) -> None:
    run = open_run({**tree, "methods": {"ce": {}}, "compare": {"tune": space}}, tmp_path / "run")
    with pytest.raises(RecipeError, match=re.escape(key)):
        pipeline.compare(run, tune=True)
    assert not imported() and not (run.folder / "plan.parquet").exists()
