"""How a light CLIP ranks classes before its first step, beside zero-shot CLIP.

    python -m benchmarks.light_start --cifar100 DIR --json benchmarks/results/light_start.json

Both use the texts of the classes. They differ in the place of the normalisation: before the
projection P for light tuning (LIFT, arXiv 2309.10019), after it for CLIP. Every second test image
is ranked, by the checkpoint of the CIFAR benchmarks and by the shipped one of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discl.data import ImageTable, read_tables
from discl.recipe import Train
from discl.stages.classifiers import describe_classifier, starter_of
from discl.training.image_cache import ImageCache
from discl.training.inference import predict_logits

CIFAR = Path(__file__).parent / "checkpoints" / "cifar" / "clip"
FASHION = "embedded:fashion-mnist"
FIRST = 5


def compare(checkpoint: str, table: ImageTable) -> dict[str, float]:
    """Fractions of the images: same first class, zero-shot's first among light's five, correct."""
    model = {"architecture": "clip", "checkpoint": checkpoint}
    train = Train.model_validate(
        {"image_size": 32, "model": {**model, "templates": ["a photo of a {class}."]}}
    )
    names = {name: name.replace("_", " ") for name in table.class_names}
    rows = np.arange(0, len(table), 2)
    logits = {}
    for kind in ("light", "zero-shot"):
        config = describe_classifier(train, table.class_names, names, fine_tune=kind)
        pixels = ImageCache([table], config.resize)
        logits[kind] = predict_logits(starter_of(config, train, names)(), pixels, rows, config)
    labels = torch.from_numpy(table.labels[rows])
    first = {kind: each.argmax(1) for kind, each in logits.items()}
    best = logits["light"].topk(FIRST, 1).indices
    found: dict[str, Any] = {
        "same_first": first["light"] == first["zero-shot"],
        "zero_shot_first_in_light_first_five": (best == first["zero-shot"][:, None]).any(1),
        "light_correct": first["light"] == labels,
        "zero_shot_correct": first["zero-shot"] == labels,
    }
    figures = {name: float(each.double().mean()) for name, each in found.items()}
    return {"images": len(rows), "classes": len(table.class_names), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar100", required=True, help="folder with CIFAR-100 as Parquet")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = {
        "cifar": compare(str(CIFAR), read_tables(arguments.cifar100)["test"]),
        "fashion": compare(f"{FASHION}/clip", read_tables(f"{FASHION}/data")["test"]),
    }
    for name, each in figures.items():
        print(name, ", ".join(f"{key} {value:.4g}" for key, value in each.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
