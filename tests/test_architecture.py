"""The rules of the house, checked on the imports and calls in the source."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import discl

ROOT = Path(discl.__file__).parent
FLOORS = [
    {"cli"},
    {"pipeline"},
    {"report", "integrations"},
    {"stages"},
    {"run_folder"},
    {"recipe"},
    {"baselines"},
    {"training"},
    {"curriculum", "models", "spectrum"},
    {"conversion", "data", "evaluation", "export", "prompts"},
    {"checkpoints"},
    {"assets", "checkpoint_checks", "levels", "unpickling"},
    {"utils"},
    {"escaping"},
    {"errors"},
]
"""Rooms from the entrance down; a room imports from the floors below it only."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    .removesuffix(".__init__")
    .replace("__init__", ""): path
    for path in sorted(ROOT.rglob("*.py"))
}


def is_script(module: str) -> bool:
    """The scripts that made the assets are run by hand and belong to no room."""
    return module.startswith("assets.make_")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports(module: str, everywhere: bool = True) -> set[str]:
    """Modules that a module imports; those of discl begin with "discl.". With `everywhere` false, only while it is loaded itself."""
    package = f"discl.{module}".rstrip(".").split(".")
    if MODULES[module].name != "__init__.py":
        package = package[:-1]
    waiting: list[ast.AST] = list(tree(module).body)
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            submodules = {f"{source}.{alias.name}" for alias in node.names} & {
                f"discl.{name}" for name in MODULES
            }
            found |= submodules or {source}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.body if everywhere else []
        elif everywhere or not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


def inside(module: str, everywhere: bool = True) -> set[str]:
    """Modules of discl, without the prefix, that a module imports."""
    return {
        name.removeprefix("discl.")
        for name in imports(module, everywhere)
        if name.startswith("discl.")
    }


def room(module: str) -> str:
    return module.split(".")[0]


def test_the_source_is_read_at_all() -> None:
    assert {"", "cli", "spectrum", "spectrum.engine", "stages.prepare_data"} <= set(MODULES)
    assert {"discl.errors", "collections.abc", "dataclasses"} <= imports("levels")
    assert "discl.recipe" in imports("cli")
    assert "discl.recipe" not in imports("cli", everywhere=False)
    assert {"stages.train", "run_folder.run", "data.hardness"} <= inside("stages.hard")
    assert "data.table" in inside("data")


def test_every_room_has_its_floor() -> None:
    rooms = {room(module) for module in MODULES} - {""}
    assert rooms <= set(FLOOR_OF), (
        f"say in FLOORS where these belong: {sorted(rooms - set(FLOOR_OF))}"
    )


@pytest.mark.parametrize("module", [name for name in MODULES if not is_script(name)])
def test_arrows_point_down_only(module: str) -> None:
    """So nobody imports the command line, and the two wings, which share a floor, do not know each other."""
    upwards = {
        other
        for other in inside(module)
        if room(other) != room(module)
        and FLOOR_OF.get(room(other), 0) <= FLOOR_OF.get(room(module), 0)
    }
    assert not upwards


def test_nobody_loads_the_frameworks_of_others() -> None:
    others = {"integrations.huggingface", "integrations.lightning"}
    assert [module for module in MODULES if module not in others and others & inside(module)] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: inside(module, everywhere=False) & set(MODULES) for module in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [name for name in MODULES if not is_script(name)])
def test_heavy_packages_stay_in_their_room(module: str) -> None:
    packages = {name.split(".")[0] for name in imports(module)}
    if module in {"integrations.huggingface", "integrations.lightning"}:
        return  # each exists for that framework, and only its users load it
    if not module.startswith("spectrum.models.") and module not in {
        "spectrum.clip_filter",
        "prompts.captions",
        "models.pretrained",
        "models.clip",
        "training.distributed",
    }:
        assert not packages & {"diffusers", "transformers", "accelerate"}
    assert not {name.split(".")[0] for name in imports(module, everywhere=False)} & {
        "diffusers",
        "transformers",
        "accelerate",
        "ray",
    }


@pytest.mark.parametrize("module", ["", "cli", "errors", "levels", "utils.hashing", "utils.atomic"])
def test_what_the_entrance_loads_is_light(module: str) -> None:
    packages = {name.split(".")[0] for name in imports(module, everywhere=False)}
    assert not packages & {"torch", "numpy", "datasets", "pyarrow", "PIL", "pydantic"}


