"""The measurements for a GPU: small on the CPU, without data libraries, and what they compare."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ALLOWED = "torch transformers diffusers kornia safetensors numpy PIL yaml pydantic annotated_types"
HIDDEN = "pyarrow pandas datasets accelerate torchmetrics rich peft timm ray lightning"
BARE = """
import builtins, sys

for name in {hidden}:
    sys.modules[name] = None  # neither imported nor found
ALLOWED = {{*{allowed}, *sys.stdlib_module_names, "discl"}}
load = builtins.__import__


def load_allowed(name, globals=None, locals=None, fromlist=(), level=0):
    own = (globals or {{}}).get("__file__") or ""
    if level == 0 and ("/src/discl/" in own or "/benchmarks/" in own):
        if name.split(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"{{name}} is imported by {{own}}", name=name)
    return load(name, globals, locals, fromlist, level)


builtins.__import__ = load_allowed
"""
"""A `sitecustomize.py` under which this project's code sees few packages, as on a bare machine."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.slow
def test_everything_in_small_on_a_machine_with_few_packages(tmp_path: Path) -> None:
    own = [path.stem for path in BENCHMARKS.glob("*.py")]
    code = BARE.format(hidden=HIDDEN.split(), allowed=[*ALLOWED.split(), *own])
    (tmp_path / "sitecustomize.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    out = tmp_path / "out"
    done = subprocess.run(
        [BENCHMARKS / "gpu.sh", "--smoke", "--out", out],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "gpu.json").read_text())
    states = {name: told["status"] for name, told in found["parts"].items()}
    without = {"adapter": "peft", "tests": "not run"}
    for name, why in without.items():
        assert states.pop(name) == "failed" and why in found["parts"][name]["error"]
    assert set(states.values()) == {"done"} and len(states) == 15, found["parts"]
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert figures["difference from diffusers' latents, float32"]["met"]
    assert figures["grey levels between CPU and device, a tiny SDXL: most"]["value"] <= 1
    with zipfile.ZipFile(out / "cifar.zip") as stored:
        units = [name for name in stored.namelist() if name.startswith("seed-0/")]
        discl = json.loads(stored.read("seed-0/ce-discl.json"))
    assert len(units) == 10 and discl["levels"] == [[[0], 1], [[50], 1]]
    assert not list(out.glob(".*.new"))


