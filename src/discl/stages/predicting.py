"""Use of a trained classifier on new images."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml

from ..curriculum.metrics import softmax_rows
from ..curriculum.models import load_classifier
from ..curriculum.pixels import Pixels
from ..curriculum.training import predict_logits
from ..data.readers import IMAGE_SUFFIXES
from ..data.table import make_table
from ..errors import DataError, RunError, unknown


def find_classifier(run: Path, method: str | None = None) -> Path:
    """Folder of a method's classifier in a run folder (the recipe's last one unless one is named), or `run` itself if it is one.

    Of the folder's recipe only the order of its methods is read; nothing that it names is looked up or imported.
    """
    if (run / "model.safetensors").exists():
        return run
    found = sorted((run / "train").glob("*/model.safetensors"))
    order = _methods_of(run / "recipe.yaml")
    trained = {each.parent.name: each.parent for each in found}
    trained = {name: trained[name] for name in order if name in trained}
    if not trained:
        raise RunError(
            f"{run} holds no trained classifier; expected {run}/train/METHOD/model.safetensors. Run `discl train` first."
        )
    if method is not None and method not in trained:
        raise RunError(unknown("method", method, trained))
    return trained[method] if method is not None else list(trained.values())[-1]


def _methods_of(recipe: Path) -> list[str]:
    """Names of the methods of a run folder's recipe, which is read as text and not carried out; none where it tells none."""
    try:
        tree = yaml.safe_load(recipe.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    methods = tree.get("methods") if isinstance(tree, dict) else None
    return [str(name) for name in methods] if isinstance(methods, dict) else []


def predict(
    run: Path | str, images: Path | str, out: Path | str, method: str | None = None, device: str = "cpu",
    on_progress: Callable[[int], None] = lambda count: None,
) -> Path:  # fmt: skip
    """Writes a CSV of `image, prediction, probability` and one probability column per class, one row per image, and returns its path.

    `images` is an image file or a folder that is searched. Raises DataError where no image is found or one cannot be read.
    """
    where = Path(images)
    files = (
        [where]
        if where.is_file()
        else sorted(path for path in where.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    )
    if not files:
        raise DataError(
            f"'{where}' holds no image (none ends in {', '.join(sorted(IMAGE_SUFFIXES))})."
        )
    if not _is_there(device):
        raise RunError(f"there is no device '{device}' here; use --device cpu.")
    model, config = load_classifier(find_classifier(Path(run), method))
    names = [str(file.absolute()) for file in files]
    columns: dict[str, list] = {
        "id": names,
        "image": [{"bytes": None, "path": name} for name in names],
        "label": [0] * len(names),
    }
    folder = where if where.is_dir() else where.resolve().parent
    table = make_table(columns, config.class_names, folder.absolute())
    pixels = Pixels([table], config.resize)
    logits = predict_logits(
        model.to(device),
        pixels,
        np.arange(len(files)),
        config,
        torch.float32,
        device,
        on_progress=on_progress,
    )
    probabilities = softmax_rows(logits).numpy()
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "prediction", "probability", *config.class_names])
        for file, row in zip(files, probabilities, strict=True):
            best = int(row.argmax())
            writer.writerow(
                [
                    file,
                    config.class_names[best],
                    f"{row[best]:.6f}",
                    *(f"{value:.6f}" for value in row),
                ]
            )
    return target


def _is_there(device: str) -> bool:
    try:
        return torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):
        return False
