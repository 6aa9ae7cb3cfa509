"""Compares results with golden values, which a change of the code must not change.

    python tools/compare_golden.py                 # compare with tests/golden; exit status 0 or 1
    python tools/compare_golden.py --part demo     # one part only
    python tools/compare_golden.py --add           # pin what has no value yet: new names
    python tools/compare_golden.py --write         # pin the current values, old ones too

Parts, each a file in `tests/golden`:

- `plans`: ids of the plan of every shipped recipe, on a miniature of its data set. Also a test.
- `short`: a small run with every strategy, objective and system: images, filter verdicts, training
  losses, results. Also a test.
- `demo`: the embedded example as it ships. Minutes.

On the machine that wrote a file, images and figures must be equal. Elsewhere (another processor,
another version of torch) floats may differ by `TOLERANCE`. Ids never differ.

The script uses the public API and the files of a run folder only, so it does not depend on the
layout of the package. It uses one thread and one process.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
GENERATOR, CLIP = "embedded:fashion-mnist/diffusion", "embedded:fashion-mnist/clip"
TOLERANCE = {"plans": 0.0, "short": 0.02, "demo": 0.05}
"""Largest difference of a float on another machine, relative to max(1, |golden value|)."""
DEMO_METHODS = ("ce", "ce-undersampled", "ce-balanced", "discl", "discl-balanced")
"""Rows of the embedded example, which the short run leaves out."""
BLOCKS = 4
"""The golden value of an image is its digest, and mean grey levels of BLOCKS × BLOCKS parts."""

STRATEGIES = {
    "real-only": {}, "diverse-to-specific": {}, "easy-to-hard": {}, "specific-to-diverse": {},
    "text-only": {}, "fixed": {"level": 30}, "all-levels": {}, "random": {}, "adaptive": {},
    "adaptive-per-class": {}, "bandit": {},
}  # fmt: skip
OBJECTIVES = ("balanced-softmax", "logit-adjusted", {"name": "focal", "gamma": 2.0}, "ldam")
SYSTEMS = (
    {"name": "cuda", "threshold": 0.1},
    {"name": "docl", "warm_up": 1},
    {"name": "ldmlr", "diffusion_epochs": 2, "epochs": 2},
)


def short_recipe() -> dict[str, Any]:
    """A run with few images, and a few training steps of every strategy, objective and system."""
    progress = {"guidance_images": 8, "probe_samples": 32}
    methods: dict[str, Any] = {}
    for name, more in STRATEGIES.items():
        follows = progress if name.startswith(("adaptive", "bandit")) else {}
        methods[name] = {"strategy": name, **more, **follows}
    for objective in OBJECTIVES:
        label = objective if isinstance(objective, str) else objective["name"]
        cosine = {"train": {"model": {"head": "cosine"}}} if label == "ldam" else {}
        methods[f"objective-{label}"] = {"objective": objective, **cosine}
    for system in SYSTEMS:
        methods[f"system-{system['name']}"] = {"system": system}
    methods["balanced"] = {
        "strategy": "all-levels", "sampling": "class-balanced", "undersample": False,
    }  # fmt: skip
    tail = {"n_max": 60, "imbalance_ratio": 20}
    return {
        "extends": "fashion-lt", "name": "golden", "data": {"long_tail": tail},
        "hard": {"fewer_than": 8}, "groups": {"many": 30, "few": 8},
        "spectrum": {"seeds": 2, "num_inference_steps": 10},
        "filter": {"threshold": 0.5},
        "train": {
            "epochs": 5, "curriculum_epochs": 4, "batch_size": 32, "steps_per_epoch": 4,
            "precision": "float32", "model": {"width": 8},
        },
        "methods": {**dict.fromkeys(DEMO_METHODS), **methods},
        "runtime": {"slots": 16, "workers": 0, "threads": 1, "device": "cpu"},
    }  # fmt: skip


def plans(recipes: Sequence[str] = ()) -> dict[str, Any]:
    """`{recipe: {requests, digest of the sorted ids, first ids}}`, by default of all that ship."""
    import pyarrow.parquet as pq

    import discl

    miniatures = _load(ROOT / "tests" / "helpers" / "miniatures.py")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        roots: dict[str, Path] = {}
        for name in recipes or shipped_names():
            overrides = miniature_of(name, miniatures, Path(folder), roots)
            run = discl.open_run(discl.load_recipe(name, overrides), Path(folder) / "runs" / name)
            discl.run_until(run, "plan")
            ids = sorted(pq.read_table(run.folder / "plan.parquet").column("id").to_pylist())
            values = {"requests": len(ids), "digest": digest("\n".join(ids)), "first": ids[:3]}
            result[name] = values
    return result


def shipped_names() -> list[str]:
    """Recipes that ship, by their files."""
    return sorted(path.stem for path in (ROOT / "src/discl/recipes").glob("*.yaml"))


def miniature_of(
    name: str, miniatures: ModuleType, folder: Path, roots: dict[str, Path]
) -> dict[str, Any]:
    """Overrides of data and sizes, so that the recipe can be planned on a miniature."""
    import discl

    if name == "fashion-lt":
        return {"data.long_tail.n_max": 100, "data.long_tail.imbalance_ratio": 20}
    counts = [24, 9, 2] + [1] * 97
    sets = {
        "imagenet-lt": miniatures.imagenet_lt, "inaturalist2018": miniatures.inaturalist2018,
        "iwildcam": miniatures.iwildcam, "cifar10-lowlight": miniatures.cifar10,
        "cifar100-lt": lambda root: miniatures.cifar100(root, cifar100_names(), counts),
    }  # fmt: skip
    of = next(each for each in sets if name.startswith(each))
    if of not in roots:
        roots[of] = sets[of](folder / of)
    overrides = {
        "data.root": str(roots[of]), "spectrum.checkpoint": GENERATOR, "filter.checkpoint": CLIP,
        "spectrum.num_inference_steps": 10, "spectrum.size": None, "spectrum.dtype": "float32",
        "spectrum.seeds": 2, "hard.rule": "tail", "hard.fewer_than": 10, "train.batch_size": 16,
        "train.steps_per_epoch": 2, "train.image_size": 32, "train.resize": None,
    }  # fmt: skip
    if of == "cifar100-lt":
        overrides |= {"data.long_tail": None}
    if name.startswith("imagenet-lt"):
        overrides |= {"prompts.phrases": None}  # the miniature has none of ImageNet-LT's tail
    if of == "cifar10-lowlight":
        overrides |= {"hard.fewer_than": 100, "data.cameras.validation": 40}
    if discl.load_recipe(name).train.model.checkpoint is not None:
        overrides |= {"train.model.checkpoint": CLIP}
    for method, settings in discl.load_recipe(name).methods.items():
        if settings.probe_samples:
            overrides[f"methods.{method}.probe_samples"] = 16
        if settings.guidance_images:
            overrides[f"methods.{method}.guidance_images"] = 4
    return overrides


def cifar100_names() -> list[str]:
    import yaml

    phrases = ROOT / "src/discl/assets/phrases/cifar100.yaml"
    return [name.replace(" ", "_") for name in yaml.safe_load(phrases.read_text())]


def short(measured: Sequence[str] = ()) -> dict[str, Any]:
    """The values of `short_recipe`; results of some methods only, or of all."""
    return _run(short_recipe(), measured)


def demo() -> dict[str, Any]:
    """The values of the embedded example."""
    runtime = {"threads": 1, "device": "cpu"}
    return _run({"extends": "fashion-lt", "name": "demo", "runtime": runtime})


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"plans": plans, "short": short, "demo": demo}


def _run(recipe: dict[str, Any], measured: Sequence[str] = ()) -> dict[str, Any]:
    """Images, verdicts, losses and results of a run of the recipe; `measured` as in `short`."""
    import discl

    with tempfile.TemporaryDirectory() as folder:
        run = discl.open_run(recipe, Path(folder) / "run")
        discl.run_until(run, "train")
        if measured:
            kept = {
                name: words for name, words in recipe["methods"].items()
                if words is None or name in measured
            }  # fmt: skip
            run = discl.open_run({**recipe, "methods": kept}, run.folder, amend=True)
        discl.run_until(run, "evaluate")
        return read_run(run.folder)


def read_run(folder: Path) -> dict[str, Any]:
    """Images, verdicts, losses and results of a run folder, as plain values."""
    import pyarrow.parquet as pq

    images: dict[str, Any] = {}
    for shard in sorted((folder / "spectrum").glob("*.parquet")):
        for row in pq.read_table(shard, columns=["id", "image"], partitioning=None).to_pylist():
            images[row["id"]] = describe_image(row["image"]["bytes"])
    verdicts = {
        row["id"]: [bool(row["keep"]), round(float(row["clip_similarity"]), 6)]
        for row in pq.read_table(folder / "filter.parquet").to_pylist()
    }
    losses: dict[str, Any] = {}
    for file in sorted(folder.glob("train/*/history.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        losses[file.parent.name] = [[each["loss"], each.get("levels", [])] for each in records]
    return {
        "images": dict(sorted(images.items())),
        "verdicts": dict(sorted(verdicts.items())),
        "losses": losses,
        "results": json.loads((folder / "results.json").read_text()),
    }


def describe_image(data: bytes) -> list[Any]:
    """[digest of the pixels, mean grey levels of BLOCKS × BLOCKS parts]."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened.convert("RGB"), np.float64)
    rows = [part.mean(2) for part in np.array_split(pixels, BLOCKS, 0)]
    means = [cell.mean() for row in rows for cell in np.array_split(row, BLOCKS, 1)]
    return [digest(pixels.astype(np.uint8).tobytes()), *(round(float(mean), 2) for mean in means)]


