"""What happens around `gpu.sh cifar`: packing its data, and making its table.

    python benchmarks/gpu_pack.py --data DIR --out build/gpu/data
    python benchmarks/gpu_pack.py --table OUT/cifar.zip

DIR has CIFAR-100 as Parquet. The spectrum is that of `cifar100_lt.py`: its run folder is used, or
made. Settings are those of `cifar100_lt_full.yaml`: 200 epochs at the usual rate .1, not searched.
The four `.npz` files take 43 MB: pixels are lossless, labels, levels, sources and scores are
beside them. They can travel one by one.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from gpu_data import Data, write_data

HERE = Path(__file__).parent
ORACLE = "oracle"
ROWS = (
    *("ce", "ce-undersampled", "ce-discl", "ce-all-levels", "ce-text-only"),
    *("ce-balanced", "discl-balanced", "levels-balanced", "text-balanced", "bs", ORACLE),
)
"""Rows of the recipe, and the oracle with the settings of ce-discl."""
CONTROLS = dict.fromkeys(("ce-text-only", "ce-all-levels", "ce-discl", ORACLE), "ce-undersampled")
CONTROLS |= dict.fromkeys(("text-balanced", "levels-balanced", "discl-balanced"), "ce-balanced")
"""The same mixture without synthetic images."""
COLUMNS = {"many": "many", "medium": "medium", "few": "few", "all": "accuracy"}


def open_spectrum(data: Path, work: Path) -> tuple[Any, Any]:
    """(The run with the filtered spectrum, the store and verdicts of the oracle)."""
    import cifar100_lt
    from discl.run_folder.run import Run

    job = cifar100_lt.Job(data, work, work, {}, HERE / "cifar100_lt_full.yaml")
    run = cifar100_lt.open_data(job)
    folder = work / cifar100_lt.oracle_folder(run.recipe)
    cifar100_lt.make_oracle(run, folder)
    return run, Run(run.recipe, folder, {"data.parquet": run.path("data.parquet")})


def pixels_of(pictures: Any) -> np.ndarray:
    """uint8 `[n, 32, 32, 3]` of pictures."""
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def real_images(table: Any) -> dict[str, np.ndarray]:
    pixels = pixels_of(table.image(row) for row in range(len(table)))
    return {"pixels": pixels, "labels": table.labels.astype(np.uint8)}


def made_images(run: Any, row_of: dict[str, int]) -> dict[str, np.ndarray]:
    """Kept images of a store with their scores; `row_of` is the row of each real image."""
    from discl.data import decode_image
    from discl.stages.sample_pool import kept_images
    from discl.utils.stored import read_table

    kept = kept_images(run)
    verdicts = read_table(run.path("filter.parquet"), ["id", "clip_similarity"]).to_pylist()
    scores = {each["id"]: each["clip_similarity"] for each in verdicts}
    return {
        "pixels": pixels_of(decode_image(each) for each in kept["image"]),
        "labels": np.asarray(kept["label"], np.uint8),
        "levels": np.asarray(kept["level"], np.uint8),
        "sources": np.array([row_of.get(name, -1) for name in kept["source_id"]], np.int32),
        "scores": np.array([scores[name] for name in kept["id"]], np.float32),
    }


def pack(data: Path, work: Path) -> Data:
    """The long-tailed set, the test set, the kept spectrum and the oracle's images."""
    from discl.stages.sample_pool import hard_rows

    run, oracle = open_spectrum(data, work)
    row_of = {name: row for row, name in enumerate(run.train.ids)}
    images = {
        "train": real_images(run.train) | {"hard": hard_rows(run)},
        "test": real_images(run.tables["test"]),
        "spectrum": made_images(run, row_of),
        "oracle": made_images(oracle, row_of),
    }
    return Data(describe_settings(run), images)


def describe_settings(run: Any) -> dict[str, Any]:
    """What `gpu_cifar.py` needs of the recipe, as plain values."""
    from discl.mixtures import read_mixture
    from discl.stages.method_plan import CLASS_POWER
    from discl.stages.trained import classifier_config

    recipe = run.recipe
    rows = {}
    for name in ROWS:
        method = recipe.methods["ce-discl" if name == ORACLE else name]
        undersample, frequencies = read_mixture(
            method.model_dump(mode="json"), recipe.hard.rule == "tail"
        )
        rows[name] = {
            "strategy": method.strategy,
            "level": method.level,
            "objective": method.loss.name,
            "undersample": undersample,
            "synthetic_scale": method.synthetic_scale,
            "shortage": method.shortage,
            "missing": method.missing,
            "class_power": CLASS_POWER[frequencies],
            "curriculum_epochs": recipe.train.curriculum_epochs,
            "images": "spectrum",
        }
    rows[ORACLE] |= {"strategy": "fixed", "level": 100, "images": "oracle"}
    rows[ORACLE] |= {"curriculum_epochs": recipe.train.epochs}
    return {
        "levels": list(recipe.spectrum.levels),
        "groups": run.groups,
        "seeds": list(recipe.compare.seeds),
        "rows": rows,
        "train": describe_train(recipe.train, len(run.train)),
        "classifier": asdict(classifier_config(run, "ce")),
    }