INTO_A_FOLDER = {"export.writing", "export.formats", "stages.workers.ray", "conversion"}
"""They write into a folder that appears whole, or into one that is deleted."""


@pytest.mark.parametrize(
    "module", [name for name in MODULES if not is_script(name) and name not in INTO_A_FOLDER]
)
def test_every_file_is_written_whole(module: str) -> None:
    """What writes a file does it in a block of `with whole(…) as unfinished`; a plan is written where its caller says, who does."""
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in {"write_text", "write_bytes"}:
            assert ast.unparse(node.func.value) == "unfinished", f"line {node.lineno}"
        if ast.unparse(node.func) in {"save_file", "pq.write_table"} and module != "spectrum.plan":
            assert ast.unparse(node.args[1]) in {"unfinished", "shard"}, (
                f"line {node.lineno}"
            )  # a shard for elsewhere, in memory
    assert module == "utils.atomic" or '.new"' not in MODULES[module].read_text()


READERS = {"utils.stored", "spectrum.store", "run_folder.locks", "recipe.loading", "assets"}
"""They read files bare, each with errors of its own, and so do those below."""
OF_OTHERS = (
    *("data.", "prompts.", "spectrum.models.", "assets.", "models.pretrained"),
    *("checkpoints", "checkpoint_checks", "conversion", "unpickling"),
)
"""They read data sets, texts and checkpoints, which are not files of a run."""
BARE = {
    *(f"pq.{name}" for name in ("read_table", "read_schema", "read_metadata", "ParquetFile")),
    *("load_file", "safe_open", "json.load"),
}


@pytest.mark.parametrize(
    "module",
    [name for name in MODULES if name not in READERS and not name.startswith(OF_OTHERS)],
)
def test_files_of_a_run_are_read_with_a_check(module: str) -> None:
    """By the functions of `stored`, which know what is whole and of the right kind."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), " ".join(map(ast.unparse, node.args))
            bare = called in {"json.loads", "yaml.safe_load"} and ".read_" in given
            guarded = module in {"export.writing", "stages.classifiers"}
            assert called not in BARE and (guarded or not bare), f"line {node.lineno}"


def called_names(module: str) -> set[str]:
    """Names of what a module calls: `hash`, `torch.load`."""
    return {ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("module", [name for name in MODULES if not is_script(name)])
def test_nothing_is_unpickled_evaluated_or_keyed_by_the_built_in_hash(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & {
        "pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
    }
    banned = {"hash", "eval", "exec", "torch.load", "np.load", "numpy.load"}
    found = called_names(module) & banned
    assert found == ({"torch.load"} if module == "unpickling" else set())


def test_the_converter_unpickles_tensors_only() -> None:
    """The one call of torch.load names the restricted unpickler, and only a process of its own makes it."""
    calls = [
        node
        for node in ast.walk(tree("unpickling"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert (
        [
            ast.unparse(word.value)
            for call in calls
            for word in call.keywords
            if word.arg == "weights_only"
        ]
        == ["True"] * len(calls)
        != []
    )
    assert [module for module in MODULES if "unpickling" in inside(module)] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name != "utils.yaml_text"])
def test_yaml_is_read_within_limits_only(module: str) -> None:
    reading = {"load", "load_all", "full_load", "unsafe_load", "safe_load", "safe_load_all"}
    reading |= {"parse", "scan", "compose", "compose_all"}
    assert not {name for name in called_names(module) if name in {f"yaml.{n}" for n in reading}}
    names = {
        alias.name
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "yaml"
        for alias in node.names
    }
    assert not names, "call yaml's functions as yaml.NAME"


@pytest.mark.parametrize("module", [name for name in MODULES if not is_script(name)])
def test_user_input_is_not_checked_by_assert(module: str) -> None:
    assert not [node.lineno for node in ast.walk(tree(module)) if isinstance(node, ast.Assert)]


def test_every_module_stands_in_the_house_in_one_page() -> None:
    page = (ROOT.parents[1] / "ARCHITECTURE.md").read_text()
    named = {
        path.relative_to(ROOT).as_posix()
        for module, path in MODULES.items()
        if path.name != "__init__.py" and not is_script(module)
    }
    assert {name for name in named if name.rpartition("/")[2] not in page} == set()