def digest(content: str | bytes) -> str:
    """16 hexadecimal digits."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def machine() -> dict[str, str]:
    """Processor and version of torch: floats are equal bit for bit if both are."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    return {"processor": model, "torch": torch.__version__}


def compare(golden: Any, now: Any, tolerance: float | None, key: str = "") -> list[str]:
    """Differences as lines. With a tolerance, floats and digests of images may differ."""
    if isinstance(golden, Mapping) and isinstance(now, Mapping):
        lines = [f"{key}/{name}: gone" for name in golden if name not in now]
        lines += [f"{key}/{name}: new" for name in now if name not in golden]
        for name in golden:
            if name in now:
                lines += compare(golden[name], now[name], tolerance, f"{key}/{name}")
        return lines
    if isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        pairs = zip(golden, now, strict=True)
        return [
            line
            for index, (old, new) in enumerate(pairs)
            for line in compare(old, new, tolerance, f"{key}[{index}]")
        ]
    if tolerance is not None and key.startswith("/images/") and key.endswith("[0]"):
        return []
    if tolerance is not None and isinstance(golden, (int, float)) and isinstance(now, (int, float)):
        allowed = tolerance * max(1.0, abs(golden))
        return [] if abs(golden - now) <= allowed else [f"{key}: {golden} -> {now}"]
    return [] if golden == now else [f"{key}: {golden} -> {now}"]