@pytest.mark.slow
def test_latents_that_differ_are_found(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sdxl = script("sdxl")
    denoise = sdxl.Engine.denoise
    monkeypatch.setattr(
        sdxl.Engine,
        "denoise",
        lambda *given: ((request, 1.01 * latents) for request, latents in denoise(*given)),
    )
    assert sdxl.compare(sdxl.TINY, "cpu", 10, (50, 90)) > sdxl.EQUAL


# ------------------------------------------------------------------------------------- the parts

PARTS = """
import os, time
from figures import Figure

def fine(bench):
    yield Figure("one", 1.0, ">=", 2.0)

def breaks(bench):
    yield Figure("before", 1.0)
    raise ValueError("broken")

def lasts(bench):
    yield Figure("begun", 1.0)
    try:
        time.sleep(60)
    except Exception:
        pass

def dies(bench):
    yield Figure("last words", 1.0)
    os._exit(3)
"""
DRIVER = """
import sys
sys.path[:0] = [{benchmarks!r}, {folder!r}]
import gpu
from pathlib import Path

class Bench:
    smoke = False
    begin = staticmethod(lambda: None)
    end = staticmethod(dict)

given = sys.argv[sys.argv.index("--parts") + 1 : sys.argv.index("--until")]
until, since = float(sys.argv[-3]), float(sys.argv[-1])
record = gpu.Record(Path({folder!r}) / "gpu.json", since)
gpu.work([gpu.Part("parts_of_test", name, 0.3) for name in given], Bench(), record, until)
"""


def test_what_goes_wrong_costs_one_part(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = script("gpu")
    (tmp_path / "parts_of_test.py").write_text(PARTS)
    driver = DRIVER.format(benchmarks=str(BENCHMARKS), folder=str(tmp_path))
    (tmp_path / "gpu.py").write_text(driver)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    names = ("breaks", "lasts", "dies", "fine")
    record = gpu.Record(tmp_path / "gpu.json", time.time())
    groups = [[gpu.Part("parts_of_test", name, 60) for name in names]]
    gpu.run_groups(groups, record, time.time() + 100, [])
    found = record.read()
    states = {name: told["status"] for name, told in found["parts"].items()}
    assert states == dict(zip(names, ("failed", "stopped", "crashed", "done"), strict=True))
    assert found["parts"]["breaks"]["error"] == "ValueError: broken"
    assert "ended with 3" in found["parts"]["dies"]["error"]
    told = [(figure["part"], figure.get("met")) for figure in found["figures"]]
    assert told == [("breaks", None), ("lasts", None), ("dies", None), ("fine", False)]


def test_parts_for_which_no_time_is_left_say_so(script: Any, tmp_path: Path) -> None:
    gpu = script("gpu")
    record = gpu.Record(tmp_path / "gpu.json", time.time())
    gpu.run_groups(gpu.GROUPS, record, time.time() + 1, [])
    assert {told["status"] for told in record.read()["parts"].values()} == {"skipped"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    call = [BENCHMARKS / "gpu.sh", "cifar", "1", "--out", tmp_path]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "no NVIDIA GPU; --smoke" in done.stderr
    done = subprocess.run(call[:2], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "gpu.sh cifar MINUTES" in done.stderr


# --------------------------------------------------------------------------------- the trainings


@pytest.fixture
def data(script: Any) -> Any:
    return script("gpu_data").smoke_data()


def on_device(data: Any, name: str) -> torch.Tensor:
    return torch.from_numpy(data.pixels(name)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["discl-balanced"])
def test_a_training_is_that_of_the_package(script: Any, data: Any, name: str) -> None:
    """The same rows, rates and weights as `TrainState.train_epoch`, augmentation left aside."""
    from discl.models.classifier import build_classifier
    from discl.training.optim import make_learning_rate, make_optimizer
    from discl.training.step import EpochPart, StepConfig, TrainState
    from discl.utils.hashing import derive_seed

    pixels, plan = on_device(data, name), data.settings["train"]
    training = script("gpu_train").Training(
        data, name, 3, pixels, graph=False, precision=torch.float32, augmented=False
    )
    assert sum(1 for _ in training.steps()) == plan["epochs"] * plan["steps_per_epoch"]

    torch.manual_seed(derive_seed("init", 3))
    model: Any = build_classifier(data.config)
    state = TrainState(
        model.to(memory_format=torch.channels_last),
        lambda made: make_optimizer(made, **plan["optimizer"]),
        objective=training.objective,
        class_counts=training.pool.real_counts,
        config=data.config,
        steps=StepConfig(),
        augment=(),
        precision=torch.float32,
        device="cpu",
    )

    class Loader:
        aspects_of = staticmethod(lambda rows: None)

        def of(self, rows: np.ndarray) -> Any:
            for part in np.split(rows, len(rows) // plan["batch_size"]):
                yield part, pixels[part]

    rate = make_learning_rate(**plan["learning_rate"])
    losses = []
    for epoch in range(plan["epochs"]):
        rows, _ = training.schedule.draw(epoch, 0, [])
        part = EpochPart(rows, epoch, epochs=plan["epochs"], batch_size=16, seed=3)
        losses.append(state.train_epoch(Loader(), part, training.pool.labels, rate, Path("none")))  # type: ignore[arg-type]
    assert training.losses.tolist() == pytest.approx(losses, rel=1e-5)
    for own, theirs in zip(training.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(own, theirs, atol=1e-5)
    training.model.load_state_dict(training.model.state_dict())  # as after capturing a graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA")
def test_steps_as_a_graph_are_those_without(script: Any, data: Any) -> None:
    module = script("gpu_cifar")
    data.settings["train"]["steps_per_epoch"] = 10
    session = module.Session.on(data, torch.device("cuda"), graph=False)
    equal, found = module.check_graph(session)
    assert equal, found


def test_crops_and_flips(script: Any) -> None:
    size, count = 8, 400
    pixels = torch.arange(3 * size * size, dtype=torch.uint8).view(1, 3, size, size)
    padded = torch.nn.functional.pad(pixels, (1,) * 4)[0]
    crops = [
        padded[:, top : top + size, left : left + size] for top in range(3) for left in range(3)
    ]
    allowed = [view for crop in crops for view in (crop, crop.flip(-1))]
    generator = torch.Generator().manual_seed(0)
    made = script("gpu_train").augment(pixels.expand(count, -1, -1, -1), generator)
    found = [
        next(i for i, view in enumerate(allowed) if torch.equal(image, view)) for image in made
    ]
    counts = np.bincount(found, minlength=18)
    assert counts.min() > 8 and counts.max() < 40  # 22 expected of each


def test_data_travel_unchanged(script: Any, data: Any, tmp_path: Path) -> None:
    module = script("gpu_data")
    module.write_data(data, tmp_path)
    again = module.read_data(tmp_path)
    assert again.settings == data.settings and again.digest == data.digest
    for part, arrays in data.images.items():
        assert arrays.keys() == again.images[part].keys()
        assert all((arrays[name] == again.images[part][name]).all() for name in arrays)
    (tmp_path / "cifar-oracle.npz").unlink()
    with pytest.raises(SystemExit, match=r"has no cifar-oracle\.npz"):
        module.read_data(tmp_path)


def test_finished_trainings_are_kept(script: Any, data: Any, tmp_path: Path) -> None:
    module = script("gpu_cifar")
    archive, device = module.Archive(tmp_path / "cifar.zip"), torch.device("cpu")
    first = module.missing_units(data, archive, [0, 1])
    claim = [("ce", 0), ("ce-discl", 0), ("ce", 1), ("ce-discl", 1)]
    assert first[:4] == claim and len(first) == 10
    assert not module.train_units(data, archive, [0, 1], device, minutes=1e-9)
    assert module.missing_units(data, archive, [0, 1]) == first  # no time, no training

    session = module.Session.on(data, device, graph=False)
    module.carry_out(session, claim[:1], archive, time.time())
    assert module.missing_units(data, archive, [0, 1]) == first[1:]
    files = archive.read()
    told = json.loads(files["seed-0/ce.json"])
    assert set(told["rows"]) == {"ce", "ce+la"} and sum(told["class_samples"]) == 96
    data.settings["train"]["optimizer"]["weight_decay"] = 1e-3  # of another setting
    assert module.missing_units(data, archive, [0, 1]) == first


def test_as_many_trainings_at_once_as_end_in_time(script: Any) -> None:
    speeds = {1: 500.0, 2: 800.0, 4: 1000.0, 6: 900.0}
    choose = script("gpu_cifar").choose_count
    found = [choose(speeds, 17_000, seconds) for seconds in (200, 68, 67, 40, 33)]
    assert found == [4, 4, 2, 1, 0]  # 68, 42.5 and 34 seconds for four, two and one


def test_the_table_compares_with_the_same_mixture(script: Any, data: Any, tmp_path: Path) -> None:
    from safetensors.numpy import save

    pack, module = script("gpu_pack"), script("gpu_cifar")
    labels, groups = np.repeat(np.arange(6, dtype=np.uint8), 20), data.settings["groups"]
    files = {
        "facts.json": json.dumps({"settings": data.settings}).encode(),
        "labels.safetensors": save({"test": labels}),
    }
    for name, right in (("ce-undersampled", 60), ("ce-discl", 90)):
        for seed in range(2):
            predicted = np.where(np.arange(120) < right, labels, 255).astype(np.uint8)
            rows = {name: module.accuracies(predicted, labels, groups)}
            files[f"seed-{seed}/{name}.json"] = json.dumps({"rows": rows}).encode()
            files[f"seed-{seed}/{name}.safetensors"] = save({name: predicted})
    module.Archive(tmp_path / "cifar.zip").add(files)
    lines = pack.make_table(tmp_path / "cifar.zip").splitlines()
    assert len(lines) == 4 and lines[3].startswith("| ce-undersampled | 2 | 100.0 ± 0.0")
    assert "| 75.0 ± 0.0 | +50.0 [" in lines[2]
