"""House rules, checked on the imports and calls in the source."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

import discl

ROOT = Path(discl.__file__).parent
PROJECT = Path(__file__).parents[1]
LAYERS = [
    {"cli"},
    {"pipeline"},
    {"browse", "report", "integrations"},
    {"stages"},
    {"run_folder"},
    {"recipe"},
    {"baselines"},
    {"training"},
    {"curriculum", "models", "spectrum"},
    {"spectrum.models"},
    {"audit"},
    {"conversion", "data", "evaluation", "export", "prompts"},
    {"data.readers"},
    {"data."},
    {"transformers_models"},
    {"checkpoints"},
    {"assets", "checkpoint_checks", "levels", "mixtures", "unpickling"},
    {"utils"},
    {"escaping"},
    {"errors", "run_folder.paths"},
]
"""Module paths from the top down; "data." is what is below `data`, without `data/__init__.py`.
A module belongs to the longest path that it starts with. It imports from the same path and from
the layers below."""
LAYER_OF = {path: layer for layer, paths in enumerate(LAYERS) for path in paths}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    .removesuffix(".__init__")
    .replace("__init__", ""): path
    for path in sorted(ROOT.rglob("*.py"))
}
PACKAGE_MODULES = [name for name in MODULES if name]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def offenders(
    check: Callable[[str], Iterable[str]], names: Iterable[str] = tuple(MODULES)
) -> dict[str, list[str]]:
    """What a check finds in modules, without those where it finds nothing."""
    found = {name: sorted(check(name)) for name in names}
    return {name: lines for name, lines in found.items() if lines}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


@cache
def imports(module: str, deferred: bool = True, types: bool = False) -> frozenset[str]:
    """Modules that a module imports; those of this package start with "discl.".

    - `deferred`: count imports within functions.
    - `types`: count imports under TYPE_CHECKING.
    """
    package = f"discl.{module}".rstrip(".").split(".")
    if MODULES[module].name != "__init__.py":
        package = package[:-1]
    nodes: list[ast.AST] = list(tree(module).body)
    result: set[str] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                result.add(whole if whole.removeprefix("discl.") in MODULES else source)
        elif is_for_types(node):
            nodes += [*(node.body if types else []), *node.orelse]
        elif deferred or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return frozenset(result)


def inside(module: str, deferred: bool = True, types: bool = False) -> set[str]:
    """Modules of this package that a module imports, without the prefix "discl."."""
    return {
        name.removeprefix("discl.")
        for name in imports(module, deferred, types)
        if name.startswith("discl.")
    }


def entry(module: str) -> str:
    """The longest path in LAYERS that a module starts with; the module itself if there is none."""
    parts = module.split(".")
    paths = [module]
    for length in range(len(parts) - 1, 0, -1):
        above = ".".join(parts[:length])
        paths += [f"{above}.", above]
    return next((path for path in paths if path in LAYER_OF), module)


def test_imports_are_found() -> None:
    assert {"", "cli", "spectrum", "spectrum.engine", "stages.prepare_data"} <= set(MODULES)
    assert {"discl.errors", "collections.abc", "numbers"} <= imports("levels")
    assert "discl.pipeline" in imports("cli.run")
    assert "discl.pipeline" not in imports("cli.run", deferred=False)
    assert {"stages.train", "data.hardness"} <= inside("stages.hard")
    assert "data.table" in inside("data", types=True) - inside("data")
    assert entry("spectrum.models.flow") == "spectrum.models"
    assert entry("spectrum.modelled") == "spectrum"
    assert [entry(name) for name in ("data", "data.table", "data.readers.cifar")] == [
        "data",
        "data.",
        "data.readers",
    ]


def test_every_module_has_a_layer() -> None:
    missing = {entry(module) for module in PACKAGE_MODULES} - set(LAYER_OF)
    assert not missing, f"add these to LAYERS: {sorted(missing)}"


def test_imports_point_down() -> None:
    """Deferred imports and those for types included."""

    def upwards(module: str) -> set[str]:
        own = LAYER_OF.get(entry(module), 0)
        return {
            other
            for other in inside(module, types=True)
            if entry(other) != entry(module) and LAYER_OF.get(entry(other), 0) <= own
        }

    assert offenders(upwards, PACKAGE_MODULES) == {}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Deferred imports included, those for types excepted."""
    graph = {module: inside(module) & set(MODULES) for module in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


DISTRIBUTIONS = {"PIL": "pillow", "c2pa": "c2pa-python", "yaml": "pyyaml"}
"""Distributions by the name of their module, where the two differ."""
LOADED_BY_OTHERS = {"peft", "tensorboard"}
"""Packages of an extra that diffusers and torch import, not this package."""
FRAMEWORKS = {"integrations.huggingface", "integrations.lightning"}
"""Each exists for one framework, and only its users load it."""
OF_EXTRAS = {"prompts.bounded_client", "browse.app", "browse.guard", "export.signing"}
"""Each needs an extra, and other modules import it only where they use it."""


def distribution(name: str) -> str:
    top = name.split(".")[0]
    return DISTRIBUTIONS.get(top, top).lower().replace("_", "-")


@cache
def declared() -> tuple[set[str], set[str]]:
    """Distributions that pyproject.toml requires, and those of the extras for users."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = dict(project["optional-dependencies"])
    del extras["dev"], extras["docs"]

    def names(lines: Iterable[str]) -> set[str]:
        return {re.split(r"[<>=!~\[; ]", line)[0].lower().replace("_", "-") for line in lines}

    return names(project["dependencies"]), names(chain.from_iterable(extras.values()))


def third_party(names: Iterable[str]) -> set[str]:
    """Distributions of the modules that are neither of this package nor of Python."""
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"discl"}
    return {distribution(name) for name in tops}


def test_what_is_imported_is_declared() -> None:
    """Deferred imports may be of an extra; those at the top must be required."""
    required, optional = declared()

    def undeclared(module: str) -> set[str]:
        found = third_party(imports(module, types=True)) - required - optional
        if module not in OF_EXTRAS:
            found |= inside(module, deferred=False) & OF_EXTRAS
        if module not in FRAMEWORKS | OF_EXTRAS:
            found |= third_party(imports(module, deferred=False)) - required
        return found

    assert offenders(undeclared) == {}


def test_what_is_declared_is_imported() -> None:
    required, optional = declared()
    used = set().union(*(third_party(imports(module)) for module in MODULES))
    assert required | optional <= used | LOADED_BY_OTHERS


def test_frameworks_are_loaded_by_their_users_only() -> None:
    others = [module for module in MODULES if module not in FRAMEWORKS]
    assert [module for module in others if FRAMEWORKS & inside(module)] == []


HEAVY = {"diffusers", "transformers", "accelerate"}
USERS_OF_HEAVY = {
    *("spectrum.clip_filter", "prompts.captions", "models.pretrained", "models.clip"),
    "training.distributed",
}


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    def heavy(module: str) -> set[str]:
        at_the_top = {name.split(".")[0] for name in imports(module, deferred=False)}
        found = at_the_top & (HEAVY | {"ray"})
        if not module.startswith("spectrum.models.") and module not in USERS_OF_HEAVY:
            found |= {name.split(".")[0] for name in imports(module)} & HEAVY
        return found

    assert offenders(heavy, set(MODULES) - FRAMEWORKS) == {}


@pytest.mark.parametrize(
    "module", ["", "cli.program", "errors", "levels", "utils.hashing", "utils.atomic"]
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    packages = {name.split(".")[0] for name in imports(module, deferred=False)}
    assert not packages & {"torch", "numpy", "datasets", "pyarrow", "PIL", "pydantic"}


@cache
def calls(module: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]


WRITERS = {"write_text", "write_bytes"}
INTO_A_FOLDER = {"export.writing", "export.formats", "stages.workers.ray", "conversion"}
"""They write into a folder that is renamed as a whole, or into a temporary one."""


def test_files_are_written_atomically() -> None:
    """Within `with whole(…) as unfinished`; `spectrum.plan` writes to its caller's open path."""

    def partly(module: str) -> Iterable[str]:
        for node in calls(module):
            writes = isinstance(node.func, ast.Attribute) and node.func.attr in WRITERS
            if writes and ast.unparse(node.func.value) != "unfinished":  # type: ignore[attr-defined]
                yield f"line {node.lineno}"
            saves = ast.unparse(node.func) in {"save_file", "pq.write_table"}
            saves = saves and module != "spectrum.plan"
            # a shard for elsewhere is written in memory
            if saves and ast.unparse(node.args[1]) not in {"unfinished", "shard"}:
                yield f"line {node.lineno}"
        if module != "utils.atomic" and '.new"' in MODULES[module].read_text():
            yield ".new"

    assert offenders(partly, set(MODULES) - INTO_A_FOLDER) == {}


READERS = {"utils.stored", "spectrum.store", "run_folder.locks", "recipe.loading", "assets"}
"""They read files directly, with errors that they raise themselves."""
INPUT_READERS = (
    *("data.", "prompts.", "spectrum.models.", "assets.", "models.pretrained"),
    *("checkpoints", "checkpoint_checks", "conversion", "transformers_models", "unpickling"),
)
"""They read data sets, texts and checkpoints: input, not files of a run."""
UNCHECKED = {
    *(f"pq.{name}" for name in ("read_table", "read_schema", "read_metadata", "ParquetFile")),
    *("load_file", "safe_open", "json.load"),
}


def test_files_of_a_run_are_read_with_a_check() -> None:
    """With the functions of `utils.stored`."""

    def unchecked(module: str) -> Iterable[str]:
        allowed = module in {"export.writing", "stages.classifiers"}
        for node in calls(module):
            called = ast.unparse(node.func)
            parses = called in {"json.loads", "yaml.safe_load"} and any(
                ".read_" in ast.unparse(argument) for argument in node.args
            )
            if called in UNCHECKED or (parses and not allowed):
                yield f"line {node.lineno}"

    names = [name for name in MODULES if name not in READERS]
    assert offenders(unchecked, [n for n in names if not n.startswith(INPUT_READERS)]) == {}


SCRIPTS = sorted(
    path.relative_to(PROJECT).as_posix()
    for folder in ("benchmarks", "examples", "tools")
    for path in (PROJECT / folder).rglob("*.py")
)


def defined_names(module: str) -> set[str]:
    """Names at the top of a module: definitions, assignments and imports."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_scripts_import_names_that_exist() -> None:
    def missing(script: str) -> Iterable[str]:
        for node in ast.walk(ast.parse((PROJECT / script).read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.partition(".")[0] != "discl":
                continue
            name = module.removeprefix("discl").removeprefix(".")
            if name not in MODULES:
                yield f"line {node.lineno}: no module {module}"
                continue
            known = {*defined_names(name), *discl.__all__} if not name else defined_names(name)
            for alias in node.names:
                submodule = f"{name}.{alias.name}".removeprefix(".")
                if alias.name not in known and submodule not in MODULES:
                    yield f"line {node.lineno}: {alias.name}"

    assert offenders(missing, SCRIPTS) == {}


@cache
def called_names(module: str) -> frozenset[str]:
    """What a module calls, as written: `hash`, `torch.load`."""
    return frozenset(ast.unparse(node.func) for node in calls(module))


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def test_nothing_is_unpickled_evaluated_or_keyed_by_the_built_in_hash() -> None:
    banned = {"hash", "eval", "exec", "torch.load", "np.load", "numpy.load"}
    banned |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")}

    def unsafe(module: str) -> set[str]:
        packages = {name.split(".")[0] for name in imports(module)}
        return packages & PICKLES | called_names(module) & banned

    assert offenders(unsafe) == {"unpickling": ["torch.load"]}


def test_scripts_unpickle_nothing_and_read_plain_values_of_yaml() -> None:
    banned = {"eval", "exec", "torch.load"}
    banned |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")}

    def unsafe(script: str) -> set[str]:
        used = set()
        for node in ast.walk(ast.parse((PROJECT / script).read_text())):
            match node:
                case ast.Call():
                    used |= {ast.unparse(node.func)} & banned
                case ast.Import():
                    used |= {alias.name.split(".")[0] for alias in node.names} & PICKLES
                case ast.ImportFrom():
                    used |= {(node.module or "").split(".")[0]} & PICKLES
        return used

    assert offenders(unsafe, SCRIPTS) == {}


def test_the_converter_unpickles_tensors_only() -> None:
    """With the restricted unpickler, and no module imports the one that does it."""
    loads = [node for node in calls("unpickling") if ast.unparse(node.func) == "torch.load"]
    words = [word for load in loads for word in load.keywords if word.arg == "weights_only"]
    assert [ast.unparse(word.value) for word in words] == ["True"] * len(loads) != []
    assert [module for module in MODULES if "unpickling" in inside(module)] == []


def test_yaml_is_read_within_limits_only() -> None:
    """With `utils.yaml_text`. Functions of yaml are called as yaml.NAME."""
    reading = {"load", "load_all", "full_load", "unsafe_load", "safe_load", "safe_load_all"}
    reading |= {"parse", "scan", "compose", "compose_all"}

    def unlimited(module: str) -> set[str]:
        imported = {
            f"from yaml import {alias.name}"
            for node in ast.walk(tree(module))
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "yaml"
            for alias in node.names
        }
        return imported | called_names(module) & {f"yaml.{name}" for name in reading}

    assert offenders(unlimited, set(MODULES) - {"utils.yaml_text"}) == {}


def test_user_input_is_not_checked_by_assert() -> None:
    def asserted(module: str) -> list[str]:
        nodes = (node for node in ast.walk(tree(module)) if isinstance(node, ast.Assert))
        return [f"line {node.lineno}" for node in nodes]

    assert offenders(asserted) == {}


def test_architecture_names_every_module() -> None:
    page = (PROJECT / "ARCHITECTURE.md").read_text()
    files = [path.name for path in MODULES.values() if path.name != "__init__.py"]
    assert [name for name in files if name not in page] == []