def check(part: str, measured: Sequence[str] = ()) -> list[str]:
    """Differences between the pinned values of a part and those of the current code.

    - `measured`: methods of `short` whose results are compared; by default all.
    """
    pinned = json.loads((GOLDEN / f"{part}.json").read_text())
    same, values = pinned["machine"] == machine(), pinned["values"]
    if measured:
        values["results"] = {
            row: figures for row, figures in values["results"].items()
            if row.partition("+")[0] in measured
        }  # fmt: skip
    now = short(measured) if measured else PARTS[part]()
    return compare(values, now, None if same else TOLERANCE[part])


def write(part: str) -> Path:
    """Pins the current values of a part."""
    path = GOLDEN / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "values": PARTS[part]()}, indent=0) + "\n")
    return path


def add(part: str) -> list[str]:
    """Pins values that a part does not have yet and leaves the others; returns the new keys.

    Floats are pinned for one machine, so nothing is added on another one.
    """
    path = GOLDEN / f"{part}.json"
    pinned = json.loads(path.read_text())
    if pinned["machine"] != machine():
        raise SystemExit(f"{path} is of another machine; ask a maintainer to pin new values there.")
    values = PARTS[part]()
    keys = add_missing(pinned["values"], values)
    path.write_text(json.dumps(pinned, indent=0) + "\n")
    return keys


def add_missing(golden: dict[str, Any], now: Mapping[str, Any], key: str = "") -> list[str]:
    """Adds to `golden` the values of `now` that it lacks; returns their keys."""
    keys = []
    for name, value in now.items():
        if name not in golden:
            golden[name] = value
            keys.append(f"{key}/{name}")
        elif isinstance(value, Mapping) and isinstance(golden[name], dict):
            keys += add_missing(golden[name], value, f"{key}/{name}")
    return keys


def _load(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a module")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--add", action="store_true", help="pin values that are not pinned yet")
    parser.add_argument("--write", action="store_true", help="pin the current values, old ones too")
    given = parser.parse_args()
    status = 0
    for part in given.part or PARTS:
        if given.write:
            print(write(part))
            continue
        if given.add:
            print("\n".join(add(part)) or f"{part}: nothing to add")
            continue
        lines = check(part)
        status |= bool(lines)
        print(f"{part}: {len(lines)} differences")
        print("\n".join(f"  {line}" for line in lines[:20]))
    return status


if __name__ == "__main__":
    sys.exit(main())