def describe_train(train: Any, real_images: int) -> dict[str, Any]:
    """The updates, the optimizer and its rate. Raises SystemExit for what the loop cannot do."""
    optimizer = train.optimizer
    if list(train.augment) != ["random-crop", "flip"] or train.ema or train.mixup or train.cutmix:
        raise SystemExit("gpu_cifar.py crops and flips, and does nothing else to images or weights")
    decays = True if optimizer.decay_vectors is None else optimizer.decay_vectors
    names = ("name", "lr", "weight_decay", "momentum", "nesterov")
    return {
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "steps_per_epoch": train.steps_per_epoch or -(-real_images // train.batch_size),
        "optimizer": {name: getattr(optimizer, name) for name in names} | {"decay_vectors": decays},
        "learning_rate": {
            "peak": optimizer.lr,
            "schedule": optimizer.schedule,
            "epochs": train.epochs,
            "warm_up_epochs": optimizer.warm_up_epochs,
            "milestones": list(optimizer.milestones or ()),
            "factor": optimizer.factor,
        },
    }


def make_table(archive: Path) -> str:
    """The rows over the seeds that all of them have, as Markdown.

    Differences of few and of all to the same mixture without synthetic images are paired.
    """
    with zipfile.ZipFile(archive) as stored:
        files = {name: stored.read(name) for name in stored.namelist()}
    groups = json.loads(files["facts.json"])["settings"]["groups"]
    labels = load(files["labels.safetensors"])["test"].astype(np.int64)
    units: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for name, content in files.items():
        if not name.startswith("seed-") or not name.endswith(".json"):
            continue
        place, seed = name.removesuffix(".json"), int(name.split("/")[0].removeprefix("seed-"))
        predicted = load(files[f"{place}.safetensors"])
        for row, told in json.loads(content)["rows"].items():
            figures.setdefault(row, {})[seed] = told
            units.setdefault(row, {})[seed] = {"predicted": predicted[row].astype(np.int64)}
    lines = [
        f"| method | seeds | {' | '.join(COLUMNS)} | few − same mixture | all − same mixture |",
        f"|{'---|' * (len(COLUMNS) + 4)}",
    ]
    for row, seen in figures.items():
        cells = [row, str(len(seen))]
        for key in COLUMNS.values():
            values = 100 * np.array([each[key] for each in seen.values()])
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}")
        cells += [difference(row, key, units, labels, groups) for key in ("few", "accuracy")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(
    row: str,
    metric: str,
    units: dict[str, dict[int, dict[str, np.ndarray]]],
    labels: np.ndarray,
    groups: dict[str, list[int]],
) -> str:
    """The paired difference of a row to its control over common seeds, or a dash."""
    from discl.stages.compare import paired

    name, _, adjusted = row.partition("+")
    control = CONTROLS.get(name, "") + ("+" + adjusted if adjusted else "")
    common = sorted(units[row].keys() & units.get(control, {}).keys())
    if not common:
        return "–"
    first, second = (
        np.stack([units[each][seed]["predicted"] for seed in common]) for each in (row, control)
    )
    found = paired(first, second, labels, metric, groups)
    if found is None:
        return "–"
    return f"{found.difference:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CIFAR-100 as Parquet")
    parser.add_argument("--work", type=Path, default=Path("build/cifar100_lt"))
    parser.add_argument("--out", type=Path, default=Path("build/gpu/data"))
    parser.add_argument("--table", type=Path, help="cifar.zip, of which the table is printed")
    arguments = parser.parse_args()
    if arguments.table:
        print(make_table(arguments.table))
        return
    if not arguments.data:
        raise SystemExit("name the folder with CIFAR-100 as Parquet: --data DIR")
    packed = pack(arguments.data, arguments.work)
    write_data(packed, arguments.out)
    for file in sorted(arguments.out.iterdir()):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
