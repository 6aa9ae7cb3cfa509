"""Custom systems, strategies and objectives, by `module:attribute` and by entry point."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts import test_policies
from contracts import test_strategies as contract
from discl.baselines import make_system
from discl.curriculum.policies import make_policy
from discl.curriculum.sampling import Pool
from discl.curriculum.schedule import make_sampling
from discl.curriculum.strategies import STRATEGIES, follows_progress, make_strategy
from discl.errors import RecipeError
from discl.recipe import Method, Recipe, check_own_pieces
from discl.stages import trained as trained_stage
from discl.training.objectives import Objective, make_objective, parameters_of

LEVELS = (0, 50)
MIXTURE: dict[str, Any] = {
    "undersample": True,
    "synthetic_scale": 3.0,
    "shortage": "repeat",
    "missing": "error",
}
SOURCE = '''
from dataclasses import dataclass

import torch.nn.functional as F

from discl.training.hooks import TrainingHook
from discl.curriculum.policies import Wish
from discl.curriculum.strategies import Planned


class Halves(TrainingHook):
    def __init__(self, *, share=0.5):
        self.share = share


class Plain(TrainingHook):
    def __init__(self, threshold=0.4):
        self.threshold = threshold


class NoHook:
    pass


def no_hook():
    return NoHook()


class Listens(TrainingHook):
    def learn(self, rows, labels, logits, learning_rate):
        pass


@dataclass(frozen=True)
class Alternating(Planned):
    """One level after the other, each for an epoch, again and again."""

    levels_in_turn: tuple
    curriculum_epochs: int

    def levels(self, epoch, history):
        if epoch >= self.curriculum_epochs:
            return ()
        return (self.levels_in_turn[epoch % len(self.levels_in_turn)],)


def alternating(levels, curriculum_epochs, **_):
    return Alternating(tuple(sorted(levels)), curriculum_epochs)


class Probing(Alternating):
    def measures(self, epoch):
        return "probe" if epoch < self.curriculum_epochs else "never"


def probing(levels, curriculum_epochs, **_):
    return Probing(tuple(sorted(levels)), curriculum_epochs)


class Forgetful(Planned):
    """Other levels at each call."""

    def __init__(self, levels, **_):
        self.left = list(levels)

    def levels(self, epoch, history):
        return (self.left.pop(),)


class Elsewhere(Planned):
    def __init__(self, **_):
        pass

    def levels(self, epoch, history):
        return ["no level"]


def nothing(levels, **_):
    return object()


def too_few(levels):
    return None


def scaled(logits, labels, class_counts, *, factor=1.0, progress=0.0):
    return factor * (1 + progress) * F.cross_entropy(logits, labels)


def prior_aware(logits, labels, class_counts):
    return F.cross_entropy(logits + class_counts.to(logits).log(), labels)


prior_aware.corrected = True


def of_two(logits, labels):
    return logits.mean()


class Rarest:
    measures = False

    def __init__(self, power=1.0):
        self.power = power

    def weigh(self, number, cells, history):
        return [Wish(cell.real ** -self.power, why="rare") for cell in cells]


NUMBER = 3
'''
ENTRY_POINTS = """
[discl.systems]
halves = own_pieces:Halves
[discl.strategies]
alternating = own_pieces:alternating
[discl.objectives]
scaled = own_pieces:scaled
[discl.policies]
rarest = own_pieces:Rarest
"""


@pytest.fixture(scope="module", autouse=True)
def own_pieces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package as pip would have installed it: a module and its entry points."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "own_pieces.py").write_text(SOURCE)
    info = folder / "own_pieces-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-pieces\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        yield


def recipe_of(**method: Any) -> Recipe:
    recipe = Recipe.model_validate(
        {
            "name": "short",
            "data": {"root": "somewhere"},
            "spectrum": {"checkpoint": "somewhere", "levels": [0, 50]},
            "filter": {"checkpoint": "somewhere", "threshold": 0.2},
            "train": {"epochs": 6, "curriculum_epochs": 4},
            "methods": {"mine": method},
        }
    )
    check_own_pieces(recipe, allow_plugins=True)
    return recipe


@pytest.mark.parametrize("name", ["own_pieces:Halves", "halves"])
def test_a_system(name: str) -> None:
    system: Any = make_system({"name": name, "share": 0.25}, ":" in name)
    assert system.share == 0.25
    assert recipe_of(system={"name": name, "share": 0.25}).methods["mine"].system == {
        "name": name,
        "share": 0.25,
    }


@pytest.mark.parametrize("name", ["own_pieces:alternating", "alternating"])
def test_a_strategy(name: str) -> None:
    strategy = make_strategy(name, levels=LEVELS, curriculum_epochs=4, allow_plugins=":" in name)
    assert [strategy.levels(epoch, []) for epoch in range(6)] == [
        (LEVELS[0],),
        (LEVELS[1],),
    ] * 2 + [()] * 2
    assert not follows_progress(name, strategy)
    assert recipe_of(strategy=name, prior="effective").methods["mine"].strategy == name


@pytest.mark.parametrize("name", ["own_pieces:Rarest", "rarest"])
def test_a_policy(name: str) -> None:
    policy: Any = make_policy({"name": name, "power": 2.0}, 3, allow_plugins=":" in name)
    assert policy.power == 2.0
    test_policies.test_one_wish_for_each_cell("rarest", 2, "few cells")
    test_policies.test_pure_in_round_and_history("rarest")
    recipe = recipe_of(strategy="all-levels").plain() | {"loop": {"rounds": 2, "policy": name}}
    loaded = Recipe.model_validate(recipe)
    check_own_pieces(loaded, allow_plugins=True)
    if ":" in name:
        with pytest.raises(RecipeError, match=r"loop\.policy: .*--allow-plugins"):
            check_own_pieces(loaded, allow_plugins=False)
    with pytest.raises(RecipeError, match="powr"):
        make_policy({"name": name, "powr": 2.0}, 3, allow_plugins=True)


@pytest.mark.parametrize("promise", [name for name in dir(contract) if name.startswith("test_")])
def test_a_strategy_keeps_what_every_strategy_promises(promise: str) -> None:
    """The contract suite runs over one of your own too."""
    getattr(contract, promise)(name="alternating", levels=LEVELS)


def test_a_strategy_that_probes(tmp_path: Path) -> None:
    strategy = make_strategy(
        "own_pieces:probing", levels=LEVELS, curriculum_epochs=4, allow_plugins=True
    )
    assert follows_progress("own_pieces:probing", strategy)
    real = torch.zeros(4, dtype=torch.bool).numpy()
    pool = Pool(torch.arange(4).numpy(), torch.full((4,), 100).numpy(), real, ~real, tuple("abcd"))
    for name in STRATEGIES:
        shipped = make_strategy(name, levels=LEVELS, curriculum_epochs=4, level=LEVELS[0])
        assert make_sampling(pool, shipped, **MIXTURE) == make_sampling(pool, name, **MIXTURE)
    assert not make_sampling(pool, strategy, **MIXTURE).with_hard
    with pytest.raises(
        ValueError,
        match=r"methods\.mine: prior 'effective' .* strategy 'own_pieces:probing'",
    ):
        recipe_of(strategy="own_pieces:probing", prior="effective")


@pytest.mark.parametrize("name", ["own_pieces:scaled", "scaled"])
def test_an_objective(name: str) -> None:
    logits, labels, counts = (
        torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
        torch.tensor([0, 0]),
        torch.tensor([3.0, 1.0]),
    )
    plain = make_objective("cross-entropy").loss(logits, labels, counts)
    leave = ":" in name
    assert torch.equal(make_objective(name, leave).loss(logits, labels, counts), plain)
    assert torch.equal(
        make_objective({"name": name, "factor": 2}, leave).loss(logits, labels, counts, 0.5),
        3 * plain,
    )
    assert parameters_of(name, leave) == ["factor"]
    assert recipe_of(objective={"name": name, "factor": 2}).methods["mine"].loss == Objective(
        name, {"factor": 2.0}
    )
    assert not make_objective(name, leave).corrected
    assert make_objective("own_pieces:prior_aware", True).corrected
    assert [make_objective(each).corrected for each in ("focal", "ldam", "flyp")] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"system": "halvs"}, r"unknown system 'halvs'; known: .*halves, .* Did you mean 'halves'"),
        (
            {"system": "own_pieces:Nobody"},
            r"'own_pieces:Nobody' cannot .* has no attribute 'Nobody'",
        ),
        (
            {"system": {"name": "halves", "shar": 1}},
            r"system halves 'shar'; known: share\. Did you mean 'share'",
        ),
        (
            {"system": {"name": "own_pieces:Plain", "treshold": 1}},
            r"'treshold'; known: threshold\. Did you mean 'threshold'\?",
        ),
        (
            {"system": {"name": "own_pieces:Listens", "share": 1}},
            r"own_pieces:Listens has no parameter; got 'share'\.",
        ),
        (
            {"system": "own_pieces:NoHook"},
            r"is a class, .*subclass of discl\.training\.hooks\.TrainingHook",
        ),
        (
            {"system": "own_pieces:no_hook"},
            r"'own_pieces:no_hook' is a function, .* not called",
        ),
        ({"strategy": "alternatin"}, r"strategy 'alternatin'; known: .*Did you mean 'alternating'"),
        (
            {"strategy": "nowhere:thing"},
            r"'nowhere:thing' .* named 'nowhere'\. .*run `PYTHONPATH=\.",
        ),
        ({"strategy": ":thing"}, r"strategy ':thing' is no address; write module:attribute"),
        ({"strategy": "own_pieces:NUMBER"}, r"strategy 'own_pieces:NUMBER' is a int"),
        (
            {"strategy": "own_pieces:too_few"},
            r"'own_pieces:too_few' .* \(levels=, curriculum_epochs=, level=, seed=\)",
        ),
        (
            {"strategy": "own_pieces:nothing"},
            r"'own_pieces:nothing' gives a object, .* no method measures",
        ),
        (
            {"strategy": "own_pieces:Forgetful"},
            r"answers .* and then .* for epoch 0; .*\(epoch, history\)",
        ),
        (
            {"strategy": "own_pieces:Elsewhere"},
            r"levels\(0, \.\.\.\) is \['no level'\]; .* 0 %, 50 %",
        ),
        ({"strategy": 3}, r"unknown strategy '3'; known"),
        (
            {"objective": "scald"},
            r"unknown objective 'scald'; known: .*scaled\. Did you mean 'scaled'",
        ),
        (
            {"objective": "own_pieces:of_two"},
            r"'own_pieces:of_two' .* \(logits, labels, class_counts\)",
        ),
        ({"objective": "own_pieces:NUMBER"}, r"objective 'own_pieces:NUMBER' is a int"),
        (
            {"objective": {"name": "scaled", "facto": 1}},
            r"objective scaled 'facto'; known: factor\. Did you mean",
        ),
        (
            {"objective": {"name": "scaled", "factor": "two"}},
            r"objective scaled: factor .* got 'two'",
        ),
        (
            {"objective": {"name": "own_pieces:prior_aware", "tau": 1}},
            r"own_pieces:prior_aware has no parameter; got 'tau'",
        ),
    ],
)
def test_what_is_none_is_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        try:
            recipe_of(**method)
        except ValueError as error:  # pydantic's, with the places
            raise RecipeError(str(error)) from error


def test_what_a_module_of_your_own_lacks_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacking.py").write_text("import nowhere_else\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match=r"cannot be found: No module named 'nowhere_else'$"):
        make_system("lacking:Mine", allow_plugins=True)


def test_parameters_of_a_system_need_no_star() -> None:
    system: Any = make_system({"name": "own_pieces:Plain", "threshold": 0.3}, True)
    assert system.threshold == 0.3


def test_a_piece_of_your_own_is_known_by_its_source_and_one_that_ships_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both the defining and the naming module count, as they were when loaded."""

    def sources(**method: Any) -> list[str]:
        return trained_stage._own_sources(Method.model_validate(method), allow_plugins=True)

    assert (
        sources(strategy="adaptive", objective="focal", system="cuda")
        == sources(system="discl.baselines.cuda:Cuda")
        == []
    )
    assert sources(objective="flyp") == []
    assert (
        len(
            sources(
                strategy="alternating",
                objective="own_pieces:scaled",
                system={"name": "halves", "share": 0.25},
            )
        )
        == 3
    )
    found = {}
    for outer, inner in (("", ""), ("\n# another", ""), ("", "\n# another"), ("", "")):
        (tmp_path / "outer_piece.py").write_text("from inner_piece import Mine" + outer)
        (tmp_path / "inner_piece.py").write_text(
            "from discl.training.hooks import TrainingHook\nclass Mine(TrainingHook): pass" + inner
        )
        for module in ("outer_piece", "inner_piece"):
            sys.modules.pop(module, None)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        found.setdefault((outer, inner), []).append(sources(system="outer_piece:Mine"))
        (tmp_path / "outer_piece.py").write_text("not loaded")
        assert sources(system="outer_piece:Mine") == found[outer, inner][-1]
    first, *others = found.values()
    assert first[0] == first[1] and len({str(each[0]) for each in (first, *others)}) == 3


def test_a_name_that_ships_is_never_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "impostor-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: impostor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[discl.systems]\ncuda = own_pieces:Halves\n[discl.objectives]\nfocal = own_pieces:scaled\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(make_system("cuda")).__name__ == "Cuda"
    assert parameters_of("focal") == ["gamma"]
